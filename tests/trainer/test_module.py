"""The module under a real Trainer: its loss, its checkpoints, its precision, and a subclass in somebody's project."""

import pytest
import torch
from helpers import LLAMA, random_loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_longrope import LongRoPEModule, RescaleFactors, load_model
from lightning_longrope.model import install_factors, installed_factors
from lightning_longrope.module import compile_decoder_layers, decoder_layers, scale_initial_weights
from lightning_longrope.optimizers import MuonAdamW, Schedule

SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 32, "target_length": 64}


def trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": 4, "enable_checkpointing": False, **quiet, **options}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_training_is_that_of_a_plain_loop_around_hugging_face(tmp_path):
    """SGD without clipping, so that a wrong scale of the gradients shows in the weights."""
    torch.manual_seed(0)
    module = LongRoPEModule(config=LLAMA, optimizer=sgd, schedule=Schedule("constant", 0))
    module.configure_model()
    torch.manual_seed(0)
    twin = AutoModelForCausalLM.from_config(module.model.config, attn_implementation="sdpa")
    twin.load_state_dict(module.model.state_dict())
    trainer(tmp_path, accumulate_grad_batches=2, max_steps=2).fit(module, random_loader(), random_loader())

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index, batch in enumerate(random_loader()):
        (twin(batch["input_ids"], labels=batch["labels"]).loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(module.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("precision", "dtype", "lost"),
    [("32-true", "float32", False), ("bf16-mixed", "float32", False), ("bf16-mixed", "bfloat16", True),
     ("bf16-true", "float32", True)],
)  # fmt: skip
def test_training_weights_whose_updates_would_be_rounded_away_is_said(tmp_path, caplog, precision, dtype, lost):
    trainer(tmp_path, precision=precision, max_steps=1).fit(
        LongRoPEModule(config=LLAMA, dtype=dtype), random_loader(), random_loader()
    )
    assert any("Weights are trained in bfloat16" in message for message in caplog.messages) == lost


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-true", 0.02), ("16-true", 0.005)])
def test_validation_perplexity_is_token_weighted(tmp_path, precision, tolerance):
    module = LongRoPEModule(config=LLAMA)
    run = trainer(tmp_path, precision=precision)
    found = run.validate(module, random_loader(rows=201), verbose=False)[0]["val_perplexity"]
    total, count = 0.0, 0
    module.model.float()
    with torch.no_grad():
        for batch in random_loader(rows=201):
            tokens = batch["input_ids"]
            logits = module.model.eval()(tokens).logits[:, :-1].double()
            total += nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
            count += tokens[:, 1:].numel()
    assert found == pytest.approx(torch.tensor(total / count).exp().item(), rel=tolerance)


def test_a_module_that_was_validated_can_be_trained(tmp_path):
    module, run = LongRoPEModule(config=LLAMA), trainer(tmp_path)
    run.validate(module, random_loader(), verbose=False)
    run.fit(module, random_loader(), random_loader())
    assert run.global_step == 4


def test_factors_and_weights_travel_in_the_checkpoint(tmp_path):
    table = RescaleFactors.yarn(**SHAPE)
    table.save(tmp_path / "factors.json")
    module = LongRoPEModule(config=LLAMA, factors=str(tmp_path / "factors.json"))
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(module, random_loader(), random_loader())

    plain = load_model(str(tmp_path / "last.ckpt"))
    assert installed_factors(plain) == table
    tokens = torch.arange(60)[None] % 96
    with torch.no_grad():
        assert torch.equal(plain.eval()(tokens).logits, module.model.eval()(tokens).logits)

    resumed = LongRoPEModule(config=LLAMA)
    run = trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    run.validate(resumed, random_loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert installed_factors(resumed.model) == table


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    def module():
        torch.manual_seed(0)
        return LongRoPEModule(config=LLAMA, optimizer=lambda p: MuonAdamW(p, lr=0.01), schedule=Schedule("linear", 2))

    whole = module()
    trainer(tmp_path, max_steps=8).fit(whole, random_loader(rows=8), random_loader())
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)

    class Cut(LongRoPEModule):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 4:
                raise KeyboardInterrupt

    first = module()
    first.__class__ = Cut
    run = trainer(tmp_path, max_steps=8, callbacks=[saver], enable_checkpointing=True)
    run = trainer(tmp_path, max_steps=8, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(SystemExit):
        run.fit(first, random_loader(rows=8), random_loader())
    second = module()
    run = trainer(tmp_path, max_steps=8, callbacks=[saver], enable_checkpointing=True)
    run.fit(second, random_loader(rows=8), random_loader(), ckpt_path=tmp_path / "last.ckpt")
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_angles_stay_exact_in_low_precision(tmp_path, precision):
    """A table rounded to bf16 would turn positions of a long window by whole radians."""
    table = RescaleFactors.yarn(rotary_size=16, base=10_000.0, original_length=32, target_length=65_536)
    module = LongRoPEModule(config=LLAMA)
    module.configure_model()
    install_factors(module.model, table)
    trainer(tmp_path, precision=precision, max_steps=1).fit(module, random_loader(), random_loader())
    positions = torch.tensor([[65_535]])
    cos, _ = module.model.model.rotary_emb(torch.zeros(1, 1, 64, dtype=torch.float32), positions)
    speeds = [1 / (factor * 10_000 ** (2 * i / 16)) for i, factor in enumerate(table.values)]
    expected = torch.tensor([65_535 * speed for speed in speeds], dtype=torch.float64).cos() * table.attention_factor
    torch.testing.assert_close(cos[0, 0, :8].double(), expected, rtol=0, atol=1e-6)


def test_weights_of_tokens_count_in_the_loss(tmp_path):
    module = LongRoPEModule(config=LLAMA)
    module.configure_model()
    module.log = lambda *args, **options: None  # no trainer here
    tokens = torch.arange(20)[None]
    weights = torch.ones(1, 20)
    weights[0, 5] = 3.0
    with torch.no_grad():
        loss = module.training_step({"input_ids": tokens, "labels": tokens, "weights": weights}, 0)
        logits = module.model(tokens).logits[0, :-1]
    nll = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    expected = (nll.sum() + 2 * nll[4]) / (19 + 2)  # token 5 is predicted from position 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def packed_batch(**more):
    """Documents of 4, 9 and 11 tokens side by side."""
    tokens = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(size) for size in (4, 9, 11)])[None]
    bounds = torch.tensor([0, 4, 13, 24], dtype=torch.int32)
    labels = tokens.clone()
    labels[0, [0, 4, 13]] = -100
    batch = {"input_ids": tokens, "labels": labels, "position_ids": positions, "cu_seq_lens": bounds, "max_length": 11}
    return {**batch, **more}


def module_with_factors(**options):
    torch.manual_seed(0)
    module = LongRoPEModule(config=LLAMA, **options)
    module.configure_model()
    install_factors(module.model, RescaleFactors.linear(**SHAPE))
    module.log = lambda *args, **more: None  # no trainer here
    return module


@pytest.mark.parametrize("original_rope", [True, False])
def test_recomputed_layers_have_the_rope_and_documents_of_their_forward(original_rope):
    gradients = []
    for checkpointing in (False, True):
        module = module_with_factors(gradient_checkpointing=checkpointing)
        module.training_step(packed_batch(original_rope=original_rope), 0).backward()
        gradients.append([p.grad for p in module.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_isolated_rows_give_the_loss_and_perplexity_of_their_documents():
    module, batch = module_with_factors(), packed_batch()
    sums, model = [], module.model.eval()
    with torch.no_grad():
        for document in batch["input_ids"][0].split((4, 9, 11)):
            logits = model(document[None]).logits[0, :-1].double()
            sums.append(nn.functional.cross_entropy(logits, document[1:], reduction="sum"))
        expected = sum(sums) / (3 + 8 + 10)
        assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)
        module.validation_step(batch, 0)
    assert module.perplexity.compute().item() == pytest.approx(expected.exp().item(), rel=1e-6)


def test_short_rows_are_trained_with_the_pretrained_rope():
    module, batch = module_with_factors(), packed_batch(original_rope=True)
    short = module.training_step(batch, 0)
    long = module.training_step({**batch, "original_rope": False}, 0)
    install_factors(module.model, RescaleFactors.none(**SHAPE))
    assert short.item() == module.training_step(packed_batch(), 0).item() != long.item()


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    module, batch = module_with_factors(), packed_batch()
    loss = module.training_step({**batch, "labels": torch.full_like(batch["labels"], -100)}, 0)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in module.model.parameters())


def test_a_model_that_was_trained_on_isolated_rows_is_saved_and_loaded_like_any(tmp_path):
    module = module_with_factors()
    module.training_step(packed_batch(), 0)
    checkpoint = {"state_dict": {f"model.{k}": v for k, v in module.model.state_dict().items()}}
    module.on_save_checkpoint(checkpoint)
    assert "by_document" not in str(checkpoint["longrope"])
    torch.save(checkpoint, tmp_path / "a.ckpt")
    loaded, tokens = load_model(tmp_path / "a.ckpt"), torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, module.model.eval()(tokens).logits)
    module.model.save_pretrained(tmp_path / "hf")
    assert "by_document" not in (tmp_path / "hf" / "config.json").read_text()


def test_a_subclass_with_a_loss_of_its_own(tmp_path):
    class LabelSmoothing(LongRoPEModule):
        def training_step(self, batch, batch_idx):
            logits = self(batch["input_ids"])[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
            self.log("train_loss", loss)
            return loss

    module = LabelSmoothing(config=LLAMA, optimizer=sgd)
    run = trainer(tmp_path)
    run.fit(module, random_loader(), random_loader())
    assert run.callback_metrics["train_loss"] > 0


def test_initial_weights_have_the_size_they_should(tmp_path):
    torch.manual_seed(0)
    model = load_model(config={**LLAMA, "hidden_size": 256, "intermediate_size": 512})
    scale_initial_weights(model)
    layer = decoder_layers(model)[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(512**-0.5 / 2, rel=0.03)  # sqrt(2 * 2 layers)


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    model = load_model(config=LLAMA)
    with caplog.at_level("INFO", "lightning_longrope"):
        compile_decoder_layers(model)
    assert caplog.text.count("without torch.compile") == 1
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


def test_a_loaded_model_trains_in_training_mode(tmp_path):
    """Hugging Face loads in eval mode; left there, dropout would be off in every fine-tune."""
    load_model(config=LLAMA).save_pretrained(tmp_path)
    module = LongRoPEModule(str(tmp_path))
    module.configure_model()
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("arguments", [{}, {"name_or_path": "a", "config": LLAMA}])
def test_a_module_needs_one_source_of_its_model(arguments):
    with pytest.raises(ValueError, match="either `name_or_path`"):
        LongRoPEModule(**arguments)
