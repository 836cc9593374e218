"""Adapters against peft's own model, LongLoRA's rule of what is trained, and plain transformers after the export."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from helpers import LLAMA, random_loader, tiny_llama
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import PARTITIONED, run_ranks
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_longrope import LongRoPEModule, RescaleFactors, export_model, install_factors, load_model
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.export import export_checkpoint
from lightning_longrope.export import folder
from lightning_longrope.fingerprints import _sample, model_digest
from lightning_longrope.lora import LoRA, add_adapters
from lightning_longrope.losses import chunked_nll
from lightning_longrope.model import output_head
from lightning_longrope.optimizers import MuonAdamW, Schedule
from lightning_longrope.strategies import LongContextDeepSpeedStrategy, LongContextFSDP2Strategy

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's get_peft_model
ROOT = Path(__file__).parents[2]
SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 32, "target_length": 64}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True},
}


def trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": 4, "enable_checkpointing": False, **quiet, **options}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)


def module(lora=LoRA(), seed=0, optimizer=None, **options):  # noqa: B008 - frozen
    torch.manual_seed(seed)
    optimizer = optimizer or (lambda groups: torch.optim.AdamW(groups, lr=0.01))
    made = LongRoPEModule(
        **{"config": LLAMA, "schedule": Schedule("constant", 0), "optimizer": optimizer, "lora": lora, **options}
    )
    made.configure_model()
    return made


def trained(tmp_path, lora=LoRA(), **options):  # noqa: B008 - frozen
    """A module with factors after four steps, and its checkpoint."""
    made = module(lora, **options)
    install_factors(made.model, RescaleFactors.yarn(**SHAPE))
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(made, random_loader(length=60), random_loader())
    made.model.eval()
    return made, tmp_path / "last.ckpt"


@torch.no_grad()
def logits(model, length=60):
    return model.eval()(torch.arange(length)[None] * 7 % 96, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_longlora_trains_moves_and_all_else_stays_bit_for_bit(tmp_path, family):
    """The witness is the released code's rule: an adapter, or a name that contains `embed` or `norm`."""
    made = module(config={**LLAMA, "model_type": family, **FAMILIES[family]})
    before = {name: tensor.clone() for name, tensor in made.model.named_parameters()}
    trainer(tmp_path).fit(made, random_loader(), random_loader())
    moved = {name for name, tensor in made.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if any(part in name for part in ("lora_", "embed", "norm"))}
    assert len({name for name in moved if "lora_" in name}) == 2 * 2 * (2 if family == "phi3" else 4)


@pytest.mark.parametrize("whole", [True, False])
def test_peft_counts_as_many_trained_parameters(whole):
    names = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"] if whole else None
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, target_modules=ATTENTION, modules_to_save=names))
    made = module(LoRA(rank=3, train_norms=whole, train_embeddings=whole))
    groups = made.parameter_groups()
    assert sum(p.numel() for group in groups for p in group["params"]) == theirs.get_nb_trainable_parameters()[0]
    assert len(groups[0]["params"]) == 2 * 2 * 4
    assert len(groups) == 1 + whole


def test_merged_weights_are_those_that_peft_merges(tmp_path):
    made, checkpoint = trained(tmp_path, LoRA(rank=4, alpha=12, train_norms=False, train_embeddings=False))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION))
    theirs.load_state_dict({f"base_model.model.{name}": value for name, value in made.model.state_dict().items()})
    merged, loaded = theirs.merge_and_unload().state_dict(), load_model(checkpoint).state_dict()
    assert merged.keys() == loaded.keys()
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-7, msg=name)


def test_the_merged_copy_of_a_half_precision_model_keeps_exact_tables():
    made = module(LoRA(train_norms=False, train_embeddings=False), dtype="bfloat16")
    made.configure_model()
    tables = [merged.model.rotary_emb.inv_freq for merged in (made.model, folder._merged(made.model), tiny_llama())]
    assert all(table.dtype == torch.float32 for table in tables)
    assert torch.equal(tables[1], tables[2])


@pytest.mark.parametrize("tied", [False, True])
def test_every_way_out_gives_the_logits_of_the_adapted_model(tmp_path, tied):
    options = {} if tied else {"lora": LoRA(targets=("q_proj", "down_proj", "lm_head"), dropout=0.1)}
    made, checkpoint = trained(tmp_path, config={**LLAMA, "tie_word_embeddings": tied}, **options)
    expected = logits(made.model)
    assert (logits(module(None, config={**LLAMA, "tie_word_embeddings": tied}).model) - expected).abs().max() > 0.1
    export_checkpoint(str(checkpoint), str(tmp_path / "hf"))
    weights = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    export_model(made.model, None, tmp_path / "live")
    for found in (
        load_model(checkpoint),
        *map(AutoModelForCausalLM.from_pretrained, (tmp_path / "hf", tmp_path / "live")),
    ):
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
        assert not any("lora" in name for name in found.state_dict())
        assert all(parameter.requires_grad for parameter in found.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made.model.state_dict().items())


def test_adapters_change_nothing_before_they_are_trained():
    """Neither the logits nor the name that a search's scores are kept under."""
    plain, adapted = module(None).model, module().model
    assert torch.equal(logits(plain), logits(adapted))
    assert model_digest(adapted) == model_digest(plain)
    with torch.no_grad():
        adapted.model.layers[1].self_attn.v_proj.lora_B["default"].weight += 1e-3
    assert model_digest(adapted) != model_digest(plain)


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    def fresh():
        return module(optimizer=lambda groups: MuonAdamW(groups, lr=0.01), gradient_checkpointing=True)

    whole, cut, resumed = fresh(), fresh(), fresh()
    trainer(tmp_path, max_steps=6).fit(whole, random_loader(6), random_loader())
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=3)
    trainer(tmp_path, max_steps=3, callbacks=[saver], enable_checkpointing=True).fit(
        cut, random_loader(6), random_loader()
    )
    run = trainer(tmp_path, max_steps=6, callbacks=[saver], enable_checkpointing=True)
    run.fit(resumed, random_loader(6), random_loader(), ckpt_path=tmp_path / "last.ckpt")
    states = [made.model.state_dict() for made in (whole, resumed)]
    assert all(torch.equal(one, other) for one, other in zip(*map(dict.values, states), strict=True))


@pytest.mark.parametrize("lora", [None, LoRA(alpha=8), LoRA(rank=4)])
def test_other_adapters_cannot_resume(tmp_path, lora):
    _, checkpoint = trained(tmp_path)
    with pytest.raises(ValueError, match=r"trained with lora=LoRA\(rank=8.*name_or_path"):
        trainer(tmp_path).validate(module(lora), random_loader(), ckpt_path=checkpoint, verbose=False)
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    run = trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    run.validate(module(LoRA(dropout=0.5)), random_loader(), ckpt_path=checkpoint, verbose=False)


def test_a_second_stage_starts_from_the_merged_weights(tmp_path):
    made, checkpoint = trained(tmp_path)
    second = module(config=None, name_or_path=str(checkpoint))
    torch.testing.assert_close(logits(second.model), logits(made.model), rtol=0, atol=1e-5)
    assert sum("lora_B" in name for name, _ in second.model.named_parameters()) == 8


def test_weights_trained_beside_frozen_half_precision_ones_are_float32(tmp_path):
    made = module(config={**LLAMA, "tie_word_embeddings": True}, dtype="bfloat16", gradient_checkpointing=True)
    before = {name: tensor.clone() for name, tensor in made.model.named_parameters()}
    trainer(tmp_path, precision="bf16-mixed").fit(made, random_loader(), random_loader())
    install_factors(made.model, RescaleFactors.yarn(**SHAPE))  # whose proof runs the model outside of a trainer
    for name, tensor in made.model.named_parameters():
        assert tensor.dtype == (torch.float32 if tensor.requires_grad else torch.bfloat16)
        assert torch.equal(tensor, before[name]) != tensor.requires_grad, name


def test_half_precision_without_autocast_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer(tmp_path).fit(
            LongRoPEModule(config=LLAMA, dtype="bfloat16", lora=LoRA()), random_loader(), random_loader()
        )


def test_an_adapted_head_has_the_same_loss_and_gradients_in_chunks():
    made = module(LoRA(targets=("lm_head",)))
    hidden, labels = torch.randn(21, 64, generator=torch.Generator().manual_seed(1)), torch.arange(21)
    head, found = made.model.lm_head, {}
    nn.init.normal_(head.lora_B["default"].weight, std=0.1)
    for chunk in (4, 64):
        loss = chunked_nll(hidden, output_head(made.model), labels, chunk=chunk)[0]
        parts = (head.lora_A["default"].weight, head.lora_B["default"].weight)
        found[chunk] = [loss, *torch.autograd.grad(loss, parts)]
    one, other = parts
    whole = nn.functional.cross_entropy(hidden @ (head.weight + 2 * other @ one).T, labels, reduction="sum")
    for chunk in found:
        torch.testing.assert_close(found[chunk], [whole, *torch.autograd.grad(whole, parts, retain_graph=True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "empty"),
        ({"targets": ("q_proj", "c_attn")}, r"no layers \['c_attn'\].*'down_proj'.*'q_proj'"),
        ({"targets": ("lm_head",)}, "lm_head is not a linear layer with a weight of its own"),
        ({"targets": ("embed_tokens",)}, "train_embeddings"),
        ({"targets": ("self_attn",)}, "self_attn is not a linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_a_line(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny_llama(tie_word_embeddings=True), LoRA(**options))


def test_settings_read_from_a_file_are_those_written_in_python():
    assert hash(LoRA(targets=["q_proj", "v_proj"])) == hash(LoRA(targets=("q_proj", "v_proj")))


class Built(LongRoPECLI):
    def _run_subcommand(self, subcommand):
        pass


def test_the_shipped_recipe_goes_after_any_fit(monkeypatch):
    """It says every setting, and they are the defaults."""
    monkeypatch.setattr("lightning_longrope.cli.check_places", lambda config: None)  # no stage has run before
    path = ROOT / "configs" / "lora" / "longlora.yaml"
    fit = yaml.safe_load((ROOT / "configs" / "quickstart" / "3-finetune.yaml").read_text())
    assert (fit.pop("command"), bool(fit.pop("short"))) == ("fit", True)
    cli = Built(["fit", "--config", yaml.safe_dump(fit), "--config", str(path), "--trainer.logger=false"])
    assert cli.model.lora == LoRA()
    assert cli.model.name_or_path == fit["model"]["init_args"]["name_or_path"]
    assert cli.model.gradient_checkpointing
    optimizer = cli.model.optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 2e-5
    said = yaml.safe_load(path.read_text())["model"]["init_args"]["lora"]
    assert list(said) == list(vars(LoRA()))
    assert cli.model.schedule == Schedule("constant_with_warmup", 20)


class Seeded(LongRoPEModule):
    """Has the same adapters under every strategy."""

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()


def samples(folder, devices, strategy, name):
    """A few values of every parameter after two steps of SGD, as every strategy gathers them; and a checkpoint."""
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5), "schedule": Schedule("constant", 0)}
    made = Seeded(str(folder / "base"), lora=LoRA(targets=("q_proj", "lm_head")), **options)
    run = trainer(folder, max_steps=2, devices=devices, strategy=strategy, use_distributed_sampler=False)
    run.fit(made, random_loader(), random_loader())
    run.save_checkpoint(folder / f"{name}.ckpt")
    return {name: _sample(parameter).tolist() for name, parameter in made.model.named_parameters()}


def cut_before_it_is_set(folder):
    """Adapters made in the context in which Lightning builds models for ZeRO stage 3."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = tiny_llama()
        add_adapters(model, LoRA())
    parts = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(p.numel() == 0 for p in parts.values())
    values = {name: _sample(p) for name, p in parts.items()}
    assert all(bool(value.any()) == ("lora_A" in name) for name, value in values.items())


def train_with_every_strategy(folder):
    strategies = {"ddp": "ddp", "fsdp2": LongContextFSDP2Strategy(), "zero2": LongContextDeepSpeedStrategy(2)}
    for name, strategy in {**strategies, "zero3": LongContextDeepSpeedStrategy(3, zero=PARTITIONED)}.items():
        (folder / f"{name}{os.environ['RANK']}.json").write_text(json.dumps(samples(folder, 2, strategy, name)))
    cut_before_it_is_set(folder)
    (folder / f"cut{os.environ['RANK']}.json").write_text("{}")


@pytest.mark.slow
@pytest.mark.distributed
def test_every_strategy_trains_the_same_adapters(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    with suppress(AssertionError):  # the log says more
        run_ranks(2, train_with_every_strategy, tmp_path, logs=tmp_path / "logs")
    assert (tmp_path / "cut0.json").exists(), (tmp_path / "logs" / "rank0.log").read_text()[-4000:]
    alone = samples(tmp_path, 1, "auto", "alone")
    expected = logits(load_model(tmp_path / "alone.ckpt"))
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}{rank}.json").read_text())
            assert found.keys() == alone.keys()
            for weight, values in alone.items():
                assert found[weight] == pytest.approx(values, abs=2e-6), (name, weight)
        merged = load_model(tmp_path / f"{name}.ckpt")
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5, msg=name)
