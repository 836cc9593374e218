"""Mixing of sources against a brute-force walk along the line, exact fractions, and its contract over many epochs."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_longrope.mixing import Mixture, _Stratum

ONE = 2**32


def mixture(lengths, sources, names="abc", **options):
    return Mixture(np.array(lengths, np.int64), np.array(sources, np.uint16), names, **options)


CASES = st.integers(1, 25).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "lengths": st.lists(st.integers(1, 60), min_size=count, max_size=count),
            "sources": st.lists(st.integers(0, 2), min_size=count, max_size=count),
            "weights": st.none() | st.lists(st.integers(0, 9), min_size=3, max_size=3),
            "long": st.sampled_from([(None, 1.0), (20, 2.5), (40, 10.0), (30, 0.5)]),
            "seed": st.integers(0, 3),
        }
    )
)


def expected(case):
    """Multiplicities by fractions, or None where the weights do not fit the documents."""
    lengths, sources = case["lengths"], case["sources"]
    held = Counter()
    for length, source in zip(lengths, sources, strict=True):
        held[source] += length
    weights = case["weights"] or [held[source] for source in range(3)]
    if not sum(weights) or any(weights[source] and not held[source] for source in range(3)):
        return None
    total = sum(held[source] for source in range(3) if weights[source])
    bound, extra = case["long"]
    relative = [Fraction(extra) if bound is not None and length >= bound else Fraction(1) for length in lengths]
    weighed = [
        sum(r * n for r, n, s in zip(relative, lengths, sources, strict=True) if s == source) for source in range(3)
    ]
    return [
        Fraction(weights[source], sum(weights)) * total / weighed[source] * r
        for r, source in zip(relative, sources, strict=True)
    ]


def build(case):
    weights = case["weights"] and dict(zip("abc", case["weights"], strict=True))
    long_length, long_weight = case["long"]
    return mixture(case["lengths"], case["sources"], weights=weights, long_length=long_length,
                   long_weight=long_weight, seed=case["seed"])  # fmt: skip


@given(CASES)
def test_multiplicities_give_every_source_exactly_its_share_and_epochs_keep_to_them(case):
    exact = expected(case)
    if exact is None:
        with pytest.raises(ValueError, match="`weights`"):
            build(case)
        return
    mixed, lengths = build(case), np.array(case["lengths"])
    assert mixed.multiplicities == pytest.approx([float(m) for m in exact], rel=1e-6, abs=2 / ONE)
    seen = np.zeros(len(lengths), int)
    for epoch in range(12):
        order = mixed.order(epoch)
        assert lengths[order].sum() >= mixed.least_tokens
        np.add.at(seen, order, 1)
        assert (np.abs(seen - (epoch + 1) * mixed.multiplicities) < 1 + 1e-9).all()
    strata = 6
    assert abs(lengths[order].sum() - mixed.multiplicities @ lengths) <= 2 * strata * lengths.max()


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    wanted=st.integers(1, 2**12 - 1),
    step=st.integers(1, 3 * ONE) | st.sampled_from([ONE // 8, 3 * ONE // 8, ONE // 2, ONE, 5 * ONE // 4]),
    epoch=st.integers(0, 2000),
    begin=st.integers(0, ONE - 1),
)
def test_a_stratum_is_a_walk_along_the_line_and_its_least_is_the_least(lengths, wanted, step, epoch, begin):
    stratum = _Stratum(np.arange(len(lengths)), step, begin)

    def walk(place):
        """Whole numbers in (left, right] of every document, by exact fractions."""
        edges = [Fraction(place + i * step, ONE) for i in range(len(lengths) + 1)]
        return [right.__floor__() - left.__floor__() for left, right in zip(edges, edges[1:], strict=False)]

    assert stratum.counts(epoch).tolist() == walk(begin + epoch * step)
    rests = [-(i * step) % ONE for i in range(len(lengths) + 1)]  # where something changes, and beside it
    totals = [
        sum(c * n for c, n in zip(walk(place + side), lengths, strict=True)) for place in rests for side in (0, -1)
    ]
    assert stratum.least(np.array(lengths)) == min(totals)
    if lengths == sorted(lengths):
        assert max(totals) - min(totals) <= 2 * max(lengths)
    marked = np.array([bool(wanted >> i & 1) for i in range(len(lengths))])
    if marked.any() and step > ONE // 100:
        nearest = next(e for e in range(epoch, epoch + 101) if np.array(walk(begin + e * step))[marked].any())
        assert stratum.next_epoch(epoch, marked) == nearest


@given(CASES, st.integers(0, 20), st.integers(0, 2**25 - 1))
def test_the_next_epoch_that_reads_one_of_some_documents_is_found_without_trying(case, epoch, wanted):
    exact = expected(case)
    assume(exact is not None)
    mixed, wanted = build(case), np.array([bool(wanted >> i & 1) for i in range(len(case["lengths"]))])
    found = mixed.next_epoch(epoch, wanted)
    assert (found is None) == (not any(m for m, one in zip(exact, wanted, strict=True) if one))
    for earlier in range(epoch, epoch + 40 if found is None else min(found, epoch + 40)):
        assert not wanted[mixed.order(earlier)].any()
    assert found is None or wanted[mixed.order(found)].any()


def test_epochs_are_those_of_the_drawing():
    stratum = _Stratum(np.arange(5), 3 * ONE // 8, 0)
    drawn = ["c", "be", "ad", "ce"]
    assert ["".join("abcde"[i] for i in np.flatnonzero(stratum.counts(epoch))) for epoch in range(4)] == drawn


def test_documents_of_a_source_with_less_rotate_until_every_one_is_read():
    rng = np.random.default_rng(0)
    lengths, sources = rng.integers(1, 3000, 4000), rng.integers(0, 3, 4000)
    mixed = mixture(lengths, sources, weights={"a": 8, "b": 1, "c": 1})
    least = mixed.multiplicities.min()
    assert 0.1 < least < 0.4
    cycle = int(np.ceil(1 / least))
    for first in (0, 7, 1000):
        assert len(set(np.concatenate([mixed.order(first + epoch) for epoch in range(cycle)]))) == 4000
    assert len(set(mixed.order(0))) < 3000


def test_long_documents_come_more_often_and_sources_no_more_often():
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.integers(1, 900, 5000), rng.integers(1, 90, 50_000)])  # b has nothing long
    sources = np.repeat([0, 1], [5000, 50_000])
    plain, mixed = (
        mixture(lengths, sources, "ab", **options) for options in ({}, {"long_length": 600, "long_weight": 5})
    )
    assert (np.bincount(plain.order(0), minlength=55_000) == 1).all()

    def held(order, where):
        return lengths[order][where(order)].sum() / lengths[order].sum()

    for epoch in range(3):
        order = mixed.order(epoch)
        assert held(order, lambda o: sources[o] == 0) == pytest.approx(
            held(np.arange(55_000), lambda o: sources[o] == 0), rel=2e-3
        )
        counts = np.bincount(order, minlength=55_000)[:5000]
        assert counts[lengths[:5000] >= 600].mean() / counts[lengths[:5000] < 600].mean() == pytest.approx(5, rel=5e-3)
        assert lengths[order].sum() == pytest.approx(lengths.sum(), rel=2e-3)
    rows = mixed.summary()
    assert [(row.name, row.documents, row.tokens) for row in rows] == [
        ("a", 5000, lengths[:5000].sum()), ("b", 50_000, lengths[5000:].sum())]  # fmt: skip
    assert rows[0].long_repeats / rows[0].short_repeats == pytest.approx(5)
    assert rows[1].short_repeats == pytest.approx(1)


def test_the_order_depends_on_seed_and_epoch_alone_and_copies_lie_apart():
    lengths, sources = [5, 6, 7, 8] * 500, [0, 0, 0, 1] * 500
    weights = {"a": 1, "b": 1, "c": 0}
    mixed, again, other = (mixture(lengths, sources, weights=weights, seed=seed) for seed in (0, 0, 1))
    orders = [mixed.order(epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in [*orders, other.order(0).tolist()]}) == 4
    assert pickle.loads(pickle.dumps(again)).order(2).tolist() == orders[2]  # without the epochs before
    places = {}
    for place, number in enumerate(orders[0]):
        places.setdefault(number, []).append(place / len(orders[0]))
    twice = [at for at in places.values() if len(at) == 2]
    assert len(twice) > 200
    assert all(first < 0.53 and second > 0.47 for first, second in twice)


def test_a_source_with_weight_0_is_left_out_and_an_epoch_is_as_long_as_the_others():
    mixed = mixture([10] * 30, [0, 1, 2] * 10, weights={"a": 1, "b": 3, "c": 0})
    order = mixed.order(0)
    assert set(order % 3) == {0, 1}
    assert mixed.least_tokens == len(order) * 10 == 200
    assert [row.share for row in mixed.summary()] == [0.25, 0.75, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1, "b": 1}}, "does not name c: give every source a weight; 0 leaves it out"),
        ({"weights": {"a": 1, "b": 1, "c": 1, "x": 1}}, "names x, but the sources are a, b, c, d"),
        ({"weights": {"a": 1, "b": 1, "c": 1, "d": 1}}, "gives d a share, but no document of it is there"),
        ({"weights": {"a": 1, "b": 1, "c": -1}}, "must be at least 0"),
        ({"weights": {"a": 0, "b": 0, "c": 0}}, "one of them above"),
        ({"weights": {"a": 1, "b": 1, "c": float("nan")}}, "must be at least 0"),
        ({"long_weight": 2}, "go together"),
        ({"long_length": 9}, "go together"),
        ({"long_weight": 0, "long_length": 9}, "must be above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixture([10] * 30, [0, 1, 2] * 10, "abcd", **options)
