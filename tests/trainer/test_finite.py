"""Numbers that break in a real Trainer: step and rank are named, and the last good checkpoint stays as it is."""

import math
import os

import pytest
import torch
from helpers import LLAMA, random_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import PARTITIONED, run_ranks
from transformers import AutoModelForCausalLM

from lightning_longrope import LongRoPEModule, finite
from lightning_longrope.__main__ import main
from lightning_longrope.optimizers import Schedule
from lightning_longrope.strategies import (
    LongContextDDPStrategy,
    LongContextDeepSpeedStrategy,
    LongContextFSDP2Strategy,
)


class Breaks(LongRoPEModule):
    """Its loss or its gradients break at one step, on one rank; says so by ``BREAK``."""

    where, at, rank, value = "loss", 4, 0, math.nan

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        here = self.trainer.global_step + 1 == self.at and self.global_rank == self.rank
        if here and self.where == "gradients":
            loss.register_hook(lambda gradient: gradient * self.value)
        return loss * self.value if here and self.where == "loss" else loss


def fit(folder, module, max_steps=8, **options):
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = Trainer(
        accelerator="cpu", max_steps=max_steps, limit_val_batches=0, callbacks=[saver], default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, random_loader(rows=32), random_loader(rows=2))
    return trainer


def module(kind=Breaks, **settings):
    made = kind(config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), schedule=Schedule("constant", 0))
    vars(made).update(settings)
    return made


def broken(folder, run, **options):
    """The one line of a run that breaks."""
    with pytest.raises(ValueError, match=r"^step \d+, (all )?rank") as caught:
        fit(folder, run, **options)
    return str(caught.value)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """Weights after the three steps before the one that breaks."""
    folder = tmp_path_factory.mktemp("three")
    fit(folder, module(at=0), max_steps=3)
    return weights(folder / "last.ckpt")


@pytest.mark.parametrize("where", ["loss", "gradients"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_is_named_and_weights_in_memory_and_on_disk_stay_those_before_it(tmp_path, three_steps, where, value):
    run = module(where=where, value=value)
    said = broken(tmp_path, run)
    what = f"rank 0: the loss is {value}." if where == "loss" else "all ranks: the gradients are not finite"
    assert said.startswith(f"step 4, {what}")
    assert f"the last good checkpoint is {tmp_path / 'last.ckpt'}" in said
    assert "--trainer.gradient_clip_val 1" in said
    for name, tensor in weights(tmp_path / "last.ckpt").items():
        assert torch.equal(tensor, three_steps[name])
        assert torch.equal(tensor, run.state_dict()[name])
    assert fit(tmp_path, module(at=0), max_steps=5).global_step == 5


def test_a_trainer_that_stopped_trains_again_with_the_same_callbacks(tmp_path, caplog):
    trainer = Trainer(
        accelerator="cpu", max_steps=6, limit_val_batches=0, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="step 4, rank 0: the loss is nan"):
        trainer.fit(module(), random_loader(rows=32), random_loader(rows=2))
    before = list(trainer.callbacks)
    trainer.fit(module(at=0), random_loader(rows=32), random_loader(rows=2))
    assert trainer.global_step == 6
    assert trainer.callbacks == before
    assert "will override" not in caplog.text


@pytest.mark.parametrize("at", [4, 8])
def test_where_the_norm_is_read_a_step_later_nothing_broken_is_saved_either(tmp_path, monkeypatch, at, three_steps):
    """As on an accelerator: the weights break in memory, and the checkpoint of that very step is refused."""
    monkeypatch.setattr(finite, "reads_at_once", lambda norm: False)
    run = module(at=at)
    assert f"step {at}, rank 0: the loss is nan" in broken(tmp_path, run)
    assert not all(tensor.isfinite().all() for tensor in run.state_dict().values())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == at - 1
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def half_precision(start):
    """fp16 with a scale of the loss that starts at 2 ** ``start``, and its scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**start)
    return MixedPrecision("16-mixed", "cpu", scaler), scaler


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of steps that are left out
def test_fp16_leaves_out_steps_until_its_scale_is_right(tmp_path):
    precision, scaler = half_precision(30)
    fit(tmp_path, module(at=0), plugins=[precision], max_steps=24)
    assert 2**10 < scaler.get_scale() < 2**26  # halved several times: as many steps were left out


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_that_finds_no_scale_stops(tmp_path):
    precision, scaler = half_precision(60)
    said = broken(tmp_path, module(at=0), plugins=[precision], max_steps=30)
    assert said.startswith("step 20, all ranks: the gradients are not finite, though the losses are, for the 20th step")
    assert scaler.get_scale() == 2**41  # the 20th was not updated any more
    assert "Try --trainer.precision bf16-mixed," in said


def test_only_steps_in_a_row_are_too_many_to_be_left_out(tmp_path):
    """Whenever the scale is doubled again some are; 31 of them here, with one good step among them."""
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[half_precision(8)[0]], default_root_dir=tmp_path)
    looking, steps = finite.StopAtNan(), iter(range(99))

    def look(norm, times):
        for _ in range(times):
            looking.on_before_backward(trainer, None, torch.tensor(2.5))
            looking._look_at(trainer, next(steps), torch.tensor(norm))

    look(math.inf, 12)
    look(1.0, 1)
    look(math.inf, 19)
    with pytest.raises(ValueError, match="for the 20th step in a row"):
        look(math.inf, 1)


def test_the_last_step_of_a_run_that_saves_nothing_is_read_too(tmp_path, monkeypatch):
    """As on an accelerator, where nobody has waited for its norm."""
    monkeypatch.setattr(finite, "reads_at_once", lambda norm: False)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, limit_val_batches=0, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="step 4, rank 0: the loss is nan"):
        trainer.fit(module(at=4), random_loader(rows=32), random_loader(rows=2))


def test_a_loss_that_overflows_in_fp16_is_no_matter_of_its_scale(tmp_path):
    said = broken(tmp_path, module(value=math.inf), plugins=[half_precision(8)[0]])
    assert said.startswith("step 4, rank 0: the loss is inf.")


def test_gradients_that_explode_end_the_command_in_one_line(tmp_path, capsys):
    """A real explosion: a learning rate at which weights leave the range of float32."""
    words = ["fit", "--model.config", str(LLAMA).replace("'", ""), "--model.config.vocab_size", "300"]
    words += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e12", "--trainer.max_steps", "20"]
    words += ["--data", "lightning_longrope.datamodules.SampleTextDataModule", "--data.seq_len", "32"]
    words += ["--data.vocab_size", "300", "--data.cache_dir", str(tmp_path / "data"), "--trainer.logger", "false"]
    words += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", str(tmp_path)]
    words += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks.every_n_train_steps", "1"]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "longrope: error:" in line]
    assert "Try --trainer.gradient_clip_val 1 or a lower learning rate" in line
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "last.ckpt").values())


STRATEGIES = {
    "ddp": lambda: LongContextDDPStrategy(),
    "shared rows": lambda: LongContextDDPStrategy(sequence_parallel_size=2),
    "fsdp2": lambda: LongContextFSDP2Strategy(save_distributed_checkpoint=False),
    "zero2": lambda: LongContextDeepSpeedStrategy(stage=2),
    "zero3": lambda: LongContextDeepSpeedStrategy(stage=3, zero=PARTITIONED),
}


def on_two_ranks(folder):
    """Rank 1 breaks under every strategy; what both say."""
    for name, strategy in STRATEGIES.items():
        for where in ("loss", "gradients"):
            run = module(where=where, rank=1)
            said = broken(folder / name / where, run, strategy=strategy(), devices=2, accumulate_grad_batches=2)
            (folder / f"{name}-{where}-{os.environ['RANK']}.txt").write_text(said)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_breaks_is_named_and_all_stop_together(tmp_path):
    run_ranks(2, on_two_ranks, tmp_path, logs=tmp_path / "logs", timeout=200)
    for name in STRATEGIES:
        for where, what in (("loss", "rank 1: the loss is nan."), ("gradients", "all ranks: the gradients are not")):
            said = {(tmp_path / f"{name}-{where}-{rank}.txt").read_text() for rank in (0, 1)}
            assert len(said) == 1
            assert said.pop().startswith(f"step 4, {what}"), (name, where, said)


class Unlabelled(LongRoPEModule):
    """Ranks in ``silent`` hold no label; notes the rows that come."""

    silent: tuple[int, ...] = (1,)

    def on_train_start(self):
        self.rows = []

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def training_step(self, batch, batch_idx):
        self.rows.append(batch["input_ids"])
        if self.global_rank in self.silent:
            batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        loss = super().training_step(batch, batch_idx)
        assert loss.isfinite()
        return loss


def whole(parameter):
    """A copy of a weight, brought together from all ranks."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor().clone() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


def train_unlabelled(path, strategy, silent, decay):
    run = module(Unlabelled, silent=silent, optimizer=lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=decay))
    trainer = Trainer(
        accelerator="cpu", max_steps=2, strategy=strategy, devices=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.fit(run, random_loader(rows=8, batch_size=1))
    found = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    torch.save({**found, "rows": run.rows}, path)


def without_labels_on_two_ranks(folder):
    for name, strategy in STRATEGIES.items():
        if name != "shared rows":  # whose ranks hold the labels of a row together
            train_unlabelled(folder / f"{name}-one{os.environ['RANK']}.pt", strategy(), (1,), decay=0.0)
        train_unlabelled(folder / f"{name}-none{os.environ['RANK']}.pt", strategy(), (0, 1), decay=0.25)


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_without_labels_add_nothing_and_nobody_waits(tmp_path):
    run_ranks(2, without_labels_on_two_ranks, tmp_path, logs=tmp_path / "logs", timeout=200)
    first = module()
    first.configure_model()
    twin = AutoModelForCausalLM.from_config(first.model.config, attn_implementation="sdpa")
    twin.load_state_dict(first.model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    for tokens in torch.load(tmp_path / "ddp-one0.pt")["rows"]:
        twin(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in STRATEGIES:
        for rank in (0, 1):
            none = torch.load(tmp_path / f"{name}-none{rank}.pt")
            for key, start in first.model.named_parameters():
                decayed = start.detach() * (1 - 0.5 * 0.25) ** 2
                torch.testing.assert_close(none[key], decayed, msg=f"{name} {key}")
            if name != "shared rows":
                one = torch.load(tmp_path / f"{name}-one{rank}.pt")
                for key, expected in twin.named_parameters():
                    torch.testing.assert_close(one[key], expected.detach(), rtol=1e-4, atol=2e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("isolated", [True, False])
def test_a_row_of_nothing_but_padding_changes_nothing(attention, isolated):
    """Loss and gradients are those of the batch without that row, bit for bit but for the order of sums."""
    run = LongRoPEModule(config=LLAMA, attn_implementation=attention)
    run.configure_model()
    run.log = lambda *args, **options: None  # no trainer here
    tokens = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.zeros_like(tokens), tokens])
    batch = {"input_ids": padded, "labels": torch.cat([torch.full_like(tokens, -100), tokens])}
    alone = {"input_ids": tokens, "labels": tokens}
    if isolated:
        positions = torch.cat([torch.arange(size) for size in (4, 20)])[None]
        ends = torch.tensor([0, 4, 24], dtype=torch.int32)
        alone |= {"position_ids": positions, "cu_seq_lens": ends, "max_length": 20}
        empty = torch.arange(24)[None]
        ends = torch.tensor([0, 24, 28, 48], dtype=torch.int32)
        batch |= {"position_ids": torch.cat([empty, positions]), "cu_seq_lens": ends, "max_length": 24}
    found = []
    for one in (batch, alone):
        loss = run.training_step(one, 0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in run.model.parameters())])
        run.zero_grad()
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
