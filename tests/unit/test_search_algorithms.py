"""The searches: always inside the space, never twice, exact budgets and resumes, and hidden optima found."""

import copy
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.search import (
    EvolutionSearch,
    Journal,
    LongRoPE2Search,
    RampSearch,
    SearchAlgorithm,
    SearchSpace,
    SmoothSearch,
)
from lightning_longrope.search.critical import critical_range
from lightning_longrope.search.evolution import child
from lightning_longrope.search.ramp import LEAST_TURNS, SPREAD, START, Ramp, yarn_ramp
from tests.unit.test_search_space import valid

ALGORITHMS = [EvolutionSearch, SmoothSearch, RampSearch, LongRoPE2Search]
SHAPE = {"rotary_size": 64, "base": 10_000.0, "original_length": 128, "target_length": 1024}
SPACE = SearchSpace(**SHAPE, pinned=4, start_tokens=(0, 4, 16))


def hidden_table(space, seed):
    """A rising table that no seed is: an uneven walk in log-factors."""
    steps = np.random.default_rng(seed).exponential(size=space.pairs) ** 2
    steps[: space.pinned + 1] = 0
    return np.exp(np.cumsum(steps) / steps.sum() * math.log(1.1 * space.scale))


def distance(space, seed=0):
    """Root mean square log distance to a hidden table, plus a price on start tokens that should be 4."""
    target = np.log(hidden_table(space, seed))
    return lambda candidate: float(
        np.sqrt(np.mean((np.log(candidate.values) - target) ** 2)) + 0.01 * (candidate.start_tokens != 4)
    )


def run(algorithm, fitness, generations=10**6):
    """Ask and tell; returns the candidates of each generation."""
    asked = []
    while len(asked) < generations and (candidates := algorithm.ask()):
        asked.append(candidates)
        algorithm.tell(candidates, [fitness(candidate) for candidate in candidates])
    return asked


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    pairs=st.integers(2, 40),
    pinned=st.integers(0, 5),
    ratio=st.sampled_from([1, 2, 8, 100]),
    monotone=st.booleans(),
    step=st.sampled_from([0.01, 0.25, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_every_candidate_is_in_the_space_and_none_comes_twice(algorithm, pairs, pinned, ratio, monotone, step, seed):
    shape = {"rotary_size": 2 * pairs, "base": 10_000.0, "original_length": 256, "target_length": 256 * ratio}
    space = SearchSpace(**shape, pinned=min(pinned, pairs - 1), monotone=monotone, step=step)
    search = algorithm().start(space, seed, max_evaluations=90)
    noise = np.random.default_rng(seed)
    seen = [candidate for batch in run(search, lambda _: noise.random()) for candidate in batch]
    assert all(valid(candidate, search.space) for candidate in seen)
    assert len(set(seen)) == len(seen) == search.evaluations <= 90
    assert len(seen) == 90 or step == 1.0 or ratio == 1 or algorithm is LongRoPE2Search


def test_the_papers_search_asks_1344_different_candidates():
    shape = {"rotary_size": 128, "base": 10_000.0, "original_length": 4096, "target_length": 262_144}
    space = SearchSpace(**shape)
    search = EvolutionSearch().start(space)
    batches = run(search, distance(space))
    assert [len(batch) for batch in batches] == [64] + [32] * 40
    assert len({candidate for batch in batches for candidate in batch}) == 1344 == search.evaluations
    assert [candidate.origin for candidate in batches[0]] == ["seed:linear", "seed:ntk", "seed:yarn"] + ["mutant"] * 61
    later = {tuple(candidate.origin for candidate in batch) for batch in batches[1:]}
    assert later == {("mutant",) * 16 + ("crossover",) * 16}
    assert search.done


@pytest.mark.parametrize(("length", "sizes"), [(524_288, {64, 32}), (524_289, {32, 16})])
def test_the_paper_halves_its_population_beyond_512k(length, sizes):
    space = SearchSpace(rotary_size=32, base=10_000.0, original_length=4096, target_length=length)
    batches = run(EvolutionSearch(iterations=3).start(space), distance(space))
    assert {len(batch) for batch in batches} == sizes
    kept = run(EvolutionSearch(iterations=1, halve_beyond=None).start(space), distance(space))
    assert [len(batch) for batch in kept] == [64, 32]


def test_parents_are_the_best_of_all_candidates_so_far():
    """With crossovers only, every gene of a child must stem from one of the two best."""
    search = EvolutionSearch(population=40, iterations=4, parents=2, mutants=0, crossovers=4).start(SPACE)
    fitness = distance(SPACE)
    told = []
    while batch := search.ask():
        if told:
            best = sorted(told, key=fitness)[:2]
            for new in [candidate for candidate in batch if candidate.origin == "crossover"]:
                assert all(value in (a, b) for value, a, b in zip(new.values, *(p.values for p in best), strict=True))
                assert new.start_tokens in {parent.start_tokens for parent in best}
        told += batch
        search.tell(batch, [fitness(candidate) for candidate in batch])
    assert any(candidate.origin == "crossover" for candidate in told)


@pytest.mark.parametrize(
    ("algorithm", "budget", "bar"),
    [(EvolutionSearch, 1344, 0.5), (SmoothSearch, 200, 0.5), (partial(RampSearch, ramp_share=0.2), 400, 0.5)],
)
def test_finds_a_hidden_table(algorithm, budget, bar):
    """``bar``: distance left, as a share of that of the best seed; the median of five tables."""
    left = []
    for seed in range(5):
        fitness = distance(SPACE, seed)
        search = algorithm().start(SPACE, seed, max_evaluations=budget)
        run(search, fitness)
        left.append(search.best[1] / min(map(fitness, SPACE.seeds())))
        assert search.best[1] == fitness(search.best[0])
    assert np.median(left) < bar
    assert max(left) < 1


@pytest.mark.parametrize("seed", range(5))
def test_eighty_evaluations_of_ramp_search_come_near_a_hidden_ramp(seed):
    rng = np.random.default_rng(seed)
    first, last, bend = rng.uniform(3, 6), rng.uniform(9, 11.5), rng.uniform(-2, 0)
    target = np.log(Ramp(first, last, SPACE.scale, bend).values(SPACE.pairs))

    def fitness(candidate):
        return float(np.square(np.log(candidate.values) - target).sum())

    search = RampSearch().start(SPACE, seed, max_evaluations=80)
    batches = run(search, fitness)
    assert search.evaluations == 80
    assert search.best[1] < 0.1 < fitness(SPACE.seeds()[2])
    assert {candidate.origin for batch in batches for candidate in batch} == {"seed:yarn", "ramp"}


def test_genes_after_ramps_find_what_no_ramp_is():
    fitness = distance(SPACE)
    ramps, both = RampSearch().start(SPACE, max_evaluations=200), RampSearch(ramp_share=0.3)
    batches = run(both.start(SPACE, max_evaluations=200), fitness)
    origins = [candidate.origin for batch in batches for candidate in batch]
    assert set(origins[60:]) >= {"block", "mutant", "crossover"}
    assert set(origins[:57]) == {"seed:yarn", "ramp"}
    run(ramps, fitness)
    assert both.best[1] < 0.9 * min(fitness(c) for batch in batches[:5] for c in batch)


def test_a_warm_start_is_asked_first_and_begins_near_the_table_of_the_shorter_window():
    shape = {**SHAPE, "pinned": 0}
    short = SearchSpace(**{**shape, "target_length": 512})
    ramp = Ramp(4.0, 10.0, short.scale, -0.3)
    found = RescaleFactors(tuple((ramp.values(32) * np.linspace(1, 1.05, 32)).tolist()), 128, 512)
    space = SearchSpace(**shape, warm_start=found)
    first = RampSearch().start(space).ask()
    assert [candidate.origin for candidate in first] == ["seed:yarn", "seed:warm", "ramp"]
    stretched = [value ** (math.log(8) / math.log(4)) for value in found.values]
    assert first[1].values == pytest.approx(stretched, abs=0.00501)
    assert first[1] in EvolutionSearch().start(space).ask()
    cold = RampSearch().start(SearchSpace(**shape)).ask()[-1]
    far, near = (np.abs(np.log(c.values) - np.log(stretched)).max() for c in (cold, first[2]))
    assert near < far / 4
    late = RescaleFactors(tuple(Ramp(4.0, 14.0, short.scale, -0.3).values(32).tolist()), 128, 512)
    search = RampSearch().start(SearchSpace(**shape, warm_start=late))
    turns = START[1] * math.exp(SPREAD[1] * search._nearest(search.space.seeds()[-1])[1])
    assert turns >= LEAST_TURNS - 1e-9  # or no step would move the end of the ramp
    with pytest.raises(ValueError, match="`warm_start` needs 32 factors"):
        SearchSpace(**shape, warm_start=RescaleFactors((1.0, 2.0), 128, 512))


def test_patience_ends_a_search_that_finds_nothing_better():
    search = EvolutionSearch(population=10, mutants=4, crossovers=4, parents=4).start(SPACE, patience=20)
    batches = run(search, lambda candidate: 0.0 if candidate.origin == "seed:ntk" else 1.0)
    assert [len(batch) for batch in batches] == [10, 8, 8]  # the second of all is the best, and 24 come after it
    assert search.fingerprint["patience"] == 20
    with pytest.raises(ValueError, match="`patience`"):
        EvolutionSearch().start(SPACE, patience=0)


def test_evolution_finds_the_attention_factor_where_it_is_a_gene():
    space = SearchSpace(**SHAPE, start_tokens=(0,), attention_factors=(1.0, 1.1, 1.2, 1.3))
    assert space.attention_factor == 1.2  # sqrt(1 + ln 8 / ln 128) = 1.195
    search = EvolutionSearch(population=20, iterations=6).start(space)
    batches = run(search, lambda c: abs(c.attention_factor - 1.0) + 0.01 * c.values[3])
    assert {c.attention_factor for batch in batches for c in batch} == {1.0, 1.1, 1.2, 1.3}
    assert {c.attention_factor for c in batches[0][:3]} == {1.2}
    assert search.best[0].attention_factor == 1.0
    assert all(space.contains(c) for batch in batches for c in batch)
    with pytest.raises(ValueError, match="must be one of `attention_factors`"):
        SearchSpace(**SHAPE, attention_factor=1.05, attention_factors=(1.0, 1.1))


@pytest.mark.parametrize(
    ("rotary_size", "base", "length", "expected"),
    [(128, 500_000.0, 8192, (24, 35)), (96, 10_000.0, 2048, (19, 31)), (128, 10_000.0, 4096, (30, 46))],
)
def test_the_critical_pairs_are_those_of_longrope2(rotary_size, base, length, expected):
    """LLaMA 3 and Phi 3 as published; LLaMA 2's first was worked out by hand: 64 ln(65.19) / ln(1e4) = 29.02."""
    space = SearchSpace(rotary_size=rotary_size, base=base, original_length=length, target_length=131_072)
    assert critical_range(space) == expected


def test_longrope2_candidates_are_ntk_before_the_critical_pair_and_within_s_and_2s_from_it_on():
    search = LongRoPE2Search(population=32, iterations=8).start(SPACE)
    target = 4  # the scores pull the critical pair to the fourth
    batches = run(search, lambda c: abs(sum(value < 8 - 1e-9 for value in c.values) - target) + 1e-3 * c.values[-1])
    low, high = critical_range(search.space)
    assert (low, high) == (3, 11)
    met = set()
    for candidate in (c for batch in batches for c in batch):
        pair = sum(value < 8 - 1e-9 for value in candidate.values)
        met.add(pair)
        assert low <= pair <= high
        assert all(8 - 1e-9 <= value <= 16 + 1e-9 for value in candidate.values[pair:])
        ntk = [candidate.values[pair] ** (i / pair) for i in range(pair)]
        assert candidate.values[:pair] == pytest.approx(ntk, abs=0.00501)
    assert met == set(range(low, high + 1))
    assert sum(value < 8 - 1e-9 for value in search.best[0].values) == target


def test_evolution_finds_the_start_tokens_and_smooth_search_leaves_them():
    fitness = distance(SPACE)
    evolution, smooth = EvolutionSearch().start(SPACE), SmoothSearch().start(SPACE)
    assert {c.start_tokens for batch in run(evolution, fitness) for c in batch} == {0, 4, 16}
    assert evolution.best[0].start_tokens == 4
    assert {c.start_tokens for batch in run(smooth, fitness) for c in batch} == {0}


@pytest.mark.parametrize("length", [128, 4096, 8192])
def test_the_yarn_ramp_is_the_yarn_seed(length):
    for rotary_size, base in ((64, 10_000.0), (128, 500_000.0)):
        space = SearchSpace(
            rotary_size=rotary_size, base=base, original_length=length, target_length=8 * length, pinned=3
        )
        assert space.candidate(yarn_ramp(space).values(space.pairs)) == space.seeds()[2]


def test_a_child_takes_the_start_tokens_of_either_parent():
    search = EvolutionSearch().start(SPACE)
    parents = [SPACE.candidate(SPACE.seeds()[i].values, tokens) for i, tokens in ((1, 4), (2, 16))]
    assert {child(search, parents).start_tokens for _ in range(50)} == {4, 16}


def test_the_smallest_budget_of_ramp_search_goes_to_yarn():
    assert [candidate.origin for candidate in RampSearch().start(SPACE, max_evaluations=1).ask()] == ["seed:yarn"]


def test_ramps_by_hand():
    assert Ramp(1, 3, 4.0, bend=0).values(5).tolist() == pytest.approx([1, 1, 2, 4, 4])
    assert Ramp(1, 3, 4.0, bend=-1).values(5).tolist() == pytest.approx([1, 1, 1 / 0.625, 4, 4])
    assert Ramp(0, 4, 4.0, bend=1).values(5).tolist() == pytest.approx([1, 1.75, 2.5, 3.25, 4])


@settings(max_examples=60, deadline=None)
@given(
    point=st.tuples(*[st.floats(-5, 5)] * 3),
    rotary=st.sampled_from([8, 32, 64, 128]),
    window=st.integers(16, 8192),
    base=st.sampled_from([1e3, 1e4, 5e5]),
    ratio=st.floats(1.5, 64),
)
def test_pairs_that_have_seen_too_little_of_the_circle_are_slowed_in_full(point, rotary, window, base, ratio):
    target = math.ceil(ratio * window)
    space = SearchSpace(rotary_size=rotary, base=base, original_length=window, target_length=target, pinned=0)
    values = np.array(RampSearch().start(space)._ramp(np.array(point)).values)
    turns = window / (2 * math.pi * base ** (np.arange(rotary // 2) / (rotary // 2)))
    assert values[turns < 0.5999] == pytest.approx(target / window, abs=0.011)


def test_the_first_ramp_counts_turns_in_the_window_of_the_pretraining():
    """Wavelengths of 12.8 and 213.3 tokens, which turn 10 and 0.6 times in 128, whatever was extended before."""
    second = SearchSpace(**{**SHAPE, "original_length": 1024, "target_length": 8192}, pretrained_length=128)
    for space in (SearchSpace(**SHAPE), second):
        ramp = np.array(RampSearch().start(space).ask()[-1].values)
        wavelengths = 2 * math.pi * 10_000 ** (np.arange(32) / 32)
        assert (ramp[wavelengths < 128 / START[0]] == 1).all()
        assert (ramp[wavelengths > 128 / LEAST_TURNS] == 8).all()
        between = (wavelengths > 128 / START[0] * 1.4) & (wavelengths < 128 / START[1] / 1.1)
        assert between.sum() > 5
        assert ((ramp > 1) & (ramp < 8))[between].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_failed_scores_are_worst_and_the_search_goes_on(algorithm, bad):
    fitness = distance(SPACE)
    broken = np.random.default_rng(0)
    search = algorithm().start(SPACE, max_evaluations=90)
    run(search, lambda candidate: bad if broken.random() < 0.4 else fitness(candidate))
    assert search.evaluations == 90
    assert search.best[1] == fitness(search.best[0])
    hopeless = algorithm().start(SPACE, max_evaluations=90)
    run(hopeless, lambda _: bad)
    assert hopeless.evaluations == 90
    assert hopeless.best[1] == math.inf
    json.dumps(hopeless.state_dict(), allow_nan=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_search_is_the_uninterrupted_one(algorithm):
    fitness = distance(SPACE)
    whole = algorithm().start(SPACE, 3, max_evaluations=150)
    batches = run(whole, fitness)
    assert len(batches) > 3
    for cut in {*range(4), len(batches) - 1, len(batches)}:
        first = algorithm().start(SPACE, 3, max_evaluations=150)
        run(first, fitness, generations=cut)
        state = json.loads(json.dumps(first.state_dict()))
        second = algorithm().start(SPACE, 3, max_evaluations=150)
        second.load_state_dict(state)
        assert second.generation == cut
        assert batches[:cut] + run(second, fitness) == batches
        assert second.best == whole.best
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_replayed_from_its_journal_scores_nothing_twice(algorithm, tmp_path):
    """Killed within a generation: the candidates on disk are reused, and the rest is as if nothing happened."""
    fitness, scored = distance(SPACE), []

    def search(most):
        state = algorithm().start(SPACE, 1, max_evaluations=120)
        journal = Journal(tmp_path / "history.jsonl", state.fingerprint)
        while candidates := state.ask():
            scores = []
            for candidate in candidates:
                if (record := journal.cached(candidate)) is None:
                    if len(scored) == most:
                        return state
                    scored.append(candidate)
                    record = {"values": candidate.values, "start_tokens": candidate.start_tokens,
                              "attention_factor": candidate.attention_factor, "score": fitness(candidate)}  # fmt: skip
                    journal.append([record])
                scores.append(record["score"])
            state.tell(candidates, scores)
        return state

    search(most=70)
    assert len(scored) == 70
    resumed = search(most=1000)
    whole = algorithm().start(SPACE, 1, max_evaluations=120)
    assert [candidate for batch in run(whole, fitness) for candidate in batch] == scored
    assert resumed.best == whole.best


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_seed_decides_and_nothing_else_does(algorithm):
    fitness = distance(SPACE)

    def candidates(seed):
        return run(algorithm().start(SPACE, seed, max_evaluations=80), fitness)

    np.random.seed(5)  # noqa: NPY002  the global generator, which a search must not touch
    before = np.random.get_state()  # noqa: NPY002
    one = candidates(0)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    np.random.seed(6)  # noqa: NPY002
    assert candidates(0) == one
    assert candidates(1) != one


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("budget", [1, 2, 7, 33])
def test_the_budget_cuts_the_last_generation(algorithm, budget):
    search = algorithm().start(SPACE, max_evaluations=budget)
    assert sum(map(len, run(search, distance(SPACE)))) == budget == search.evaluations
    assert search.done
    assert search.ask() == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_space_of_a_few_points_ends_the_search(algorithm):
    space = SearchSpace(
        rotary_size=4, base=10_000.0, original_length=128, target_length=384, step=1.0, start_tokens=(0,)
    )
    search = algorithm().start(space, max_evaluations=500)
    seen = [candidate for batch in run(search, lambda c: sum(c.values)) for candidate in batch]
    everything = {(float(a), float(b)) for a in range(1, 7) for b in range(1, 7) if a <= b}
    assert {candidate.values for candidate in seen} <= everything
    assert len(seen) == len(set(seen))
    assert len(seen) == 6 or algorithm in (SmoothSearch, LongRoPE2Search)
    assert search.done


def test_tell_takes_any_order_and_refuses_other_candidates():
    fitness = distance(SPACE)
    straight, shuffled = (RampSearch().start(SPACE, max_evaluations=100) for _ in range(2))
    for _ in range(6):
        batch = straight.ask()
        straight.tell(batch, [fitness(candidate) for candidate in batch])
        shuffled.tell(batch[::-1], [fitness(candidate) for candidate in batch[::-1]])
        assert shuffled.ask() == straight.ask() == straight.ask()
    batch = straight.ask()
    for candidates, scores in [
        (batch[1:], [0.0] * (len(batch) - 1)),
        (batch, [0.0] * (len(batch) - 1)),
        (batch[:-1] + [SPACE.random(np.random.default_rng(0))], [0.0] * len(batch)),
        (batch[:-1] + batch[:1], [0.0] * len(batch)),
        ([], []),
    ]:
        with pytest.raises(ValueError, match="`tell` expected"):
            straight.tell(candidates, scores)
    assert straight.ask() == batch


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (lambda: RampSearch().start(SPACE, 1), "seed"),
        (lambda: RampSearch(population=13).start(SPACE, 0), r"settings\.population"),
        (lambda: RampSearch().start(SPACE, 0, 25), "limit"),
        (lambda: RampSearch().start(SearchSpace(**SHAPE, pinned=3, start_tokens=(0, 4, 16)), 0), r"space\.pinned"),
        (lambda: SmoothSearch().start(SPACE, 0), "algorithm"),
    ],
)
def test_a_state_of_another_search_is_refused(other, key):
    search = RampSearch().start(SPACE, 0)
    run(search, distance(SPACE), generations=2)
    with pytest.raises(ValueError, match=f"`{key}` differs"):
        other().load_state_dict(search.state_dict())
    foreign = search.state_dict()
    foreign["generations"][1]["crc"] += 1
    with pytest.raises(ValueError, match="generation 1 now has other candidates"):
        RampSearch().start(SPACE, 0).load_state_dict(foreign)


def test_starting_again_forgets_and_copies_hold_the_settings_only():
    search = RampSearch(population=5).start(SPACE, 0)
    first = run(search, distance(SPACE))
    for twin in (copy.deepcopy(search), pickle.loads(pickle.dumps(search)), search):
        assert twin.population == 5
        assert run(twin.start(SPACE, 0), distance(SPACE)) == first
    with pytest.raises(ValueError, match="call `start"):
        copy.deepcopy(search).ask()
    with pytest.raises(ValueError, match="no best candidate"):
        _ = search.start(SPACE).best


class Grid(SearchAlgorithm):
    """The shortest subclass: repeats and an empty generation are the base class's business."""

    def __init__(self, leave=False):
        self.leave = leave

    def _generations(self):
        linear, ntk, yarn = self.space.seeds()
        self.heard = [(yield [linear, linear, ntk])]
        self.heard.append((yield []))
        self.heard.append((yield [ntk, yarn]))
        if self.leave:
            yield [SearchSpace(**SHAPE).seeds()[0]]


def test_a_subclass_reads_as_straight_code():
    scores = {"seed:linear": 3.0, "seed:ntk": 2.0, "seed:yarn": 1.0}
    search = Grid().start(SPACE)
    assert [len(batch) for batch in run(search, lambda candidate: scores[candidate.origin])] == [2, 1]
    assert search.heard == [[3.0, 3.0, 2.0], [], [2.0, 1.0]]
    assert search.best[0].origin == "seed:yarn"
    with pytest.raises(ValueError, match="Grid proposed a candidate outside"):
        run(Grid(leave=True).start(SPACE), lambda candidate: 0.0)


class Stubborn(SearchAlgorithm):
    """Proposes the same candidate for ever."""

    def _generations(self):
        yield self._new(5, lambda: self.space.seeds()[0])
        yield self._new(5, lambda: self.space.seeds()[0])


def test_random_points_stand_in_for_proposals_that_repeat():
    first, second = run(Stubborn().start(SPACE), lambda candidate: 0.0)
    assert [candidate.origin for candidate in first] == ["seed:linear"] + ["random"] * 4
    assert [candidate.origin for candidate in second] == ["random"] * 5
    assert len({*first, *second}) == 10


@pytest.mark.parametrize(
    ("algorithm", "arguments", "name"),
    [
        (EvolutionSearch, {"population": 0}, "population"),
        (EvolutionSearch, {"parents": 0}, "parents"),
        (EvolutionSearch, {"mutants": -1}, "mutants"),
        (EvolutionSearch, {"mutants": 0, "crossovers": 0}, "offspring"),
        (EvolutionSearch, {"probability": 0.0}, "probability"),
        (EvolutionSearch, {"probability": math.nan}, "probability"),
        (SmoothSearch, {"knots": 1}, "knots"),
        (SmoothSearch, {"spread": 0.0}, "spread"),
        (SmoothSearch, {"max_evaluations": 0}, "max_evaluations"),
        (RampSearch, {"ramp_share": 1.5}, "ramp_share"),
        (RampSearch, {"max_evaluations": 0}, "max_evaluations"),
    ],
)
def test_refuses_settings_that_cannot_work(algorithm, arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        algorithm(**arguments)
    with pytest.raises(ValueError, match="`max_evaluations`"):
        algorithm().start(SPACE, max_evaluations=0)
