"""Passes that do not fit, races, and scores of other searches: what the evaluator does beside adding up."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_llama

from lightning_longrope import evaluating
from lightning_longrope.evaluating import Evaluator, Race
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.objectives import OBJECTIVES, SearchDocument
from lightning_longrope.search import RampSearch
from lightning_longrope.searching import search_factors

LENGTH = 64
SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 32, "target_length": LENGTH}
TABLES = [getattr(RescaleFactors, name)(**SHAPE) for name in ("none", "linear", "ntk", "yarn")]


def texts(count, seed=2):
    return list(torch.randint(96, (count, LENGTH), generator=torch.Generator().manual_seed(seed)))


def scores(documents=4, rows=6, **options):
    rows = {"batch_tokens": rows * LENGTH}
    evaluator = Evaluator(tiny_llama(), [SearchDocument(t) for t in texts(documents)], OBJECTIVES["perplexity"], **rows)
    return evaluator.scores(TABLES, ["" for _ in TABLES], **options), evaluator


def full_beyond(rows, monkeypatch, error=torch.OutOfMemoryError):
    """Memory suffices for so many rows; returns the sizes of all passes tried."""
    real, tried = evaluating.row_sums, []

    def row_sums(model, factors, documents):
        tried.append(len(documents))
        if len(documents) > rows:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, factors, documents)

    monkeypatch.setattr(evaluating, "row_sums", row_sums)
    return tried


@pytest.mark.parametrize(
    ("fit", "tried", "error"),
    [
        (6, [6, 6, 4], RuntimeError),
        (3, [6, 3, 3, 6, 3, 3, 4, 2, 2], RuntimeError),
        (2, None, torch.OutOfMemoryError),
        (1, None, MemoryError),
    ],
)
def test_a_pass_that_does_not_fit_is_halved_until_it_does(fit, tried, error, monkeypatch):
    monkeypatch.setattr(evaluating, "free_memory", lambda: None)  # collecting garbage takes a second here
    expected, _ = scores()
    sizes = full_beyond(fit, monkeypatch, error)
    found, evaluator = scores()
    assert [score.value for score in found] == pytest.approx([score.value for score in expected], rel=1e-6)
    assert {score.status for score in found} == {"ok"}
    assert tried is None or sizes == tried
    assert sum(size for size in sizes if size <= fit) == evaluator.forwards == 16
    if fit < 6:  # what was learnt stays
        sizes.clear()
        evaluator.scores(TABLES[1:], ["", "", ""])
        assert max(sizes) <= fit


def test_passes_on_a_cpu_hold_2048_tokens_where_nothing_is_said(monkeypatch):
    sizes = full_beyond(99, monkeypatch)
    rows = [SearchDocument(text) for text in texts(20)]
    Evaluator(tiny_llama(), rows, OBJECTIVES["perplexity"]).scores(TABLES, [""] * 4)
    assert sizes == [32, 32, 16]


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    full_beyond(3, monkeypatch, error=lambda _: RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="scalar type"):
        scores()


def test_one_candidate_that_never_fits_is_recorded_and_the_search_goes_on(monkeypatch, tmp_path):
    real, seen = evaluating.row_sums, {}

    def row_sums(model, factors, documents):
        if any(seen.setdefault(table.values, len(seen)) in (5, 9) for table in factors):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, factors, documents)

    def search():
        return search_factors(tiny_llama(), texts(4), LENGTH, max_evaluations=24, folder=tmp_path, held_out=2)

    monkeypatch.setattr(evaluating, "row_sums", row_sums)
    result = search()
    statuses = [row["status"] for row in result.history]
    assert {"ok", "oom"} == set(statuses)
    assert result.evaluations == 24
    assert all((row["status"] == "oom") == math.isnan(row["score"]) for row in result.history)
    monkeypatch.setattr(evaluating, "row_sums", None)  # nothing is tried again
    assert [row["status"] for row in search().history] == statuses


def test_out_of_memory_everywhere_stops_in_one_line_and_leaves_nothing_wrong_behind(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        full_beyond(0, patch)
        with pytest.raises(ValueError, match="one row of 64 tokens in a forward pass. Next: half precision") as error:
            search_factors(tiny_llama(), texts(2), LENGTH, max_evaluations=6, folder=tmp_path)
    assert "\n" not in str(error.value)
    again = search_factors(tiny_llama(), texts(2), LENGTH, max_evaluations=6, folder=tmp_path)
    assert again.score == search_factors(tiny_llama(), texts(2), LENGTH, max_evaluations=6).score


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_search_that_was_cut_puts_no_rows_together_that_an_uncut_one_keeps_apart(monkeypatch, tmp_path, cut):
    """Sums of a row may differ in the last bit with the rows beside it; passes of 6 hold parts of candidates of 4."""
    real, passes, limit = evaluating.row_sums, [], cut

    def row_sums(model, factors, documents):
        if len(passes) == limit:
            raise KeyboardInterrupt
        rows = zip(factors, documents, strict=True)
        passes.append({(table.values, table.attention_factor, tuple(row.tokens.tolist())) for table, row in rows})
        return real(model, factors, documents)

    def search(folder):
        passes.clear()
        options = {"max_evaluations": 12, "batch_tokens": 6 * LENGTH, "folder": folder}
        return search_factors(tiny_llama(), texts(4), LENGTH, **options)

    monkeypatch.setattr(evaluating, "row_sums", row_sums)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut")
    begun, limit = list(passes), -1
    resumed, planned = search(tmp_path / "cut"), list(passes)
    uncut = search(tmp_path / "uncut")
    assert begun == passes[: len(begun)]
    assert all(any(rows <= together for together in passes) for rows in planned)
    assert [(row["values"], row["score"]) for row in resumed.history] == [
        (row["values"], row["score"]) for row in uncut.history
    ]


class TwoWorkers(evaluating.SingleWorker):
    """The first of two, whose other one does nothing."""

    world_size = 2


@pytest.mark.parametrize("mark", [None, "ds_id", "full_tensor"])
@pytest.mark.parametrize("workers", [evaluating.SingleWorker, TwoWorkers])
def test_a_process_that_others_wait_for_goes_on_with_shapes(monkeypatch, mark, workers):
    """Whoever leaves a pass early would leave them waiting for its part of the weights."""
    model, entered = tiny_llama(), []
    if mark:
        setattr(next(iter(model.parameters())), mark, 0)
    mode = evaluating.GoOnWithShapes
    monkeypatch.setattr(evaluating, "GoOnWithShapes", lambda: entered.append(mode()) or entered[-1])
    monkeypatch.setattr(evaluating, "row_sums", lambda *_: torch.zeros(2, 4))
    evaluator = Evaluator(model, [SearchDocument(t) for t in texts(2)], OBJECTIVES["perplexity"], workers=workers())
    assert evaluator._attempt([(0, 0), (0, 1)], TABLES) is not None
    assert len(entered) == (mark is not None and workers is TwoWorkers)


def test_a_race_drops_by_standard_errors_of_paired_differences():
    reference = [2.0, 3.0, 1.0, 2.5]
    race = Race(z=2.0, value=2.125, documents=reference)
    behind = [0.3, 0.4, 0.2]
    error = np.std(behind, ddof=1) / math.sqrt(3)
    values = [one + other for one, other in zip(reference, behind, strict=False)]
    assert race.lost(values, range(3)) == pytest.approx(2.125 + 0.3)
    assert 2 * error < 0.3
    assert Race(z=0.31 / error, value=2.125, documents=reference).lost(values, range(3)) is None
    assert race.lost([value - 0.6 for value in values], range(3)) is None  # ahead, however surely


def test_a_race_saves_forwards_and_never_crowns_a_dropped_candidate():
    def search(race):
        return search_factors(
            tiny_llama(), texts(12), LENGTH, algorithm=RampSearch(max_evaluations=80), race=race, batch_tokens=9999
        )

    whole, raced = search(None), search(1.0)
    dropped = [row for row in raced.history if row["status"] == "dropped"]
    assert len(dropped) > 5
    assert whole.forwards == 12 * len(whole.history)
    assert raced.forwards == sum(part is not None for row in raced.history for part in row["documents"])
    assert raced.forwards < whole.forwards - 5 * len(dropped)
    best = next(row for row in raced.history if row["score"] == raced.score and not row["origin"].startswith("base"))
    assert best["status"] == "ok"
    complete = {tuple(row["values"]): row["score"] for row in whole.history}
    errors = [row["score"] - complete[tuple(row["values"])] for row in dropped if tuple(row["values"]) in complete]
    assert errors
    assert max(map(abs, errors)) < 0.05  # the extrapolation is near the score on all documents


@pytest.fixture
def earlier(tmp_path):
    folder = tmp_path / "earlier"
    search_factors(tiny_llama(), texts(4), LENGTH, max_evaluations=16, folder=folder)
    return folder / "history.jsonl"


def test_another_search_uses_earlier_scores_of_the_same_documents(earlier, monkeypatch):
    fresh = search_factors(tiny_llama(), texts(4)[1:] + texts(1, seed=9), LENGTH, max_evaluations=8)
    sizes = full_beyond(99, monkeypatch)
    options = {"max_evaluations": 8, "caches": [earlier]}
    found = search_factors(tiny_llama(), texts(4)[1:] + texts(1, seed=9), LENGTH, **options)
    assert found.factors == fresh.factors
    assert [row["score"] for row in found.history] == pytest.approx([row["score"] for row in fresh.history], rel=1e-6)
    assert sum(sizes) == found.forwards < fresh.forwards
    sizes.clear()
    same = search_factors(tiny_llama(), texts(4), LENGTH, **options)
    assert not sizes or sum(sizes) == same.forwards < 22


def test_scores_of_another_model_or_of_other_documents_are_refused_by_name(earlier):
    with pytest.raises(ValueError, match=r"cache .*`model` differs"):
        search_factors(tiny_llama(seed=1), texts(4), LENGTH, max_evaluations=4, caches=[earlier])
    with pytest.raises(ValueError, match="has no document of this search"):
        search_factors(tiny_llama(), texts(4, seed=9), LENGTH, max_evaluations=4, caches=[earlier])
