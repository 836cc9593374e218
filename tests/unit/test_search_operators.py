"""Mutation, crossover and block scaling: by hand, by property, and by counting what they change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longrope.search.operators import crossover, mutate, project, scale_block

LOW, HIGH = 0, 900
rising = st.lists(st.integers(LOW, HIGH), min_size=1, max_size=20).map(lambda genes: np.array(sorted(genes)))


def rng(seed=0):
    return np.random.default_rng(seed)


def is_rising(genes):
    return all(a <= b for a, b in zip(genes.tolist(), genes.tolist()[1:], strict=False))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(genes=rising, probability=st.floats(0, 1), seed=st.integers(0, 9999), monotone=st.booleans())
def test_mutants_stay_in_the_space(genes, probability, seed, monotone):
    before = genes.copy()
    mutant = mutate(genes, probability, LOW, HIGH, rng(seed), monotone=monotone)
    assert (genes == before).all()
    assert mutant.dtype == np.int64
    assert mutant.shape == genes.shape
    assert mutant.min() >= LOW
    assert mutant.max() <= HIGH
    assert is_rising(mutant) or not monotone


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("probability", [0.1, 0.3])
def test_mutation_changes_about_its_probability_of_the_genes(probability, monotone):
    genes = np.arange(64, dtype=np.int64) * 1000  # gaps so wide that a redraw hardly ever hits the old value
    changed = [
        (mutate(genes, probability, -1000, 64_000, rng(seed), monotone=monotone) != genes).mean() for seed in range(300)
    ]
    assert np.mean(changed) == pytest.approx(probability, abs=0.01)  # standard error 0.0033
    assert np.std(changed) == pytest.approx((probability * (1 - probability) / 64) ** 0.5, rel=0.15)


def test_mutation_keeps_what_it_does_not_redraw_and_reaches_every_place_between():
    genes = np.array([10, 20, 30])
    seen = {tuple(mutate(genes, 0.5, 8, 32, rng(seed)).tolist()) for seed in range(5000)}
    assert {b for a, b, c in seen if (a, c) == (10, 30)} == set(range(10, 31))  # both neighbours included
    assert {a for a, b, c in seen if (b, c) == (20, 30)} == set(range(8, 21))
    assert {c for a, b, c in seen if (a, b) == (10, 20)} == set(range(20, 33))
    free = {tuple(mutate(np.array([3, 3]), 1.0, 0, 3, rng(seed)).tolist()) for seed in range(500)}
    assert free == {(a, b) for a in range(4) for b in range(a, 4)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_crossover_takes_each_gene_from_a_parent_in_order(data):
    mother = data.draw(rising)
    father = np.array(sorted(data.draw(st.lists(st.integers(LOW, HIGH), min_size=len(mother), max_size=len(mother)))))
    child = crossover(mother, father, rng(data.draw(st.integers(0, 9999))))
    assert ((child == mother) | (child == father)).all()
    assert is_rising(child)


def test_crossover_mixes_both_parents_evenly_where_the_order_allows_it():
    mother = np.arange(64) * 10
    father = mother + 1
    shares = np.array([(crossover(mother, father, rng(seed)) == mother).mean() for seed in range(300)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.std() == pytest.approx(0.5 / 64**0.5, rel=0.15)  # gene by gene, not one cut


def test_crossover_does_not_drift_to_the_larger_parent():
    low, high = np.arange(32), np.arange(32) + 100  # one switch at most
    shares = [(crossover(low, high, rng(seed)) == low).mean() for seed in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert any(0 < share < 1 for share in shares)


def test_without_the_order_crossover_takes_any_gene():
    mother, father = np.array([5, 4, 3, 2]), np.array([9, 8, 7, 6])
    children = {tuple(crossover(mother, father, rng(seed), monotone=False).tolist()) for seed in range(500)}
    assert len(children) == 16


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (2.0, [1.0, 2.0, 4.0, 8.0, 8.0, 9.0]),
        (0.25, [0.5, 0.5, 0.5, 1.0, 5.0, 9.0]),
        (1.0, [1.0, 2.0, 2.0, 4.0, 5.0, 9.0]),
    ],
)
def test_a_scaled_block_keeps_its_ratios_and_pushes_its_neighbours(factor, expected):
    values = np.array([1.0, 2.0, 2.0, 4.0, 5.0, 9.0])
    assert scale_block(values, 2, 4, factor).tolist() == expected
    assert values.tolist() == [1.0, 2.0, 2.0, 4.0, 5.0, 9.0]
    only = [1.0, 2.0, 2.0 * factor, 4.0 * factor, 5.0, 9.0]
    assert scale_block(values, 2, 4, factor, monotone=False).tolist() == only


def test_projection_rounds_bounds_and_orders():
    steps = np.array([-4.0, 3.4, 2.6, 99.0, 7.0])
    assert project(steps, 0, 50, monotone=True).tolist() == [0, 3, 3, 50, 50]
    assert project(steps, 0, 50, monotone=False).tolist() == [0, 3, 3, 50, 7]
    assert project(np.array([5.0, 1.6]), 0, 50, monotone=False).tolist() == [5, 2]
