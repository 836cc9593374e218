"""Times a training step of LongRoPEModule in a Trainer against Hugging Face's Trainer and a loop of plain PyTorch.

All three train the same model on the same batches with the same optimizer and precision, in one process and in turns,
in an order drawn anew for each; a step is the time from the begin of one to the begin of the next, loading of its
batch and logging included, in processor seconds of one thread, and the figure is the median over all turns. The
losses of all three must agree. What a framework adds is measured on a model so small that it does not hide it, and
held against a step of 200 ms. Gradients are clipped, as Hugging Face's Trainer does by default and the quick start
too. The C library is told to keep the memory it has: otherwise up to 13,000 page faults a step come and go with what
ran before, 10 % of its time.

Compiled layers are measured at the quick start's own size, over as many steps as it takes, compilation included.

    python benchmarks/training.py
    python benchmarks/training.py --quick
"""

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _memory import keep_freed_memory
from _results import Row, finish, lower_is_better, parser
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments

from lightning_longrope import LongRoPEModule, load_model
from lightning_longrope.layers import has_compiler
from lightning_longrope.optimizers import Schedule

CLIPPED = 1.0
STEP = 0.2  # seconds of the step that a framework's share is stated of
PRETRAINING_STEPS = 2000  # of the quick start


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        hidden: Width.
        layers: Decoder layers.
        vocabulary: Size of the vocabulary.
        rows: Rows of a batch.
        length: Tokens of a row.
        precision: As Lightning names it.
        steps: Steps of a turn.
        turns: Turns of each side.
    """

    hidden: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    precision: str = "32-true"
    steps: int = 12
    turns: int = 7

    @property
    def config(self) -> dict[str, Any]:
        """Hugging Face's."""
        return {
            "model_type": "llama", "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.hidden // 64), "num_key_value_heads": max(1, self.hidden // 64),
            "max_position_embeddings": self.length,
        }  # fmt: skip

    @property
    def name(self) -> str:
        """What the rows call it."""
        return (
            f"{self.layers} layers of {self.hidden}, {self.vocabulary} tokens, batch {self.rows} x {self.length},"
            f" {self.precision}"
        )


QUICK_START = Case(128, 4, 1024, 32, 128, "bf16-mixed", steps=12)
CASES = (replace(QUICK_START, precision="32-true"), Case(256, 4, 32_000, 2, 512, steps=6), QUICK_START)
BARE = Case(64, 1, 96, 1, 16, steps=150)


def batches(case: Case) -> list[dict[str, Tensor]]:
    """Rows of random tokens for one turn."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(case.vocabulary, (case.steps * case.rows, case.length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


@dataclass
class Turn:
    """What one side did in one turn: when each step began, and its losses."""

    begins: list[float]
    losses: list[float]

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first two, which warm up."""
        return [after - before for before, after in zip(self.begins[2:], self.begins[3:], strict=False)]


def module_of(case: Case, **options: Any) -> LongRoPEModule:
    """The module with its model, on AdamW without a schedule."""
    torch.manual_seed(0)
    module = LongRoPEModule(
        config=case.config, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        schedule=Schedule("constant", 0), **{"attn_implementation": "sdpa", **options},
    )  # fmt: skip
    module.configure_model()
    return module


def weights(case: Case) -> dict[str, Tensor]:
    """The initial weights that every side starts from."""
    return {name: tensor.clone() for name, tensor in module_of(case).model.state_dict().items()}


class Begins(Callback):
    """Notes when steps begin, and their losses."""

    def __init__(self) -> None:
        self.turn = Turn([], [])

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self.turn.begins.append(time.process_time())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:  # noqa: D102
        self.turn.losses.append(float(outputs["loss"]))


def ours(case: Case, start: dict[str, Tensor], folder: Path, **options: Any) -> Turn:
    """LongRoPEModule in Lightning's Trainer as `longrope fit` has it, with its progress bar and loggers."""
    module, noted = module_of(case, **options), Begins()
    module.model.load_state_dict(start)
    trainer = Trainer(
        accelerator="cpu", precision=case.precision, max_steps=case.steps, default_root_dir=folder, callbacks=[noted],
        enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=10, gradient_clip_val=CLIPPED,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(case), batch_size=case.rows))
    return noted.turn


class HuggingFaceBegins(TrainerCallback):
    """Notes when steps begin."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self.begins.append(time.process_time())


class Noting(HuggingFaceTrainer):
    """Notes the losses."""

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:  # noqa: D102
        loss = super().training_step(*arguments, **options)
        self.noted.append(float(loss))
        return loss


def huggingface(case: Case, start: dict[str, Tensor], folder: Path) -> Turn:
    """Hugging Face's Trainer."""
    model: Any = load_model(config=case.config, attn_implementation="sdpa").train()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    arguments = TrainingArguments(
        str(folder / "huggingface"), use_cpu=True, bf16=case.precision.startswith("bf16"), max_steps=case.steps,
        per_device_train_batch_size=case.rows, max_grad_norm=CLIPPED, save_strategy="no", report_to=[],
        logging_steps=10, train_sampling_strategy="sequential",
    )  # fmt: skip
    noted = HuggingFaceBegins()
    trainer = Noting(
        model, arguments, train_dataset=batches(case), callbacks=[noted],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )  # fmt: skip
    trainer.noted = []
    trainer.train()
    return Turn(noted.begins, trainer.noted)


def plain(case: Case, start: dict[str, Tensor], folder: Path) -> Turn:
    """A loop of PyTorch's."""
    model: Any = load_model(config=case.config, attn_implementation="sdpa").train()
    model.load_state_dict(start)
    optimizer, turn = torch.optim.AdamW(model.parameters(), lr=1e-3), Turn([], [])
    for batch in DataLoader(batches(case), batch_size=case.rows):
        turn.begins.append(time.process_time())
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision.startswith("bf16")):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        turn.losses.append(float(loss))
    return turn


def bare(case: Case, start: dict[str, Tensor], folder: Path) -> Turn:
    """The same module as ours, called by hand."""
    module, turn = module_of(case), Turn([], [])
    module.model.load_state_dict(start)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = module.optimizer(module.parameter_groups())
    for index, batch in enumerate(DataLoader(batches(case), batch_size=case.rows)):
        turn.begins.append(time.process_time())
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIPPED)
        optimizer.step()
        turn.losses.append(float(loss))
    return turn


Side = Callable[[Case, dict[str, Tensor], Path], Turn]


def in_turns(case: Case, sides: dict[str, Side], folder: Path) -> dict[str, float]:
    """Median seconds of a step of every side; their order is drawn anew for every turn, so none is always first."""
    start, turns, chance = weights(case), {name: [] for name in sides}, random.Random(0)
    for _ in range(case.turns):
        for name in chance.sample(list(sides), len(sides)):
            with quiet(folder):
                turns[name].append(sides[name](case, start, folder))
    first = next(iter(turns.values()))[0].losses
    for name, taken in turns.items():
        tolerance = 1e-3 if case.precision == "32-true" else 0.02
        if not all(abs(one - other) < tolerance for one, other in zip(first, taken[0].losses, strict=True)):
            raise SystemExit(f"{name} trains something else: losses {taken[0].losses}, not {first}")
    return {name: statistics.median(s for turn in taken for s in turn.seconds) for name, taken in turns.items()}


class quiet(redirect_stdout):  # noqa: N801 - a context, as its base
    """Sends progress bars to a file, where they cost what they cost."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "output").open("w")
        self.errors = redirect_stderr(self.file)
        super().__init__(self.file)

    def __enter__(self) -> Any:
        self.errors.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.errors.__exit__(*raised)
        self.file.close()


def steps(case: Case, folder: Path) -> Row:
    """Ours against the faster of the two others."""
    found = in_turns(case, {"ours": ours, "huggingface": huggingface, "plain": plain}, folder)
    others = {name: found[name] * 1000 for name in ("huggingface", "plain")}
    faster = min(others, key=lambda name: others[name])
    told = ", ".join(f"{name} {value:.0f} ms" for name, value in others.items())
    return lower_is_better(f"step of {case.name} ({told})", found["ours"] * 1000, others[faster], "ms", ">= 1")


def overhead(case: Case, folder: Path) -> Iterator[Row]:
    """What each framework adds to the same model called by hand, as a share of a step of 200 ms."""
    found = in_turns(case, {"ours": ours, "bare": bare, "huggingface": huggingface, "plain": plain}, folder)
    for name, side, under, goal in (
        ("Lightning", "ours", "bare", "<= 0.02"),
        ("Hugging Face's Trainer", "huggingface", "plain", None),
    ):
        added = found[side] - found[under]
        yield Row(f"what {name} adds, of a step of 200 ms (share)", added * 1e3, STEP * 1e3, "ms", added / STEP, goal)


def compiled(case: Case, folder: Path) -> Row:
    """The quick start's pretraining with eager attention in compiled layers against sdpa in plain ones."""
    torch.compiler.reset()
    begin = time.process_time()
    options = {"attn_implementation": "eager", "compile_layers": True}
    with quiet(folder):
        ours(replace(case, steps=2), weights(case), folder, **options)
    compilation = time.process_time() - begin

    def with_compiler(case: Case, start: dict[str, Tensor], folder: Path) -> Turn:
        return ours(case, start, folder, **options)

    found = in_turns(case, {"sdpa": ours, "compiled": with_compiler}, folder)
    took = [compilation + PRETRAINING_STEPS * found["compiled"], PRETRAINING_STEPS * found["sdpa"]]
    each = f"{found['compiled'] * 1e3:.0f} against {found['sdpa'] * 1e3:.0f} ms a step, {compilation:.0f} s to compile"
    return lower_is_better(f"{PRETRAINING_STEPS} steps of {case.name}, layers compiled ({each})", *took, "s", ">= 1")


def main() -> int:
    """Runs the benchmark."""
    given = parser(__doc__).parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # nothing is compiled yet
        cases = CASES[:1] if given.quick else CASES
        rows = [steps(case, folder) for case in cases]
        rows += overhead(replace(BARE, steps=100) if given.quick else BARE, folder)
        if has_compiler() and not given.quick:
            rows.append(compiled(QUICK_START, folder))
    return finish("training", rows, given, ("torch", "lightning", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
