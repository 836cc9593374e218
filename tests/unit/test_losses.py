"""Chunked losses against one softmax in float64 that shares no code with them, and against whole models."""

import copy
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import LLAMA, SIZES, tiny_llama
from live_bytes import LiveBytes
from torch import nn
from torch.nn import functional

from lightning_longrope import LongRoPEModule, heads, losses
from lightning_longrope.loading import load_model
from lightning_longrope.lora import LoRA, add_adapters
from lightning_longrope.losses import chunked_nll, fused_nll, liger_nll, token_nll
from lightning_longrope.model import hidden_states, output_head

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[[2, 11]] = -100
    weights = torch.rand(TOKENS, generator=generator) + 0.5
    return hidden, weight, labels, weights


def witness(hidden, weight, labels):
    """nll by the definition, one token at a time, in float64; 0 where the label is -100."""
    values = []
    for state, label in zip(hidden.double(), labels.tolist(), strict=True):
        logits = [float(torch.dot(state, row)) for row in weight.double()]
        total = torch.tensor(logits, dtype=torch.float64).exp().sum().log().item()
        values.append(0.0 if label == -100 else total - logits[label])
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, 23, 4096])
def test_token_nll_is_the_definition_whatever_the_chunk(case, chunk):
    hidden, weight, labels, _ = case
    actual = token_nll(hidden, lambda states: states @ weight.T, labels, chunk)
    torch.testing.assert_close(actual.double(), witness(hidden, weight, labels), rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [5, 23])
def test_weights_and_masked_labels_count_in_both_sums(case, chunk):
    hidden, weight, labels, weights = case
    nll, count = chunked_nll(hidden, lambda states: states @ weight.T, labels, weights, chunk)
    kept = labels != -100
    assert count.item() == pytest.approx(weights[kept].double().sum().item(), rel=1e-6)
    expected = (witness(hidden, weight, labels) * weights.double()).sum().item()
    assert nll.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [5, 4096])
def test_gradients_are_those_of_the_unchunked_loss(case, chunk):
    hidden, weight, labels, _ = case
    gradients = []
    for loss in ("ours", "torch"):
        states, matrix = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if loss == "ours":
            nll, count = chunked_nll(states, lambda s, m=matrix: s @ m.T, labels, chunk=chunk)
            (nll / count).backward()
        else:
            torch.nn.functional.cross_entropy(states @ matrix.T, labels).backward()
        gradients.append((states.grad, matrix.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_confident_wrong_token_gives_a_finite_loss():
    hidden = torch.tensor([[200.0, 0.0]])
    assert token_nll(hidden, lambda states: states, torch.tensor([1])).item() == pytest.approx(200.0)


def bare(layer, **config):
    """The output head of a model that consists of an output layer."""
    settings = SimpleNamespace(model_type="bare", **config)
    settings.get_text_config = lambda: settings
    return output_head(SimpleNamespace(config=settings, get_output_embeddings=lambda: layer))


HEADS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"model_type": "phi", "num_key_value_heads": 4},
    "soft cap": {
        "model_type": "gemma2",
        "head_dim": 16,
        "final_logit_softcapping": 0.5,
        "attn_implementation": "eager",
    },
    "scale": {"model_type": "cohere", "logit_scale": 0.25},
    "adapters": {},
    "frozen body": {},
    "frozen head": {},
}


def model_of(name, double):
    torch.manual_seed(0)
    config = {"model_type": "llama", **SIZES, "pad_token_id": 0, "initializer_range": 0.3, **HEADS[name]}
    attention = config.pop("attn_implementation", "sdpa")
    model = load_model(config=config, attn_implementation=attention).train()
    if name == "adapters":
        pytest.importorskip("peft")
        add_adapters(model, LoRA(targets=("lm_head", "q_proj")))
        nn.init.normal_(model.lm_head.lora_B["default"].weight, std=0.1)
    model.get_decoder().requires_grad_(name != "frozen body")
    if name == "frozen head":
        model.lm_head.requires_grad_(False)
    return model.double() if double else model


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("loss", [chunked_nll, fused_nll])
def test_a_model_gets_the_gradients_of_its_own_logits(name, loss):
    ours = model_of(name, double=False)
    theirs = copy.deepcopy(ours).double()
    tokens = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, 5:8] = -100
    shares = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) + 0.5
    for rows, targets, weights in ((tokens, labels, shares), (tokens.flip(1), labels, shares)):  # accumulated
        logits = theirs(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        each = functional.cross_entropy(logits, targets.flatten(), reduction="none")
        expected = (each * weights.flatten()).sum() / 7
        expected.backward()
        hidden = hidden_states(ours, rows)[:, :-1].flatten(0, 1)
        nll, count = loss(hidden, output_head(ours), targets.flatten(), weights.flatten(), chunk=5)
        (nll / 7).backward()
        assert (nll / 7).item() == pytest.approx(expected.item(), rel=1e-5)
        assert count.item() == pytest.approx(weights[targets != -100].sum().item())
    assert any(parameter.requires_grad for parameter in ours.get_output_embeddings().parameters()) == (
        name != "frozen head"
    )
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if other.grad is not None:
            top = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=2e-5 * max(top, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_gradients_in_half_precision_and_with_a_scaled_loss(case, dtype):
    hidden, weight, labels, _ = case
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    layer.weight.data = weight
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), {}
    for loss in ("fused", "whole"):
        layer.zero_grad()
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            if loss == "fused":
                nll, count = fused_nll(states, bare(layer), labels, chunk=5)
                mean = nll / count
            else:
                mean = functional.cross_entropy(layer(states).float(), labels)
        scaler.scale(mean).backward()
        found[loss] = [mean.detach(), states.grad / 1024, layer.weight.grad / 1024]
    assert layer.weight.grad.dtype == torch.float32
    for ours, theirs in zip(found["fused"], found["whole"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * torch.finfo(dtype).eps * float(theirs.abs().max()))


def test_weights_in_half_precision_get_gradients_added_up_in_float32():
    layer, generator = nn.Linear(16, 8, bias=False).bfloat16(), torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(4096, 16, generator=generator), torch.arange(4096) % 3
    fused_nll(hidden.bfloat16(), bare(layer), labels, chunk=8)[0].backward()
    exact = layer.weight.detach().float().requires_grad_()
    functional.cross_entropy(hidden.bfloat16().float() @ exact.T, labels, reduction="sum").backward()
    error = (layer.weight.grad.float() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 0.01  # 0.05 if the 512 chunks were added up in bfloat16


def test_gradients_of_a_half_type_reach_every_row_of_a_large_vocabulary():
    """They are added up some rows at a time; those beyond the first lot hold labels here."""
    vocabulary, generator = losses.ROWS_AT_A_TIME + 8, torch.Generator().manual_seed(0)
    layer, labels = nn.Linear(8, vocabulary).bfloat16(), torch.arange(vocabulary - 24, vocabulary)
    hidden = torch.randn(24, 8, generator=generator).bfloat16()
    fused_nll(hidden, bare(layer), labels, chunk=5)[0].backward()
    exact = copy.deepcopy(layer).double()
    functional.cross_entropy(exact(hidden.double()), labels, reduction="sum").backward()
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        error = (ours.grad.double() - theirs.grad).abs().amax(-1)
        assert theirs.grad[-8:].abs().max() > 0.9  # of the label's own row
        assert error.max() < 0.02


def test_the_gradient_of_a_bias_is_added_up_in_float32_under_autocast():
    layer, labels, generator = nn.Linear(4, 3), torch.zeros(8192, dtype=torch.int64), torch.Generator().manual_seed(0)
    states, shares = torch.randn(8192, 4, generator=generator), torch.full((8192,), 1.0039)  # 1 in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        fused_nll(states, bare(layer), labels, shares)[0].backward()
    exact = copy.deepcopy(layer).double()
    (functional.cross_entropy(exact(states.double()), labels, reduction="sum") * 1.0039).backward()
    torch.testing.assert_close(layer.bias.grad.double(), exact.bias.grad, rtol=5e-4, atol=0)


@pytest.mark.parametrize("mixed", [False, True], ids=["float16 weights", "autocast"])
def test_in_float16_no_sum_over_tokens_ends_at_infinity(mixed):
    layer = nn.Linear(8, 31, bias=False, dtype=torch.float32 if mixed else torch.float16)
    nn.init.zeros_(layer.weight)
    states = torch.full((4096, 8), 30.0, dtype=layer.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=mixed):
        nll, count = fused_nll(states, bare(layer), torch.zeros(4096, dtype=torch.int64))  # 4096 x 30 > 65,504
        (nll / count).backward()
    expected = torch.full((31, 8), 30 / 31)
    expected[0] -= 30
    torch.testing.assert_close(layer.weight.grad.float(), expected, rtol=2e-3, atol=0)


def test_a_confident_wrong_token_gives_a_finite_fused_loss_and_an_unknown_label_none():
    states, layer = torch.tensor([[200.0, 0.0]], requires_grad=True), nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    nll = fused_nll(states, bare(layer), torch.tensor([1]))[0]
    nll.backward()
    assert nll.item() == pytest.approx(200)
    assert states.grad.tolist() == [[1, -1]]
    for label in (-1, 2):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            fused_nll(states, bare(layer), torch.tensor([label]))


def test_what_counts_for_nothing_leaves_no_trace(case):
    hidden, weight, labels, _ = case
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    layer.weight.data = weight
    states = torch.where((labels == -100)[:, None], torch.nan, hidden).requires_grad_()
    fused_nll(states, bare(layer), labels, chunk=5)[0].backward()
    assert layer.weight.grad.isfinite().all()
    assert (states.grad[labels == -100] == 0).all()
    nothing, count = fused_nll(hidden.clone().requires_grad_(), bare(layer), torch.full_like(labels, -100), chunk=5)
    assert (nothing.item(), count.item()) == (0, 0)


def test_a_fused_loss_is_differentiated_once(case):
    hidden, _, labels, _ = case
    nll = fused_nll(hidden.requires_grad_(), bare(nn.Linear(HIDDEN, VOCABULARY)), labels)[0]
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once: take loss='checkpointed'"):
        nll.backward()


def test_the_output_layer_is_called_once_and_left_as_it_was(case):
    hidden, _, labels, _ = case
    layer, seen = nn.Linear(HIDDEN, VOCABULARY), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fused_nll(hidden, bare(layer), labels, chunk=5)
    assert seen == [torch.Size([])]
    assert "forward" not in vars(layer)
    with pytest.raises(RuntimeError, match="shapes"):
        fused_nll(hidden[:, 1:], bare(layer), labels, chunk=5)
    assert "forward" not in vars(layer)


WIDE, LONG, PART = 2048, 256, 8
"""Vocabulary, tokens, and tokens of a chunk, whose float32 logits are 64 KiB, of all 2 MiB."""


def most_bytes(run, model):
    """Most bytes alive beside the weights and as much again, which gradients take."""
    with LiveBytes(model) as live:
        run()
    return live.most - sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("head", ["linear", "adapted"])
@pytest.mark.parametrize("loss", ["checkpointed", "fused", "token_nll"])
def test_no_more_logits_are_alive_than_those_of_a_few_chunks(loss, head):
    layer = nn.Linear(4, WIDE, bias=False)
    if head == "adapted":
        layer.forward = partial(nn.Linear.forward, layer)  # no product that the fused loss knows
    states, labels = torch.randn(LONG, 4, requires_grad=True), torch.arange(LONG)

    def run():
        if loss == "token_nll":
            token_nll(states, bare(layer), labels, PART)
        else:
            losses.LOSSES[loss](states, bare(layer), labels, chunk=PART)[0].backward()

    assert most_bytes(run, layer) < 6 * 4 * PART * WIDE


@pytest.mark.parametrize("loss", ["checkpointed", "fused"])
def test_steps_of_a_module_hold_the_logits_of_a_chunk_whatever_the_vocabulary(loss, monkeypatch):
    assert heads.LOGITS_AT_A_TIME * 4 == 128 * 2**20
    assert bare(nn.Linear(1, 1), vocab_size=128_256).tokens_at_a_time == 261
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", PART * WIDE)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    module = LongRoPEModule(config={**LLAMA, **sizes, "vocab_size": WIDE}, loss=loss)
    module.configure_model()
    module.log = lambda *args, **options: None  # no trainer here
    rows = torch.arange(LONG).view(1, -1)
    batch = {"input_ids": rows, "labels": rows}
    assert most_bytes(lambda: module.training_step(batch, 0).backward(), module) < 8 * 4 * PART * WIDE
    assert most_bytes(lambda: module.validation_step(batch, 0), module) < 8 * 4 * PART * WIDE


class Kernel(nn.Module):
    """Stands in for Liger's: what it is called with, and what comes out."""

    def __init__(self, reduction, accum_dtype):
        super().__init__()
        assert (reduction, accum_dtype) == ("sum", torch.float32)

    def forward(self, lin_weight, _input, target, bias=None):
        return functional.cross_entropy(_input @ lin_weight.T + bias, target, reduction="sum")


@pytest.fixture
def liger(monkeypatch):
    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Kernel
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(losses, "find_spec", lambda name: object())


def test_liger_is_called_with_the_weights_of_the_output_layer(case, liger, monkeypatch):
    monkeypatch.setattr(losses, "check_liger", lambda head, device: None)  # there is no GPU
    hidden, _, labels, _ = case
    layer = nn.Linear(HIDDEN, VOCABULARY)
    nll, count = liger_nll(hidden, bare(layer), labels)
    expected, labelled = chunked_nll(hidden, layer, labels)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count == labelled == TOKENS - 2


@pytest.mark.parametrize(
    ("layer", "config", "device", "message"),
    [
        (nn.Linear(2, 3), {}, "cpu", "`loss: liger` runs on GPUs, and the model is on cpu: take `loss: fused`."),
        (nn.Linear(2, 3), {"final_logit_softcapping": 30.0}, "cuda", "does not scale or cap logits"),
        (nn.Linear(2, 3), {"logit_scale": 0.5}, "cuda", "does not scale or cap logits"),
        (nn.Embedding(2, 3), {}, "cuda", "needs a linear output layer, got Embedding"),
    ],
)
def test_what_liger_does_not_take_is_refused_with_a_line(liger, layer, config, device, message):
    with pytest.raises(ValueError, match=message):
        losses.check_liger(bare(layer, **config), torch.device(device))


def test_liger_refuses_partitioned_weights_and_weighted_tokens(case, liger, monkeypatch):
    layer = nn.Linear(HIDDEN, VOCABULARY)
    layer.weight.ds_id = 0
    with pytest.raises(ValueError, match="which this strategy partitions"):
        losses.check_liger(bare(layer), torch.device("cuda"))
    monkeypatch.setattr(losses, "check_liger", lambda head, device: None)
    hidden, _, labels, weights = case
    with pytest.raises(ValueError, match="takes no weights per token"):
        liger_nll(hidden, bare(layer), labels, weights)


def test_a_run_without_liger_or_with_an_unknown_loss_does_not_begin(monkeypatch):
    monkeypatch.setattr(losses, "find_spec", lambda name: None)
    module = LongRoPEModule(config={"model_type": "llama"}, loss="liger")
    module.model = tiny_llama()
    with pytest.raises(ImportError, match=r"`loss: liger` needs Liger: pip install .lightning-longrope\[liger\]"):
        module.on_fit_start()
    with pytest.raises(ValueError, match="`loss` must be checkpointed, fused, liger, got 'flash'"):
        LongRoPEModule(config={"model_type": "llama"}, loss="flash")
