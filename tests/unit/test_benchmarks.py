"""The benchmarks' results, their page, and the options every script has."""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PUBLIC = sorted(path for path in BENCHMARKS.glob("[!_]*.py") if path.stem != "table")
RECORDS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def script(monkeypatch):
    """Imports a file of ``benchmarks/`` as its own scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_page_is_what_the_results_make(script):
    table = script("table")
    text = table.README.read_text()
    assert table.page(text, BENCHMARKS / "results") == text, "run python benchmarks/table.py"
    for record in RECORDS:
        rows = json.loads(record.read_text())["rows"]
        section = text.split(f"### {record.stem}\n")[1].split("\n### ")[0]
        assert [line.split(" | ")[0][2:] for line in section.splitlines()[6:] if line.startswith("| ")] == [
            row["name"] for row in rows
        ]


def test_page_says_what_each_script_compares():
    text = (BENCHMARKS / "README.md").read_text()
    assert len(PUBLIC) >= 3
    for path in PUBLIC:
        assert f"| `{path.name}` |" in text


def test_cells_say_whether_a_goal_is_met(script):
    cells, row = script("table").cells, script("_results").Row
    assert cells(row("step", 0.2, 0.1, "s", 0.5, ">= 1")) == "| step | 0.2 s | 0.1 s | 0.5 | >= 1 | **no** |"
    assert cells(row("rate", 5.59e9, 1234.5, "tokens/s", 2, "<= 2")) == (
        "| rate | 5.59 Gtokens/s | 1,234 tokens/s | 2 | <= 2 | yes |"
    )
    assert cells(row("time", 3, None, "s", 3)) == "| time | 3 s |  | 3 |  |  |"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_results_are_whole(path, script):
    record = json.loads(path.read_text())
    assert {"command", "machine", "versions", "rows"} <= record.keys()
    assert f"benchmarks/{path.stem}.py" in record["command"]
    if "commit" in record:  # which older files lack
        assert re.fullmatch(r"[0-9a-f]{12}\+?", record["commit"])
        assert " cores of " in record["machine"]
        assert "python" in record["versions"]
    assert not [word for word in ("/tmp", "/home", "/root", "/work") if word in path.read_text()]
    rows = script("_results").read(path)["rows"]
    assert rows
    if path.stem == "search":  # a ratio is that of the median, least or largest of several bases
        again = script("search").rows_of(record["runs"], quick=False)
        assert [row.name for row in again] == [row.name for row in rows]
        assert [row.ratio for row in again] == pytest.approx([row.ratio for row in rows], abs=1e-4)
        return
    for row in rows:
        if row.peer is None:
            assert row.ratio == row.ours
        else:
            ways = row.ours / row.peer, row.peer / row.ours, row.ours - row.peer
            near = 0.02 if path.stem == "training" else 1e-6  # there the median of ratios, not the ratio of medians
            assert any(math.isclose(row.ratio, way, rel_tol=near) for way in ways), row.name


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_scripts_have_both_options(path):
    words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    calls = {
        getattr(node.func, "id", "") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    }
    assert {"parser", "finish"} <= calls or {"--quick", "--check"} <= words


def test_a_missed_goal_is_an_exit_status(script, monkeypatch, tmp_path, capsys):
    results = script("_results")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["step.py", "--check", "--cache", "/a/secret/place"])
    options = results.parser("Steps.")
    options.add_argument("--cache")
    missed = [results.lower_is_better("step", 2, 1, "s", ">= 1"), results.higher_is_better("rate", 2, 1, "/s")]
    for words, status, writes in (
        (["--check"], 1, True),
        (["--check", "--quick"], 1, False),
        ([], 0, True),
    ):
        assert results.finish("step", missed, options.parse_args(words), ("torch",)) == status
        assert (tmp_path / "step.json").exists() == writes
        (tmp_path / "step.json").unlink(missing_ok=True)
    assert results.finish("step", missed[1:], options.parse_args(["--check"]), ("torch",), {"more": 1}) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["command"] == "python benchmarks/step.py --check --cache place"
    assert written["rows"] == [{"name": "rate", "ours": 2, "peer": 1, "unit": "/s", "ratio": 2.0, "goal": None}]
    assert written["more"] == 1
    assert written["commit"] == results.commit()
    assert f"cores of {results.processor()}" in written["machine"]
    assert set(written["versions"]) == {"python", "torch"}
    assert "MISS step: 2 s, peer 1, ratio 0.5 (goal >= 1)" in capsys.readouterr().out


def test_results_name_the_commit_and_whether_files_differ_from_it(script, monkeypatch, tmp_path):
    results = script("_results")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(results, "RESULTS", folder)
    assert results.commit.__wrapped__() == "unknown"
    for name in ("code.py", "benchmarks/README.md", "benchmarks/results/step.json"):
        (tmp_path / name).write_text("1")
    me = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), (*me, "commit", "-qm", "One")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    found = results.commit.__wrapped__()
    assert re.fullmatch(r"[0-9a-f]{12}", found)
    for name, mark in (("benchmarks/README.md", ""), ("benchmarks/results/step.json", ""), ("code.py", "+")):
        (tmp_path / name).write_text("2")
        assert results.commit.__wrapped__() == found + mark


@pytest.mark.parametrize("goal", ["2", "> 2", ">= two", "2x"])
def test_a_goal_is_a_sign_and_a_number(goal, script):
    with pytest.raises(ValueError, match="sign and a number"):
        script("_results").Row("step", 1, 1, "s", 1, goal)
