"""A whole search on a small model: it finds, leaves no trace, and continues exactly where it was cut."""

import json

import pytest
import torch
from helpers import tiny_llama

import lightning_longrope.searching as searching
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.search import EvolutionSearch, RampSearch, SmoothSearch
from lightning_longrope.searching import search_factors

LENGTH = 64


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(96, (LENGTH + 3,), generator=generator) for _ in range(2)]


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
    assert len({(tuple(r["values"]), r["start_tokens"]) for r in searched}) == len(searched)


def test_a_search_leaves_no_trace(texts):
    model = tiny_llama().train()
    rotary, before = model.model.rotary_emb, {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    search_factors(model, texts, LENGTH, max_evaluations=4)
    assert model.training
    assert model.model.rotary_emb is rotary
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", ALGORITHMS)
@pytest.mark.parametrize("passes_before_the_cut", [1, 2, 3])
def test_a_cut_search_continues_exactly_and_repeats_nothing(texts, tmp_path, monkeypatch, make, passes_before_the_cut):
    whole = search_factors(tiny_llama(), texts, LENGTH, algorithm=make(), seed=3)
    real, counts = searching.score_candidates, []

    def dies(model, candidates, *args, **options):
        if len(counts) == passes_before_the_cut:
            raise KeyboardInterrupt
        counts.append(len(candidates))
        return real(model, candidates, *args, **options)

    monkeypatch.setattr(searching, "score_candidates", dies)
    with pytest.raises(KeyboardInterrupt):
        search_factors(tiny_llama(), texts, LENGTH, algorithm=make(), seed=3, folder=tmp_path)
    done = sum(counts)
    resumed = []

    def counts_again(model, candidates, *args, **options):
        resumed.append(len(candidates))
        return real(model, candidates, *args, **options)

    monkeypatch.setattr(searching, "score_candidates", counts_again)
    result = search_factors(tiny_llama(), texts, LENGTH, algorithm=make(), seed=3, folder=tmp_path)
    assert result.factors == whole.factors
    assert result.score == whole.score
    assert [row["score"] for row in result.history] == [row["score"] for row in whole.history]
    assert 0 < done < len(whole.history)
    assert done + sum(resumed) == len(whole.history)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(whole.history)


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


def test_candidates_that_overflow_lose_and_the_search_goes_on(texts, monkeypatch):
    real = searching.score_candidates

    def poisoned(model, candidates, *args, **options):
        scores = real(model, candidates, *args, **options)
        return [
            searching.Score(float("nan"), float("nan"), float("nan")) if index % 2 else score
            for index, score in enumerate(scores)
        ]

    monkeypatch.setattr(searching, "score_candidates", poisoned)
    result = search_factors(tiny_llama(), texts, LENGTH, max_evaluations=12)
    assert result.score < float("inf")
    assert result.evaluations == 12
