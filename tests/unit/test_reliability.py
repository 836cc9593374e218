"""The page of promises: every test, script and target of make that is to hold one is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)[1:]
KINDS = re.compile(r"(?P<file>[\w./-]+\.(?:py|sh)|\.ci/\w+)(?:::(?P<test>test_\w+))?|make (?P<target>\w+)(?: \w+=\w+)*")


def rows():
    """Promise, what holds it and its figure, of every row of every table."""
    lines = [line for section in SECTIONS for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return [tuple(row) for row in cells if row[0] != "promise" and set(row[0]) != {"-"}]


def functions_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_section_has_a_table_and_there_are_promises():
    assert len(SECTIONS) == 8
    assert all(section.count("| promise | held by | figure |") == 1 for section in SECTIONS)
    assert len(rows()) > 20


@pytest.mark.parametrize(("promise", "held_by", "figure"), rows())
def test_what_holds_a_promise_exists_and_there_is_a_figure(promise, held_by, figure):
    assert figure, f"no figure of {promise!r}: how many cases, kills, files or ranks"
    named = re.findall(r"`([^`]+)`", held_by)
    assert named, f"nothing holds {promise!r}"
    assert not re.sub(r"`[^`]+`|[\s,;]", "", held_by), "names of tests, scripts and targets only"
    for name in named:
        found = KINDS.fullmatch(name)
        assert found, f"{name}: neither a test, nor a script, nor `make TARGET`"
        if found["target"]:
            assert re.search(rf"^{found['target']}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), name
        elif found["test"]:
            assert found["test"] in functions_of(ROOT / found["file"]), name
        else:
            assert (ROOT / found["file"]).exists(), name
