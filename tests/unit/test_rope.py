"""Rescaled RoPE against independent witnesses: plain arithmetic, transformers, and what an attention score may see."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lightning_longrope import rope

SHAPES = [  # rotary size, base, original length, target length
    (128, 10_000.0, 4096, 131_072),
    (64, 500_000.0, 8192, 65_536),
    (16, 10_000.0, 64, 256),
    (8, 100.0, 256, 384),
]


def _keywords(rotary_size, base, original_length, target_length):
    return {
        "rotary_size": rotary_size,
        "base": base,
        "original_length": original_length,
        "target_length": target_length,
    }


def _theirs(rope_type, shape, seq_len=None, max_position_embeddings=None, **own):
    """transformers' frequencies and attention factor."""
    rotary_size, base, original_length, target_length = shape
    parameters = {"rope_type": rope_type, "rope_theta": base, **own}
    config = LlamaConfig(
        hidden_size=2 * rotary_size,
        num_attention_heads=2,
        max_position_embeddings=max_position_embeddings or target_length,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)


def _assert_speeds(factors, shape, theirs):
    """The table agrees with float32 frequencies; atol is 0 because the slow pairs are tiny."""
    ours = rope.rescaled_inv_freq(factors, rotary_size=shape[0], base=shape[1])
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-6, atol=0)


def test_speeds_are_the_pretrained_ones_divided_by_the_factors():
    factors = [1.0, 1.5, 4.0, 8.0]  # all different: a swapped or reversed index must show
    expected = [1 / (factor * 10_000.0 ** (2 * i / 8)) for i, factor in enumerate(factors)]
    actual = rope.rescaled_inv_freq(torch.tensor(factors), rotary_size=8, base=10_000.0)
    assert actual.tolist() == pytest.approx(expected, rel=1e-14)
    ones = rope.pretrained_inv_freq(rotary_size=8, base=10_000.0)
    assert ones.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-14)
    rows = rope.rescaled_inv_freq(torch.tensor([factors, [1.0] * 4]), rotary_size=8, base=10_000.0)
    assert torch.equal(rows[0], actual)
    assert torch.equal(rows[1], ones)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_agrees_with_transformers(shape):
    theirs, _ = _theirs("linear", shape, factor=shape[3] / shape[2])
    _assert_speeds(rope.linear_factors(**_keywords(*shape)), shape, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_ntk_is_a_larger_base(shape):
    rotary_size, base, original_length, target_length = shape
    larger = base * (target_length / original_length) ** (rotary_size / (rotary_size - 2))
    expected = torch.tensor([larger ** (-2 * i / rotary_size) for i in range(rotary_size // 2)], dtype=torch.float64)
    ours = rope.rescaled_inv_freq(rope.ntk_factors(**_keywords(*shape)), rotary_size=rotary_size, base=base)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_ntk_agrees_with_transformers(shape, factor):
    theirs, _ = _theirs("dynamic", shape, seq_len=shape[3], max_position_embeddings=shape[2], factor=factor)
    _assert_speeds(rope.dynamic_ntk_factors(**_keywords(*shape), factor=factor), shape, theirs)


@pytest.mark.parametrize("own", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"truncate": False}])
@pytest.mark.parametrize("shape", SHAPES)
def test_yarn_agrees_with_transformers(shape, own):
    scale = shape[3] / shape[2]
    theirs, attention = _theirs("yarn", shape, factor=scale, original_max_position_embeddings=shape[2], **own)
    _assert_speeds(rope.yarn_factors(**_keywords(*shape), **own), shape, theirs)
    assert rope.yarn_attention_factor(original_length=shape[2], target_length=shape[3]) == pytest.approx(attention)


def test_yarn_by_hand():
    # 1,000 tokens, speeds 1 and 0.01: 159 turns keep their speed, 1.6 turns are on the ramp from pair 0 to pair 2
    factors = rope.yarn_factors(rotary_size=4, base=10_000.0, original_length=1000, target_length=4000)
    assert factors.tolist() == pytest.approx([1.0, 1 / (0.5 / 4 + 0.5)])
    assert rope.yarn_attention_factor(original_length=1000, target_length=4000) == pytest.approx(1.1386294361)


@pytest.mark.parametrize("own", [{}, {"factor": 8.0}, {"low_freq_factor": 2.0, "high_freq_factor": 16.0}])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama3_agrees_with_transformers(shape, own):
    given = {"factor": shape[3] / shape[2], "low_freq_factor": 1.0, "high_freq_factor": 4.0, **own}
    theirs, _ = _theirs("llama3", shape, original_max_position_embeddings=shape[2], **given)
    _assert_speeds(rope.llama3_factors(**_keywords(*shape), **own), shape, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_longrope_agrees_with_transformers(shape):
    pairs = shape[0] // 2
    long, short = [1 + 0.3 * i for i in range(pairs)], [1 + 0.01 * i for i in range(pairs)]
    own = {"long_factor": long, "short_factor": short, "original_max_position_embeddings": shape[2]}
    for seq_len, values in ((shape[2], short), (shape[2] + 1, long)):
        theirs, attention = _theirs("longrope", shape, seq_len=seq_len, **own)
        _assert_speeds(torch.tensor(values, dtype=torch.float64), shape, theirs)
        ours = rope.longrope_attention_factor(original_length=shape[2], target_length=shape[3])
        assert ours == pytest.approx(attention)


def test_attention_factors_by_hand():
    assert rope.longrope_attention_factor(original_length=4096, target_length=4096) == 1
    assert rope.yarn_attention_factor(original_length=4096, target_length=4096) == 1
    squared = rope.longrope_attention_factor(original_length=256, target_length=2048) ** 2
    assert squared == pytest.approx(1 + 3 / 8)  # ln 8 / ln 256 = 3 / 8


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic_ntk", "yarn", "llama3"])
def test_every_method_is_the_pretrained_model_at_its_own_length_and_monotone_beyond(name):
    method = getattr(rope, f"{name}_factors")
    same = method(**_keywords(128, 10_000.0, 4096, 4096))
    assert same.dtype == torch.float64
    assert same.tolist() == [1.0] * 64
    longer = method(**_keywords(128, 10_000.0, 4096, 200_000))  # a ratio that is no power of two
    assert (longer >= 1).all()
    assert (longer.diff() >= 0).all()
    assert longer[-1].item() == pytest.approx(200_000 / 4096)


def _angle(position, pair, factors, *, rotary_size=8, base=10_000.0, start_tokens=0):
    """The angle of the paper's equation, in Python's float64."""
    slowed = 1 if position < start_tokens else factors[pair]
    return position / (slowed * base ** (2 * pair / rotary_size))


@pytest.mark.parametrize("chunk", [1 << 22, 24])
def test_cos_sin_is_the_equation_of_the_paper_row_by_row(monkeypatch, chunk):
    monkeypatch.setattr(rope, "_CHUNK", chunk)
    factors = [[1.0, 1.5, 4.0, 8.0], [2.0, 3.0, 5.0, 9.0], [1.0, 1.0, 1.0, 1.0]]
    starts, scales = [3, 0, 5], [1.25, 1.0, 0.5]
    positions = [0, 1, 2, 3, 4, 1023, 2_097_151]
    cos, sin = rope.cos_sin(
        torch.tensor([positions]),
        rope.rescaled_inv_freq(torch.tensor(factors), rotary_size=8, base=10_000.0),
        pretrained=rope.pretrained_inv_freq(rotary_size=8, base=10_000.0),
        start_tokens=torch.tensor(starts),
        attention_factor=torch.tensor(scales, dtype=torch.float64),
        dtype=torch.float64,
    )
    assert cos.shape == sin.shape == (3, 7, 8)
    for row, (table, start, scale) in enumerate(zip(factors, starts, scales, strict=True)):
        for index, position in enumerate(positions):
            for channel in range(8):
                angle = _angle(position, channel % 4, table, start_tokens=start)
                assert cos[row, index, channel].item() == pytest.approx(scale * math.cos(angle), abs=1e-9)
                assert sin[row, index, channel].item() == pytest.approx(scale * math.sin(angle), abs=1e-9)


def test_one_table_for_all_rows_equals_the_same_table_for_each():
    pretrained = rope.pretrained_inv_freq(rotary_size=8, base=10_000.0)
    inv_freq = pretrained / torch.tensor([1.0, 1.5, 4.0, 8.0], dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 500_000]])
    one = rope.cos_sin(
        positions, inv_freq, pretrained=pretrained, start_tokens=2, attention_factor=1.1, dtype=torch.float32
    )
    each = rope.cos_sin(
        positions,
        inv_freq.expand(2, -1),
        pretrained=pretrained,
        start_tokens=torch.tensor([2, 2]),
        attention_factor=torch.tensor([1.1, 1.1], dtype=torch.float64),
        dtype=torch.float32,
    )
    assert one[0].dtype == torch.float32
    assert torch.equal(one[0], each[0])
    assert torch.equal(one[1], each[1])


def _scores(inv_freq, start_tokens, pretrained, pairs_of_positions):
    """Dot products of one fixed query and key, rotated by transformers' own function, at pairs of positions."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)
    scores = []
    for where_query, where_key in pairs_of_positions:
        rotated = []
        for position in (where_query, where_key):
            cos, sin = rope.cos_sin(
                torch.tensor([[position]]),
                inv_freq,
                pretrained=pretrained,
                start_tokens=start_tokens,
                attention_factor=1.3,
                dtype=torch.float64,
            )
            rotated.append(apply_rotary_pos_emb(query, key, cos, sin))
        scores.append((rotated[0][0] * rotated[1][1]).sum().item())
    return scores


def test_attention_scores_depend_on_distance_only_beyond_the_start_tokens():
    pretrained = rope.pretrained_inv_freq(rotary_size=16, base=10_000.0)
    factors = torch.linspace(1, 40, 8, dtype=torch.float64)
    inv_freq = rope.rescaled_inv_freq(factors, rotary_size=16, base=10_000.0)
    pairs = [(10 + shift, 7 + shift) for shift in (0, 1, 90, 4096, 1_000_000)]
    beyond = _scores(inv_freq, 4, pretrained, pairs)
    assert beyond == pytest.approx([beyond[0]] * len(pairs), abs=1e-8)
    assert _scores(inv_freq, 4, pretrained, [(11, 7)])[0] != pytest.approx(beyond[0], abs=1e-3)
    # a key among the start tokens turns by another table, so the same distance gives another score
    across = _scores(inv_freq, 8, pretrained, [(10, 7)])[0]
    assert across != pytest.approx(beyond[0], abs=1e-3)


@pytest.mark.parametrize(
    "bad", [[1.0] * 3, [1.0, 0.5, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0], [1.0, math.inf, 1.0, 1.0], [[[1.0] * 4]]]
)
def test_rejects_factors_that_cannot_be_a_rescaling(bad):
    with pytest.raises(ValueError, match="`factors`"):
        rope.rescaled_inv_freq(torch.tensor(bad), rotary_size=8, base=10_000.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rotary_size": 7}, "`rotary_size`"),
        ({"base": 1.0}, "`base`"),
        ({"target_length": 100}, "swapped"),
        ({"original_length": 1}, "`original_length`"),
        ({"beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast"),
    ],
)
def test_rejects_numbers_that_make_no_table(changed, message):
    with pytest.raises(ValueError, match=message):
        rope.yarn_factors(**{**_keywords(8, 10_000.0, 4096, 8192), **changed})


def test_methods_reject_their_own_bad_numbers():
    good = _keywords(8, 10_000.0, 4096, 8192)
    with pytest.raises(ValueError, match="`factor`"):
        rope.dynamic_ntk_factors(**good, factor=0.5)
    with pytest.raises(ValueError, match="`factor`"):
        rope.llama3_factors(**good, factor=0.5)
    with pytest.raises(ValueError, match="high_freq_factor"):
        rope.llama3_factors(**good, high_freq_factor=1.0)
    with pytest.raises(ValueError, match="at least 4"):
        rope.ntk_factors(**{**good, "rotary_size": 2})
