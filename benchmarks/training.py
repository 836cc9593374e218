"""Times a training step of LongRoPEModule in a Trainer against Hugging Face's Trainer and a loop of plain PyTorch.

All three train the same model on the same batches with the same optimizer and precision. They run side by side in one
process, one step of each in turn, in an order drawn anew for every step: what the machine does besides slows the same
step of all, where whole runs one after another came out 445 to 754 ms a step for the same work. A step is the time from
the begin of one to the begin of the next, loading of its batch and logging included, in processor seconds of one
thread. Times are medians, and a ratio is the median over the ratios of single steps. The losses of all three must
agree. What a framework adds is measured on a model so small that it does not hide it, and held against a step of
200 ms. Gradients are clipped, as Hugging Face's Trainer does by default and the quick start too. The C library is told
to keep the memory it has: otherwise up to 13,000 page faults a step come and go with what ran before, 10 % of its time.

Compiled layers are measured at the quick start's own size, over as many steps as it takes, compilation included.

    python benchmarks/training.py
    python benchmarks/training.py --quick
"""

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
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
STEP = 200.0  # milliseconds of the step that a framework's share is stated of
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
        steps: Steps of each side.
    """

    hidden: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    precision: str = "32-true"
    steps: int = 150

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


QUICK_START = Case(128, 4, 1024, 32, 128, "bf16-mixed")
CASES = (replace(QUICK_START, precision="32-true"), Case(256, 4, 32_000, 2, 512, steps=40), QUICK_START)
BARE = Case(64, 1, 96, 1, 16, steps=600)
WARM_UP = 3  # steps that do not count
COMPARED = 12  # losses, before roundings have grown


def batches(case: Case) -> list[dict[str, Tensor]]:
    """Rows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(case.vocabulary, (case.steps * case.rows, case.length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


Run = Callable[[Case, dict[str, Tensor], Path, "Side"], None]


class Side:
    """A loop in a thread of its own that takes one step at a time.

    Args:
        run: Trains; calls ``begin_step`` before each step.
        arguments: Its case, its initial weights and a folder.

    Attributes:
        seconds: Of each step, processor time.
        losses: Of each step.
    """

    def __init__(self, run: Run, *arguments: Any) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._failed: BaseException | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._whole, args=(run, *arguments), daemon=True).start()
        self._until_it_waits()

    def begin_step(self) -> None:
        """Called by the loop at the begin of each step: the step before has ended, and others take theirs."""
        self._waits.release()
        self._go.acquire()

    def step(self) -> None:
        """Has the loop take one step."""
        before = time.process_time()
        self._go.release()
        self._until_it_waits()
        self.seconds.append(time.process_time() - before)

    def _whole(self, run: Run, *arguments: Any) -> None:
        try:
            run(*arguments, self)
        except BaseException as error:
            self._failed = error
        self._waits.release()

    def _until_it_waits(self) -> None:
        self._waits.acquire()
        if self._failed is not None:
            raise self._failed


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

    def __init__(self, side: Side) -> None:
        self.side = side

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self.side.begin_step()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:  # noqa: D102
        self.side.losses.append(float(outputs["loss"]))


def ours(
    case: Case, start: dict[str, Tensor], folder: Path, side: Side, progress_bar: bool = True, **options: Any
) -> None:
    """LongRoPEModule in Lightning's Trainer as `longrope fit` has it, with its progress bar and loggers."""
    module = module_of(case, **options)
    module.model.load_state_dict(start)
    trainer = Trainer(
        accelerator="cpu", precision=case.precision, max_steps=case.steps, default_root_dir=folder,
        callbacks=[Begins(side)], enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=10,
        gradient_clip_val=CLIPPED, enable_progress_bar=progress_bar,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(case), batch_size=case.rows))


class HuggingFaceBegins(TrainerCallback):
    """Notes when steps begin."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self.side.begin_step()


class Noting(HuggingFaceTrainer):
    """Notes the losses."""

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:  # noqa: D102
        loss = super().training_step(*arguments, **options)
        self.losses.append(float(loss))
        return loss


def huggingface(case: Case, start: dict[str, Tensor], folder: Path, side: Side) -> None:
    """Hugging Face's Trainer."""
    model: Any = load_model(config=case.config, attn_implementation="sdpa").train()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    arguments = TrainingArguments(
        str(folder / "huggingface"), use_cpu=True, bf16=case.precision.startswith("bf16"), max_steps=case.steps,
        per_device_train_batch_size=case.rows, max_grad_norm=CLIPPED, save_strategy="no", report_to=[],
        logging_steps=10, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Noting(
        model, arguments, train_dataset=batches(case), callbacks=[HuggingFaceBegins(side)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )  # fmt: skip
    trainer.losses = side.losses
    trainer.train()


def plain(case: Case, start: dict[str, Tensor], folder: Path, side: Side) -> None:
    """A loop of PyTorch's."""
    model: Any = load_model(config=case.config, attn_implementation="sdpa").train()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in DataLoader(batches(case), batch_size=case.rows):
        side.begin_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision.startswith("bf16")):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        side.losses.append(float(loss))


def bare(case: Case, start: dict[str, Tensor], folder: Path, side: Side) -> None:
    """The same module as ours, called by hand."""
    module = module_of(case)
    module.model.load_state_dict(start)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = module.optimizer(module.parameter_groups())
    for index, batch in enumerate(DataLoader(batches(case), batch_size=case.rows)):
        side.begin_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision.startswith("bf16")):
            loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIPPED)
        optimizer.step()
        side.losses.append(float(loss))


def side_by_side(case: Case, runs: dict[str, Run], folder: Path) -> dict[str, list[float]]:
    """Milliseconds of the steps of each side; what is at one place of the lists ran one after another."""
    with quiet(folder):
        start, chance = weights(case), random.Random(0)
        sides = {name: Side(run, case, start, folder) for name, run in runs.items()}
        for _ in range(case.steps):
            for name in chance.sample(list(sides), len(sides)):
                sides[name].step()
    first = next(iter(sides.values())).losses[:COMPARED]
    tolerance = 1e-3 if case.precision == "32-true" else 0.02
    for name, side in sides.items():
        losses = side.losses[:COMPARED]
        if not all(abs(one - other) < tolerance for one, other in zip(first, losses, strict=True)):
            raise SystemExit(f"{name} trains something else: losses {losses}, not {first}")
    return {name: [s * 1e3 for s in side.seconds[WARM_UP:-1]] for name, side in sides.items()}


def ratio_of(these: list[float], those: list[float]) -> float:
    """Median of how many times as long each of these steps took as its neighbour among those."""
    return statistics.median(one / other for one, other in zip(these, those, strict=True))


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
    found = side_by_side(case, {"ours": ours, "huggingface": huggingface, "plain": plain}, folder)
    took = {name: statistics.median(seconds) for name, seconds in found.items()}
    faster = min(("huggingface", "plain"), key=lambda name: took[name])
    told = ", ".join(f"{name} {took[name]:.0f} ms" for name in ("huggingface", "plain"))
    ratio = ratio_of(found[faster], found["ours"])
    return Row(f"step of {case.name} ({told})", took["ours"], took[faster], "ms", ratio, ">= 1")


def overhead(case: Case, folder: Path) -> Iterator[Row]:
    """What each framework adds to the same model called by hand, as a share of a step of 200 ms."""
    found = side_by_side(case, {"ours": ours, "bare": bare, "huggingface": huggingface, "plain": plain}, folder)
    for name, side, under, goal in (
        ("Lightning", "ours", "bare", "<= 0.02"),
        ("Hugging Face's Trainer", "huggingface", "plain", None),
    ):
        added = statistics.median(one - other for one, other in zip(found[side], found[under], strict=True))
        yield Row(f"what {name} adds, of a step of 200 ms (share)", added, STEP, "ms", added / STEP, goal)


def compiled(case: Case, folder: Path) -> Row:
    """The quick start's pretraining with eager attention in compiled layers against sdpa in plain ones.

    Without progress bars, of which a terminal has one at a time.
    """
    torch.compiler.reset()
    without_compiler = partial(ours, progress_bar=False)
    with_compiler = partial(without_compiler, attn_implementation="eager", compile_layers=True)

    begin = time.process_time()
    side_by_side(replace(case, steps=2), {"compiled": with_compiler}, folder)
    compilation = time.process_time() - begin
    found = side_by_side(case, {"sdpa": without_compiler, "compiled": with_compiler}, folder)
    each = {name: statistics.median(milliseconds) / 1e3 for name, milliseconds in found.items()}
    took = [compilation + PRETRAINING_STEPS * each["compiled"], PRETRAINING_STEPS * each["sdpa"]]
    told = f"{each['compiled'] * 1e3:.0f} against {each['sdpa'] * 1e3:.0f} ms a step, {compilation:.0f} s to compile"
    return lower_is_better(f"{PRETRAINING_STEPS} steps of {case.name}, layers compiled ({told})", *took, "s", ">= 1")


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
        rows += overhead(replace(BARE, steps=200) if given.quick else BARE, folder)
        if has_compiler() and not given.quick:
            rows.append(compiled(QUICK_START, folder))
    return finish("training", rows, given, ("torch", "lightning", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
