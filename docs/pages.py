"""Pages made from the code: one for each command, of its parser, and one for each public class, of its docstrings."""

import importlib
import inspect
import pkgutil
import re
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import yaml

import lightning_longrope

ROOT = Path(lightning_longrope.__file__).parents[1]
FURTHER = ("heads", "losses", "lora", "memory", "metrics", "model", "objectives", "optimizers", "rope")
"""Modules without ``__all__`` whose public names are for users."""
MENTIONED = {
    "callbacks": ("callbacks.retrieval.RetrievalCallback",),
    "datamodules": ("datamodules.base.TokenDataModule",),
    "package": ("search_folder.SearchRun", "evaluating.Workers"),
    "search": ("search.judgement.HeldOut",),
    "strategies": ("strategies.whole_folder.WholeFolders",),
}
"""Classes that the signatures of public ones mention, by the page that they stand on."""
LIGHTNING_COMMANDS = ("fit", "validate", "test", "search", "compare", "eval")


def write_pages(source: Path) -> None:
    """Writes ``commands/*.rst`` and ``api/*.rst``; a page whose text has not changed keeps its time.

    Args:
        source: Folder of the documentation.
    """
    pages = {**command_pages(), **api_pages()}
    for folder in ("commands", "api"):
        for old in (source / folder).glob("*.rst"):
            if f"{folder}/{old.stem}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = source / f"{name}.rst"
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


@dataclass
class Group:
    """Arguments under one heading of a command's help: pairs of how one is written and what it does."""

    heading: str
    arguments: list[tuple[str, str]] = field(default_factory=list)


class _AskedError(Exception):
    """Carries the parser whose help was asked for."""


def command_pages() -> dict[str, str]:
    """Name and text of the page of each command, and of their index."""
    from lightning_longrope.commands import COMMANDS

    pages = {f"commands/{command}": _command_page(command) for command in COMMANDS}
    names = "\n".join(f"   {command}" for command in COMMANDS)
    lines = [f":doc:`longrope {name} <{name}>`\n   {_description(_parser(name))}" for name in COMMANDS]
    body = "\n\n".join(lines)
    toctree = f".. toctree::\n   :hidden:\n\n{names}"
    pages["commands/index"] = f"{_title('Commands')}\n{toctree}\n\n{body}\n"
    return pages


def _parser(command: str) -> Any:
    """The parser that writes a command's help."""
    from lightning_longrope.commands import command_of

    def stop(parser: ArgumentParser, file: Any = None) -> None:
        raise _AskedError(parser)

    with mock.patch.object(ArgumentParser, "print_help", stop):
        try:
            command_of(command)(command, ["--help"])
        except _AskedError as asked:
            return asked.args[0]
    raise AssertionError(f"longrope {command} --help shows no help")


def command_groups(parser: Any) -> list[Group]:
    """What the help of a parser shows, before it becomes text."""
    groups: list[Group] = []

    class Recorder(parser.formatter_class):  # type: ignore[name-defined, misc]
        def start_section(self: HelpFormatter, heading: str | None) -> None:
            groups.append(Group(heading or ""))
            super().start_section(heading)

        def _format_action(self: Any, action: Any) -> str:
            written = ", ".join(action.option_strings) or action.metavar or action.dest
            value = _value(self, action) if action.option_strings else ""
            if ".help" not in written:
                groups[self.places[id(action)]].arguments.append((f"{written}{value}", self._expand_help(action)))
            return ""

        def add_argument(self: Any, action: Any) -> None:
            self.places = {**getattr(self, "places", {}), id(action): len(groups) - 1}
            super().add_argument(action)

    with mock.patch.object(parser, "formatter_class", Recorder):
        parser.format_help()
    return [group for group in groups if group.arguments]


def _value(formatter: Any, action: Any) -> str:
    if action.nargs == 0:
        return ""
    return " " + formatter._format_args(action, formatter._get_default_metavar_for_optional(action))


def _command_page(command: str) -> str:
    parser = _parser(command)
    parts = [_title(f"longrope {command}"), f".. program:: longrope {command}", _description(parser)]
    if command not in LIGHTNING_COMMANDS:  # whose usage is a list of all options
        parts.append(f".. code-block:: text\n\n{_indented(parser.format_usage().removeprefix('usage: ').rstrip())}")
    for group in command_groups(parser):
        parts.append(_title(_heading(group.heading), "-"))
        parts += [f".. option:: {_written(name)}\n\n{_indented(_prose(text))}" for name, text in group.arguments]
    if command in LIGHTNING_COMMANDS:
        parts.append(
            "Classes for ``--model``, ``--data`` and ``--trainer.callbacks``:"
            " :class:`~lightning_longrope.LongRoPEModule`, :doc:`/api/datamodules`, :doc:`/api/callbacks`."
        )
    return "\n\n".join(parts) + "\n"


def _heading(text: str) -> str:
    first = re.split(r"(?<=\w)\. |:$", text.strip())[0]
    return first[:1].upper() + first[1:]


def _written(name: str) -> str:
    """An option as Sphinx reads it, without the second spelling that appends to a list."""
    return re.sub(r", --\S+\+(?= |$)", "", "".join(letter for letter in name if letter.isprintable()))


def _prose(text: str) -> str:
    """Help text as reStructuredText: commands are links, code and options are code, all else is plain."""
    text = re.sub(r",? ?known subclasses: [^)]*", "", " ".join(text.split()))
    parts = re.split(r"(``[^`]+``|`[^`]+`|(?<!\S)--[\w.]+(?:=\S*\w)?)", text)
    return "".join(_code(part.strip("`")) if part.startswith(("`", "--")) else re.sub(r"([\\*_|`])", r"\\\1", part)
                   for part in parts)  # fmt: skip


def _code(text: str) -> str:
    from lightning_longrope.commands import COMMANDS

    command = text.removeprefix("longrope ")
    return f":doc:`{text} </commands/{command}>`" if text != command and command in COMMANDS else f"``{text}``"


def _description(parser: Any) -> str:
    """The whole sentences of a command's description, of which Lightning's are cut at the end of a line."""
    text = parser.description or ""
    return _prose(text[: text.rindex(".") + 1] if "." in text else text)


def rooms() -> Iterator[ModuleType]:
    """The package, its modules with an ``__all__``, and those in ``FURTHER``."""
    yield lightning_longrope
    for info in pkgutil.walk_packages(lightning_longrope.__path__, "lightning_longrope."):
        room = importlib.import_module(info.name)
        if hasattr(room, "__all__") or info.name.removeprefix("lightning_longrope.") in FURTHER:
            yield room


def public_names(room: ModuleType) -> dict[str, Any]:
    """Public classes, functions and constants of a room by name."""
    here = [name for name, value in vars(room).items() if getattr(value, "__module__", "") == room.__name__]
    names = getattr(room, "__all__", [name for name in here if not name.startswith("_")])
    return {name: getattr(room, name) for name in names if not name.startswith("__")}


def api_pages() -> dict[str, str]:
    """Name and text of the page of each room and of each class in it; a thing with two homes has one page."""
    pages, seen, tables = {}, set(), []
    for room in rooms():
        names = {name: value for name, value in public_names(room).items() if _key(value, room, name) not in seen}
        seen |= {_key(value, room, name) for name, value in names.items()}
        page = room.__name__.removeprefix("lightning_longrope").removeprefix(".") or "package"
        classes = [name for name, value in names.items() if inspect.isclass(value)]
        pages |= {f"api/{page}.{name}": _class_page(room, name) for name in classes}
        if names:
            pages[f"api/{page}"] = _room_page(room, page, names, classes)
            tables.append(page)
    entries = "\n".join(f"   {page}" for page in tables)
    pages["api/index"] = f"{_title('Python')}\n.. toctree::\n   :maxdepth: 2\n\n{entries}\n"
    return pages


def _key(value: Any, room: ModuleType, name: str) -> Any:
    defined = inspect.isclass(value) or inspect.isfunction(value)
    return (value.__module__, value.__qualname__) if defined else (room.__name__, name)


def _class_page(room: ModuleType, name: str) -> str:
    parts = [_title(name), f".. currentmodule:: {room.__name__}", _autoclass(name, getattr(room, name))]
    if fragment := fragments().get(f"{room.__name__}.{name}"):
        parts += [
            _title("In a configuration", "-"),
            f".. literalinclude:: /../{fragment}\n   :language: yaml",
        ]
    return "\n\n".join(parts) + "\n"


def _room_page(room: ModuleType, page: str, names: dict[str, Any], classes: list[str]) -> str:
    module = room.__name__
    functions = sorted(name for name, value in names.items() if inspect.isfunction(value))
    title = module if page == "package" else page
    parts = [_title(title), f".. automodule:: {module}\n   :no-index:", f".. currentmodule:: {module}"]
    if shown := [*classes, *functions]:
        parts.append(".. autosummary::\n   :nosignatures:\n\n" + _indented("\n".join(shown)))
    if classes:
        parts.append(".. toctree::\n   :hidden:\n\n" + _indented("\n".join(f"{page}.{name}" for name in classes)))
    parts += [f".. autofunction:: {name}" for name in functions]
    # autodoc would take the docstring of their type
    constants = sorted(set(names) - set(classes) - set(functions))
    parts += [f".. py:data:: {name}\n   :value: {names[name]!r}".replace("typing.", "") for name in constants]
    for path in MENTIONED.get(page, ()):
        home, name = f"lightning_longrope.{path}".rsplit(".", 1)
        parts.append(_autoclass(f"{home}.{name}", getattr(importlib.import_module(home), name)))
    return "\n\n".join(parts) + "\n"


def _autoclass(name: str, cls: type) -> str:
    bases = "" if cls.__bases__ == (object,) else "\n   :show-inheritance:"
    return f".. autoclass:: {name}\n   :members:{bases}"


def fragments() -> dict[str, str]:
    """Files of ``callbacks/`` and ``datamodules/`` by the class they are about."""
    paths = [*ROOT.glob("callbacks/*.yaml"), *ROOT.glob("datamodules/*.yaml")]
    return {
        yaml.safe_load(path.read_text(encoding="utf-8"))["class_path"]: str(path.relative_to(ROOT)) for path in paths
    }


def _title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" if line else line for line in text.split("\n"))
