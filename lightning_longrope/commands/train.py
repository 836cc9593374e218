"""``longrope fit``, ``validate``, ``test``, ``search``, ``compare``: LightningCLI."""

import os
from pathlib import Path
from typing import Any

import yaml

from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.parsing import Parser, folder_name
from lightning_longrope.reading import read_yaml
from lightning_longrope.recipes import Stage, map_texts, read_stage

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
    parser.add_argument("--out", type=folder_name)
    given, words = parser.parse_known_args(arguments)
    words, stage = split_config(words), None
    for index, word in enumerate(words[:-1]):
        if word not in ("-c", "--config"):
            continue
        path = Path(words[index + 1])
        content = read_yaml(path) if os.path.isfile(path) else None  # False for what is no path at all
        if isinstance(content, dict) and "command" in content:
            stage = read_stage(path, given.out or Path("runs") / path.parent.name)
            words[index + 1] = yaml.safe_dump(stage.config)
        elif (filled := _fill(content, given.out, path)) != content:
            words[index + 1] = yaml.safe_dump(filled)
    return words, stage, given.out


def split_config(words: list[str]) -> list[str]:
    """The words with ``--config=FILE`` as two."""
    pairs = (word.split("=", 1) if word.startswith(("--config=", "-c=")) else [word] for word in words)
    return [word for pair in pairs for word in pair]


def _fill(content: Any, out: Path | None, path: Path) -> Any:
    """A configuration that is no stage, with the folder that ``--out`` names in place of ``{out}``."""

    def fill(text: str) -> str:
        if "{out}" in text and out is None:
            raise ValueError(f"`{{out}}` in {path} stands for the folder that --out names: give --out FOLDER.")
        return text.replace("{out}", str(out))

    return map_texts(content, fill)
