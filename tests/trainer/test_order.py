"""Which rows a run sees: through the command line, killed by SIGKILL, on other numbers of ranks, in real processes."""

import json
import os
import signal

import pytest
import torch
from helpers import LLAMA
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import run_ranks, start_ranks
from row_recorder import RowRecorder, recorded

from lightning_longrope import LongRoPEModule, RescaleFactors
from lightning_longrope.__main__ import main
from lightning_longrope.datamodules import PackedTextDataModule
from lightning_longrope.datamodules.sample_text import train_tokenizer
from lightning_longrope.strategies import LongContextDeepSpeedStrategy, LongContextFSDP2Strategy

pytestmark = pytest.mark.distributed

SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 16, "target_length": 48}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with a text, its tokenizer and factors."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"story {number}: " + "the grass is green " * (1 + 3 * (number % 5)) for number in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300).save_pretrained(folder / "tokenizer")
    RescaleFactors.linear(**SHAPE).save(folder / "factors.json")
    return folder


def config(corpus, folder, packing, steps, devices=1, batch_size=2, kill_at=None):
    """Configuration of a run that writes a checkpoint every second step."""
    saver = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver},
        {"class_path": "row_recorder.RowRecorder", "init_args": {"folder": str(folder / "rows"), "kill_at": kill_at}},
    ]
    text = {"train_files": [str(corpus / "text.jsonl")], "tokenizer": str(corpus / "tokenizer"), "cache_dir": None}
    data = {**text, "seq_len": 48, "batch_size": batch_size, "packing": packing, "short_seq_len": 16}
    model = {"config": {**LLAMA, "vocab_size": 300}, "factors": str(corpus / "factors.json")}
    model["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    trainer = {**QUIET, "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer |= {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "callbacks": callbacks}
    trainer["default_root_dir"] = str(folder)
    return {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {"class_path": "lightning_longrope.LongRoPEModule", "init_args": model},
        "data": {"class_path": "lightning_longrope.datamodules.PackedTextDataModule", "init_args": data},
    }


def command(folder, settings, resume=False):
    """Words of a command line."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    words = ["fit", "-c", str(path)]
    return [*words, "--ckpt_path", str(folder / "last.ckpt")] if resume else words


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


OTHERS = [pytest.param(packing, marks=pytest.mark.slow) for packing in ("concat", "document", "best_fit")]


@pytest.mark.parametrize("packing", [*OTHERS, "mixed"])
def test_a_killed_run_goes_on_with_the_very_rows_and_ends_with_the_very_weights(tmp_path, corpus, packing):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ranks(1, main, command(whole, config(corpus, whole, packing, 18)), logs=tmp_path)
    (killed,) = start_ranks(
        1, main, command(cut, config(corpus, cut, packing, 18, kill_at=13)), logs=tmp_path / "killed"
    )
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "killed" / "rank0.log").read_text()[-3000:]
    run_ranks(1, main, command(cut, config(corpus, cut, packing, 18), resume=True), logs=tmp_path)
    assert recorded(cut / "rows") == recorded(whole / "rows")  # steps 12 and 13 were run twice, on the same rows
    assert len(recorded(whole / "rows")) == 18
    assert torch.load(whole / "last.ckpt", weights_only=True)["epoch"] > 0  # across the border of epochs
    assert {short for short, _ in recorded(whole / "rows").values()} == (
        {False, True} if packing == "mixed" else {None}
    )
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(cut)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "mixed"])
def test_from_two_ranks_to_one_and_back_no_row_is_lost_or_doubled(tmp_path, corpus, packing):
    """The batch over all ranks stays the same, and so must every step, whichever rank holds how many labels."""
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    settings = config(corpus, whole, packing, 12, devices=2, batch_size=1)
    run_ranks(2, main, command(whole, settings), logs=tmp_path)
    seen = {}
    for steps, devices in (
        (4, 2),
        (6, 1),
        (12, 2),
    ):  # one rank reads a last row that two leave out: no epoch ends there
        settings = config(corpus, changed, packing, steps, devices=devices, batch_size=2 // devices)
        run_ranks(devices, main, command(changed, settings, resume=steps > 4), logs=tmp_path)
        seen |= recorded(changed / "rows")
        for path in (changed / "rows").iterdir():
            path.unlink()
    assert seen == recorded(whole / "rows")
    assert len(seen) == 12
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(changed)[name], rtol=1e-4, atol=1e-6, msg=name)


class Groups(DDPStrategy):
    """Ranks 2 k and 2 k + 1 share their samples, as the ranks of a sequence-parallel group do."""

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.world_size // 2, "rank": self.global_rank // 2}


def fit_in_groups(corpus, folder):
    data = PackedTextDataModule(
        [str(corpus / "text.jsonl")],
        tokenizer=str(corpus / "tokenizer"),
        seq_len=48,
        cache_dir=None,
        packing="best_fit",
    )
    trainer = Trainer(
        **QUIET, strategy=Groups(), devices=2, max_steps=6, enable_checkpointing=False, limit_val_batches=0,
        use_distributed_sampler=False, callbacks=[RowRecorder(str(folder))],
    )  # fmt: skip
    trainer.fit(LongRoPEModule(config={**LLAMA, "vocab_size": 300}), datamodule=data)


def test_ranks_of_a_sequence_parallel_group_see_the_same_rows(tmp_path, corpus):
    run_ranks(2, fit_in_groups, corpus, tmp_path / "rows", logs=tmp_path)
    first, second = ((tmp_path / "rows" / f"rank{rank}.jsonl").read_text() for rank in range(2))
    assert first == second
    assert len({str(json.loads(line)["rows"]) for line in first.splitlines()}) == 6


class Noting(LongRoPEModule):
    """Keeps the losses it logged."""

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(0)
            super().configure_model()
        self.losses = []

    def on_train_batch_end(self, *arguments):
        self.losses.append(self.trainer.callback_metrics["train_loss"].item())


def strategy(name):
    if name == "fsdp2":
        return LongContextFSDP2Strategy()
    if name.startswith("zero"):
        return LongContextDeepSpeedStrategy(stage=int(name[-1]))
    return "ddp" if name == "ddp" else "auto"


def losses_under(corpus, folder, names, devices):
    for name in names:
        data = PackedTextDataModule(
            [str(corpus / "text.jsonl")], tokenizer=str(corpus / "tokenizer"), seq_len=48, cache_dir=None,
            packing="mixed", short_seq_len=16, batch_size=2 // devices,
        )  # fmt: skip
        trainer = Trainer(
            **QUIET, strategy=strategy(name), devices=devices, max_steps=6, enable_checkpointing=False,
            limit_val_batches=0, use_distributed_sampler=False,
        )  # fmt: skip
        module = Noting(
            config={**LLAMA, "vocab_size": 300}, factors=str(corpus / "factors.json"), gradient_checkpointing=True,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        (folder / f"{name}{os.environ.get('RANK', 0)}.json").write_text(json.dumps(module.losses))


@pytest.mark.slow
def test_mixed_rows_train_alike_under_every_strategy(tmp_path, corpus):
    names = ["ddp", "fsdp2", "zero2", "zero3"]
    run_ranks(1, losses_under, corpus, tmp_path, ["alone"], 1, logs=tmp_path)
    alone = json.loads((tmp_path / "alone0.json").read_text())
    assert len(set(alone)) == 6
    run_ranks(2, losses_under, corpus, tmp_path, names, 2, logs=tmp_path, timeout=200)
    for name in names:
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}{rank}.json").read_text())
            assert found == pytest.approx(alone, rel=1e-5), name
