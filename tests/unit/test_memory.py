"""Savings of memory in training: the same gradients for less memory, counted on the storages that are alive."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import LLAMA
from live_bytes import LiveBytes
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_longrope import LongRoPEModule, memory
from lightning_longrope.layers import decoder_layers
from lightning_longrope.loading import load_model
from lightning_longrope.losses import chunked_nll
from lightning_longrope.memory import Memory, save_memory
from lightning_longrope.model import hidden_states, output_head

FAMILIES = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gemma": {"model_type": "gemma", "head_dim": 16},
}
SAVINGS = {
    "checkpointing": (True, Memory()),
    "offload": (True, Memory(offload_activations=True)),
    "tiles": (False, Memory(mlp_tile=7)),  # of which the last has 3 tokens
    "all": (True, Memory(offload_activations=True, mlp_tile=7)),
}


def model_of(name, dtype="float32", **changes):
    torch.manual_seed(0)
    config = {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES[name], **changes}
    model = load_model(config={k: v for k, v in config.items() if v is not None}, dtype=dtype)
    return model.train()


def step(model, tokens):
    """One forward and backward pass, as the module runs them."""
    hidden = hidden_states(model, tokens)[:, :-1].flatten(0, 1)
    nll, count = chunked_nll(hidden, output_head(model), tokens[:, 1:].flatten(), chunk=16)
    (nll / count).backward()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_a_plain_step(name):
    plain = model_of(name)
    tokens = torch.randint(1, 96, (2, 31), generator=torch.Generator().manual_seed(1))
    twins = {saving: copy.deepcopy(plain) for saving in SAVINGS}
    step(plain, tokens)
    for saving, (checkpointing, further) in SAVINGS.items():
        twin = twins[saving]
        save_memory(twin, decoder_layers(twin), checkpointing, further)
        step(twin, tokens)
        compared = 0
        for (weight, ours), theirs in zip(twin.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=f"{saving}: {weight}")
            compared += bool(theirs.grad.abs().max() > 1e-4)
        assert compared > 12


TOKENS, HIDDEN, MLP = 1536, 32, 256


def peak(layers, checkpointing, further):
    """Most bytes alive in a training step of a Llama on one row, beyond its weights."""
    model = model_of("llama", hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, vocab_size=64)
    save_memory(model, decoder_layers(model), checkpointing, further)
    with LiveBytes(model) as live:
        step(model, torch.zeros(1, TOKENS, dtype=torch.int64))
    assert live.now >= sum(p.numel() * 4 for p in model.parameters())  # gradients, which stay
    return live.most


def test_each_saving_saves():
    stored, inner = TOKENS * HIDDEN * 4, TOKENS * MLP * 4
    two, six = (peak(layers, False, Memory()) for layers in (2, 6))
    assert six - two > 4 * 3 * inner  # gate, up and their product of every layer
    two, six = (peak(layers, True, Memory()) for layers in (2, 6))
    assert six - two == 4 * stored  # the input of every layer and nothing else
    tiled = peak(2, True, Memory(mlp_tile=TOKENS // 32))
    assert two - tiled > 4 * inner  # what the MLP of one layer needed at once


def test_offloaded_inputs_are_all_that_waits_on_the_cpu(monkeypatch):
    """On a CPU nothing moves, so this counts what would."""
    moved = []
    monkeypatch.setattr(memory, "save_on_cpu", lambda pin_memory: saved_tensors_hooks(
        lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor))  # fmt: skip
    model = model_of("llama")
    save_memory(model, decoder_layers(model), True, Memory(offload_activations=True))
    step(model, torch.zeros(2, 16, dtype=torch.int64))
    assert [shape for shape in moved if shape != (0,)] == [(2, 16, 64)] * 2  # one for each layer


@pytest.mark.parametrize("cuda", [True, False])
def test_what_leaves_a_gpu_goes_through_pinned_memory(monkeypatch, cuda):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(memory, "save_on_cpu", lambda pin_memory: asked.append(pin_memory) or nullcontext())
    assert memory.offloaded_checkpoint(torch.neg, torch.ones(1, requires_grad=True)).item() == -1
    assert asked == [cuda]


def test_every_norm_and_mlp_is_tiled_that_of_the_decoder_s_end_too():
    model = model_of("llama")
    save_memory(model, decoder_layers(model), False, Memory(mlp_tile=7))
    tiled = {name for name, module in model.named_modules() if "forward" in vars(module)}
    inner = ("mlp", "input_layernorm", "post_attention_layernorm")
    assert tiled == {"model.norm", *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in inner)}


def test_arguments_without_effect_are_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing: true"):
        LongRoPEModule(config=LLAMA, memory=Memory(offload_activations=True))
    with pytest.raises(ValueError, match="`compile_layers` has no effect"):
        LongRoPEModule(
            config=LLAMA, gradient_checkpointing=True, compile_layers=True, memory=Memory(offload_activations=True)
        )
    with pytest.raises(ValueError, match="at least 1 token"):
        Memory(mlp_tile=0)
    with pytest.raises(ValueError, match="has no `mlp`"):
        save_memory(None, nn.ModuleList([nn.Linear(2, 2)]), False, Memory(mlp_tile=8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_inputs_leave_the_gpu():
    tokens = torch.randint(1, 96, (1, 8192), generator=torch.Generator().manual_seed(1)).cuda()
    peaks, gradients = [], []
    for further in (Memory(), Memory(offload_activations=True)):
        model = model_of("llama", num_hidden_layers=12, dtype="bfloat16").cuda()
        save_memory(model, decoder_layers(model), True, further)
        torch.cuda.reset_peak_memory_stats()
        step(model, tokens)
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert peaks[0] - peaks[1] > 10 * 8192 * 64 * 2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
