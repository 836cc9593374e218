"""The documentation: a page for every command and public class, every option on it, and commands that are there."""

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level

from lightning_longrope.__main__ import USAGE, main
from lightning_longrope.recipes import read_stage

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402 - lies beside the configuration of Sphinx

COMMANDS = sorted(set(re.findall(r"^  longrope ([a-z]+) ", USAGE, re.M)) | {"validate", "test"})


@pytest.fixture(scope="module")
def command_pages():
    return pages.command_pages()


@pytest.fixture(scope="module")
def api_pages():
    return pages.api_pages()


def test_every_command_has_a_page(command_pages):
    assert {name.removeprefix("commands/") for name in command_pages} == {*COMMANDS, "index"}
    assert len(COMMANDS) >= 13


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_command_has_every_option_of_its_help(command, command_pages, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = re.findall(r"^  (?:-\w(?: \w+)?, )?(--[\w.-]+)", capsys.readouterr().out, re.M)
    wanted = {option for option in shown if not option.endswith(".help")}
    named = re.findall(r"^\.\. option:: (?:-\w, )?(--[\w.-]+)", command_pages[f"commands/{command}"], re.M)
    assert set(named) == wanted
    assert "--help" in wanted


def exported():
    """Names in every ``__all__`` of the package, read without importing it."""
    for path in sorted((ROOT / "lightning_longrope").rglob("*.py")):
        room = ".".join(path.relative_to(ROOT / "lightning_longrope").with_suffix("").parts).removesuffix("__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                yield from ((room, name) for name in ast.literal_eval(node.value) if not name.startswith("__"))


def test_every_public_name_is_documented_once(api_pages):
    text = "\n".join(api_pages.values())
    places = re.findall(r"^\.\. (?:auto|py:)(?:class|function|data):: (?:[\w.]+\.)?(\w+)$", text, re.M)
    wanted = {name for _, name in exported()}
    assert len(wanted) > 60
    assert not wanted - set(places)
    assert len(places) == len(set(places))


def test_every_public_class_has_a_page_and_shows_its_fragment(api_pages):
    with_page = {name.split(".")[-1] for name in api_pages if "." in name}
    rooms = [(importlib.import_module(f"lightning_longrope.{room}".rstrip(".")), name) for room, name in exported()]
    classes = {name for room, name in rooms if inspect.isclass(getattr(room, name))}
    assert len(classes) > 50
    assert not classes - with_page
    shown = "\n".join(api_pages.values())
    assert len(pages.fragments()) > 10
    for file in pages.fragments().values():
        assert f"literalinclude:: /../{file}\n" in shown


def code(language, page):
    """Blocks of code on a page written by hand."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A working folder with what the walk-through starts from: a tiny model, texts, and the recipe shortened."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    Path("corpus").mkdir()
    for number in range(40):
        Path("corpus", f"{number}.txt").write_text(f"The book number {number}. {TEXT}", encoding="utf-8")
    Path("prompt.txt").write_text("In the garden of the queen", encoding="utf-8")
    Path("extend").mkdir()
    for path in (ROOT / "examples" / "extend").glob("*.yaml"):
        stage = read_stage(path, Path("{out}"), short=True)
        Path("extend", path.name).write_text(yaml.safe_dump({"command": stage.command, **stage.config}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_the_commands_of_the_walk_through_run(own_model, capsys):
    commands = [line for block in code("shell", "extend.md") for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == [
        *("data", "estimate", "search", "fit", "compare", "export", "generate", "run")
    ]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    config = json.loads(Path("runs/mine/hf/config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_parameters"]["factor"]) == (1024, 8.0)
    assert Path("runs/mine/hf/tokenizer.json").exists()
    assert Path("runs/mine-again/hf/tokenizer.json").exists()
    assert Path("runs/mine-again/report.html").exists()


def test_every_command_in_the_text_exists():
    texts = [path.read_text(encoding="utf-8") for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]]
    named = {word for text in texts for word in re.findall(r"(?<!_)longrope ([a-z]+)(?=[ `\n])", text)}
    assert named <= {*COMMANDS, "command"}
    assert len(named) > 8


def test_every_file_named_in_the_text_exists():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    place = r"(?:configs|examples|benchmarks|callbacks|datamodules)/[\w./-]*\w"
    named = {word for text in texts for word in re.findall(rf"(?<![\w/]){place}", text)}
    assert len(named) > 12
    assert not [word for word in named if not (ROOT / word).exists()]
