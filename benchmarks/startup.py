"""Times how long commands take to begin: ``longrope --help``, and the first training step of ``longrope fit``.

Beside the step stands a script that imports the same packages (torch, Lightning with its command line, transformers),
reads the same tokenizer and does the same step by hand. The text has been tokenised before. Processes of both sides
take turns, their files are in the system's cache, and the fastest counts; seconds are of processor time of one thread,
which is what they take on a machine that does nothing else.

    python benchmarks/startup.py
    python benchmarks/startup.py --quick
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import Row, finish, parser

BATCH, LENGTH = 8, 128
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
LONGROPE = [sys.executable, "-m", "lightning_longrope"]


def configuration(folder: Path) -> Path:
    """A file for ``longrope fit`` that ends after one step."""
    off = ("enable_checkpointing", "logger", "enable_progress_bar")
    content = {
        "trainer": {
            "max_steps": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": str(folder / "run"),
            "limit_val_batches": 0, "callbacks": [{"class_path": "_first_step.FirstStep"}], **dict.fromkeys(off, False),
        },
        "model": {
            "class_path": "lightning_longrope.LongRoPEModule", "init_args": {"config": {"model_type": "llama", **SIZES}}
        },
        "data": {
            "class_path": "lightning_longrope.datamodules.SampleTextDataModule",
            "init_args": {"seq_len": LENGTH, "batch_size": BATCH, "cache_dir": str(folder / "data")},
        },
    }  # fmt: skip
    path = folder / "fit.yaml"
    path.write_text(json.dumps(content))
    return path


def ran(words: list[str]) -> str:
    """What a process prints to its error stream."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "STARTED": str(time.time())}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr[-2000:]}")
    return done.stderr


def first_step(words: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of a process until its first step is done."""
    line = next(line for line in ran(words).splitlines() if line.startswith("first step: "))
    processor, wall = map(float, line.split()[2:])
    return processor, wall


def helped() -> float:
    """Wall seconds of ``longrope --help``."""
    begin = time.perf_counter()
    ran([*LONGROPE, "--help"])
    return time.perf_counter() - begin


def main() -> int:
    """Runs the benchmark."""
    given = parser(__doc__).parse_args()
    repeats = 2 if given.quick else 5
    seconds = min(helped() for _ in range(repeats))
    rows = [Row("longrope --help (seconds)", seconds, None, "s", seconds, "<= 2")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = [*LONGROPE, "fit", "-c", str(configuration(folder))]
        ran(ours)  # which tokenises
        tokenizer = next(folder.rglob("tokenizer.json")).parent
        plain = [sys.executable, str(Path(__file__).with_name("_first_step.py")), str(tokenizer)]
        runs = [(first_step(ours), first_step(plain)) for _ in range(repeats)]
    for number, (what, goal) in enumerate((("processor", "<= 1"), ("wall", None))):
        one, other = (min(run[side][number] for run in runs) for side in range(2))
        rows.append(Row(f"first step of longrope fit, {what} time (seconds more)", one, other, "s", one - other, goal))
    return finish("startup", rows, given, ("torch", "lightning", "transformers", "jsonargparse"))


if __name__ == "__main__":
    sys.exit(main())
