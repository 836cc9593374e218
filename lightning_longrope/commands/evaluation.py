"""``longrope eval``: measures a checkpoint, an exported folder or any Hugging Face model, without training."""

import os

from lightning_longrope.commands.train import trainer
from lightning_longrope.reading import read_yaml

ANSWERS = "3"


def evaluate(command: str, arguments: list[str]) -> None:
    """``longrope eval``: LightningCLI, where ``--generate`` may stand alone and tasks need no data."""
    words = list(arguments)
    if "--generate" in words:
        after = words.index("--generate") + 1
        if not words[after : after + 1] or not words[after].isdecimal():
            words.insert(after, ANSWERS)
    if not _has_data(words):
        words += ["--data", "lightning.pytorch.LightningDataModule"]
    trainer(command, words)


def _has_data(words: list[str]) -> bool:
    """Whether a word or a configuration file names a datamodule; what is no file is left to LightningCLI."""
    if any(word.split("=")[0] == "--data" or word.startswith("--data.") for word in words):
        return True
    pairs = [*zip(words, words[1:], strict=False), *(word.split("=", 1) for word in words if "=" in word)]
    for flag, value in pairs:
        if flag in ("-c", "--config"):
            if not os.path.isfile(value):
                return True
            content = read_yaml(value)
            if isinstance(content, dict) and content.get("data"):
                return True
    return False
