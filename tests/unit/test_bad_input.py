"""Files that are damaged, invented or no files at all: one clear line that names them, or the value that is there."""

import os
import random
import subprocess
import sys

import pytest
from fuzzing.attempt import Attempts
from fuzzing.damage import damaged
from fuzzing.readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_longrope.commands import run_command
from lightning_longrope.reading import LARGEST, number, parse_json, parse_yaml, read_text, whole

MAY_BE_AWAY = ("report", "search scores", "token store in", "tokenizer (tokenizer_config.json)", "wandb")
NAMES = [reader.name for reader in READERS]
EXAMPLES = settings(
    max_examples=20, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """Every reader at work in a folder of its own, made when it is asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Attempts(READERS[NAMES.index(name)], tmp_path_factory.mktemp("reader"))
        return made[name]

    return get


def test_there_are_readers_and_whole_files_pass_them(attempts):
    assert len(set(NAMES)) == len(NAMES) > 30
    for name in NAMES:
        assert [attempts(name).problem(data) for data in attempts(name).seeds] == [(False, None)] * len(
            attempts(name).seeds
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_by_name_or_read_as_what_is_in_it(name, attempts):
    work = attempts(name)

    @EXAMPLES
    @given(seed=st.integers(0, 10**6), noise=st.binary(max_size=64))
    def holds(seed, noise):
        rng = random.Random(seed)
        for data in (damaged(rng, rng.choice(work.seeds)), noise):
            assert work.problem(data)[1] is None

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_by_name(name, attempts):
    work = attempts(name)
    for make in (os.mkdir, lambda path: os.symlink(path, path)):
        work.path.unlink()
        make(work.path)
        try:
            value = work.reader.read(work.path)
            assert value is None or name.startswith(MAY_BE_AWAY), value
        except (ValueError, OSError) as error:
            assert any(part in str(error) for part in (work.path.name, *work.reader.names))  # noqa: PT017
        finally:
            work.path.rmdir() if work.path.is_dir() else work.path.unlink()
            work.path.write_bytes(work.seeds[0])


def test_yaml_that_no_parser_survives_is_one_line(tmp_path):
    """In a process of its own: libyaml ends it at some ten thousand levels."""
    bad = ["[" * 200_000, "- " * 200_000, "a: &a [*a]", "x: 1\nx: 2", "!!python/name:os.system ''"]
    words = []
    for place, text in enumerate(bad):
        (tmp_path / f"r{place}").mkdir()
        (tmp_path / f"r{place}" / "1-bad.yaml").write_text(text)
        words += [[command, "-c", f"r{place}/1-bad.yaml"] for command in ("fit", "tokenize")] + [["run", f"r{place}"]]
    code = f"from lightning_longrope.__main__ import main; print([main(words) for words in {words}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == f"{[2] * 15}\n", done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["longrope", " error"]] * 15
    assert all("1-bad.yaml is not valid YAML" in line for line in lines), lines


def test_aliases_that_stand_for_billions_are_refused_and_a_few_are_not():
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
    )
    with pytest.raises(ValueError, match="more than 1048576 values, with its aliases"):
        parse_yaml(bomb, "x")
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: &m {x: 1}\nd: {<<: *m, y: 2}", "x") == {
        "a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"x": 1}, "d": {"x": 1, "y": 2},
    }  # fmt: skip


def test_a_key_that_stands_twice_is_refused():
    for parse, text in ((parse_json, '{"a": {"b": 1, "b": 2}}'), (parse_yaml, "a: {b: 1, c: 3, b: 2}")):
        with pytest.raises(ValueError, match="the key 'b' stands twice"):
            parse(text, "x")


@pytest.mark.parametrize(
    ("parse", "text"),
    [(number, text) for text in ("1_0", "١", " 1", "")] + [(whole, text) for text in ("1_0", "1e3", "9" * 30, "٣")],
)
def test_numbers_that_only_python_reads_are_none(parse, text):
    with pytest.raises(ValueError, match=r"not a|could not convert"):
        parse(text)
    assert (number("-1.5e3"), whole("-12"), number("nan") != number("nan")) == (-1500.0, -12, True)


def test_a_file_that_never_ends_is_refused_after_a_moment():
    with pytest.raises(ValueError, match=f"/dev/zero has more than {LARGEST} bytes"):
        read_text("/dev/zero")


def test_an_error_is_short_printable_and_without_credentials(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    (tmp_path / "f.csv").write_text("1.0\n\x1b[31m" + "hf_plantedplantedplanted" + "x" * 10_000)
    assert run_command("export", ["nowhere", "out", "--tables", str(tmp_path / "f.csv")]) == 2
    assert run_command("report", [str(tmp_path / "a\x1b[31mhf_plantedplantedplanted" / ("x" * 5000))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(len(line) < 1600 and line.isprintable() and "planted" not in line for line in lines)
