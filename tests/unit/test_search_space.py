"""The search space against its own contract, written out again here with plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longrope.search import Candidate, SearchSpace

SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 128, "target_length": 1024}


def valid(candidate, space):
    """The constraints of the paper's Table 1 in plain arithmetic."""
    low, high, free = space.min_factor, space.max_factor, candidate.values[space.pinned :]
    assert len(candidate.values) == space.rotary_size // 2
    assert candidate.values[: space.pinned] == (1.0,) * space.pinned
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in free)
    assert all(abs(value / space.step - round(value / space.step)) < 1e-6 for value in free)
    assert all(float(f"{value:.10g}") == value for value in free)  # 1.07 and never 1.0700000000000001
    assert all(type(value) is float for value in candidate.values)
    assert candidate.start_tokens in space.start_tokens
    assert candidate.attention_factor == space.attention_factor
    if space.monotone:
        assert all(a <= b for a, b in zip(candidate.values, candidate.values[1:], strict=False))
    return True


def test_defaults_are_those_of_the_paper():
    space = SearchSpace(**SHAPE)
    assert space.pairs == 8
    assert space.max_factor == 10.0  # 1.25 x 8
    assert (space.min_factor, space.step, space.pinned, space.monotone) == (1.0, 0.01, 0, True)
    assert space.start_tokens == (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
    assert space.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(128)), rel=1e-12)


def test_seeds_are_linear_ntk_and_yarn_by_hand():
    linear, ntk, yarn = SearchSpace(**SHAPE, max_factor=10.0).seeds()
    assert [seed.origin for seed in (linear, ntk, yarn)] == ["seed:linear", "seed:ntk", "seed:yarn"]
    assert linear.values == (8.0,) * 8
    assert ntk.values == pytest.approx([8 ** (2 * i / 14) for i in range(8)], abs=0.005001)
    # 32 turns in 128 tokens are left of pair 0, one turn lies at pair 2.62, so speeds fall evenly from pair 0 to 3
    keep = [1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0]
    assert yarn.values == pytest.approx([1 / (m + (1 - m) / 8) for m in keep], abs=0.005001)


@pytest.mark.parametrize(("pinned", "largest"), [(0, 10.0), (3, 10.0), (7, 10.0), (2, 4.0)])
def test_seeds_and_random_points_lie_in_the_space(pinned, largest):
    space = SearchSpace(**SHAPE, pinned=pinned, max_factor=largest)
    rng = np.random.default_rng(0)
    points = [*space.seeds(), *(space.random(rng) for _ in range(200))]
    assert all(valid(point, space) and space.contains(point) for point in points)
    assert len({point.start_tokens for point in points}) == 14
    assert max(max(point.values) for point in points) > 0.95 * min(largest, 8.0)


def test_random_points_are_even_on_the_logarithmic_scale():
    space = SearchSpace(**SHAPE)
    rng = np.random.default_rng(0)
    logs = np.log([space.random(rng).values for _ in range(500)])
    assert logs.mean() == pytest.approx(math.log(10) / 2, abs=0.05)  # a running maximum of unsorted draws has 1.7


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-3, 99), min_size=8, max_size=8),
    pinned=st.integers(0, 7),
    monotone=st.booleans(),
    step=st.sampled_from([0.01, 0.05, 0.1, 0.25, 1.0]),
    lowest=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_projection_lands_in_the_space_and_stays_there(values, pinned, monotone, step, lowest):
    space = SearchSpace(**SHAPE, pinned=pinned, monotone=monotone, step=step, min_factor=lowest)
    candidate = space.candidate(values)
    assert valid(candidate, space)
    assert space.contains(candidate)
    assert space.project(candidate.values) == candidate.values
    assert space.decode(space.encode(candidate), candidate.start_tokens) == candidate


def test_projection_moves_a_point_of_the_box_by_half_a_step_at_most():
    values = np.sort(np.random.default_rng(0).uniform(1, 10, (50, 8)), axis=1)
    space = SearchSpace(**SHAPE)
    assert max(np.abs(np.array(space.project(row)) - row).max() for row in values) <= 0.005 + 1e-9


def test_contains_refuses_each_broken_rule():
    space = SearchSpace(**SHAPE, pinned=1)
    good = (1.0, 1.0, 1.5, 2.0, 2.0, 8.0, 9.99, 10.0)
    factor = space.attention_factor
    assert space.contains(Candidate(good, 4, factor))
    broken = {
        "pin": (1.01, *good[1:]),
        "order": (*good[:4], 1.99, *good[5:]),
        "grid": (*good[:3], 2.005, *good[4:]),
        "last bit": (*good[:3], math.nextafter(2.0, 3), *good[4:]),
        "bound": (*good[:7], 10.01),
        "count": good[:7],
        "nan": (*good[:7], math.nan),
    }
    assert [rule for rule, values in broken.items() if space.contains(Candidate(values, 4, factor))] == []
    assert not space.contains(Candidate(good, 3, factor))
    assert not space.contains(Candidate(good, 4, factor + 1e-12))
    falling = SearchSpace(**SHAPE, pinned=1, monotone=False)
    assert falling.contains(Candidate(broken["order"], 4, factor))


def test_origin_is_no_part_of_a_candidate():
    one, other = Candidate((1.0,), 0, 1.0, "mutant"), Candidate((1.0,), 0, 1.0, "crossover")
    assert one == other
    assert len({one, other}) == 1


def test_a_candidate_becomes_the_factors_it_holds():
    space = SearchSpace(**SHAPE, attention_factor=1.25)
    factors = space.decode(space.encode(space.seeds()[1]), 64).to_factors(space)
    assert factors.values == space.seeds()[1].values
    assert (factors.original_length, factors.target_length) == (128, 1024)
    assert (factors.start_tokens, factors.attention_factor) == (64, 1.25)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rotary_size": 15}, "rotary_size"),
        ({"base": 1.0}, "base"),
        ({"target_length": 127}, "target_length"),
        ({"original_length": 0}, "original_length"),
        ({"min_factor": 0.5}, "min_factor"),
        ({"min_factor": 11.0}, "min_factor"),
        ({"max_factor": math.nan}, "max_factor"),
        ({"max_factor": math.inf}, "max_factor"),
        ({"step": 0.0}, "step"),
        ({"pinned": 8}, "pinned"),
        ({"pinned": -1}, "pinned"),
        ({"start_tokens": ()}, "start_tokens"),
        ({"start_tokens": (0, -1)}, "start_tokens"),
        ({"attention_factor": 0.0}, "attention_factor"),
        ({"attention_factor": math.nan}, "attention_factor"),
    ],
)
def test_refuses_a_space_that_cannot_be(change, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        SearchSpace(**{**SHAPE, **change})


@pytest.mark.parametrize("values", [[1.0] * 7, [1.0] * 9, [math.nan] * 8, [[1.0] * 8]])
def test_refuses_values_of_another_shape(values):
    with pytest.raises(ValueError, match="8 finite factors"):
        SearchSpace(**SHAPE).project(values)
