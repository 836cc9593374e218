"""Several runs on one page, against the numbers that went into them."""

import base64
import csv
import io
import json
import shutil

import pytest
import yaml
from report_runs import PERPLEXITY, measurements, write_run
from test_reporting import Page

from lightning_longrope.__main__ import main
from lightning_longrope.reporting import read_run, write_comparison
from lightning_longrope.reporting.side_by_side import _below_root, differences


def worse(rows):
    """The same measurements with those of the search and of YaRN exchanged."""
    swap = {"searched": "yarn", "yarn": "searched"}
    return [(swap.get(row[0], row[0]), *row[1:]) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    first = write_run(root / "one" / "quickstart")
    second = write_run(root / "two" / "quickstart", worse(measurements()))
    config = second / "3-finetune" / "config.yaml"
    config.write_text(config.read_text() + f"trainer:\n  max_steps: 240\n  default_root_dir: {second}/3-finetune\n")
    third = write_run(root / "three")
    shutil.rmtree(third / "2-search")
    shutil.rmtree(third / "4-evaluate")
    (third / "run.json").unlink()
    return [first, second, third]


@pytest.fixture(scope="module")
def page(runs):
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    page = Page(write_comparison(runs, runs[0].parent.parent / "both.html"))
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
    return page


def test_headline_counts_the_searches_that_won(page):
    headline = (
        "2 searches: on pass keys 1 beats the best formula, 1 loses to it; on perplexity 1 beats the best formula,"
    )
    assert page.headings == [f"{headline} 1 loses to it."]


def test_runs_have_names_that_tell_them_apart(page):
    rows = page.tables["Perplexity at 1,024 tokens"]
    assert [row[0]["text"] for row in rows] == ["run", "one/quickstart", "two/quickstart"]
    texts = [[cell["text"].replace("\u00a0", " ") for cell in row[1:]] for row in rows]
    assert texts == [
        ["best formula", "searched", "change", "tuned"],
        ["YaRN 13.10", "12.44", "−5.0 %", "10.22"],
        ["YaRN 12.44", "13.10", "+5.3 %", "10.22"],
    ]
    assert [row[3]["class"] for row in rows[1:]] == ["ratio better", "ratio worse"]


def test_measurements_stand_below_each_other(page):
    shown = {
        row[0]["text"]: [float(cell["text"]) for cell in row[1:]] for row in page.tables["Perplexity, searched"][1:]
    }
    expected = {"one/quickstart": list(PERPLEXITY["searched"]), "two/quickstart": list(PERPLEXITY["yarn"])}
    assert shown == expected
    assert page.text.count("By depth, searched") == 1


def test_every_measurement_is_inside_the_page(page, runs):
    (link,) = [value for tag, name, value in page.attributes if name == "href" and value.startswith("data:text/csv")]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(link.partition(",")[2]).decode())))
    assert len(rows) == sum(len(read_run(run).results) for run in runs) > 500
    value = {(row["run"], row["method"], row["length"]): row["value"] for row in rows if row["metric"] == "perplexity"}
    assert float(value["two/quickstart", "searched", "1024"]) == PERPLEXITY["yarn"][-1]


def test_settings_that_differ_are_named_and_own_folders_are_no_difference(runs, page):
    found = differences([read_run(run) for run in runs[:2]])
    assert found == [(["3-finetune: trainer.max_steps"], ["-", "240"])] or found == [
        (["3-finetune: trainer.max_steps"], ["-", "240"]),
        (["3-finetune: trainer.default_root_dir"], ["-", "{out}"]),
    ]
    assert "3-finetune: trainer.max_steps" in page.text


@pytest.mark.parametrize("root", ["a", ".", "a/", "/"])
def test_only_whole_paths_of_a_run_are_its_own_folder(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        for stage in ("1-pretrain", "2-tune"):
            own = f"{root.replace('a', name)}/{stage}" if "a" in root else root
            settings = {
                "default_root_dir": own.replace("//", "/"),
                "optimizer": "adam",
                "data": f"{name}/data",
                "lr": "0.1",
            }
            (tmp_path / name / stage).mkdir(parents=True)
            (tmp_path / name / stage / "config.yaml").write_text(yaml.safe_dump({"trainer": settings}))
    found = differences([read_run(tmp_path / name) for name in ("a", "b")])
    if "a" in root:  # as relative paths, and neither is a difference
        assert found == []
    else:
        keys = ["1-pretrain: trainer.data", "2-tune: trainer.data"]
        assert found == [(keys, ["a/data", "b/data"])]
    assert _below_root("adam", "a") == "adam"
    assert _below_root("x/a/b", "a") == "x/a/b"
    assert [_below_root(value, "a/") for value in ("a", "a/b", "ab/b")] == ["{out}", "{out}/b", "ab/b"]


def test_how_they_were_run(page):
    assert page.text.count("longrope run configs/quickstart --seed 1") == 2
    assert "longrope report /" in page.text
    assert "7 min 51 s" in page.text


def test_page_needs_no_other_file(page):
    assert {"script", "img", "iframe", "object"}.isdisjoint(page.tags)
    links = {value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")}
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))


def test_command_line(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("lightning_longrope.reporting.drawing.Plot.svg", lambda plot, narrow: "")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert main(["report", str(runs[0]), str(runs[1]), "--out", "pages/two.html"]) == 0
    assert capfd.readouterr().out.split() == [str(tmp_path / "comparison.html"), str(tmp_path / "pages/two.html")]
    assert (tmp_path / "pages/two.html").exists()
    mistakes = {
        "`--out` is for the page of several runs": [str(runs[0]), "--out", "x.html"],
        "at least two different runs": [str(runs[0]), str(runs[0])],
        "No run at": [str(runs[0]), "nowhere"],
        "names a file, and": [*map(str, runs), "--out", str(tmp_path)],
    }
    for message, words in mistakes.items():
        assert main(["report", *words]) == 2
        assert message in capfd.readouterr().err


def test_runs_without_any_search_are_shown_too(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_longrope.reporting.drawing.Plot.svg", lambda plot, narrow: "")
    for name, loss in (("a", 3.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train_loss\n1,{loss}\n")
        (tmp_path / name / "run.json").write_text(json.dumps({"seed": name}))
    (tmp_path / "notes.html").write_text("<title>mine</title>")
    with pytest.raises(ValueError, match=r"notes\.html` is there and is no page of `longrope report`"):
        write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "<title>mine</title>"
    write_comparison([tmp_path / "b", tmp_path / "a"], tmp_path / "page.html")
    page = Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    assert page.headings == ["2 runs beside each other"]
    for sentence in (
        "Nothing has been measured yet.",
        "No run has searched factors.",
        "No run has held searched factors",
    ):
        assert sentence in page.text
