"""Recipes: a folder of numbered stage files, run in order, finished stages skipped, a cut one resumed.

A stage file ``<n>-<name>.yaml`` is the configuration of one command with two more keys: ``command``, and ``short``
with the values that ``--short`` puts in place of others; in a stage of ``export`` it may be the option of that name.
``{out}`` in any text stands for the recipe's output folder.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_longrope.reading import is_number, read_json_object, read_yaml

STAGE_NAME = re.compile(r"\d+-[A-Za-z0-9_-]+\.yaml")
_MEANT_AS_STAGE = re.compile(r"\d.*\.ya?ml", re.IGNORECASE)
WHERE = ("--trainer.devices", "--trainer.num_nodes", "--peers.timeout")
"""Options that say where a stage runs: one that was cut may go on elsewhere."""

log = logging.getLogger("lightning_longrope")

SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
"""Where the recipes of this package are: installed, and in a checkout."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, ready to run.

    Attributes:
        name: File name without ``.yaml``.
        command: Which ``longrope`` command runs it.
        template: Configuration of the command, with ``{out}`` in it.
        out: Output folder of the recipe.
        overrides: Options of the command line that count for every stage, ``--trainer.max_steps 3`` and so on.
    """

    name: str
    command: str
    template: dict[str, Any]
    out: Path
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the command, ``{out}`` replaced."""
        config: dict[str, Any] = map_texts(self.template, lambda text: text.replace("{out}", str(self.out)))
        return config

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return self.out / self.name

    @property
    def root(self) -> Any:
        """The ``trainer.default_root_dir`` of its configuration, None if that states none."""
        trainer = self.config.get("trainer")
        return trainer.get("default_root_dir") if isinstance(trainer, dict) else None

    @property
    def digest(self) -> str:
        """Short name of the configuration and the options, to notice when they have changed.

        It stays as it is when the output folder is moved, and when other devices run the stage.
        """
        return _digest(self.command, self.template, *([options] if (options := _deciding(self.overrides)) else []))

    @property
    def finished(self) -> dict[str, Any] | None:
        """What ``done.json`` says, None if the stage has not ended."""
        done = self._note("done.json")
        if done is not None and not is_number(done.get("seconds")):
            raise ValueError(f"{self.folder / 'done.json'} is damaged: delete it to run the stage again.")
        return done

    @property
    def begun(self) -> dict[str, Any] | None:
        """What ``begun.json`` says, None if the stage has not been started."""
        return self._note("begun.json")

    def is_of(self, note: dict[str, Any]) -> bool:
        """Whether a note of a stage is about this configuration; earlier versions wrote ``{out}`` replaced."""
        earlier = [] if _deciding(self.overrides) else [_digest(self.command, self.config)]
        return note["config"] in (self.digest, *earlier)

    def _note(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        note = read_json_object(path)
        if not isinstance(note.get("config"), str):
            raise ValueError(f"{path} is damaged: delete it to run the stage again.")
        return note


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _deciding(overrides: Sequence[str]) -> list[str]:
    """The options of a command line in one spelling, without those of ``WHERE``."""
    parts = [word.split("=", 1) if word.startswith("--") else [word] for word in overrides]
    kept, flag = [], ""
    for word in (word for pair in parts for word in pair):
        flag = word if re.match(r"--?[A-Za-z]", word) else flag
        if flag not in WHERE:
            kept.append(word)
    return kept


def read_stage(path: Path, out: Path, *, short: bool = False) -> Stage:
    """Reads a stage file.

    Args:
        path: The YAML file.
        out: Output folder of the recipe, put in place of ``{out}``.
        short: Apply the values under ``short``.

    Raises:
        ValueError: If the file is missing, not a YAML mapping, or ``short`` names a value that is not there.
    """
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(config).__name__}.")
    command = config.pop("command", "fit")
    changes = {} if command == "export" and isinstance(config.get("short"), str) else config.pop("short", {})
    for name, value, kind in (("command", command, str), ("short", changes, dict)):
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` in {path} must be a {kind.__name__}, got {value!r}.")
    if short:
        for key, value in changes.items():
            _set(config, key, value, path)
    return Stage(path.stem, command, config, out)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    folders = (folder for home in SHIPPED for folder in home.glob("*"))
    return {folder.name: folder for folder in sorted(folders) if _stage_files(folder)}


def _stage_files(folder: Path) -> list[Path]:
    """The stage files of a folder in the order of their numbers.

    Raises:
        ValueError: If a YAML file begins with a number and has no name of a stage, or two have the same number.
    """
    paths = sorted(path for path in folder.glob("*") if _MEANT_AS_STAGE.fullmatch(path.name))
    if other := next((path for path in paths if not STAGE_NAME.fullmatch(path.name)), None):
        raise ValueError(
            f"{other} begins with a number like a stage and is not called like one: rename it, to 1-search.yaml for"
            " instance, or to something that begins with a letter."
        )
    paths.sort(key=_number)
    for path, after in zip(paths, paths[1:], strict=False):
        if _number(path) == _number(after):
            raise ValueError(f"{path} and {after.name} have the same number: the order of stages goes by it.")
    return paths


def _number(stage_file: Path) -> int:
    return int(stage_file.stem.split("-")[0])


def recipe_folder(recipe: Path) -> Path:
    """The folder that is meant: where there is none of that name, that of a recipe which comes with this package."""
    if not os.path.exists(recipe):  # False for what is no path at all
        for name, folder in shipped_recipes().items():
            if str(recipe) in (name, f"configs/{name}"):
                log.info("%s is the recipe that comes with the package: %s", recipe, folder)
                return folder
    return recipe


def read_recipe(recipe: Path, out: Path, *, short: bool = False) -> list[Stage]:
    """The stages of a recipe in the order of their numbers.

    Args:
        recipe: Its folder; or, where there is no such folder, the name of one that comes with this package, such as
            ``quickstart`` or ``configs/quickstart``.
        out: Output folder of the recipe, put in place of ``{out}``.
        short: Apply the values under ``short``.

    Raises:
        ValueError: If the folder is missing or holds no stage file, or it cannot be told which come when.
    """
    recipe = recipe_folder(recipe)
    paths = _stage_files(recipe)
    if not paths:
        names = "" if recipe.exists() else f" Recipes that come with the package: {', '.join(shipped_recipes())}."
        raise ValueError(
            f"The recipe {recipe} must be a folder with stage files such as `1-search.yaml`, found none.{names}"
        )
    return [read_stage(path, out, short=short) for path in paths]


def with_seed(stage: Stage, seed: int) -> Stage:
    """The stage with every ``seed`` in it set, and ``seed_everything`` where the command has it."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: seed if key == "seed" else change(entry) for key, entry in value.items()}
        return [change(entry) for entry in value] if isinstance(value, list) else value

    config = change(stage.template)
    if "trainer" in config:
        config["seed_everything"] = seed
    return replace(stage, template=config)


def from_model(stages: list[Stage], name_or_path: str) -> list[Stage]:
    """The recipe for another model, without the stages that make one from a ``config``.

    What the later stages take from a stage left out becomes the given model, and so does a model that the recipe names,
    and its tokenizer; where a stage names no tokenizer it is that of the given model.
    """
    made = [stage for stage in stages if _model_arguments(stage).get("config") is not None]
    folders = tuple(f"{{out}}/{stage.name}/" for stage in made)
    named = {name for stage in stages if (name := _model_arguments(stage).get("name_or_path")) is not None}
    named = {name for name in named if not name.startswith("{out}/")}
    kept = []
    for stage in stages:
        if stage in made:
            continue
        config = map_texts(
            stage.template, lambda text: name_or_path if text in named or text.startswith(folders) else text
        )
        takes_tokenizer = config if stage.command == "export" else config.get("data", {}).get("init_args", {})
        if takes_tokenizer.get("tokenizer") is None:
            takes_tokenizer["tokenizer"] = name_or_path
        kept.append(replace(stage, template=config))
    return kept


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested mappings and lists with every text changed."""
    if isinstance(value, dict):
        return {key: map_texts(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [map_texts(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def _model_arguments(stage: Stage) -> dict[str, Any]:
    model = stage.template.get("model")
    return model.get("init_args", {}) if isinstance(model, dict) else {}


def _set(config: dict[str, Any], key: str, value: Any, path: Path) -> None:
    """Sets a value by its dotted key; list entries go by their index."""
    *parents, last = key.split(".")
    node: Any = config
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        node[last]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"`short` in {path} names `{key}`, which the configuration does not have.") from error
    node[last] = value
