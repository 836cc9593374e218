"""Training, evaluation and search by the command line, over and over in one process: does anything pile up?

    make soak MINUTES=30

Every round trains a small model and saves it, resumes it, searches factors, measures, and removes what it wrote. What
the process holds is noted every few seconds and at the end of each round. Runs add up: samples are appended to
``benchmarks/results/soak.jsonl`` with their commit. The verdict is over all runs of the commit that is here;
``--minutes 0`` judges whatever has been kept.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from _results import RESULTS, commit

COUNTS = ("handles", "threads", "children", "temporary")
MIB_PER_HOUR = 32.0
"""Growth that a verdict lets pass: after a day, a run holds less than 1 GiB more."""
WARM_UP = 4
"""Rounds of a run that are not judged: imports, caches of kernels and of the allocator."""

MODEL = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip


def holds(temporary: Path) -> dict[str, Any]:
    """What this process holds at the moment: MiB, and how many handles, threads, child processes, temporary files."""
    memory = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    tasks = list(Path("/proc/self/task").iterdir())
    return {
        "resident": int(memory["Rss"].split()[0]) / 1024,
        "anonymous": int(memory["Anonymous"].split()[0]) / 1024,
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(tasks),
        "children": sum(len(_text(task / "children").split()) for task in tasks),
        "temporary": sum(1 for _ in temporary.rglob("*")),
    }


def _text(path: Path) -> str:
    """Content of a file of a thread, which may have ended meanwhile."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


class Watch:
    """Notes what the process holds, every ``seconds`` and where ``note`` is called, as lines of a file."""

    def __init__(self, file: Path, temporary: Path, seconds: float = 5.0, **constant: Any) -> None:
        self.file, self.temporary, self.seconds, self.constant = file, temporary, seconds, constant
        self.begun, self.round, self._end = time.monotonic(), 0, threading.Event()
        self._one_at_a_time = threading.Lock()  # a note sees no file that another has open
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self.seconds):
            self.note("during")

    def note(self, moment: str) -> None:
        with self._one_at_a_time:
            now = {"seconds": round(time.monotonic() - self.begun, 1), "round": self.round, "moment": moment}
            line = json.dumps({**self.constant, **now, **holds(self.temporary)})
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def commands(home: Path, data: Path, steps: int) -> Iterator[list[str]]:
    """Words of the commands of a round, all of whose files are in ``home`` but for the tokens, in ``data``."""
    saver = {"dirpath": str(home), "save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "default_root_dir": str(home), "limit_val_batches": 1}
    text = {"seq_len": 64, "batch_size": 4, "vocab_size": 300, "cache_dir": str(data), "passkey_share": 0.0}
    loader = {"class_path": "lightning_longrope.datamodules.SampleTextDataModule", "init_args": text}
    new, last = {"config": MODEL}, {"name_or_path": str(home / "last.ckpt")}
    longer = {"target_length": 128, "max_evaluations": 4, "documents": 4, "held_out": 2}
    lengths = {"lengths": [64, 128], "documents": 4}

    def words(command: str, model: dict[str, Any], callback: str, settings: dict[str, Any], **more: Any) -> list[str]:
        trainer = {**quiet, **more, "callbacks": [{"class_path": callback, "init_args": settings}]}
        if command == "fit":
            trainer["max_epochs"] = -1
        path = home / f"{command}-{more.get('max_steps', 0)}.yaml"
        config = {"seed_everything": 0, "trainer": trainer, "data": loader}
        config["model"] = {"class_path": "lightning_longrope.LongRoPEModule", "init_args": model}
        path.write_text(json.dumps(config), encoding="utf-8")
        return [command, "-c", str(path)]

    ours = "lightning_longrope.callbacks."
    yield words("fit", new, "ModelCheckpoint", saver, max_steps=steps)
    yield [*words("fit", new, "ModelCheckpoint", saver, max_steps=2 * steps), "--ckpt_path", str(home / "last.ckpt")]
    yield words("search", last, f"{ours}FactorSearch", longer)
    yield words("eval", last, f"{ours}PerplexityByLength", lengths)


def one_round(home: Path, data: Path, steps: int = 4) -> None:
    """Runs a round and removes its files; what it prints is kept back unless it fails."""
    from lightning_longrope.__main__ import main

    home.mkdir()
    for words in commands(home, data, steps):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(words)
        if code:
            raise RuntimeError(f"longrope {' '.join(words)} ended with {code}:\n{said.getvalue()[-3000:]}")
    for path in sorted(home.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    home.rmdir()


def soak(file: Path, minutes: float, most_rounds: int = 10**9, **constant: Any) -> list[dict[str, Any]]:
    """Rounds until the time is up.

    Args:
        file: Takes the samples, after those that are there.
        minutes: Time after which no round is begun.
        most_rounds: Rounds after which it ends in any case.
        constant: What every sample says besides, such as the commit.

    Returns:
        The samples of this run.
    """
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name, _temporary_files_in(Path(name) / "temporary") as temporary:
        constant |= {"run": f"{time.time():.0f}-{os.getpid()}"}
        with Watch(file, temporary, **constant) as watch:
            while time.monotonic() < end and watch.round < most_rounds:
                watch.round += 1
                one_round(Path(name) / "round", Path(name) / "data")
                gc.collect()
                watch.note("end")
    return [sample for sample in read(file) if sample["run"] == constant["run"]]


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    earlier, os.environ["TMPDIR"], tempfile.tempdir = os.environ.get("TMPDIR"), str(folder), None
    try:
        yield folder
    finally:
        os.environ.pop("TMPDIR")
        os.environ |= {"TMPDIR": earlier} if earlier else {}
        tempfile.tempdir = None


def read(file: Path) -> list[dict[str, Any]]:
    """Samples of all runs, in order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def judged(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Ends of the rounds of each run after those that warm it up."""
    ends = [sample for sample in samples if sample["moment"] == "end" and sample["round"] > WARM_UP]
    return [[sample for sample in ends if sample["run"] == run] for run in dict.fromkeys(s["run"] for s in ends)]


def growth(runs: list[list[dict[str, Any]]], name: str) -> float:
    """MiB an hour, the median slope between any two rounds of the same run (Theil and Sen)."""
    pairs = [pair for run in runs for pair in combinations(run, 2)]
    slopes = [3600 * (later[name] - sooner[name]) / (later["seconds"] - sooner["seconds"]) for sooner, later in pairs]
    return median(slopes)


def complaints(samples: list[dict[str, Any]]) -> list[str]:
    """What piles up: memory faster than ``MIB_PER_HOUR``, or more of anything at the end of a run than at its start."""
    runs = judged(samples)
    if not any(len(run) > 1 for run in runs):
        return [f"too short to judge: no run has more than {WARM_UP + 1} rounds"]
    found = [
        f"{name} memory grows by {slope:.1f} MiB an hour, more than {MIB_PER_HOUR:g}"
        for name in ("anonymous", "resident")
        if (slope := growth(runs, name)) > MIB_PER_HOUR
    ]
    for run in runs:
        third = max(len(run) // 3, 1)
        for name in COUNTS:
            first, last = (max(sample[name] for sample in part) for part in (run[:third], run[-third:]))
            if last > first:
                found.append(f"{name}: {first} at the start of run {run[0]['run']}, {last} at its end")
    return found


def summary(samples: list[dict[str, Any]]) -> str:
    """One line: how long, how many rounds, and how it grew if there are enough of them."""
    runs = judged(samples)
    minutes = sum(max(s["seconds"] for s in samples if s["run"] == run) for run in {s["run"] for s in samples}) / 60
    rounds = sum(sample["moment"] == "end" for sample in samples)
    if not any(len(run) > 1 for run in runs):
        return f"{minutes:.0f} minutes, {rounds} rounds"
    slopes = ", ".join(f"{name} memory {growth(runs, name):+.1f} MiB an hour" for name in ("anonymous", "resident"))
    ends = runs[-1][-1]
    return f"{minutes:.0f} minutes, {rounds} rounds: {slopes}; " + ", ".join(f"{ends[name]} {name}" for name in COUNTS)


def draw(samples: list[dict[str, Any]], path: Path) -> None:
    """Memory and counts over the hours of all runs, one after another."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    shift = 0.0
    for number, run in enumerate(dict.fromkeys(sample["run"] for sample in samples)):
        mine = [sample for sample in samples if sample["run"] == run]
        ends = [sample for sample in mine if sample["moment"] == "end"]
        if number:
            for axis in axes:
                axis.axvline(shift / 60, color="0.6", linewidth=1)
        for axis, names in zip(axes, (("anonymous",), ("handles", "threads"), ("children", "temporary")), strict=True):
            for color, name in enumerate(names):
                for part, style in (
                    (mine, {"alpha": 0.35, "linewidth": 0.8}),
                    (ends, {"marker": ".", "markersize": 3}),
                ):
                    label = name if part is ends and not number else None
                    times = [(shift + sample["seconds"]) / 60 for sample in part]
                    axis.plot(times, [sample[name] for sample in part], color=f"C{color}", label=label, **style)
        shift += max(sample["seconds"] for sample in mine)
    axes[0].set_ylabel("anonymous memory, MiB")
    axes[1].set_ylabel("count")
    axes[2].set_ylabel("count")
    axes[2].set_xlabel("minutes; dots: after a round")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Returns 1 if anything piles up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="time of this run; 0 judges and draws what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of soak.jsonl and soak.png")
    given = parser.parse_args()
    os.nice(10)
    file = given.results / "soak.jsonl"
    if given.minutes:
        soak(file, given.minutes, commit=commit())
    samples = read(file)
    draw(samples, given.results / "soak.png")
    if given.minutes:
        samples = [sample for sample in samples if sample["commit"] == commit()]
    found = complaints(samples)
    sys.stdout.write("\n".join([summary(samples), *found, "piles up" if found else "flat"]) + "\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
