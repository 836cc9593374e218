"""Throughput while a Trainer trains, against a clock that only the steps move."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LLAMA, RandomRows, random_loader
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from processes import run_ranks
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_longrope import LongRoPEModule
from lightning_longrope.callbacks import Measurement, MeasuringCallback, Throughput, throughput
from lightning_longrope.sizes import model_size
from lightning_longrope.strategies import LongContextDDPStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no `val_dataloader`.*", "ignore:.*exists and is not empty.*", "ignore:.*dataloader is not resumable.*"
)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Slow(LongRoPEModule):
    """Its steps take as long as they are told to."""

    def __init__(self, clock, each=2.0, **options):
        super().__init__(config={**LLAMA, **options.pop("changes", {})}, **options)
        self.clock, self.each = clock, each

    def training_step(self, batch, batch_idx):
        self.clock.now += self.each
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 500
        super().validation_step(batch, batch_idx)


class Seen(Callback):
    """What the loggers and the bar are given after each step, and a search that takes its time."""

    def __init__(self, clock=None):
        self.clock, self.found, self.bar = clock, [], []

    def on_train_start(self, trainer, pl_module):
        if self.clock is not None:
            self.clock.now += 10_000

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.found) + 1:  # what was logged in the step before is in the metrics now
            self.found.append(dict(trainer.callback_metrics))
            self.bar.append(dict(trainer.progress_bar_metrics))

    def values(self, name):
        return [float(found[f"throughput/{name}"]) for found in self.found[1:]]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", clock)
    return clock


def loaders(rows=64, val=2):
    return {"train_dataloaders": random_loader(rows), "val_dataloaders": random_loader(val)}


def test_tokens_hours_and_memory_of_a_run_with_pauses(clock, tmp_path):
    seen = Seen(clock)
    trainer = Trainer(
        max_steps=10, accumulate_grad_batches=2, val_check_interval=4, log_every_n_steps=2, callbacks=[seen],
        default_root_dir=tmp_path, enable_checkpointing=False, **{**QUIET, "logger": CSVLogger(tmp_path)},
    )  # fmt: skip
    trainer.fit(Slow(clock), **loaders())
    assert seen.values("tokens_per_second") == [2 * 2 * 24 / (2 * 2.0)] * 9  # a step: two batches of two rows of 24
    assert [bar["tokens/s"] for bar in seen.bar[1:]] == [24] * 9
    assert not any("mfu" in name for found in seen.found for name in found)  # nobody knows the peak of a CPU
    left = seen.values("hours_left")
    assert left[0] == pytest.approx(9 * 4 / 3600)  # after the first step; the search before it is over
    assert left[3] == pytest.approx(6 * (4 + 500 / 4) / 3600)  # one validation so far, in four steps
    assert 0.05 < seen.values("memory_gib")[-1] < 20
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/tokens_per_second"]]
    assert {float(row["throughput/tokens_per_second"]) for row in rows} == {24.0}
    assert len(rows) >= 5


class Measures(MeasuringCallback):
    """Takes its time."""

    def __init__(self, clock, **when):
        super().__init__((8,), **when)
        self.clock, self.times = clock, 0

    def connect(self, trainer):
        self._resolved = self.lengths

    def prepare(self, datamodule, lengths):
        raise AssertionError("nothing to prepare")

    def measure_length(self, trainer, module, length):
        self.clock.now += 300
        self.times += 1
        return [Measurement("found", length, None, 1.0, 1.0, 1.0, n=1)]


def test_measurements_between_steps_are_no_part_of_the_time(clock, tmp_path):
    seen = Seen(clock)
    between, behind = Measures(clock, every_n_steps=3), Measures(clock, every_n_epochs=1)
    trainer = Trainer(
        max_steps=12, log_every_n_steps=1, callbacks=[seen, between, behind], default_root_dir=tmp_path,
        enable_checkpointing=False, limit_val_batches=0, **QUIET,
    )  # fmt: skip
    trainer.fit(Slow(clock), train_dataloaders=random_loader(8))
    assert (between.times, behind.times) == (4, 3)
    assert seen.values("tokens_per_second") == [2 * 24 / 2.0] * 11


def test_hours_left_after_resuming_are_at_the_speed_of_now(clock, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=4)
    options = {"default_root_dir": tmp_path, "max_steps": 10, **QUIET}
    Trainer(callbacks=[saving], **{**options, "max_steps": 4}).fit(Slow(clock, each=100), **loaders())
    seen = Seen()
    again = Trainer(callbacks=[seen, saving], **options)
    seen.found = [None] * 4
    again.fit(Slow(clock, each=3), ckpt_path=tmp_path / "cut.ckpt", weights_only=False, **loaders())
    first = seen.found[5]["throughput/hours_left"]  # as it was after step 5
    assert float(first) == pytest.approx(5 * 3 / 3600)


class Stretches(RandomRows):
    """Rows that say they hold stretches of so many tokens."""

    lengths = (8, 5)

    def __getitem__(self, index):
        return {**super().__getitem__(index), "stretch_lengths": np.array(self.lengths)}


def stretches_loader(*lengths, batch_size=2):
    data = Stretches(32, 24)
    data.lengths = lengths

    def collate(items):
        joined = np.concatenate([item.pop("stretch_lengths") for item in items])
        return {**torch.utils.data.default_collate(items), "stretch_lengths": joined}

    return DataLoader(data, batch_size=batch_size, collate_fn=collate)


def test_utilisation_counts_documents_and_no_padding(clock, tmp_path):
    seen = Seen()
    trainer = Trainer(max_steps=3, callbacks=[seen, Throughput(1e-6)], enable_checkpointing=False, **QUIET)
    trainer.fit(Slow(clock, gradient_checkpointing=True), stretches_loader(8, 5))
    assert seen.values("tokens_per_second") == [2 * 13 / 2.0] * 2
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64  # of which a token multiplies every weight once
    row = 2 * 13 * (2 * layer + 96 * 64) + sum(2 * size**2 * 4 * 16 * 2 for size in (8, 5))
    assert seen.values("mfu") == pytest.approx([3 * 2 * row / 2.0 / 1e6] * 2, rel=1e-6)


@pytest.mark.parametrize(("lengths", "flops"), [([131_072], 6.2e15), ([4096] * 3, 3 * 5.9e13), ([262_144], 2.15e16)])
def test_utilisation_of_llama_2_7b_is_the_arithmetic_of_its_published_cost(clock, monkeypatch, lengths, flops):
    llama = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    monkeypatch.setattr(throughput, "model_size", lambda *_: model_size(llama))
    seen = Seen()
    trainer = Trainer(max_steps=2, callbacks=[seen, Throughput(989)], enable_checkpointing=False, **QUIET)
    trainer.fit(Slow(clock, each=60), stretches_loader(*lengths, batch_size=1))
    assert seen.values("mfu") == pytest.approx([3 * flops / 60 / 989e12], rel=0.01)


def test_frozen_weights_need_no_gradient(clock, monkeypatch):
    from lightning_longrope.lora import LoRA

    seen = Seen()
    trainer = Trainer(max_steps=2, callbacks=[seen, Throughput(1e-6)], enable_checkpointing=False, **QUIET)
    trainer.fit(Slow(clock, lora=LoRA(rank=4, train_embeddings=False, train_norms=False)), stretches_loader(24))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    full = 3 * 2 * (2 * 24 * (2 * layer + 96 * 64) + 2 * 24**2 * 4 * 16 * 2) / 2.0 / 1e6
    assert 0.6 * full < seen.values("mfu")[0] < 0.85 * full


def test_a_run_without_an_end_and_batches_of_another_kind(clock, tmp_path):
    class Endless(Slow):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    class Pairs(Endless):
        def training_step(self, batch, batch_idx):
            return super().training_step({"input_ids": batch[0], "labels": batch[0]}, batch_idx)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    seen = Seen()
    options = {"max_steps": -1, "max_epochs": -1, "enable_checkpointing": False, **QUIET}
    Trainer(callbacks=[seen, Stop()], **options).fit(Endless(clock), random_loader())
    assert seen.values("tokens_per_second") == [24.0] * (len(seen.found) - 1)
    assert "throughput/hours_left" not in seen.found[-1]
    other = Seen()
    rows = torch.randint(96, (8, 24))
    Trainer(callbacks=[other, Stop()], **options).fit(Pairs(clock), DataLoader(torch.utils.data.TensorDataset(rows)))
    assert len(other.found) == 3
    assert not any("throughput" in name for name in other.found[-1])


def test_one_given_by_the_user_stays(clock):
    trainer = Trainer(max_steps=1, callbacks=[mine := Throughput(5.0)], enable_checkpointing=False, **QUIET)
    trainer.fit(Slow(clock), random_loader())
    assert [callback for callback in trainer.callbacks if isinstance(callback, Throughput)] == [mine]
    with pytest.raises(ValueError, match="`peak_tflops` must be positive, got 0"):
        Throughput(0)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835e12),
        ("NVIDIA L40S", torch.float16, 362e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H200", torch.float64, None),
    ],
)
def test_peaks_are_those_without_sparsity(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    assert throughput.peak_flops(torch.device("cuda"), dtype) == peak


def test_memory_is_that_of_the_rank_that_has_most(monkeypatch):
    monkeypatch.setattr(throughput, "memory_bytes", lambda device: 5)
    others = torch.tensor([[30.0, 0.0, 9.0], [20.0, 0.0, 4.0]])
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), all_gather=lambda own: torch.cat([own.float()[None], others])
    )
    callback = Throughput()
    callback._lengths = [np.array([8, 2])]
    assert callback._over_ranks(SimpleNamespace(strategy=strategy, world_size=3)) == [60, 0, 9]


@pytest.mark.parametrize(
    ("plugin", "weights", "dtype"),
    [
        (HalfPrecision("bf16-true"), torch.bfloat16, torch.bfloat16),
        (Precision(), torch.bfloat16, torch.bfloat16),  # 32-true, whose weights are a half type all the same
        (Precision(), torch.float32, torch.float32),
        (MixedPrecision("bf16-mixed", "cpu"), torch.float32, torch.bfloat16),
        (MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), torch.float32, torch.float16),
    ],
)
def test_the_peak_is_that_of_the_type_in_which_products_are_computed(plugin, weights, dtype, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: dtype)
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=plugin)
    module = SimpleNamespace(model=SimpleNamespace(dtype=weights))
    assert Throughput()._peak_flops(trainer, module) == dtype


class Shards(LightningDataModule):
    """As many different rows for each rank, or each group of ranks that share them, as the strategy says."""

    def train_dataloader(self):
        kwargs = self.trainer.distributed_sampler_kwargs
        sampler = torch.utils.data.DistributedSampler(RandomRows(32, 24), shuffle=False, **kwargs)
        return DataLoader(RandomRows(32, 24), batch_size=2, sampler=sampler)


def two_ranks(folder):
    for size in (1, 2):
        clock, seen = Clock(), Seen()
        throughput.perf_counter = clock
        trainer = Trainer(
            max_steps=3, devices=2, callbacks=[seen, Throughput(1e-6)], enable_checkpointing=False,
            strategy=LongContextDDPStrategy(sequence_parallel_size=size), use_distributed_sampler=False, **QUIET,
        )  # fmt: skip
        trainer.fit(Slow(clock), Shards())
        names = ("tokens_per_second", "mfu")
        if trainer.is_global_zero:
            (folder / f"{size}.json").write_text(json.dumps({name: seen.values(name) for name in names}))


@pytest.mark.distributed
def test_ranks_are_summed_and_shared_rows_count_once(tmp_path):
    run_ranks(2, two_ranks, tmp_path, logs=tmp_path / "logs")
    apart, shared = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2))
    assert apart["tokens_per_second"] == [2 * 2 * 24 / 2.0] * 2
    assert shared["tokens_per_second"] == [2 * 24 / 2.0] * 2
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    row = 3 * (2 * 24 * (2 * layer + 96 * 64) + 2 * 24**2 * 4 * 16 * 2)
    assert apart["mfu"] == pytest.approx([2 * row / 2.0 / 1e6] * 2, rel=1e-6)  # four rows on two devices
    assert shared["mfu"] == pytest.approx([row / 2.0 / 1e6] * 2, rel=1e-6)
