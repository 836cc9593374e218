"""Searches that judge early candidates on fewer documents: what is scored, compared and paid for, from the journal."""

import json
import math

import pytest
import torch
from helpers import tiny_llama

from lightning_longrope import evaluating
from lightning_longrope.search import EvolutionSearch, RampSearch, SearchSpace, SmoothSearch
from lightning_longrope.search.schedule import DocumentSchedule
from lightning_longrope.searching import search_factors

LENGTH, TEXTS = 64, 8
STAGES = ((0.3, 2), (0.6, 5))
SPACE = SearchSpace(rotary_size=16, base=10_000.0, original_length=32, target_length=64)
ALGORITHMS = {
    "ramp": (lambda: RampSearch(generation=4), 4),
    "ramp and genes": (lambda: RampSearch(generation=4, ramp_share=0.3, population=6, mutants=3, crossovers=3), 6),
    "smooth": (SmoothSearch, 4),
    "evolution": (lambda: EvolutionSearch(population=8, parents=5, mutants=3, crossovers=3, iterations=20), 5),
}


def texts(count=TEXTS):
    return list(torch.randint(96, (count, LENGTH), generator=torch.Generator().manual_seed(2)))


def run(make, **options):
    options = {"schedule": STAGES, "max_evaluations": 30, "batch_tokens": 3 * LENGTH, **options}
    return search_factors(tiny_llama(), texts(), LENGTH, algorithm=make(), **options)


def judged_on(record):
    """How many documents; they are the first ones."""
    known = [row is not None for row in record["documents"]]
    assert known == sorted(known, reverse=True)
    return sum(known)


def mean(record, documents):
    nll, tokens = (sum(row[i] for row in record["documents"][:documents]) for i in (0, 1))
    return nll / tokens


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_comparison_is_on_the_same_documents_and_no_pair_is_scored_twice(name, monkeypatch):
    make, survivors = ALGORITHMS[name]
    real, pairs = evaluating.row_sums, []

    def row_sums(model, factors, documents):
        pairs.extend((table, id(document)) for table, document in zip(factors, documents, strict=True))
        return real(model, factors, documents)

    monkeypatch.setattr(evaluating, "row_sums", row_sums)
    shown = []
    result = run(make, progress=lambda run: shown.append((run.generation, run.documents, run.evaluations)))
    assert len(pairs) == len(set(pairs)) == result.forwards
    assert result.evaluations == 30
    assert shown[-1][2] == 30

    stages, seen = [2, 5, TEXTS], {2: {}, 5: {}, TEXTS: {}}
    for record in result.history:
        count = judged_on(record)
        assert record["score"] == pytest.approx(mean(record, count), rel=1e-12)
        assert record["status"] == ("ok" if count == TEXTS else "partial")
        seen[count][tuple(record["values"]), record["attention_factor"]] = record
    for earlier, later in ((2, 5), (5, TEXTS)):
        order = [r for r in seen[earlier].values() if not r["origin"].startswith("baseline")]
        best = sorted(order, key=lambda record: record["score"])[:survivors]
        again = list(seen[later].values())[: 3 + len(best)]  # after the baselines, in the order of their scores
        assert [r["origin"] for r in again[:3]] == ["baseline:linear", "baseline:ntk", "baseline:yarn"]
        assert [r["values"] for r in again[3:]] == [r["values"] for r in best]
        assert all(
            record["generation"] >= again[-1]["generation"] for record in list(seen[later].values())[len(again) :]
        )
    whole = [r for r in seen[TEXTS].values() if not r["origin"].startswith("baseline")]
    assert result.score == min(record["score"] for record in whole)
    assert all(len(seen[count]) > 3 + survivors for count in stages)
    assert result.forwards < (30 + 3) * TEXTS * 0.8


def test_stages_begin_where_their_shares_end():
    """Of 16 evaluations: generations that begin before 30 % (4.8), before 60 % (9.6), and then on all documents."""
    shown = {}
    run(
        lambda: RampSearch(generation=4),
        max_evaluations=16,
        progress=lambda r: shown.update({r.evaluations: r.documents}),
    )
    assert {count: shown[count] for count in (2, 5, 6, 12, 13, 16)} == {2: 2, 5: 2, 6: 5, 12: 5, 13: TEXTS, 16: TEXTS}


def test_a_search_that_ends_early_goes_on_to_all_documents():
    patient = run(SmoothSearch, patience=4, max_evaluations=60)
    counts = [judged_on(record) for record in patient.history]
    assert {2, TEXTS} <= set(counts)
    assert patient.evaluations < 60
    last = [r for r in patient.history if judged_on(r) == TEXTS and not r["origin"].startswith("baseline")]
    assert patient.score == min(record["score"] for record in last)
    assert len(last) > 4 + 4  # patience begins again with the documents


def test_a_race_holds_candidates_against_the_same_documents():
    result = run(ALGORITHMS["evolution"][0], race=0.5)
    dropped = [record for record in result.history if record["status"] == "dropped"]
    assert dropped
    assert result.forwards < run(ALGORITHMS["evolution"][0]).forwards
    finished = {judged_on(record) for record in result.history if record["status"] in ("ok", "partial")}
    assert finished == {2, 5, TEXTS}


def test_without_a_schedule_nothing_changes(tmp_path):
    plain = run(SmoothSearch, schedule=None, folder=tmp_path)
    header = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])
    assert "schedule" not in header["fingerprint"]
    assert plain.forwards == 33 * TEXTS
    with pytest.raises(ValueError, match="`schedule"):
        run(SmoothSearch, folder=tmp_path)


def tell(search, generations, renewed=()):
    """Tells so many generations a score that every candidate has; renews after those named."""
    for number in range(generations):
        asked = search.ask()
        search.tell(asked, [math.fsum(map(math.log, candidate.values)) for candidate in asked])
        if number in renewed:
            search.renew([math.fsum(map(math.log, one.values)) for one in search.survivors])
    return search


@pytest.mark.parametrize("name", ALGORITHMS)
def test_renewed_scores_are_part_of_the_state(name):
    def fresh():
        return ALGORITHMS[name][0]().start(SPACE, 3, 100)

    whole = tell(fresh(), 5, renewed=(1, 3))
    again = fresh()
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again.ask() == whole.ask()
    assert (again.best, again.evaluations) == (whole.best, whole.evaluations)


def test_scores_that_stay_the_same_change_no_generation():
    """Survivors are all that an evolution looks at, so forgetting the others is not to be noticed."""
    make = ALGORITHMS["evolution"][0]
    plain, renewed = (tell(make().start(SPACE, 3, 100), 6, after) for after in ((), (0, 1, 2, 4)))
    assert renewed.ask() == plain.ask()
    assert len(renewed.ranked()) < len(plain.ranked())


def test_what_was_forgotten_is_asked_again_by_those_who_name_it():
    search = tell(RampSearch(generation=4).start(SPACE, 0, 40), 1)
    first = search.ask()
    search.tell(first, range(len(first)))
    search.renew([0.0] * len(search.survivors))
    assert set(search.ranked()) <= {*search.survivors}
    with pytest.raises(ValueError, match="`renew` expected"):
        search.renew([])
    search.ask()
    with pytest.raises(ValueError, match=r"before the next `ask`; got 4 after it"):
        search.renew([0.0] * len(search.survivors))


@pytest.mark.parametrize("stages", [((0.5, 4), (0.5, 6)), ((0.5, 4), (0.8, 4)), ((0.0, 4),), ((1.1, 4),), ((0.5, 0),)])
def test_stages_must_grow(stages):
    with pytest.raises(ValueError, match="both growing"):
        DocumentSchedule(stages)


def test_a_schedule_needs_a_budget_and_documents_for_its_end():
    with pytest.raises(ValueError, match="give `max_evaluations`"):
        run(EvolutionSearch, max_evaluations=None)
    with pytest.raises(ValueError, match="ends with 8 documents, of 8"):
        run(RampSearch, schedule=((0.5, 8),))
