"""What a comparison keeps of each method, and what it makes of two."""

import csv
import math

import pytest
from helpers import LLAMA, tiny_llama
from known_models import VOCABULARY, Data, Module, trainer_with
from transformers import LlamaConfig

from lightning_longrope import LengthTables, install_factors
from lightning_longrope.callbacks import PerplexityByLength
from lightning_longrope.callbacks.comparison import MethodResults, method_tables, paired_rows, write_results
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.metrics import DocumentSums, Measurement, PositionMean


def results(nll, *, value=2.0):
    sums = {("perplexity", 64): DocumentSums(tuple(nll), (10.0, 10.0, 20.0))}
    rows = [
        Measurement("perplexity", 64, None, value, 1.0, math.inf, 3),
        Measurement("passkey", 64, 0.5, 1.0, 0.5, 1.0, 4),
    ]
    return MethodResults(rows, [PositionMean(64, 2, 10, 1.5, 1.0, 2.0, 3)], sums)


def test_results_come_back_as_they_were_saved(tmp_path):
    found = results([30.0, 20.0, 50.0])
    found.save(tmp_path / "yarn.json")
    assert MethodResults.load(tmp_path / "yarn.json") == found


def test_a_method_is_held_against_yarn_and_the_best_baseline():
    baselines = {"none": results([90, 90, 90]), "ntk": results([10, 20, 30]), "yarn": results([30, 20, 50])}
    rows = paired_rows(results([28.0, 19.0, 46.0]), baselines)
    assert [(row.metric, row.length, row.depth, row.n) for row in rows] == [
        ("perplexity_over_ntk", 64, None, 3),
        ("perplexity_over_yarn", 64, None, 3),
    ]
    assert [row.value for row in rows] == pytest.approx([math.exp(33 / 40), math.exp(-7 / 40)])
    assert all(row.low <= row.value <= row.high for row in rows)
    baselines["ntk"].sums[("perplexity", 64)] = DocumentSums((1.0,), (40.0,))  # measured on other documents
    assert [row.metric for row in paired_rows(results([28.0, 19.0, 46.0]), baselines)] == ["perplexity_over_yarn"]


def test_methods_extend_a_model_a_second_time_on_top_of_its_factors():
    config, pairs = LlamaConfig(**LLAMA), 8
    earlier = RescaleFactors((1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), 32, 128, start_tokens=2, attention_factor=1.2)
    again = method_tables("linear", config, 512, earlier)(64)
    assert again.values == tuple(4 * value for value in earlier.values)
    assert (again.original_length, again.target_length, again.start_tokens) == (32, 512, 2)
    assert again.attention_factor == 1.2
    yarn, ntk = (method_tables(name, config, 512, earlier)(64) for name in ("yarn", "ntk"))
    assert yarn.attention_factor == pytest.approx(1.2 * (0.1 * math.log(4) + 1))
    # the slow end of YaRN is slowed 4 times, and NTK's ramp is a power of the extension ratio
    assert yarn.values[-1] == pytest.approx(16.0)
    assert ntk.values == pytest.approx([value * 4 ** (i / (pairs - 1)) for i, value in enumerate(earlier.values)])
    assert method_tables("none", config, 512, earlier)(64).values == earlier.values
    dynamic = method_tables("dynamic_ntk", config, 512, earlier)
    assert dynamic(100).values == earlier.values  # within the window that the model reads already
    assert dynamic(512).values == pytest.approx(ntk.values)


def test_tables_of_a_comparison(tmp_path):
    write_results(tmp_path, {"yarn": results([30.0, 20.0, 50.0]), "searched": results([28.0, 19.0, 46.0])})
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert list(rows[0]) == ["method", "metric", "length", "depth", "value", "low", "high", "n"]
    assert [(row["method"], row["metric"], row["depth"]) for row in rows] == [
        ("yarn", "perplexity", ""),
        ("yarn", "passkey", "0.5"),
        ("searched", "perplexity", ""),
        ("searched", "passkey", "0.5"),
        ("searched", "perplexity_over_yarn", ""),
    ]
    positions = list(csv.DictReader((tmp_path / "positions.csv").read_text().splitlines()))
    assert list(positions[0]) == ["method", "length", "start", "end", "nll", "low", "high", "n"]
    assert [row["method"] for row in positions] == ["yarn", "searched"]
    second = {f"second_{name}": results(nll) for name, nll in (("yarn", [30, 20, 50]), ("searched", [28, 19, 46]))}
    write_results(tmp_path, second)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["metric"] for row in rows if "over" in row["metric"]] == ["perplexity_over_second_yarn"]


def test_rows_of_other_methods_are_kept_beside_those_measured_anew(tmp_path):
    write_results(tmp_path, {name: results([30.0, 20.0, 50.0]) for name in ("yarn", "searched")})
    before = {name: (tmp_path / name).read_text().splitlines() for name in ("results.csv", "positions.csv")}
    write_results(tmp_path, {"searched": MethodResults(results([], value=9.0).rows[:1])}, beside_others=True)
    after = {name: (tmp_path / name).read_text().splitlines() for name in before}
    kept = {name: [line for line in lines if not line.startswith("searched")] for name, lines in before.items()}
    assert after["results.csv"] == [*kept["results.csv"], "searched,perplexity,64,,9.0,1.0,inf,3"]
    assert after["positions.csv"] == kept["positions.csv"]
    (tmp_path / "results.csv").write_text("notes\n")
    with pytest.raises(ValueError, match="needs the columns method,metric"):
        write_results(tmp_path, {"searched": results([1.0, 2.0, 3.0])}, beside_others=True)


def test_tables_by_length_are_measured_each_at_its_lengths_installed_or_given(tmp_path):
    tables = LengthTables(
        tuple(RescaleFactors(tuple(1 + k * i for i in range(8)), 32, length) for k, length in ((0.2, 32), (2.0, 64)))
    )

    def perplexities(factors, table_at=None):
        model = tiny_llama(vocab_size=VOCABULARY, initializer_range=0.2)
        callback = PerplexityByLength((16, 32, 33, 64), documents=3)
        install_factors(model, factors)
        module, trainer = Module(model), trainer_with(tmp_path, callback)
        trainer.validate(module, datamodule=Data(), verbose=False)
        found = callback.results if table_at is None else callback.measure(trainer, module, table_at)
        return {row.length: row.value for row in found if row.metric == "perplexity"}

    short, long = (perplexities(table) for table in tables.tables)
    assert all(short[length] != pytest.approx(long[length], rel=1e-3) for length in short)
    expected = {16: short[16], 32: short[32], 33: long[33], 64: long[64]}
    assert perplexities(tables) == expected
    assert perplexities(tables.longest, tables.for_length) == expected
