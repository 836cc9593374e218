"""The real DeepSpeed engine on processors, two processes and one, against Lightning's DDP.

Silent faults that were met with Lightning, DeepSpeed and transformers, and the test that would show each:

- inverse frequencies rounded to bfloat16: ``test_rotary_tables_stay_float32``
- gradients divided twice when accumulated, or clipped where nobody asked: ``test_sgd_steps_are_those_of_ddp`` (Adam
  would hide the scale)
- random weights made of empty tensors, or not partitioned: the same
- pretrained weights not read, or whole on every rank: ``test_pretrained_weights_are_partitioned_while_they_are_read``
- a search that runs again when its run is resumed: ``test_a_resumed_run_goes_on_as_under_ddp``
- a checkpoint that cannot be validated under stage 3: ``test_a_checkpoint_validates``
- operations compiled behind one's back, whose stale locks hang later runs: ``test_nothing_was_compiled``
- Adam's steps counted twice, or settings of one group given to all, on another number of ranks:
  ``test_another_number_of_ranks_goes_on_as_under_ddp``
- shards of an earlier run with more ranks left in a checkpoint: the same

Those of sequence parallelism, packed rows and exports are caught in ``test_sequence_parallel``, ``test_isolation`` and
``test_export``.
"""

import json
import os
import pickle
import shutil
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from helpers import LLAMA, random_loader, tiny_llama
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from processes import PARTITIONED, run_ranks, whole
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_longrope import LongRoPEModule, load_model
from lightning_longrope.callbacks import FactorSearch
from lightning_longrope.commands.export import export_checkpoint
from lightning_longrope.lora import LoRA
from lightning_longrope.model import installed_factors
from lightning_longrope.optimizers import MuonAdamW, Schedule
from lightning_longrope.rotary import recompute_rotary
from lightning_longrope.search import RampSearch
from lightning_longrope.strategies import (
    LongContextDDPStrategy,
    LongContextDeepSpeedStrategy,
    LongContextFSDP2Strategy,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LENGTH = 64  # of the texts to search on, twice the model's window
WEIGHT = LLAMA["hidden_size"] * LLAMA["intermediate_size"]  # elements of the largest
ZERO = ["zero1", "zero2", "zero3"]
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "num_sanity_val_steps": 0,
}  # fmt: skip


class Rows(LightningDataModule):
    seq_len = LENGTH
    tokenizer = None

    def train_dataloader(self):
        return random_loader(rows=32, length=LENGTH, batch_size=1)

    def val_dataloader(self):
        return random_loader(rows=4, length=LENGTH, batch_size=1)

    def excerpts(self, split, count, length, seed=0):
        return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed))


class Module(LongRoPEModule):
    """Notes its losses and how its weights lay, and trains its two groups with settings of their own."""

    def __init__(self, **options):
        super().__init__(**{"schedule": Schedule("constant", 0), **options})
        self.losses = []

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()
        self.read = sum(parameter.numel() for parameter in self.model.parameters())

    def on_train_start(self):
        weight = self.model.model.layers[0].mlp.up_proj.weight
        self.share = (weight.to_local() if hasattr(weight, "to_local") else weight).numel()
        if hasattr(self.trainer.strategy, "deepspeed_engine"):
            self.clipping = self.trainer.strategy.deepspeed_engine.gradient_clipping()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def parameter_groups(self):
        matrices, others = super().parameter_groups()
        return [{**matrices, "weight_decay": 0.5}, {**others, "lr": 0.02}]


def strategy(name, **options):
    if name == "ddp":
        return LongContextDDPStrategy()
    if name == "fsdp2":
        return LongContextFSDP2Strategy()
    return LongContextDeepSpeedStrategy(stage=int(name[-1]), zero=PARTITIONED if name == "zero3" else None, **options)


def note(folder, name, **found):
    (folder / f"{name}{os.environ['RANK']}.json").write_text(json.dumps(found))


def sgd(folder, name, source, how, note_as=None, save=None, **options):
    """Four steps of two batches each with recomputed layers, the first clipped and the last not."""
    module = Module(
        **source, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), gradient_checkpointing=True, **options
    )
    precision = how.pop("precision", "32-true")
    trainer = Trainer(
        strategy=strategy(name, **how), devices=2, max_steps=4, accumulate_grad_batches=2, gradient_clip_val=1.0,
        precision=precision, default_root_dir=folder, **QUIET,
    )  # fmt: skip
    trainer.fit(module, datamodule=Rows())
    if save:
        trainer.save_checkpoint(folder / save)
    rotary = getattr(module.model.model.rotary_emb, "stock", module.model.model.rotary_emb)
    tables = [str(rotary.inv_freq.dtype), *rotary.inv_freq.tolist()]
    sizes = trainer.strategy.config["zero_optimization"] if name in ZERO else {}
    note(folder, note_as or f"sgd-{name}", losses=module.losses, share=module.share, read=module.read, tables=tables,
         sizes={key: size for key, size in sizes.items() if "bucket" in key or "threshold" in key})  # fmt: skip


def adam(folder, name, note_as, devices=2, steps=3, resume=None, save=None, optimizer=torch.optim.AdamW, **how):
    """A search and a few steps without clipping; what came of it."""
    search = FactorSearch(
        documents=3,
        held_out=2,
        objective="perplexity",
        algorithm=RampSearch(max_evaluations=6),
        batch_tokens=2 * LENGTH,
    )
    module = Module(config=LLAMA, optimizer=lambda groups: optimizer(groups, lr=0.01))
    trainer = Trainer(
        strategy=strategy(name, **how), devices=devices, max_steps=steps, callbacks=[search],
        default_root_dir=folder / note_as, **QUIET,
    )  # fmt: skip
    trainer.fit(module, datamodule=Rows(), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
        weights = {key: whole(weight) for key, weight in module.model.state_dict(keep_vars=True).items()}
        if trainer.is_global_zero:
            torch.save(weights, save.with_suffix(".pt"))
    factors = installed_factors(module.model)
    note(folder, note_as, losses=module.losses, factors=factors.values, searched=search.result is not None,
         clipping=getattr(module, "clipping", None))  # fmt: skip


def validate(folder, name):
    trainer = Trainer(strategy=strategy(name), devices=2, default_root_dir=folder, **QUIET)
    metrics = trainer.validate(
        Module(config=LLAMA), datamodule=Rows(), ckpt_path=folder / f"{name}.ckpt", verbose=False
    )
    note(folder, f"validate-{name}", **metrics[0])


def on_two_ranks(folder):
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    random, pretrained = {"config": LLAMA}, {"name_or_path": str(folder / "pretrained")}
    for name in ("ddp", *ZERO):
        sgd(folder, name, random, {})
        adam(folder, name, f"adam-{name}", save=folder / f"{name}.ckpt")
        adam(folder, name, f"resumed-{name}", steps=5, resume=folder / f"{name}.ckpt")
        validate(folder, name)
    adam(folder, "fsdp2", "adam-fsdp2", save=folder / "fsdp2.ckpt")
    for name in ("ddp", "fsdp2"):
        saved, two = folder / f"muon-{name}.ckpt", {"optimizer": MuonAdamW}
        adam(folder, name, f"muon-{name}", save=saved, **two)
        adam(folder, name, f"muon-resumed-{name}", steps=5, resume=saved, **two)
    sgd(folder, "zero3", pretrained, {}, "sgd-pretrained")
    for name in ("ddp", "zero3"):
        sgd(folder, name, {"name_or_path": str(folder / f"{name}.ckpt")}, {}, f"sgd-second-{name}")
        sgd(folder, name, pretrained, {}, f"sgd-lora-{name}", f"lora-{name}.ckpt", lora=LoRA(rank=2))
    for name, precision in (("zero2", "bf16-true"), ("zero3", "bf16-true"), ("zero3", "bf16-mixed")):
        sgd(folder, name, pretrained, {"precision": precision}, f"{precision}-{name}")
    adam(folder, "zero2", "adam-offload2", offload_optimizer=True)
    adam(folder, "zero3", "adam-offload3", offload_optimizer=True, offload_parameters=True)
    adam(folder, "zero2", "plain2", save=folder / "plain2.ckpt", optimizer=torch.optim.SGD)


def on_one_rank(folder):
    import deepspeed

    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    adam(folder, "zero2", "first2", 1, timeout=timedelta(seconds=77))
    backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    note(folder, "timeout", seconds=backend.options._timeout.total_seconds())
    adam(folder, "ddp", "two-one-ddp", 1, steps=5, resume=folder / "ddp.ckpt")
    adam(folder, "ddp", "one-ddp", 1, save=folder / "one-ddp.ckpt")
    for name in ("zero2", "zero3"):
        adam(folder, name, f"two-one-{name}", 1, steps=5, resume=folder / f"{name}.ckpt")
    shutil.copytree(folder / "zero3.ckpt", folder / "over3.ckpt")
    adam(folder, "zero3", "one-zero3", 1, save=folder / "over3.ckpt")  # over that of two ranks
    refused = {
        "stage": {"name": "zero2", "resume": folder / "zero3.ckpt"},
        "file": {"name": "zero2", "resume": folder / "ddp.ckpt"},
        "plain": {"name": "zero2", "resume": folder / "plain2.ckpt", "optimizer": torch.optim.SGD},
        "muon": {"name": "zero1", "optimizer": MuonAdamW},
        "nvme": {"name": "zero3", "offload_optimizer": True, "nvme_path": str(folder)},
    }
    messages = {}
    type(deepspeed.accelerator.get_accelerator()).create_op_builder = lambda *_: None  # as without libaio
    for case, options in refused.items():
        with pytest.raises(ValueError, match=r"\S") as error:
            adam(folder, note_as=case, devices=1, steps=5, **options)
        messages[case] = str(error.value)
    note(folder, "refused", **messages)


def again_on_two_ranks(folder):
    for name, path in (("ddp", "one-ddp.ckpt"), ("zero3", "over3.ckpt")):
        adam(folder, name, f"one-two-{name}", steps=5, resume=folder / path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    module = Module(config=LLAMA)
    module.configure_model()
    module.model.save_pretrained(folder / "pretrained")
    with suppress(AssertionError):  # each test says what became of its run
        run_ranks(2, on_two_ranks, folder, logs=folder / "first", timeout=160)
        run_ranks(1, on_one_rank, folder, logs=folder / "second", timeout=80)
        run_ranks(2, again_on_two_ranks, folder, logs=folder / "third", timeout=50)
    return folder


def found(runs, name, rank=0):
    path = runs / f"{name}{rank}.json"
    assert path.exists(), "\n".join(log.read_text()[-3000:] for log in sorted(runs.glob("*/rank*.log")))
    return json.loads(path.read_text())


def assert_same_losses(runs, name, reference, ranks=2, rel=2e-6):
    for rank in range(ranks):
        losses = found(runs, reference, rank)["losses"]
        assert found(runs, name, rank)["losses"] == pytest.approx(losses, rel=rel)
        assert len(set(losses)) == len(losses) >= 2


@pytest.mark.parametrize("name", ZERO)
def test_sgd_steps_are_those_of_ddp(runs, name):
    assert_same_losses(runs, f"sgd-{name}", "sgd-ddp")
    assert found(runs, f"sgd-{name}")["share"] == (0 if name == "zero3" else WEIGHT)
    assert found(runs, f"adam-{name}")["clipping"] == 0


def test_pretrained_weights_are_partitioned_while_they_are_read(runs):
    assert found(runs, "sgd-ddp")["read"] > 10 * WEIGHT
    for name, reference in (("pretrained", "ddp"), ("second-zero3", "second-ddp"), ("lora-zero3", "lora-ddp")):
        assert_same_losses(runs, f"sgd-{name}", f"sgd-{reference}", rel=1e-5)
        read = found(runs, f"sgd-{name}")["read"]
        assert read < WEIGHT if "lora" in name else read == 0  # adapters are added whole


@pytest.mark.parametrize("name", ["bf16-true-zero2", "bf16-true-zero3", "bf16-mixed-zero3", "sgd-pretrained"])
def test_rotary_tables_stay_float32(runs, name):
    kind, *speeds = found(runs, name)["tables"]
    assert kind == "torch.float32"
    assert speeds == pytest.approx([10_000 ** (-pair / 8) for pair in range(8)], rel=2e-7)
    assert found(runs, name)["losses"] == pytest.approx(found(runs, "sgd-ddp")["losses"], rel=1e-3)


def test_rounded_rotary_tables_are_computed_again():
    model = tiny_llama()
    rotary, exact = model.model.rotary_emb, model.model.rotary_emb.inv_freq.clone()
    rotary.inv_freq = exact.bfloat16()
    assert not torch.equal(rotary.inv_freq.float(), exact)
    recompute_rotary(model)
    assert torch.equal(rotary.inv_freq, exact)


@pytest.mark.parametrize(("stage", "hidden", "bucket"), [(2, 4096, 4096**2), (3, 4096, 4096**2), (2, 64, 2**20)])
def test_buckets_follow_the_hidden_size_unless_they_are_chosen(runs, stage, hidden, bucket):
    model = SimpleNamespace(config=LlamaConfig(hidden_size=hidden))
    sized, chosen = (LongContextDeepSpeedStrategy(stage=stage, zero=zero) for zero in ({}, {"reduce_bucket_size": 7}))
    for strategy in (sized, chosen):
        strategy._size_buckets(SimpleNamespace(model=model))
    zero = sized.config["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
    assert zero.get("stage3_param_persistence_threshold") == (10 * hidden if stage == 3 else None)
    assert chosen.config["zero_optimization"]["reduce_bucket_size"] == 7
    assert found(runs, "sgd-zero2")["sizes"]["reduce_bucket_size"] == 2**20


@pytest.mark.parametrize("name", ZERO)
def test_a_resumed_run_goes_on_as_under_ddp(runs, name):
    assert found(runs, f"adam-{name}")["searched"]
    assert not found(runs, f"resumed-{name}")["searched"]
    assert found(runs, f"resumed-{name}")["factors"] == found(runs, "adam-ddp")["factors"] != [1.0] * 8
    assert_same_losses(runs, f"adam-{name}", "adam-ddp")
    assert_same_losses(runs, f"resumed-{name}", "resumed-ddp", rel=1e-5)


@pytest.mark.parametrize("name", ZERO)
def test_a_checkpoint_validates(runs, name):
    value = found(runs, f"validate-{name}")["val_perplexity"]
    assert value == pytest.approx(found(runs, "validate-ddp")["val_perplexity"], rel=1e-5)
    trainer = Trainer(devices=1, default_root_dir=runs, **QUIET)
    alone = trainer.validate(Module(name_or_path=str(runs / f"{name}.ckpt")), datamodule=Rows(), verbose=False)
    assert alone[0]["val_perplexity"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_another_number_of_ranks_goes_on_as_under_ddp(runs, name):
    assert_same_losses(runs, f"two-one-{name}", "two-one-ddp", ranks=1, rel=1e-5)
    assert not list(runs.glob("*.universal"))
    if name == "zero3":
        assert_same_losses(runs, "one-two-zero3", "one-two-ddp", rel=1e-5)
        assert len(list((runs / "over3.ckpt" / "checkpoint").glob("*_optim_states.pt"))) == 1
        assert not list(runs.glob(".*"))


@pytest.mark.parametrize("name", ["offload2", "offload3"])
def test_an_optimizer_of_torch_is_offloaded_as_it_is(runs, name):
    assert_same_losses(runs, f"adam-{name}", "adam-ddp")


def test_nothing_was_compiled(runs):
    assert found(runs, "adam-offload3")
    assert not (runs / "compiled").exists()


def test_ranks_wait_as_long_as_they_are_told(runs):
    assert found(runs, "timeout")["seconds"] == 77


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stage", "zero3.ckpt was saved under ZeRO stage 3, not 2: set `stage`, or give it as `model.name_or_path`"),
        ("file", "ddp.ckpt is no folder that DeepSpeed has written: give it as `model.name_or_path`"),
        ("plain", "saved by 2 ranks and cannot be resumed by 1: DeepSpeed, which converts the states of Adam"),
        ("nvme", "`nvme_path` needs libaio with its headers"),
        ("muon", "MuonAdamW needs whole matrices, and ZeRO stage 1 cuts them"),
    ],
)
def test_what_cannot_go_on_is_said_in_one_line(runs, case, message):
    assert message in found(runs, "refused")[case]


@pytest.mark.parametrize("name", [*ZERO, "fsdp2"])
def test_a_folder_loads_as_the_weights_that_were_trained(runs, name):
    trained = torch.load(runs / f"{name}.pt")
    model = load_model(runs / f"{name}.ckpt")
    weights = model.state_dict()
    assert len(trained) == len(weights) == 21
    assert all(torch.equal(weights[key], trained[key]) for key in trained)
    assert list(installed_factors(model).values) == found(runs, "adam-ddp")["factors"]
    assert not model.training


def test_adapters_in_a_folder_are_merged(runs):
    ours, theirs = (load_model(runs / f"lora-{name}.ckpt").state_dict() for name in ("zero3", "ddp"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_a_folder_is_exported(runs, tmp_path):
    trained = torch.load(runs / "zero3.pt")
    shutil.copytree(runs / "zero3.ckpt", tmp_path / "named as it pleases")
    folder = export_checkpoint(str(tmp_path / "named as it pleases"), str(tmp_path / "hf"))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(weight, trained[key]) for key, weight in exported.state_dict().items())
    assert exported.config.rope_parameters["rope_type"] == "longrope"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_folder_runs_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in (("zero2", "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"), ("fsdp2", ".metadata")):
        folder = tmp_path / f"{name}.ckpt"
        shutil.copytree(runs / folder.name, folder)
        if file.endswith(".pt"):
            torch.save({"optimizer_state_dict": Evil()}, folder / file)
        else:
            (folder / file).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="not safe to read: posix.mkdir"):
            load_model(folder)
    assert not (tmp_path / "evil").exists()


def test_a_folder_without_a_shard_is_not_whole(runs, tmp_path):
    shutil.copytree(runs / "zero3.ckpt", tmp_path / "zero3.ckpt")
    next((tmp_path / "zero3.ckpt" / "checkpoint").glob("*_1_*_optim_states.pt")).unlink()
    with pytest.raises(ValueError, match=r"zero3.ckpt is damaged, or no checkpoint: Expected 2"):
        load_model(tmp_path / "zero3.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4}, "`stage` must be 0, 1, 2 or 3, got 4"),
        ({"stage": 0, "offload_optimizer": True}, "needs partitioned optimizer states"),
        ({"stage": 2, "offload_parameters": True}, "needs partitioned weights: stage=3, got stage=2"),
        ({"stage": 2, "nvme_path": "/disk", "offload_optimizer": True}, "`nvme_path` needs stage=3"),
    ],
)
def test_arguments_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        LongContextDeepSpeedStrategy(**options)


def test_lightnings_own_strategy_is_refused():
    module = LongRoPEModule(config=LLAMA)
    module._trainer = SimpleNamespace(strategy=DeepSpeedStrategy(stage=3))
    with pytest.raises(ValueError, match="use LongContextDeepSpeedStrategy"):
        module.configure_model()


def test_shards_of_two_optimizers_in_one_are_saved_and_restored(runs):
    assert_same_losses(runs, "muon-fsdp2", "muon-ddp", rel=3e-4)  # Muon computes in bfloat16
    assert_same_losses(runs, "muon-resumed-fsdp2", "muon-resumed-ddp", rel=2e-3)
