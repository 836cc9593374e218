"""``longrope fit``, ``validate``, ``test``, ``search``, ``compare``: LightningCLI."""

import os
from pathlib import Path

import yaml

from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.parsing import Parser
from lightning_longrope.reading import read_yaml
from lightning_longrope.recipes import Stage, read_stage

ROOT = "--trainer.default_root_dir"


def trainer(command: str, arguments: list[str]) -> None:
    """``fit``, ``validate``, ``test``, ``search`` and ``compare``: LightningCLI, which also takes a stage file."""
    words, stage, out = staged_words(arguments)
    if stage is not None and stage.command != command:
        raise ValueError(
            f"{stage.name}.yaml is a configuration of `longrope {stage.command}`, not of `longrope {command}`."
        )
    folder = out if stage is None else stage.folder
    if out is None and _names_root(words, stage):
        folder = None
    LongRoPECLI([command, *words, *([ROOT, str(folder)] if folder else [])])


def _names_root(words: list[str], stage: Stage | None) -> bool:
    """Whether a word or a stage file says where the run writes, which counts unless ``--out`` does."""
    return (stage is not None and stage.root is not None) or any(word.split("=")[0] == ROOT for word in words)


def staged_words(arguments: list[str]) -> tuple[list[str], Stage | None, Path | None]:
    """Words for LightningCLI, with the content of a stage file in its place; that stage; and what ``--out`` says."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    given, words = parser.parse_known_args(arguments)
    stage = None
    for index, word in enumerate(words[:-1]):
        if word in ("-c", "--config") and _is_stage(path := Path(words[index + 1])):
            stage = read_stage(path, given.out or Path("runs") / path.parent.name)
            words[index + 1] = yaml.safe_dump(stage.config)
    return words, stage, given.out


def _is_stage(path: Path) -> bool:
    """Whether a file has the key that only stage files have; what is no file is left to LightningCLI."""
    content = read_yaml(path) if os.path.isfile(path) else None  # False for what is no path at all
    return isinstance(content, dict) and "command" in content
