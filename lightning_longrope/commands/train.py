"""``longrope fit``, ``validate``, ``test``, ``search``, ``compare``: LightningCLI."""

from pathlib import Path

import yaml

from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.parsing import Parser
from lightning_longrope.recipes import read_stage


def trainer(command: str, arguments: list[str]) -> None:
    """``fit``, ``validate``, ``test``, ``search`` and ``compare``: LightningCLI, which also takes a stage file."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    given, words = parser.parse_known_args(arguments)
    out, config = given.out, None
    for index, word in enumerate(words[:-1]):
        if word in ("-c", "--config") and _is_stage(path := Path(words[index + 1])):
            stage = read_stage(path, Path(out or Path("runs") / path.parent.name))
            if stage.command != command:
                raise ValueError(f"{path} is a configuration of `longrope {stage.command}`, not of `{command}`.")
            config = stage
            words[index + 1] = yaml.safe_dump(stage.config)
    if config is not None:
        words += ["--trainer.default_root_dir", str(config.folder)]
    elif out is not None:
        words += ["--trainer.default_root_dir", out]
    LongRoPECLI([command, *words])


def _is_stage(path: Path) -> bool:
    """Whether a file has the key that only stage files have; files that cannot be read are left to LightningCLI."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "command" in content
