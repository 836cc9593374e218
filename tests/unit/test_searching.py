"""A whole search on a small model: it finds, leaves no trace, and continues exactly where it was cut."""

import json
import math
import os

import pytest
import torch
from helpers import tiny_llama

from lightning_longrope import evaluating, score_book
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.objectives import Objective
from lightning_longrope.search import EvolutionSearch, LongRoPE2Search, RampSearch, SmoothSearch
from lightning_longrope.searching import search_factors

LENGTH = 64


def random_texts(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (LENGTH + 3,), generator=generator) for _ in range(count)]


@pytest.fixture
def texts():
    return random_texts(2)


def small_evolution():
    return EvolutionSearch(population=8, parents=4, mutants=3, crossovers=3, iterations=3)


ALGORITHMS = [lambda: RampSearch(max_evaluations=20), lambda: SmoothSearch(max_evaluations=20), small_evolution]


@pytest.mark.parametrize("make", ALGORITHMS)
def test_the_best_is_the_lowest_score_and_beats_or_meets_every_other(texts, make):
    model = tiny_llama()
    result = search_factors(model, texts, LENGTH, algorithm=make(), seed=1)
    searched = [row for row in result.history if not row["origin"].startswith("baseline")]
    assert result.evaluations == len(searched) >= 17
    assert result.forwards == 2 * len(result.history)
    assert result.score == min(row["score"] for row in searched)
    best = min(searched, key=lambda row: row["score"])
    assert list(result.factors.values) == best["values"]
    assert [row["origin"] for row in result.history[:3]] == ["baseline:linear", "baseline:ntk", "baseline:yarn"]
    assert list(result.baselines.values()) == [row["score"] for row in result.history[:3]]
    assert len({(tuple(r["values"]), r["start_tokens"]) for r in searched}) == len(searched)


def test_a_search_leaves_no_trace(texts):
    model = tiny_llama().train()
    model.model.layers[0].eval()  # a part that somebody has frozen
    modes = [part.training for part in model.modules()]
    rotary, before = model.model.rotary_emb, {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    search_factors(model, texts, LENGTH, max_evaluations=4)
    assert [part.training for part in model.modules()] == modes
    assert model.model.rotary_emb is rotary
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def search(make, folder=None, schedule=None):
    options = {"folder": folder, "batch_tokens": 5 * LENGTH, "race": 1.0, "held_out": 2, "schedule": schedule}
    options["max_evaluations"] = 20 if schedule else None
    return search_factors(tiny_llama(), random_texts(9), LENGTH, algorithm=make(), seed=3, **options)


def without_time(record):
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("schedule", [None, ((0.3, 2), (0.6, 4))])
@pytest.mark.parametrize("make", ALGORITHMS)
@pytest.mark.parametrize("passes_before_the_cut", [1, 8, 13, 18])
def test_a_cut_search_continues_exactly_and_repeats_nothing(
    tmp_path, monkeypatch, make, schedule, passes_before_the_cut
):
    monkeypatch.setattr(score_book, "_ROWS_EVERY", 0.0)
    whole = search(make, schedule=schedule)
    real, done, again = evaluating.row_sums, [], []

    def dies(model, factors, documents):
        if len(done) == passes_before_the_cut:
            raise KeyboardInterrupt
        done.append(len(documents))
        return real(model, factors, documents)

    monkeypatch.setattr(evaluating, "row_sums", dies)
    with pytest.raises(KeyboardInterrupt):
        search(make, tmp_path, schedule)

    def counts(model, factors, documents):
        again.append(len(documents))
        return real(model, factors, documents)

    monkeypatch.setattr(evaluating, "row_sums", counts)
    result = search(make, tmp_path, schedule)
    assert result.factors == whole.factors
    assert (result.score, result.forwards) == (whole.score, whole.forwards)
    assert [without_time(row) for row in result.history] == [without_time(row) for row in whole.history]
    assert result.held_out == whole.held_out
    assert sum(done) + sum(again) == whole.forwards + 2 * 4
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(whole.history)
    assert not (tmp_path / "history.rows.jsonl").exists()


def test_files_of_a_finished_search(texts, tmp_path):
    result = search_factors(tiny_llama(), texts, LENGTH, max_evaluations=6, folder=tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["finished"]
    assert state["evaluations"] == 6
    assert state["best"] == result.score
    assert set(state["baselines"]) == {"linear", "ntk", "yarn"}
    assert RescaleFactors.load(tmp_path / "factors.json") == result.factors
    csv = RescaleFactors.load(tmp_path / "rescale_factors.csv", original_length=32, target_length=LENGTH)
    assert csv.values == result.factors.values


def test_a_folder_of_another_model_is_refused_by_name(texts, tmp_path):
    search_factors(tiny_llama(), texts, LENGTH, max_evaluations=4, folder=tmp_path)
    with pytest.raises(ValueError, match="`model` differs"):
        search_factors(tiny_llama(seed=1), texts, LENGTH, max_evaluations=4, folder=tmp_path)


def test_a_target_within_the_window_is_refused(texts):
    with pytest.raises(ValueError, match=r"longer than the model's own window \(32 tokens\)"):
        search_factors(tiny_llama(), texts, 32)


def test_candidates_that_overflow_lose_and_the_search_goes_on(texts, tmp_path, monkeypatch):
    real = evaluating.row_sums

    def poisoned(model, factors, documents):
        sums = real(model, factors, documents)
        for row, table in zip(sums, factors, strict=True):
            if table.attention_factor != 1:  # the baselines' are
                row[0] = {0: math.nan, 1: math.inf}.get(round(100 * sum(table.values)) % 4, row[0])
        return sums

    monkeypatch.setattr(evaluating, "row_sums", poisoned)
    result = search_factors(tiny_llama(), texts, LENGTH, max_evaluations=20, folder=tmp_path)
    assert result.score < float("inf")
    assert result.evaluations == 20
    statuses = [row["status"] for row in result.history]
    assert set(statuses) == {"ok", "nan", "inf"}
    again = search_factors(tiny_llama(), texts, LENGTH, max_evaluations=20, folder=tmp_path)
    assert [row["status"] for row in again.history] == statuses
    assert again.factors == result.factors


def test_a_result_behind_a_published_table_is_said(texts, caplog):
    steep = {"pinned": 7, "max_evaluations": 1}  # leaves no room to win
    found = [search_factors(tiny_llama(seed), texts, LENGTH, seed=1, **steep) for seed in range(4)]
    behind = [result for result in found if min(result.baselines.values()) < result.score]
    assert 0 < len(behind) == sum("on the same documents" in message for message in caplog.messages)


def test_an_objective_weighs_tokens_alike_in_every_precision(texts):
    objective, rows = Objective(answer=0.0, end_weight=1.3, text_from=0.3), [torch.zeros(4096, dtype=torch.int64)]
    (expected,) = objective.documents(rows, 4096)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a forward of `bf16-true`
    try:
        (row,) = objective.documents(rows, 4096)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(row.counted, expected.counted)
    assert (row.counted == torch.tensor(1.3).double()).sum() == 512
    assert row.counted.count_nonzero() == 4096 - math.ceil(0.3 * 4096)


def test_settings_that_an_algorithm_does_not_know_are_refused(texts):
    several = {"start_tokens": (0, 4)}
    for algorithm in (None, RampSearch(), SmoothSearch(), LongRoPE2Search()):
        with pytest.raises(ValueError, match="searches none: give one number"):
            search_factors(tiny_llama(), texts, LENGTH, algorithm=algorithm, **several)
    result = search_factors(tiny_llama(), texts, LENGTH, algorithm=small_evolution(), max_evaluations=12, **several)
    assert {row["start_tokens"] for row in result.history[3:]} == {0, 4}
    warm = {"warm_start": RescaleFactors((1.0,) * 7 + (1.5,), 32, 48)}
    with pytest.raises(ValueError, match="takes no `warm_start`"):
        search_factors(tiny_llama(), texts, LENGTH, algorithm=LongRoPE2Search(), space=warm)


def test_a_second_search_is_kept_out_of_a_folder_until_the_first_has_ended(texts, tmp_path):
    folder, said = tmp_path / "search", []

    def second(run):
        if not said:
            said.append(True)
            with pytest.raises(
                ValueError, match=rf"search belongs to process {os.getpid()} on .*: wait until that has"
            ):
                search_factors(tiny_llama(), texts, LENGTH, max_evaluations=4, folder=folder)

    search_factors(tiny_llama(), texts, LENGTH, max_evaluations=4, folder=folder, progress=second)
    assert said
    again = search_factors(tiny_llama(), texts, LENGTH, max_evaluations=4, folder=folder)
    assert [row["evaluation"] for row in again.history] == list(range(len(again.history)))
