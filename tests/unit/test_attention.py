"""Which attention kernel a model gets, and that it is said."""

import pytest
import torch
from helpers import LLAMA
from transformers import Gemma2ForCausalLM

from lightning_longrope import attention
from lightning_longrope.attention import choose_attention
from lightning_longrope.layers import decoder_layers
from lightning_longrope.loading import load_model
from lightning_longrope.memory import Memory, save_memory
from lightning_longrope.model import hidden_states

GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 16}


def machine(monkeypatch, cuda, flash):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: flash)


@pytest.mark.parametrize(
    ("cuda", "flash", "dtype", "kernel", "reason"),
    [
        (False, False, torch.bfloat16, None, "needs CUDA"),
        (True, False, torch.bfloat16, None, "pip install flash-attn"),
        (True, True, torch.float32, None, "these are float32"),
        (True, True, torch.bfloat16, "flash_attention_2", "weights are bfloat16"),
    ],
)
def test_the_choice_follows_the_machine(monkeypatch, cuda, flash, dtype, kernel, reason):
    machine(monkeypatch, cuda, flash)
    found, why = choose_attention("auto", dtype)
    assert (found, reason in why) == (kernel, True)
    assert choose_attention("flex_attention", dtype) == ("flex_attention", "as configured")


def test_it_is_said_once_and_only_by_the_first_process(monkeypatch, caplog):
    attention._say.cache_clear()
    caplog.set_level("INFO", logger="lightning_longrope")
    monkeypatch.setenv("RANK", "1")
    load_model(config=LLAMA)
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        load_model(config=LLAMA)
    assert [record.getMessage() for record in caplog.records] == ["Attention: sdpa (FlashAttention needs CUDA)."]


def test_eager_attention_that_nobody_asked_for_is_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", False)  # as in some versions of transformers
    attention._say.cache_clear()
    caplog.set_level("INFO", logger="lightning_longrope")
    load_model(config=GEMMA2)
    assert "Gemma2ForCausalLM has no sdpa attention" in caplog.text
    caplog.clear()
    load_model(config=GEMMA2, attn_implementation="eager")
    assert [record.getMessage() for record in caplog.records] == ["Attention: eager (as configured)."]


FAMILIES = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1},
}


def with_gradients(model, tokens):
    """Hidden states, and the gradient of every weight."""
    model.zero_grad()
    states = hidden_states(model, tokens)
    states.square().sum().backward()
    return [states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(  # 1, 1, 2, 2, 3 heads of 4 at a time: tensors of as many elements are too large
    "elements", [24 * 16 + 1, 2 * 24 * 16, 2 * 24 * 16 + 1, 3 * 24 * 16, 3 * 24 * 16 + 1]
)
def test_heads_in_groups_are_all_heads(monkeypatch, name, elements):
    torch.manual_seed(0)
    model = load_model(config={**LLAMA, **FAMILIES[name]}, dtype="float64", attn_implementation="sdpa").train()
    tokens = torch.randint(1, 96, (1, 24), generator=torch.Generator().manual_seed(1))
    whole = with_gradients(model, tokens)
    monkeypatch.setattr(attention, "PAIRS", 23 * 23)
    calls, contiguous = [], []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *parts, **options: (
        calls.append([part.numel() for part in parts]) or contiguous.append(all(p.is_contiguous() for p in parts))
        or sdpa(*parts, **options)))  # fmt: skip
    monkeypatch.setattr(attention, "ELEMENTS", elements)
    grouped = with_gradients(model, tokens)
    assert len(whole) == len(grouped) > 10
    for ours, theirs in zip(grouped, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    groups = 4 if elements <= 2 * 24 * 16 else 2  # queries that read the same keys stay together where they fit
    assert len(calls) == 2 * groups * (1 if name != "mistral" else 5)  # layers; blocks of its sliding window
    assert max(map(max, calls)) < elements
    assert all(contiguous) or name == "mistral"  # strides of all heads reach beyond; a window's blocks are views


def test_long_rows_get_no_kernel_that_is_wrong_for_them(monkeypatch):
    """Neither the memory-efficient kernel nor the math one, in the forward pass and where it is computed again."""
    model = load_model(config=LLAMA, attn_implementation="sdpa").train()
    save_memory(model, decoder_layers(model), True, Memory())
    cuda, seen = torch.backends.cuda, []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*parts, **options):
        seen.append((cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(),
                     cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))  # fmt: skip
        return sdpa(*parts, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "PAIRS", 20 * 20)
    with_gradients(model, torch.ones(1, 20, dtype=torch.int64))
    assert seen == [(True, True, True, True)] * 4
    seen.clear()
    with_gradients(model, torch.ones(1, 21, dtype=torch.int64))
    assert seen == [(True, True, False, False)] * 4  # two layers, forward and again
    cuda.enable_cudnn_sdp(False)  # what a user has switched off stays off
    seen.clear()
    try:
        hidden_states(model, torch.ones(1, 21, dtype=torch.int64))
    finally:
        cuda.enable_cudnn_sdp(True)
    assert seen == [(True, False, False, False)] * 2
    assert cuda.math_sdp_enabled()
    assert cuda.mem_efficient_sdp_enabled()


def test_a_long_row_without_a_kernel_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(attention, "PAIRS", 20 * 20)
    fit = attention.any_length(lambda module, *parts, **options: (
        torch.nn.functional.scaled_dot_product_attention(*parts[:3]), None))  # fmt: skip
    query, value = torch.ones(1, 2, 21, 16), torch.ones(1, 2, 21, 8)  # flash wants heads of one size
    with pytest.raises(ValueError, match=r"rows of 21 tokens takes float32 with heads of 16\. .*bf16-mixed") as raised:
        fit(None, query, query, value, None)
    assert "\n" not in str(raised.value)
    assert fit(None, query[:, :, :20], query[:, :, :20], value[:, :, :20], None)[0].shape == (1, 2, 20, 8)
