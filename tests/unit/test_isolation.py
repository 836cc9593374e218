"""Documents side by side in a row against the same documents in forwards of their own: logits and gradients."""

import copy

import pytest
import torch
from helpers import LLAMA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_longrope import isolation
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.isolation import Stretches
from lightning_longrope.loading import load_model
from lightning_longrope.model import candidate_rows, hidden_states, install_factors, original_rope, output_head
from lightning_longrope.sliding import sliding_window

SIZES = (3, 9, 1, 11, 24)  # two rows of 24 tokens
ROWS, LENGTH = 2, 24
CONFIGS = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 5},  # shorter than documents
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 6},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 6, "num_hidden_layers": 6},
}


def model_of(name: str, **options):
    changes = {"rope_parameters": None} if name.startswith("gemma3") else {}
    config = {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, **changes, **CONFIGS[name]}
    torch.manual_seed(0)
    return load_model(config={k: v for k, v in config.items() if v is not None}, **options).eval()


def packed() -> tuple[Tensor, Tensor, Stretches]:
    """Tokens, positions and bounds of documents of ``SIZES``."""
    tokens = torch.randint(1, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(size) for size in SIZES]).view(ROWS, LENGTH)
    bounds = torch.tensor([0, *SIZES]).cumsum(0).int()
    return tokens, positions, Stretches(bounds, max(SIZES))


def one_by_one(model, tokens: Tensor) -> Tensor:
    parts = [model(part[None], use_cache=False).logits[0] for part in tokens.flatten().split(SIZES)]
    return torch.cat(parts).view(ROWS, LENGTH, -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_side_by_side_are_documents_alone(name, attention):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("has a soft cap, which sdpa cannot do")
    model = model_of(name, dtype="float64", attn_implementation=attention)
    twin, (tokens, positions, stretches) = copy.deepcopy(model), packed()
    side_by_side = output_head(model)(hidden_states(model, tokens, positions, stretches))
    alone = one_by_one(twin, tokens)
    # eager attention takes its softmax in float32, and Gemma 3 and GPT-NeoX parts of their norms
    tolerance = 1e-6 if attention == "eager" or "gemma" in name else 1e-12
    torch.testing.assert_close(side_by_side, alone, rtol=0, atol=tolerance)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (side_by_side * weights).sum().backward()
    (alone * weights).sum().backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    compared = [(ours.grad, theirs.grad) for ours, theirs in pairs if theirs.grad is not None]
    assert len(compared) > 10
    for ours, theirs in compared:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=200 * tolerance)
    together = model(tokens, use_cache=False).logits  # and what the documents would be if they saw each other
    assert (together - alone)[0, 3:7].abs().amax(-1).min() > 1e-3
    assert torch.equal(together, twin(tokens, use_cache=False).logits)  # plain rows are as ever


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator gave."""

    elements = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        output = operator(*arguments, **(options or {}))
        sizes = [part.numel() for part in tree_leaves(output) if isinstance(part, Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


def test_no_tensor_grows_with_the_square_of_the_row():
    model, length = model_of("mistral"), 2048
    bounds = torch.arange(0, length + 1, 16, dtype=torch.int32)
    tokens, positions = torch.ones(1, length, dtype=torch.long), (torch.arange(length) % 16)[None]
    stretches = Stretches(bounds, 16)
    hidden_states(model, tokens[:, :16], positions[:, :16], Stretches(bounds[:2], 16))
    with torch.no_grad(), LargestTensor() as ours:
        hidden_states(model, tokens, positions, stretches)
    with torch.no_grad(), LargestTensor() as plain:
        model(tokens, position_ids=positions, use_cache=False, logits_to_keep=1)
    assert ours.elements <= length * 96  # the widest layer
    assert plain.elements >= length * length  # what transformers makes of such positions


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma2"])
def test_plain_long_rows_make_no_dense_mask_either(name):
    """A training step of plain rows: transformers makes a mask over all tokens of a sliding window."""
    model, length = model_of(name, attn_implementation="sdpa").train(), 400
    twin, tokens = copy.deepcopy(model), torch.randint(1, 96, (2, length), generator=torch.Generator().manual_seed(1))
    hidden_states(model, tokens[:, :16])  # which proves that bounds are taken
    with LargestTensor() as ours:
        found = hidden_states(model, tokens)
        found.square().sum().backward()
    assert ours.elements <= 2 * length * 192  # the widest layer
    with LargestTensor() as plain:
        expected = twin.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    assert (plain.elements >= length * length) == (sliding_window(model.config) is not None)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_rows_with_tables_of_their_own_make_no_dense_mask_either():
    """As in a search, whose first forward may be the first of all."""
    model, shape = model_of("mistral"), {"rotary_size": 16, "base": 10_000.0, "original_length": 32}
    tables = [RescaleFactors.yarn(target_length=length, **shape) for length in (64, 256)]
    tokens = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with candidate_rows(model, tables):
        found = hidden_states(model, tokens)
    for row, table in enumerate(tables):
        install_factors(model, table)
        alone = model.get_decoder()(input_ids=tokens[row : row + 1], use_cache=False).last_hidden_state
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-5)


def test_a_sliding_window_without_bounds_is_told_of(caplog, monkeypatch):
    model, tokens = model_of("mistral"), torch.ones(1, 40, dtype=torch.long)
    monkeypatch.setattr(isolation, "_keywords", lambda *arguments: {})  # a model that takes no keywords
    with caplog.at_level("WARNING"):
        found = hidden_states(model, tokens)
    assert "MistralForCausalLM takes no bounds of rows" in caplog.text
    assert found.shape == (1, 40, 64)


def without_bounds(layer, inputs, keywords):
    """Of what a decoder hands on, that which layers of fixed arguments take; Falcon's were such before 5.24."""
    return inputs, {name: value for name, value in keywords.items() if name != "stretches"}


def test_a_model_that_takes_no_bounds_is_refused_and_a_foreign_attention_too():
    tokens, positions, stretches = packed()
    model = model_of("llama")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(without_bounds, with_kwargs=True)
    for _ in range(2):  # the second time as well
        with pytest.raises(RuntimeError, match="documents of a row see each other in LlamaForCausalLM"):
            hidden_states(model, tokens, positions, stretches)
    model = model_of("llama")
    model.config._attn_implementation_internal = "somebodys"
    with pytest.raises(ValueError, match="need `attn_implementation` sdpa, eager, .* got 'somebodys'"):
        hidden_states(model, tokens, positions, stretches)


@pytest.mark.parametrize("window", [None, 4])
def test_the_call_of_the_variable_length_kernel(monkeypatch, window):
    """The kernel runs on CUDA alone: here a dense witness of its documented meaning stands in for it."""

    def witness(query, key, value, starts, same, longest, also, *, scale, window_size, enable_gqa):
        assert (starts is same, longest, also, enable_gqa) == (True, 24, 24, True)
        document = torch.bucketize(torch.arange(len(query)), starts[1:], right=True)
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = (document[:, None] == document) & (distance >= -window_size[1])
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

    model = model_of("mistral", dtype="float64")
    model.config.sliding_window = window
    tokens, positions, stretches = packed()
    expected = hidden_states(model, tokens, positions, stretches)
    monkeypatch.setattr(isolation.varlen, "varlen_attn", witness)
    monkeypatch.setattr(isolation, "_varlen_runs", lambda *arguments: True)
    torch.testing.assert_close(hidden_states(model, tokens, positions, stretches), expected, rtol=0, atol=1e-12)


def test_the_original_rope_is_that_of_the_stock_model_bit_for_bit():
    model = model_of("llama")
    twin, (tokens, positions, stretches) = copy.deepcopy(model), packed()
    install_factors(model, RescaleFactors.yarn(rotary_size=16, base=10_000.0, original_length=32, target_length=256))
    with original_rope(model):
        assert torch.equal(hidden_states(model, tokens), hidden_states(twin, tokens))
        isolated = hidden_states(model, tokens, positions, stretches)
    assert torch.equal(isolated, hidden_states(twin, tokens, positions, stretches))
    assert not torch.equal(hidden_states(model, tokens), hidden_states(twin, tokens))  # the factors are back


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # how transformers calls FlexAttention is its own affair
@torch.no_grad()
def test_flex_attention_isolates_too():
    tokens, positions, stretches = packed()
    expected = hidden_states(model_of("llama"), tokens, positions, stretches)
    found = hidden_states(model_of("llama", attn_implementation="flex_attention"), tokens, positions, stretches)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_variable_length_kernel_isolates_on_a_gpu(name):
    model = model_of(name, dtype="bfloat16", attn_implementation="sdpa").cuda()
    tokens, positions, stretches = packed()
    on_gpu = Stretches(stretches.cu_seq_lens.cuda(), stretches.max_length)
    found = output_head(model)(hidden_states(model, tokens.cuda(), positions.cuda(), on_gpu))
    torch.testing.assert_close(found.float(), one_by_one(model, tokens.cuda()).float(), rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
