"""Which attention kernel a model gets, and that it is said."""

import pytest
import torch
from helpers import LLAMA

from lightning_longrope import attention
from lightning_longrope.attention import choose_attention
from lightning_longrope.loading import load_model

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


def test_eager_attention_that_nobody_asked_for_is_a_warning(caplog):
    attention._say.cache_clear()
    caplog.set_level("INFO", logger="lightning_longrope")
    load_model(config=GEMMA2)
    assert "Gemma2ForCausalLM has no sdpa attention" in caplog.text
    caplog.clear()
    load_model(config=GEMMA2, attn_implementation="eager")
    assert [record.getMessage() for record in caplog.records] == ["Attention: eager (as configured)."]
