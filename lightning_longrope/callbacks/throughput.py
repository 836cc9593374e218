"""How fast training goes, how much of the devices it uses, and when it will be done.

Lightning's ``ThroughputMonitor`` waits for the device after every batch, takes all batches to be alike and knows
neither shared rows nor padding; of it we use the table of peaks. Here a step costs a few numbers on the CPU, and this
callback waits for the device when a report is due; what stands in a progress bar Lightning itself reads at every batch.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from typing_extensions import override

from lightning_longrope.estimate import GIB, ModelSize, Run, step_flops
from lightning_longrope.sizes import model_size

log = logging.getLogger(__name__)

DENSE = {"h200": 989.0, "gh200": 989.0, "h100 nvl": 835.0, "b200": 2250.0, "l40s": 362.0}
"""TFLOP/s in half types, by name: what Lightning's table lacks, has with sparsity or takes for another device."""


class Throughput(Callback):
    """Tokens per second, model FLOP utilisation, memory and hours left, in the progress bar and in every logger.

    ``LongRoPEModule`` brings this callback with it where the trainer has none. It reports after 1, 2, 4, 8, ... steps
    and whenever Lightning logs, each time of the steps since its last report.

    ``throughput/tokens_per_second`` counts the tokens of all ranks: rows that ranks share once, padding not at all.
    Searches, validations and measurements are no part of its time; reading data and saving checkpoints are.

    ``throughput/mfu`` is the share of the devices' peak that the model's own operations take: a forward pass and twice
    that for the gradients of all weights, with attention within each document where documents are isolated. What is
    computed again to save memory does not count. It is left out where the peak is not known, as that of a CPU.

    ``throughput/memory_gib`` is the most memory of any rank so far: what torch has allocated on a GPU, what is resident
    on a CPU.

    ``throughput/hours_left`` are the steps to come at the speed of the last report, with as much time for validation at
    each as they took so far; nothing that an earlier session of a resumed run did counts. It is left out where a run
    has no last step.

    Args:
        peak_tflops: Peak of one device in TFLOP/s without sparsity; where it is None, that of the device in the type of
            the run, if known.

    Raises:
        ValueError: If the peak is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"`peak_tflops` must be positive, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self._peak: float | None = None
        self._size: ModelSize | None = None
        self._began: float | None = None  # of the steps since the last report
        self._paused_at: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = self._peak_flops(trainer, pl_module)
        self._size = None if self._peak is None else _size(pl_module)
        self._first_step = self._last_step = self._reported_step = trainer.global_step
        self._began = self._paused_at = None
        self._paused_since, self._paused_before = 0.0, 0.0  # seconds, since the last report and before it
        self._lengths: list[NDArray[np.int64]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._began is None:
            self._began = perf_counter()
        if self._paused_at is not None:
            self._paused_since += perf_counter() - self._paused_at
            self._paused_at = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        between_steps = self._began is not None and self._paused_at is None
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and between_steps:
            _wait(trainer.strategy.root_device)
            self._paused_at = perf_counter()

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Leaves what is done inside out of the time of the steps."""
        if self._began is None or self._paused_at is not None:  # nothing is timed now
            yield
            return
        _wait(device)
        begin = perf_counter()
        try:
            yield
        finally:
            _wait(device)
            self._paused_since += perf_counter() - begin

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lengths.append(stretch_lengths(batch))
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if self._due(trainer):
                self._report(trainer, pl_module)

    def _due(self, trainer: Trainer) -> bool:
        steps = trainer.global_step - self._first_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return steps & (steps - 1) == 0 or (every > 0 and trainer.global_step % every == 0)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        tokens, flops, memory = self._over_ranks(trainer)
        if not tokens:
            return
        assert self._began is not None, "a batch has begun"
        now = perf_counter()
        seconds = now - self._began - self._paused_since
        steps = trainer.global_step - self._reported_step
        self._paused_before += self._paused_since
        self._reported_step, self._began, self._paused_since, self._lengths = trainer.global_step, now, 0.0, []
        found = {"tokens_per_second": tokens / seconds, "memory_gib": memory / GIB}
        if self._peak is not None and self._size is not None:
            found["mfu"] = flops / seconds / (self._peak * trainer.world_size)
        left = trainer.estimated_stepping_batches - trainer.global_step
        if left != float("inf"):
            pauses = self._paused_before / (trainer.global_step - self._first_step)
            found["hours_left"] = left * (seconds / steps + pauses) / 3600
        _show(module, found)

    def _over_ranks(self, trainer: Trainer) -> list[float]:
        """Tokens and operations of all ranks since the last report, and the memory of the one that has most."""
        device = trainer.strategy.root_device
        _wait(device)
        lengths, counts = np.unique(np.concatenate(self._lengths), return_counts=True)
        share = 1 / getattr(trainer.strategy, "sequence_parallel_size", 1)  # ranks that share rows read the same
        flops = 0.0
        if self._size is not None:
            pairs = zip(lengths.tolist(), counts.tolist(), strict=True)
            flops = sum(count * step_flops(self._size, Run(length)) for length, count in pairs)
        own = [share * float(lengths @ counts), share * flops, float(memory_bytes(device))]
        if trainer.world_size == 1:
            return own
        ranks = trainer.strategy.all_gather(torch.tensor(own, dtype=torch.float64, device=device)).view(-1, 3)
        return [*ranks[:, :2].sum(0).tolist(), ranks[:, 2].max().item()]

    def _peak_flops(self, trainer: Trainer, module: LightningModule) -> float | None:
        if self.peak_tflops is not None:
            return 1e12 * self.peak_tflops
        device, dtype = trainer.strategy.root_device, _plugin_to_compute_dtype(trainer.precision_plugin)
        if device.type != "cuda":
            return None
        weights = getattr(getattr(module, "model", None), "dtype", dtype)
        return peak_flops(device, weights if dtype == torch.float32 else dtype)


@contextmanager
def untimed(trainer: Trainer) -> Iterator[None]:
    """Leaves what is done inside out of the throughput that a trainer's callback shows, if it has one."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                stack.enter_context(callback.paused(trainer.strategy.root_device))
        yield


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of a GPU without sparsity in operations per second, None where it is not known."""
    name = torch.cuda.get_device_name(device).lower()
    known = next((tflops for part, tflops in DENSE.items() if part in name), None)
    if known is not None and dtype in (torch.bfloat16, torch.float16):
        return 1e12 * known
    return None if known is not None else get_available_flops(device, dtype)


def stretch_lengths(batch: Any) -> NDArray[np.int64]:
    """Tokens of each stretch of a batch whose tokens see each other, without padding, [K] int64.

    Our datamodules say it, under ``stretch_lengths``. Of other batches each row of ``input_ids`` is one stretch; what
    has none is not counted.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return np.zeros(0, np.int64)
    if "stretch_lengths" in batch:
        return np.asarray(batch["stretch_lengths"])
    rows, length = batch["input_ids"].shape
    return np.full(rows, length, np.int64)


def memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated by torch on a GPU, resident in this process on a CPU; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _size(module: Any) -> ModelSize | None:
    """The geometry of the model; None where it is not one we can count."""
    try:
        trusted = getattr(module, "trust_remote_code", False)
        return model_size(module.model.config, getattr(module, "lora", None), trusted)
    except Exception as error:  # a measurement must not end a run
        log.info("No model FLOP utilisation of this model: %s", error)
        return None


def _wait(device: torch.device) -> None:
    """Until what was asked of the device is done, so that the clock tells the time of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _show(module: LightningModule, found: dict[str, float]) -> None:
    names = {"tokens_per_second": "tokens/s", "memory_gib": "GiB"}
    for name, value in found.items():
        module.log(f"throughput/{name}", value, batch_size=1)
        shown = float(round(value)) if value >= 100 else value
        module.log(names.get(name, name), shown, prog_bar=True, logger=False, batch_size=1)
