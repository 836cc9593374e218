"""Forward passes in parts against the same passes whole, and the memory they take, counted on storages."""

from types import SimpleNamespace

import pytest
import torch
from helpers import LLAMA
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lightning_longrope import long_rows
from lightning_longrope.estimate import Run, fits, layer_bytes
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.isolation import Stretches, attention_by_document
from lightning_longrope.loading import load_model
from lightning_longrope.model import candidate_rows, hidden_states
from lightning_longrope.sizes import model_size

FAMILIES = {  # fields, and whether heads can go in groups
    "llama": ({}, True),
    "mistral": ({"model_type": "mistral", "sliding_window": 5}, True),
    "qwen2": ({"model_type": "qwen2"}, True),  # projections with biases
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, True),  # heads wider than the model, and norms of them
    "phi3": ({"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1}, True),  # one projection for all three
    "gemma2": ({"model_type": "gemma2", "head_dim": 16, "sliding_window": 6, "attn_implementation": "eager"}, True),
    "gemma3_text": ({"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 6}, True),
    "olmo2": ({"model_type": "olmo2"}, False),  # norms over all heads
    "gpt_neox": ({"model_type": "gpt_neox", "num_key_value_heads": None}, False),
    "qwen3_moe": ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, True),
}


def model_of(name, **options):
    fields = dict(FAMILIES[name][0])
    attention = fields.pop("attn_implementation", "sdpa")
    changes = {"rope_parameters": None} if name == "gemma3_text" else {}
    config = {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, **changes, **fields}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4} if name != "gpt_neox" else {}
    torch.manual_seed(0)
    model = load_model(
        config={k: v for k, v in config.items() if v is not None}, attn_implementation=attention, **options
    )
    for weight in model.parameters():  # norms that begin as ones, and biases as zeros, would hide a mistake
        weight.data += 0.05 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture
def small_parts(monkeypatch):
    """Parts that rows of 20 tokens need; which layers took their heads in groups, and how many passes had parts."""
    monkeypatch.setattr(long_rows, "TOKENS", 19)
    monkeypatch.setattr(long_rows, "TILE", 17)  # of which the last has fewer, and a proof only one
    monkeypatch.setattr(long_rows, "GROUP", 2 * 20 * 2 * 16)
    seen = SimpleNamespace(groups=0, tiles=0)
    grouped, by_tokens = long_rows._grouped, long_rows.by_tokens

    def grouping(module, step, options):
        seen.groups += options["hidden_states"].shape[1] == 20
        return grouped(module, step, options)

    def tiling(*arguments, **options):
        seen.tiles += 1
        return by_tokens(*arguments, **options)

    monkeypatch.setattr(long_rows, "_grouped", grouping)
    monkeypatch.setattr(long_rows, "by_tokens", tiling)
    return seen


def tokens_of(rows=2, length=20):
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_in_parts_the_numbers_are_those_of_whole_rows(name, small_parts, monkeypatch):
    model = model_of(name, dtype="float32" if name == "qwen3_moe" else "float64")
    tokens, layers = tokens_of(), len(model.get_decoder().layers)
    found = hidden_states(model, tokens)
    assert small_parts.groups == (layers if FAMILIES[name][1] else 0)
    assert small_parts.tiles >= 3 * layers + 1 + small_parts.groups  # two norms and an MLP a layer, the last norm
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(long_rows, "TOKENS", 40)
    expected = hidden_states(model, tokens)
    # norms and eager attention compute in float32 whatever the model is
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_with_gradients_and_in_short_rows_nothing_is_in_parts(small_parts):
    model = model_of("llama")
    hidden_states(model, tokens_of()).sum().backward()
    with torch.no_grad():
        hidden_states(model, tokens_of(1, 19))
    assert (small_parts.groups, small_parts.tiles) == (0, 0)


@torch.no_grad()
def test_documents_and_tables_of_rows_stay_apart_in_parts(small_parts, monkeypatch):
    model, tokens = model_of("llama", dtype="float64"), tokens_of()
    shape = {"rotary_size": 8, "base": 10_000.0, "original_length": 32}
    tables = [RescaleFactors.yarn(target_length=length, **shape) for length in (64, 256)]
    positions = torch.cat([torch.arange(13), torch.arange(7)]).expand(2, -1)
    stretches = Stretches(torch.tensor([0, 13, 20, 33, 40], dtype=torch.int32), 13)
    passes = []
    for longest in (19, 40):
        monkeypatch.setattr(long_rows, "TOKENS", longest)
        with candidate_rows(model, tables):
            passes.append((hidden_states(model, tokens), hidden_states(model, tokens, positions, stretches)))
    assert small_parts.groups == 4
    for ours, theirs in zip(*passes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (passes[0][0] - passes[0][1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("heads", [1, 3, 4, 6])
def test_any_number_of_heads_at_a_time(name, heads, small_parts, monkeypatch):
    """Two query heads read each key head here: groups of 1, 2, 4 and 6 heads of 8."""
    model, tokens = model_of(name, dtype="float64"), tokens_of()
    monkeypatch.setattr(long_rows, "GROUP", heads * 2 * 20 * 8)
    found = hidden_states(model, tokens)
    assert small_parts.groups == 2
    monkeypatch.setattr(long_rows, "TOKENS", 40)
    torch.testing.assert_close(found, hidden_states(model, tokens), rtol=0, atol=2e-6)


@torch.no_grad()
def test_half_precision_in_parts(small_parts, monkeypatch):
    model, tokens = model_of("llama"), tokens_of()
    exact = hidden_states(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = hidden_states(model, tokens)
    model = model.to(torch.bfloat16)
    half = hidden_states(model, tokens)
    assert small_parts.groups == 6
    monkeypatch.setattr(long_rows, "TOKENS", 40)
    torch.testing.assert_close(half, hidden_states(model, tokens), rtol=0.02, atol=0.02)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)
    assert (mixed - exact).abs().max() > 0


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_trace(small_parts):
    model = model_of("llama")
    inner = model.get_decoder().layers[1].mlp
    inner.forward = lambda hidden: 1 / 0  # somebody's own, which must come back
    own = inner.forward
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, tokens_of())
    assert [module for module in model.modules() if "forward" in vars(module)] == [inner]
    assert inner.forward is own


class WholeOnly(LlamaAttention):
    """An attention layer that computes something else when it has fewer heads."""

    def forward(self, hidden_states, **options):
        return super().forward(hidden_states * self.q_proj.weight.shape[0], **options)


@torch.no_grad()
def test_layers_that_are_not_what_they_seem_stay_whole(small_parts, monkeypatch):
    model, heard = model_of("llama"), []
    first, second = (layer.self_attn for layer in model.get_decoder().layers)
    first.__class__ = WholeOnly
    second.k_proj.register_forward_hook(lambda module, given, output: heard.append(output.shape))
    found = hidden_states(model, tokens_of())
    assert small_parts.groups == 0
    assert heard == [(2, 20, 32)]  # somebody listens to this projection
    monkeypatch.setattr(long_rows, "TOKENS", 40)
    torch.testing.assert_close(found, hidden_states(model, tokens_of()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_that_other_ranks_hold_parts_of_stay_as_their_strategy_knows_them(small_parts):
    """ZeRO-3 gathers a layer at its call, which all ranks must make alike; views of a shard's rows are no heads."""
    model, tokens = model_of("llama"), tokens_of()
    expected = hidden_states(model, tokens)
    assert small_parts.groups == 2
    first, second = (layer.self_attn for layer in model.get_decoder().layers)
    first.k_proj.weight.full_tensor = second.o_proj.weight.full_tensor = None  # as a DTensor has
    small_parts.groups = 0
    torch.testing.assert_close(hidden_states(model, tokens), expected, rtol=0, atol=1e-5)
    assert small_parts.groups == 0
    model.get_input_embeddings().weight.ds_id = 0
    small_parts.tiles = 0
    torch.testing.assert_close(hidden_states(model, tokens), expected, rtol=0, atol=1e-5)
    assert small_parts.tiles == 0


LLAMA_2 = {"model_type": "llama", "num_hidden_layers": 2}
LLAMA_3 = {**LLAMA_2, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
WINDOW = 2_097_152


def live_bytes(fields, tokens):
    """Most bytes beside the weights in a forward pass of the real shapes; its tensors have sizes but no content."""
    AttentionInterface.register("unmasked", attention_by_document("sdpa"))
    AttentionMaskInterface.register("unmasked", lambda *arguments, **options: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="unmasked")
        with torch.no_grad(), LiveBytes(model) as live:
            hidden_states(model.eval(), torch.zeros(1, tokens, dtype=torch.int64))
    return live.most


@pytest.mark.parametrize("fields", [LLAMA_2, LLAMA_3], ids=["llama-2-7b", "llama-3-8b"])
def test_two_million_tokens_of_a_7b_fit_on_one_card(fields, monkeypatch):
    monkeypatch.setattr(long_rows, "_same_in_groups", lambda *arguments: True)  # values do not exist here
    ours = live_bytes(fields, WINDOW)
    monkeypatch.setattr(long_rows, "TOKENS", WINDOW)
    whole = live_bytes(fields, WINDOW)
    size = model_size(AutoConfig.for_model(**{**fields, "num_hidden_layers": 32}))
    assert ours + 2 * size.parameters < 0.8 * 141e9
    assert whole + 2 * size.parameters > 1.4 * 141e9
    assert layer_bytes(size, Run(WINDOW, training=False)) * WINDOW == pytest.approx(ours, rel=0.04)
    assert fits(size, Run(WINDOW, training=False), 141e9)
    copies = ours / (WINDOW * 4096 * 2)  # of a row's hidden states
    assert copies == pytest.approx(5.1, abs=0.1)
