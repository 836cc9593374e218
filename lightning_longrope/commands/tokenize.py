"""``longrope tokenize``: text to token stores ahead of training, over processes; and whether a store is whole."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from lightning_longrope.cli import LongRoPEParser
from lightning_longrope.commands.parsing import Parser, alone
from lightning_longrope.datamodules.base import TokenDataModule
from lightning_longrope.datamodules.token_store import find_damage, read_manifest
from lightning_longrope.loading import load_tokenizer
from lightning_longrope.recipes import read_stage

log = logging.getLogger("lightning_longrope")


def tokenize(command: str, arguments: list[str]) -> None:
    """``longrope tokenize -c CONFIG`` and ``longrope tokenize --verify STORE``.

    Raises:
        ValueError: If the configuration has no datamodule, the store is damaged, or ``--tokenizer`` has no store.
    """
    parser = Parser(
        prog="longrope tokenize",
        description="Tokenises the text of a datamodule into its cache_dir. A run that is cut goes on where it was."
        " Further options are the datamodule's: --data.cache_dir=FOLDER, --data.tokenizer=NAME, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", type=Path, help="a fragment of datamodules/, a configuration of `fit`, a stage"
    )
    parser.add_argument(
        "--workers", type=processes, help="processes; 0 works in this one; by default a core each, if it pays"
    )
    parser.add_argument("--verify", type=Path, metavar="STORE", help="read a store and say what is wrong with it")
    parser.add_argument("--tokenizer", help="with --verify: the tokenizer that should have made it")
    parser.add_argument("--out", type=Path, help="of a stage file: the recipe's output folder")
    given, words = parser.parse_known_args(arguments)
    if given.verify is not None:
        if words or given.config:
            raise ValueError(f"`--verify` takes a store and `--tokenizer`, got {' '.join(words) or '--config'} too.")
        verify(given.verify, given.tokenizer)
        return
    if given.tokenizer is not None:
        raise ValueError("`--tokenizer` is for `--verify STORE`: the datamodule's own is `--data.tokenizer`.")
    datamodule = build_datamodule(given.config, words, given.out)
    for folder in datamodule.tokenise(given.workers).values():
        sys.stdout.write(f"{folder}: {_counts(read_manifest(folder))}\n")


def verify(store: Path, tokenizer: str | None = None) -> None:
    """Reads a whole store.

    Raises:
        ValueError: With all that is wrong, one line each, if anything is.
    """
    problems = find_damage(store, None if tokenizer is None else load_tokenizer(tokenizer))
    for problem in problems[:-1]:
        log.error("%s", problem)
    if problems:
        raise ValueError(problems[-1])
    sys.stdout.write(f"{store} is whole: {_counts(read_manifest(store))}\n")


def build_datamodule(config: Path | None, words: list[str], out: Path | None = None) -> TokenDataModule:
    """The datamodule of a configuration, without its trainer and model.

    Args:
        config: YAML of a datamodule (``class_path``), of a run (``data``), or of a recipe's stage.
        words: Options that begin with ``--data``.
        out: Output folder of the recipe of a stage.

    Raises:
        ValueError: If there is no datamodule in it, or one of another kind.
    """
    content: dict[str, Any] = {}
    if config is not None:
        content = read_stage(config, out or Path("runs") / config.resolve().parent.name).config
    data = content if "class_path" in content else content.get("data")
    given = ["--data", yaml.safe_dump(data)] if data is not None else []
    if not given and not any(word.startswith("--data") for word in words):
        raise ValueError("`longrope tokenize` needs a datamodule: -c CONFIG, or --data=datamodules/packed_text.yaml.")
    parser = LongRoPEParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    datamodule = parser.instantiate_classes(parser.parse_args([*given, *words])).data
    return alone(datamodule, "tokenize", content.get("model"))


def processes(text: str) -> int:
    """Type of an option: a number of processes, no more than a machine carries."""
    number, cores = int(text), os.cpu_count() or 1
    most = max(64, 4 * cores)
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"must be from 0 to {most} on this machine of {cores} cores, got {number}")
    return number


def _counts(manifest: dict[str, Any]) -> str:
    parts = [f"{manifest['documents']:,} documents", f"{manifest['tokens']:,} tokens"]
    parts += [f"{len(manifest['source_names'])} sources"] if len(manifest["source_names"]) > 1 else []
    if skipped := manifest["skipped"]:
        parts.append("skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.items()))
    if manifest["uncertain_cuts"]:
        parts.append(f"{manifest['uncertain_cuts']:,} cuts in long texts that may have changed a token")
    return ", ".join(parts)
