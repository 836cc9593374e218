"""Second extensions, recovery of the short window, and the judgement on documents that the search has not seen."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_llama

from lightning_longrope.commands.export import export_checkpoint
from lightning_longrope.export import export_model
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import install_factors
from lightning_longrope.search import RampSearch, RecoverySearch, SearchSpace
from lightning_longrope.search.judgement import judge
from lightning_longrope.searching import search_factors

FIRST = RescaleFactors((1.0, 1.1, 1.3, 1.5, 1.7, 1.9, 2.0, 2.0), 32, 64, attention_factor=math.sqrt(1.2))
TOTAL = math.sqrt(1 + math.log(4) / math.log(32))  # 32 to 128 tokens


def texts(count, length=128, seed=2):
    return list(torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed)))


def extended():
    model = tiny_llama()
    install_factors(model, FIRST)
    return model


def test_a_second_extension_multiplies_the_factors_installed():
    model, rotary = extended(), None
    rotary = model.model.rotary_emb
    result = search_factors(model, texts(2), 128, max_evaluations=10, pinned=2)
    assert model.model.rotary_emb is rotary
    found = result.factors
    assert (found.original_length, found.target_length) == (32, 128)
    assert found.attention_factor == pytest.approx(TOTAL)
    for row in result.history[3:]:
        multipliers = np.array(row["values"]) / FIRST.values
        assert multipliers == pytest.approx(np.round(multipliers, 2), abs=1e-9)
        assert list(multipliers[:2]) == [1.0, 1.0]
        assert multipliers.max() <= 1.25 * 2 + 1e-9
    origins = [row["origin"] for row in result.history[:3]]
    assert origins == ["baseline:second_linear", "baseline:second_ntk", "baseline:second_yarn"]
    assert result.history[0]["values"] == [2 * value for value in FIRST.values]
    assert result.history[0]["attention_factor"] == FIRST.attention_factor

    install_factors(model, found)
    with torch.no_grad():
        losses = [model(text[None], labels=text[None]).loss.item() for text in texts(2)]
    assert result.score == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_first_extension_of_an_extended_model_is_there_for_those_who_ask():
    result = search_factors(extended(), texts(2), 128, max_evaluations=4, multiply=False)
    assert [row["origin"] for row in result.history[:3]] == ["baseline:linear", "baseline:ntk", "baseline:yarn"]
    assert result.history[0]["values"] == [4.0] * 8


@pytest.mark.parametrize(("length", "most"), [(32, 1.25), (16, 1.25), (64, 2.5)])
def test_a_recovery_searches_small_factors_under_the_installed_attention_factor(length, most):
    result = search_factors(extended(), texts(2), length, algorithm=RampSearch(), max_evaluations=8, recovery=True)
    names = [row["origin"] for row in result.history if row["origin"].startswith("baseline")]
    assert names[:2] == ["baseline:none", "baseline:installed"]
    assert (len(names) == 5) == (length > 32)
    assert result.history[1]["values"] == list(FIRST.values)
    searched = result.history[len(names) :]
    assert len(searched) == 8
    assert {row["attention_factor"] for row in searched} == {FIRST.attention_factor}
    assert max(max(row["values"]) for row in searched) <= most
    assert result.factors.target_length == length


def test_a_recovery_goes_from_no_factors_to_those_installed():
    model, attention = extended(), (1.0, 1.05, 1.1)
    result = search_factors(
        model, texts(2, 32), 32, max_evaluations=12, recovery=True, pinned=0, space={"attention_factors": attention}
    )
    searched = result.history[2:]
    assert searched[0]["values"] == [1.0] * 8
    assert searched[1]["values"] == list(FIRST.values)
    for row in searched:
        shares = np.log(row["values"])[1:] / np.log(FIRST.values)[1:]  # one power of all, but for the grid of 0.01
        assert shares == pytest.approx(np.full(7, shares[-1]), abs=0.06)
    assert {row["attention_factor"] for row in searched} == set(attention)
    assert result.score == min(row["score"] for row in searched)
    with torch.no_grad():
        install_factors(model, result.factors)
        losses = [model(text[None], labels=text[None]).loss.item() for text in texts(2, 32)]
    assert result.score == pytest.approx(sum(losses) / 2, rel=1e-5)
    plain = search_factors(extended(), texts(2, 32), 32, max_evaluations=5, recovery=True)
    assert {row["attention_factor"] for row in plain.history[2:]} == {FIRST.attention_factor}


def test_a_recovery_of_a_model_that_was_not_extended_has_nothing_to_go_towards():
    model = tiny_llama()
    install_factors(model, RescaleFactors((1.0,) * 8, 32, 32))
    found, ramps = (
        search_factors(model, texts(2, 32), 32, max_evaluations=3, recovery=True, algorithm=algorithm)
        for algorithm in (None, RampSearch())
    )
    assert len(found.history) > 3
    assert [row["values"] for row in found.history] == [row["values"] for row in ramps.history]


def test_a_recovery_of_a_model_that_comes_extended_goes_towards_its_own_table():
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_llama(max_position_embeddings=128, rope_parameters=scaled)
    found = search_factors(model, texts(2, 32), 32, max_evaluations=3, recovery=True)
    assert {row["origin"] for row in found.history if ":" not in row["origin"]} == {"between"}


def test_a_recovery_finds_the_shares_that_were_hidden():
    space = SearchSpace(
        rotary_size=64, base=1e4, original_length=128, target_length=128, max_factor=8.0, pinned=4,
        warm_start=RescaleFactors(tuple(8 ** (i / 31) for i in range(32)), 128, 1024, attention_factor=1.2),
        attention_factors=tuple(1 + 0.02 * step for step in range(11)),
    )  # fmt: skip
    algorithm = RecoverySearch().start(space, seed=0)
    while candidates := algorithm.ask():
        assert all(space.contains(candidate) for candidate in candidates)
        away = [(np.log(c.values[-1]) / np.log(8) - 0.6) ** 2 + (c.attention_factor - 1.06) ** 2 for c in candidates]
        algorithm.tell(candidates, away)
    best, score = algorithm.best
    assert algorithm.evaluations == 24
    assert best.attention_factor == pytest.approx(1.06, abs=0.021)
    assert score < 2e-3


def test_what_makes_no_sense_is_refused_in_one_line():
    with pytest.raises(ValueError, match="pass `recovery`"):
        search_factors(tiny_llama(), texts(1), 32)
    with pytest.raises(ValueError, match="`multiply` needs a model with factors"):
        search_factors(tiny_llama(), texts(1), 64, multiply=True)
    with pytest.raises(ValueError, match="`held_out` keeps back 2 of 2"):
        search_factors(tiny_llama(), texts(2), 64, held_out=2)
    with pytest.raises(ValueError, match="held-out document is one of the search's"):
        search_factors(tiny_llama(), texts(2), 64, held_out=[*texts(1, seed=3), texts(2)[1]])


def test_a_short_table_reaches_the_exported_config(tmp_path):
    short = RescaleFactors((1.0,) * 4 + (1.1,) * 4, 32, 32, attention_factor=FIRST.attention_factor)
    short.save(tmp_path / "short.json")
    model = export_model(extended(), None, tmp_path / "long")
    export_checkpoint(str(model), str(tmp_path / "both"), short=str(tmp_path / "short.json"))
    config = (tmp_path / "both" / "config.json").read_text()
    assert '"short_factor"' in config
    assert config.count("1.1,") >= 3


def test_a_judgement_is_the_difference_of_paired_documents_and_its_normal_interval():
    random = np.random.default_rng(0)
    tokens = np.full(400, 50.0)
    hard = random.normal(3.0, 1.0, 400)  # documents differ far more than methods do

    def sums(means):
        return np.stack([means * tokens, tokens, 0 * tokens, 0 * tokens], axis=1)

    gains = random.normal(0.05, 0.2, 400)
    tables = {"bad": sums(hard + 1), "good": sums(hard)}
    found = judge(sums(hard - gains), tables, lambda total: total[0] / total[1])
    assert found.best_baseline == "good"
    assert found.score == pytest.approx((hard - gains).mean())
    assert found.difference == pytest.approx(-gains.mean())
    error = gains.std(ddof=1) / 20
    assert found.difference_low == pytest.approx(-gains.mean() - 1.96 * error, abs=0.15 * error)
    assert found.difference_high == pytest.approx(-gains.mean() + 1.96 * error, abs=0.15 * error)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (hard - gains).std(ddof=1) / 20, rel=0.1)
    assert not found.within_noise
    assert judge(sums(hard), tables, lambda total: total[0] / total[1]).within_noise
    with pytest.raises(ValueError, match="at least 2 held-out documents"):
        judge(sums(hard)[:1], {"good": sums(hard)[:1]}, lambda total: total[0])


def test_a_search_is_judged_on_documents_of_its_own(caplog):
    result = search_factors(tiny_llama(), texts(5), 64, max_evaluations=6, held_out=3)
    model = tiny_llama()
    install_factors(model, result.factors)
    with torch.no_grad():
        losses = [model(text[None, :64], labels=text[None, :64]).loss.item() for text in texts(5)[2:]]
    assert result.held_out.score == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert result.held_out.documents == 3
    assert set(result.held_out.baselines) == {"linear", "ntk", "yarn"}
    assert ("not better than" in caplog.text) == result.held_out.within_noise
