"""The report against the numbers that went into it: every one of them is written here, and read back from the page."""

import base64
import csv
import json
import math
import shutil
from html.parser import HTMLParser

import matplotlib
import pytest
from report_runs import (
    LENGTHS,
    PERPLEXITY,
    SEARCHED,
    TRIALS,
    measurements,
    perplexity_row,
    write_csv,
    write_run,
    write_search,
)

from lightning_longrope.reporting import (
    Result,
    Results,
    compare,
    read_run,
    verdict,
    write_comparison,
    write_report,
)
from lightning_longrope.reporting.drawing import spread
from lightning_longrope.reporting.verdict import Extension
from lightning_longrope.search.journal import Journal


class Page(HTMLParser):
    """What a browser would make of a report: tags, attributes, text, and tables as lists of cells."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.tables, self.texts, self.headings = [], [], {}, [], []
        self._open, self._table = [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._open.append(tag)
        if tag == "table":
            self._table = {"caption": "", "rows": []}
        elif tag == "tr" and self._table is not None:
            self._table["rows"].append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table["rows"][-1].append({"text": "", "small": "", **dict(attributes)})

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag == "table":
            self.tables.setdefault(self._table["caption"], self._table["rows"])
            self._table = None

    def handle_data(self, data):
        if "style" in self._open or not data.strip():
            return
        self.texts.append(data)
        if "h1" in self._open:
            self.headings.append(data)
        if self._table is not None and "caption" in self._open:
            self._table["caption"] += data
        elif self._table is not None and self._table["rows"] and self._table["rows"][-1]:
            self._table["rows"][-1][-1]["small" if "small" in self._open else "text"] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole recipe with its report; tests only look at it."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run):
    return Page(run / "report.html")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are slow, and not the point."""
    monkeypatch.setattr("lightning_longrope.reporting.drawing.Plot.svg", lambda plot, narrow: "")
    monkeypatch.setattr("lightning_longrope.reporting.drawing.Plot.save", lambda plot, folder: None)


def say(rows, extension=None):
    """The verdict on rows of results.csv."""
    results = Results(Result(*row[:3], None if row[3] == "" else row[3], *row[4:]) for row in rows)
    return verdict(results, [extension or Extension("", 128, 1024)])


def two(searched, yarn, spread=0.01, metric="perplexity", **extra):
    rows = [
        perplexity_row("searched", metric, 1024, searched, spread),
        perplexity_row("yarn", metric, 1024, yarn, spread),
    ]
    return say([*rows, *extra.get("rows", [])])


def test_joined_table_holds_every_measurement_and_the_means_over_depths(run):
    rows = read_csv(run / "results.csv")
    written = {
        (m, metric, str(length), str(depth)): (value, low, high, n)
        for m, metric, length, depth, value, low, high, n in measurements()
    }
    found = {
        (row["method"], row["metric"], row["length"], row["depth"]): tuple(
            float(row[name]) for name in ("value", "low", "high", "n")
        )
        for row in rows
    }
    assert len(written) == 7 * (5 + 5 + 3 + 25)
    assert {key: found.get(key) for key in written} == written
    means = {key: found[key] for key in found.keys() - written.keys()}
    assert len(means) == 7 * 5
    assert means[("yarn", "passkey", "1024", "")] == pytest.approx((0.47, 0.3751, 0.5671, 100), abs=1e-4)  # by hand
    assert means[("none", "passkey", "1024", "")][0] == 0


def test_later_stage_replaces_an_earlier_measurement_and_the_report_says_so(tmp_path):
    for stage, value in (("10-late", 11.5), ("9-early", 12.5)):
        rows = [perplexity_row("none", "perplexity", 128, value), perplexity_row("none", "perplexity", 256, 20.0)]
        write_csv(tmp_path / stage / "eval" / "results.csv", rows)
    write_csv(tmp_path / "9-early" / "eval" / "results.csv", [perplexity_row("none", "perplexity", 128, 12.5)])
    found = read_run(tmp_path)
    assert [stage.name for stage in found.stages] == ["9-early", "10-late"]
    assert found.results.get("none", "perplexity", 128).value == 11.5
    assert len(found.notes) == 1
    assert found.notes[0].endswith("shown: 1.")


def test_every_figure_has_a_file_with_its_numbers(run):
    names = {"search_curve", "factors", "perplexity", "perplexity_last128", "passkey", "passkey_depth", "training"}
    assert {path.name for path in (run / "figures").iterdir()} == {
        f"{n}.{end}" for n in names for end in ("png", "csv")
    }
    for name in names:
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    perplexities = {
        (row["method"], int(row["length"])): float(row["value"]) for row in read_csv(run / "figures/perplexity.csv")
    }
    assert perplexities == {(m, n): v for m, values in PERPLEXITY.items() for n, v in zip(LENGTHS, values, strict=True)}
    depths = read_csv(run / "figures/passkey_depth.csv")
    hits = {(row["method"], int(row["length"]), float(row["depth"])): float(row["value"]) * TRIALS for row in depths}
    assert len(hits) == 7 * 25
    assert hits[("ntk", 512, 0.75)] == pytest.approx(16)
    losses = read_csv(run / "figures/training.csv")
    assert {row["stage"] for row in losses} == {"1-pretrain", "3-finetune"}
    assert {row["metric"] for row in losses} == {"train_loss"}


def test_search_curve_keeps_baselines_and_failures_out_of_the_best_so_far(run):
    rows = read_csv(run / "figures/search_curve.csv")
    assert len(rows) == 103
    assert [row["best"] for row in rows[:3]] == ["", "", ""]
    assert rows[20]["score"] == ""
    scores = [float(row["score"]) if row["score"] else math.inf for row in rows[3:]]
    assert [float(row["best"]) for row in rows[3:]] == [min(scores[: i + 1]) for i in range(100)]


def test_factors_figure_compares_the_searched_table_with_the_formulas(run):
    rows = read_csv(run / "figures/factors.csv")
    assert [float(row["searched"]) for row in rows] == list(SEARCHED.values)
    assert [float(row["linear"]) for row in rows] == [8.0] * 32
    assert [float(row["ntk"]) for row in rows] == pytest.approx([8 ** (i / 31) for i in range(32)])
    yarn = [float(row["yarn"]) for row in rows]
    assert yarn[0] == pytest.approx(1.0)
    assert yarn[-1] == pytest.approx(8.0)


def test_page_shows_the_numbers_with_their_intervals(page):
    table = page.tables["Perplexity"]
    assert [cell["text"] for cell in table[0]] == ["tokens read", "64", "128", "256", "512", "1,024"]
    shown = {row[0]["text"]: [float(cell["text"]) for cell in row[1:]] for row in table[1:]}
    names = {"none": "no change", "linear": "PI", "ntk": "NTK", "dynamic_ntk": "dynamic NTK", "yarn": "YaRN"}
    assert shown == {names.get(method, method): list(values) for method, values in PERPLEXITY.items()}
    yarn = table[[row[0]["text"] for row in table].index("YaRN")]
    assert yarn[-1]["title"].replace("\u00a0", " ") == "95 % interval 12.97 to 13.23, 24 documents"
    assert yarn[-1]["small"] == "12.97–13.23"
    best = {row[0]["text"]: [cell.get("class") for cell in row[1:]] for row in table[1:]}
    assert best["searched"] == [None, None, "best", "best", "best"]
    assert best["no change"] == ["best", "best", None, None, None]
    assert set(best["tuned"]) == {None}


def test_heat_map_cells_show_per_cent_of_keys_and_their_interval(page):
    rows = page.tables["YaRN"]
    assert [cell["text"] for cell in rows[1]] == ["0 %", "100", "100", "100", "90", "25"]
    assert rows[1][5]["style"] == "--v:0.250"
    assert "20 trials" in rows[1][5]["title"]


def test_page_states_how_the_run_was_made(page):
    for text in ("longrope run configs/quickstart --seed 1", "3 min 56 s", "7 min 51 s", "2.13.0", "2 threads", "515"):
        assert text in page.text


def test_page_needs_nothing_but_itself(run, page):
    assert {"script", "img", "iframe", "object"}.isdisjoint(page.tags)
    links = {value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset")}
    assert len(links) > 10
    links -= {"data:,"}  # no icon
    assert all(link.startswith(("#", "figures/", "results.csv")) for link in links)
    assert all((run / link).is_file() for link in links if not link.startswith("#"))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_verdict_follows_the_data():
    swap = {"searched": "yarn", "yarn": "searched"}
    better = say(pooled(measurements()))
    worse = say(pooled([(swap.get(row[0], row[0]), *row[1:]) for row in measurements()]))
    assert (
        better.headline
        == "At 1,024 tokens the searched factors beat the best baseline (YaRN) on perplexity and pass keys."
    )
    assert (
        worse.headline
        == "At 1,024 tokens the searched factors lose to the best baseline (YaRN) on perplexity and pass keys."
    )
    assert "perplexity 12.44, 5.0\u00a0% below YaRN (13.10)" in better.sentences[0]
    assert "perplexity 13.10, 5.3\u00a0% above YaRN (12.44)" in worse.sentences[0]
    assert (
        "93\u00a0% of the hidden pass keys are repeated, 46\u00a0points more than YaRN (47\u00a0%)"
        in better.sentences[2]
    )
    assert "46\u00a0points fewer than YaRN (93\u00a0%)" in worse.sentences[2]
    assert [tile.outcome for tile in better.tiles] == ["better", "better", "better", "same"]
    assert [tile.outcome for tile in worse.tiles] == ["worse", "worse", "better", "better"]


def pooled(rows):
    """The rows with the mean over depths of the pass keys, as an evaluation writes them."""
    groups = {}
    for row in rows:
        if row[1] == "passkey":
            groups.setdefault((row[0], row[2]), []).append(row[4])
    means = [(m, "passkey", n, "", sum(v) / 5, *wilson(sum(v) * 20, 100), 100) for (m, n), v in groups.items()]
    return [*rows, *means]


def wilson(hits, trials, z=1.959964):
    """Ends of the Wilson interval, the roots of (p - rate)^2 = z^2 p (1 - p) / n."""
    a, b, c = 1 + z * z / trials, -(2 * hits / trials + z * z / trials), (hits / trials) ** 2
    root = math.sqrt(max(b * b - 4 * a * c, 0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_verdict_does_not_call_noise_a_win():
    noise = two(12.95, 13.1)
    assert (
        noise.headline
        == "At 1,024 tokens the searched factors are within the noise of the best baseline (YaRN) on perplexity."
    )
    assert "1.1\u00a0% below YaRN (13.10), which is within the noise" in noise.sentences[0]
    assert "95\u00a0% interval −2.5 to +0.3\u00a0%." in noise.sentences[0]
    assert "beat" in two(12.9, 13.1, spread=0.001).headline
    assert "lose" in two(13.1, 12.9, spread=0.001).headline
    assert "no interval" in two(12.9, 13.1, spread=0).headline  # one document has an interval without width
    assert "level with YaRN" in two(13.1, 13.1).sentences[0]


def test_verdict_holds_the_searched_factors_against_the_best_baseline_not_a_weak_one():
    verdict = two(12.4, 13.1, rows=[perplexity_row("ntk", "perplexity", 1024, 11.0)])
    assert "lose to the best baseline (NTK)" in verdict.headline


def test_verdict_prefers_the_ratio_on_the_same_documents():
    ratio = ("searched", "perplexity_over_yarn", 1024, "", 0.985, 0.979, 0.991, 24)
    paired = two(12.95, 13.1, rows=[ratio])
    assert "within the noise" in two(12.95, 13.1).headline
    assert "beat" in paired.headline
    assert (
        "1.5\u00a0% below YaRN (13.10), 95\u00a0% interval −2.1 to −0.9\u00a0% document by document."
        in paired.sentences[0]
    )


def test_headline_admits_a_loss_at_the_end_of_the_window_that_the_mean_hides():
    end = [
        perplexity_row("searched", "perplexity_last128", 1024, 15.0),
        perplexity_row("yarn", "perplexity_last128", 1024, 13.0),
    ]
    found = two(12.0, 13.1, rows=end)
    assert found.headline == (
        "At 1,024 tokens the searched factors beat the best baseline (YaRN) on perplexity;"
        " on the last 128 tokens they lose to it."
    )
    assert [tile.outcome for tile in found.tiles] == ["better", "worse"]


def test_verdict_survives_a_model_that_broke():
    assert "lose" in two(math.inf, 13.1).headline
    assert "no finite loss" in two(math.nan, 13.1).sentences[0]
    rows = [perplexity_row(method, "perplexity", 1024, math.nan) for method in ("none", "llama3")]
    assert "beat the best baseline (YaRN)" in two(12.0, 13.1, rows=rows).headline


def test_verdict_names_what_was_measured_where_nothing_was_searched():
    rows = [perplexity_row("yarn", "perplexity", 1024, 13.1), perplexity_row("ntk", "perplexity", 1024, 16.6)]
    found = say(rows)
    assert found.headline == "No searched factors were held against a baseline."
    assert "YaRN has perplexity 13.10, the best of 2 methods: 21.1\u00a0% below NTK (16.60)" in found.sentences[0]
    assert say([]).headline == "Nothing has been measured yet."


def test_second_extension_makes_the_headline_and_each_has_its_own_tuned_model():
    rows = [(row[0] if row[0] != "tuned" else "tuned_1024", *row[1:]) for row in pooled(measurements())]
    rows += [perplexity_row(m, "perplexity", 4096, v) for m, v in (("second_yarn", 12.0), ("second_searched", 11.0))]
    rows += [perplexity_row("tuned", "perplexity", 4096, 9.0)]
    results = Results(Result(*row[:3], None if row[3] == "" else row[3], *row[4:]) for row in rows)
    found = verdict(results, [Extension("", 128, 1024, "tuned_1024"), Extension("second_", 1024, 4096, "tuned")])
    assert (
        found.headline
        == "At 4,096 tokens the factors of the second search beat the best baseline (YaRN) on perplexity."
    )
    assert found.sentences[0].startswith("At 1,024 tokens the searched factors beat")
    assert [tile.value for tile in found.tiles if "uned" in tile.label] == ["10.22", "97\u00a0%", "9.00"]


def test_interval_of_a_difference_agrees_with_published_ones():
    # Newcombe 1998, Statistics in Medicine 17:873, Table II, 56/70 against 48/80, method 10
    one, other = (Result("a", "passkey", 1, None, hits / n, *wilson(hits, n), n) for hits, n in ((56, 70), (48, 80)))
    found = compare(one, other)
    assert (found.change, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    # symmetric in the logarithm: the textbook interval of a difference of two normal means
    a, b = (
        Result("a", "perplexity", 1, None, v, v / math.exp(1.96 * s), v * math.exp(1.96 * s), 9)
        for v, s in ((10, 0.03), (12, 0.04))
    )
    found = compare(a, b)
    half = 1.96 * 0.05
    assert math.log1p(found.low) == pytest.approx(math.log(10 / 12) - half)
    assert math.log1p(found.high) == pytest.approx(math.log(10 / 12) + half)
    assert found.outcome == "better"
    assert compare(b, a).outcome == "worse"


def test_names_from_files_are_text_and_never_markup(tmp_path):
    evil, formula = "<script>alert(1)</script> \"&'", "$x^2$"
    names = {"yarn": "yarn", "ntk": evil, "dynamic_ntk": formula}
    rows = [(names[row[0]], *row[1:]) for row in measurements() if row[0] in names]
    quoted = [('"' + row[0].replace('"', '""') + '"', *row[1:]) for row in rows]
    write_csv(tmp_path / "1-<b>x" / "eval" / "results.csv", quoted)
    (tmp_path / "1-<b>x" / "config.yaml").write_text("</pre><script>alert(2)</script>", encoding="utf-8")
    about = {
        "recipe": "<i>r</i>",
        "command": "</code><script>",
        "machine": "<u>",
        "versions": {"<s>": "<q>"},
        "seed": 0,
    }
    (tmp_path / "run.json").write_text(json.dumps(about), encoding="utf-8")
    page = Page(write_report(tmp_path))
    assert {"script", "b", "i", "u", "s", "q"} & set(page.tags) == {"i", "b"}  # colour keys and the reading guide
    keys = [value for tag, name, value in page.attributes if (tag, name) == ("i", "class")]
    assert keys == ["key"] * page.tags.count("i")
    assert evil in [row[0]["text"] for row in page.tables["Perplexity"]]
    assert page.text.count(formula) == 4 + 1 + 2 * 3  # tables, heat map, and both versions of three figures
    assert {row["method"] for row in read_csv(tmp_path / "results.csv")} == {"yarn", evil, formula}


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("2-search/search", "No stage of this run has searched factors."),
        ("2-search/search/factors.json", "No factors were written"),
        ("2-search/search/history.jsonl", "No candidate with a finite score is on record"),
        ("4-evaluate/eval", "Perplexity was not measured."),
        ("4-evaluate/eval", "Pass keys were not measured."),
        ("4-evaluate/eval", "Nothing has been measured yet."),
        ("run.json", "times, versions and machine are not on record"),
    ],
)
def test_missing_parts_are_left_out_with_a_sentence(run, tmp_path, part, sentence, undrawn):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert sentence not in Page(write_report(folder)).text
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert sentence in Page(write_report(folder)).text


def test_stage_folder_alone_has_a_report(tmp_path):
    write_search(tmp_path / "search")
    page = Page(write_report(tmp_path))
    assert page.headings == ["Nothing has been measured yet."]
    assert "the best formula, YaRN, 3.2140 nats" in page.text
    assert {path.name for path in tmp_path.iterdir()} == {"search", "figures", "report.html", ".report.lock"}


def test_unreadable_parts_are_named_and_the_rest_is_reported(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "2-search/search/state.json").write_text("{", encoding="utf-8")
    journal = folder / "2-search/search/history.jsonl"
    journal.write_text(journal.read_text().replace("mutation", "mutatio_", 1))
    (folder / "3-finetune/lightning_logs/version_0/metrics.csv").write_text("step,train_loss\nx,1.0\n")
    found = read_run(folder)
    assert len(found.notes) == 3
    assert all(any(name in note for note in found.notes) for name in ("state.json", "history.jsonl", "metrics.csv"))
    assert len(found.results) == 7 * (5 + 5 + 3 + 25 + 5)
    assert found.rope_base(found.stages[1]) == 1e4  # from the configuration, as the state is gone


def test_resumed_training_log_replaces_the_steps_it_repeats(tmp_path):
    for version, rows in ((2, [(1, 5.0), (2, 4.0)]), (10, [(2, 3.9), (3, 3.0)])):
        write_csv(tmp_path / "lightning_logs" / f"version_{version}" / "metrics.csv", rows, "step,train_loss")
    (curve,) = read_run(tmp_path).stages[0].losses
    assert (curve.steps, curve.values) == ((1, 2, 3), (5.0, 3.9, 3.0))


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"No run at .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Nothing to report in"):
        write_report(tmp_path)
    results = tmp_path / "eval" / "results.csv"
    write_csv(results, [("none", "perplexity", 128, "", "many", "", "", "")])
    with pytest.raises(ValueError, match=r"results.csv` line 2 is not a measurement"):
        write_report(tmp_path)
    write_csv(results, [("none", "perplexity", 0, "", 3.0, "", "", "")])
    with pytest.raises(ValueError, match=r"line 2 is not a measurement \(a length is at least 1 token, got 0\)"):
        write_report(tmp_path)
    write_csv(results, [("none", 128, 3.0)], header="method,length,value")
    with pytest.raises(ValueError, match="missing depth,high,low,metric,n"):
        write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval"]


@pytest.mark.parametrize("value", ["0", "-3", "1e-300"])
def test_values_that_no_logarithmic_axis_has_are_drawn_all_the_same(tmp_path, value):
    rows = [("none", "perplexity", 64, "", value, value, value, 2), ("searched", "perplexity", 64, "", 3, 2.5, 3.5, 2)]
    write_csv(tmp_path / "eval" / "results.csv", rows)
    write_report(tmp_path)
    assert (tmp_path / "figures" / "perplexity.png").stat().st_size > 10_000


def test_report_is_repeatable_and_leaves_matplotlib_and_the_folder_alone(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        write_report(run)
        assert dict(matplotlib.rcParams) == settings
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_labels_are_moved_apart_in_order():
    places = spread([0.5, 0.52, 0.51, 0.9, 0.0], gap=0.1)
    assert places == pytest.approx([0.41, 0.61, 0.51, 0.9, 0.0])


def test_ratios_on_the_same_documents_are_a_table_of_changes(tmp_path, undrawn):
    ratios = [("searched", "perplexity_over_yarn", 512, "", 0.985, 0.979, 0.991, 24),
              ("searched", "perplexity_over_yarn", 1024, "", 1.004, 0.99, 1.02, 24),
              ("tuned", "perplexity_over_yarn", 1024, "", 1.05, 1.01, 1.09, 24)]  # fmt: skip
    write_csv(tmp_path / "eval" / "results.csv", [*measurements(), *ratios])
    page = Page(write_report(tmp_path))
    table = page.tables["Perplexity against the formulas, document by document"]
    assert [[cell["text"].replace("\u00a0", " ") for cell in row] for row in table] == [
        ["tokens read", "512", "1,024"],
        ["searched against YaRN", "−1.5 %", "+0.4 %"],
        ["tuned against YaRN", "", "+5.0 %"],
    ]
    assert [cell["class"] for cell in table[1][1:]] == ["ratio better", "ratio same"]
    assert table[2][2]["class"] == "ratio worse"
    assert table[1][1]["small"] == "−2.1 to −0.9"
    assert "Perplexity over that of YaRN" not in page.text


def test_nll_by_position_is_drawn_of_the_longest_window(tmp_path):
    rows = [("yarn", 512, 1, 256, 9.0, 8.0, 10.0, 24)]
    rows += [(method, 1024, start, start + 256, 2.5 + 0.01 * start, 2.4, 2.6, 24)
             for method in ("yarn", "searched") for start in range(0, 1024, 256)]  # fmt: skip
    write_csv(tmp_path / "4-evaluate/eval/results.csv", measurements())
    write_csv(tmp_path / "4-evaluate/eval/positions.csv", rows, "method,length,start,end,nll,low,high,n")
    page = Page(write_report(tmp_path))
    drawn = read_csv(tmp_path / "figures/positions.csv")
    assert [(row["method"], int(row["start"]), float(row["nll"])) for row in drawn] == [
        (method, start, nll) for method, length, start, _, nll, *_ in rows if length == 1024
    ]
    assert "How well tokens at each place of a window of 1,024 tokens" in page.text


def test_search_tells_what_was_given_up_and_how_the_winner_did_on_held_out_documents(tmp_path):
    lines = write_search(tmp_path / "search")
    journal = tmp_path / "search" / "history.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[41] |= {"status": "dropped", "score": 0.5}  # extrapolated, and no rival of the best
    journal.unlink()
    again = Journal(journal, lines[0]["fingerprint"])
    again.append({key: value for key, value in line.items() if key != "crc"} for line in lines[1:])
    state = json.loads((tmp_path / "search/state.json").read_text())
    judged = {"score": 2.81, "low": 2.7, "high": 2.93, "documents": 7, "best_baseline": "yarn"}
    judged |= {"difference": -0.49, "difference_low": -0.61, "difference_high": -0.37}
    (tmp_path / "search/state.json").write_text(json.dumps({**state, "dropped": 1, "held_out": judged}))
    page = Page(write_report(tmp_path))
    rows = read_csv(tmp_path / "figures/search_curve.csv")
    assert min(float(row["best"]) for row in rows if row["best"]) == min(
        line["score"] for line in lines[4:] if line["score"] and line.get("status") != "dropped"
    )
    assert "Crosses: judged on part of the documents (1)." in page.text
    assert "of them given up early 1" in page.text
    assert (
        "On 7 documents that the search has not seen the winner scores 2.8100 nats"
        " (95 % interval 2.7000 to 2.9300), better than the best formula, YaRN:"
        " the difference is −0.4900 nats (−0.6100 to −0.3700)." in page.text
    )


def test_pictures_of_the_data_are_inside_the_page(run, tmp_path, undrawn):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    picture = (folder / "figures/training.png").read_bytes()
    (folder / "1-pretrain/figures").mkdir()
    (folder / "1-pretrain/figures/data_train.png").write_bytes(picture)
    page = Page(write_report(folder))
    (source,) = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture
    assert ("a", "href", "1-pretrain/figures/data_train.png") in page.attributes


def test_credentials_in_old_files_do_not_reach_the_page(run, tmp_path, monkeypatch, undrawn):
    monkeypatch.setenv("HF_TOKEN", "planted in the environment")
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = folder / "1-pretrain/config.yaml"
    config.write_text(config.read_text() + "token: planted-in-the-configuration\nnote: planted in the environment\n")
    record = json.loads((folder / "run.json").read_text())
    record["command"] += " --data.password planted-in-the-command"
    (folder / "run.json").write_text(json.dumps(record))
    other = write_run(tmp_path / "other")
    pages = [write_report(folder), write_comparison([folder, other], tmp_path / "both.html")]
    assert all("planted" not in page.read_text() for page in pages)
    assert all(page.read_text().count("REDACTED") for page in pages)
