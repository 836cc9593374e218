"""What only a GPU can show: kernels at long rows against float64, which of them run, and the CPU's numbers."""

import math

import pytest
import torch
from helpers import LLAMA, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_longrope import long_rows, search_factors
from lightning_longrope.attention import PAIRS, any_length, in_head_groups
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.loading import load_model
from lightning_longrope.model import hidden_states, install_factors
from lightning_longrope.rotary import rotary_output

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LONG = math.isqrt(PAIRS) + 1
RIGHT = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"}


class Layer:
    """As much of an attention layer as transformers' sdpa function reads."""

    is_causal = True
    num_key_value_groups = 1


class Attentions(TorchDispatchMode):
    """Names of the attention operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name = operator.overloadpacket.__name__
        if "attention" in name and "backward" not in name:
            self.names.add(name)
        return operator(*arguments, **(options or {}))


def attention(*parts):
    return any_length(sdpa_attention_forward)(Layer(), *parts, None)[0]


def random_parts(heads, length, size=128):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, heads, length, size)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def exact(query, key, value, places):
    """Attention of a few queries of the first and the last head in float64, [1, places, 2, D]."""
    places = torch.tensor(places, device="cuda")
    query, key, value = (part[:, (0, -1)].double() for part in (query[:, :, places], key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.arange(key.shape[2], device="cuda") > places[:, None]
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [LONG - 1, LONG, 70_001])
def test_attention_of_long_rows_is_that_of_float64(length):
    parts, places = random_parts(4, length), [0, 40_000, LONG - 2, length - 1]
    with Attentions() as seen:
        found = attention(*parts)[:, places][:, :, (0, -1)].double()
    torch.testing.assert_close(found, exact(*parts, places), rtol=0.02, atol=0.002)
    assert seen.names <= RIGHT or length < LONG
    assert seen.names


def test_gradients_of_long_rows_are_those_of_float64():
    parts = [part.requires_grad_() for part in random_parts(2, 70_001)]
    attention(*parts)[:, -1].double().square().sum().backward()
    doubles = [part.detach().double().requires_grad_() for part in parts]
    exact(*doubles, [70_000]).square().sum().backward()
    for ours, theirs in zip(parts, doubles, strict=True):
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 0.03


def test_beyond_two_to_the_31_elements_heads_go_in_groups():
    length = 2**31 // (32 * 128) + 1
    parts, calls = random_parts(32, length), []

    def some_heads(*parts):
        calls.append(parts[0].shape[1])
        return attention(*parts)

    places = [length // 2, length - 1]
    found = in_head_groups(some_heads, *parts)[:, places][:, :, (0, -1)].double()
    assert calls == [31, 1]
    torch.testing.assert_close(found, exact(*parts, places), rtol=0.02, atol=0.002)


def test_a_model_reads_long_rows_with_right_kernels_or_not_at_all():
    tokens = torch.ones(1, LONG, dtype=torch.int64, device="cuda")
    half = load_model(config=LLAMA, dtype="bfloat16", attn_implementation="sdpa").cuda()
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, Attentions() as seen:
            hidden_states(half, tokens)
        assert seen.names
        assert seen.names <= RIGHT
    full = load_model(config=LLAMA, attn_implementation="sdpa").cuda()
    with torch.no_grad(), pytest.warns(UserWarning, match="kernel"), pytest.raises(ValueError, match="takes float32"):
        hidden_states(full, tokens)


@torch.no_grad()
def test_in_parts_the_numbers_are_those_of_whole_rows(monkeypatch):
    config = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = load_model(config=config, dtype="bfloat16", attn_implementation="sdpa").cuda().eval()
    tokens = torch.randint(1, 96, (1, LONG), generator=torch.Generator().manual_seed(1)).cuda()
    monkeypatch.setattr(long_rows, "GROUP", 2 * LONG * 8)
    right, compare = [], long_rows._same_in_groups
    monkeypatch.setattr(long_rows, "_same_in_groups", lambda *given: right.append(compare(*given)) or right[-1])
    parts = hidden_states(model, tokens)
    assert right == [True] * len(model.get_decoder().layers)
    monkeypatch.setattr(long_rows, "TOKENS", LONG)
    torch.testing.assert_close(parts, hidden_states(model, tokens), rtol=0.05, atol=0.05)


def test_rotary_tables_in_bfloat16_are_the_rounded_ones_of_the_cpu():
    factors = RescaleFactors.yarn(rotary_size=16, base=10_000.0, original_length=32, target_length=2**21)
    positions, tables = torch.tensor([[0, 1, 77_777, 2**20 + 1, 2**21 - 1]]), []
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device, torch.bfloat16)
        install_factors(model, factors)
        tables.append([part.cpu() for part in rotary_output(model.get_decoder().rotary_emb, positions.to(device))])
    for ours, theirs in zip(*tables, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_search_finds_the_numbers_of_the_cpu():
    documents = [torch.randint(1, 96, (128,), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    found = [
        search_factors(tiny_llama().to(device), documents, 128, max_evaluations=4, seed=0) for device in ("cpu", "cuda")
    ]
    scores = [[entry["score"] for entry in result.history] for result in found]
    assert len(scores[0]) >= 4
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert found[1].forwards == found[0].forwards
