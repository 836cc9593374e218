"""Small files that somebody else may have written, or a disk has damaged: read whole, within limits, never believed.

Whatever is wrong with such a file is a ``ValueError`` of one line that names it. A corpus is read elsewhere, piece by
piece: see ``datamodules.readers``.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 26  # bytes of a file that is read whole
DEEPEST = 100  # lists and mappings inside each other; parsers and whoever walks the values call themselves for each
MOST_VALUES = 1 << 20  # of a YAML file after its aliases are written out: ten lines of them can stand for billions

MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)
"""What it leads to when a file of another form is taken for one of this."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which a date is text, as LightningCLI reads it."""

    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Makes one ``ValueError`` of whatever goes wrong inside because a file has another form.

    Args:
        what: Begins the message, such as ``Cannot read factors from a.json``.

    Raises:
        ValueError: With ``what`` and the cause.
    """
    try:
        yield
    except MALFORMED as error:
        cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: {cause}") from error


def read_text(path: str | Path, limit: int = LARGEST) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        limit: Most bytes that are read, so that nothing that goes on for ever is.

    Raises:
        ValueError: If there is no such file, it is larger than ``limit``, or it is not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise ValueError(f"Cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit} bytes: that is no file of this kind.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def parse_json(text: str, source: str | Path) -> Any:
    """What a JSON text says.

    Args:
        text: The text.
        source: What errors call it.

    Raises:
        ValueError: If it is not JSON, has a key twice, or is nested too deeply.
    """
    with blaming(f"{source} is not valid JSON"):
        value = json.loads(text, object_pairs_hook=_mapping)
        _check_depth(value)
    return value


def read_json(path: str | Path) -> Any:
    """What a JSON file says; see ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path), path)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The same, of a file that holds one object.

    Raises:
        ValueError: If it holds something else too.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def parse_yaml(text: str, source: str | Path) -> Any:
    """What a YAML text says: texts, numbers, true, false, null, and lists and mappings of these.

    Args:
        text: The text.
        source: What errors call it.

    Raises:
        ValueError: If it is not YAML, has a key twice, is nested too deeply, or its aliases stand for too much.
    """
    try:
        with blaming(f"{source} is not valid YAML"):
            check_yaml(text)
            value = yaml.load(text, Loader=_Loader)
            _check_plain(value)
            return value
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}.") from error


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says; see ``read_text`` and ``parse_yaml``."""
    return parse_yaml(read_text(path), path)


def check_yaml(text: str) -> None:
    """Refuses YAML that parsers and walkers do not survive, before any of them sees it.

    A thousand brackets end the process in libyaml, aliases of aliases fill the memory when they are written out, an
    alias of what it is in never ends, and of a key that stands twice the last one wins without a word.

    Raises:
        ValueError: If it is such.
        yaml.YAMLError: If it is not YAML.
    """
    open_: list[_Open] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            open_.append(_Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(open_) > DEEPEST:
                raise ValueError(f"more than {DEEPEST} levels inside each other")
            continue
        if isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
            if open_:
                open_[-1].check_key(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == outer.anchor for outer in open_):
                raise ValueError(f"the alias *{event.anchor} stands inside what it stands for")
            anchor, size = None, sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = open_.pop()
            anchor, size = ended.anchor, ended.values
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if open_:
            open_[-1].add(size)


@dataclass
class _Open:
    """A mapping or sequence of YAML that has begun."""

    anchor: str | None
    keys: set[str] | None  # None for a sequence
    values: int = 1  # so far, itself among them
    at_key: bool = True  # the next thing in it is a key, if it is a mapping

    def check_key(self, name: str) -> None:
        """Raises ValueError if a scalar is a key that the mapping has already."""
        if self.keys is None or not self.at_key or name == "<<":
            return
        if name in self.keys:
            raise ValueError(f"the key {name!r} stands twice in a mapping")
        self.keys.add(name)

    def add(self, values: int) -> None:
        """Counts what has ended in it; raises ValueError where that is too much."""
        self.values += values
        self.at_key = not self.at_key
        if self.values > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, with its aliases written out")


def read_table(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV file with a header, each with its number.

    Args:
        path: The file.
        columns: What it must have; further columns are kept.

    Raises:
        ValueError: If columns are missing, a line has more or fewer cells than the header, or a cell never ends.
    """
    text = read_text(path)
    if "\0" in text:
        raise ValueError(f"`{path}` is damaged: it holds bytes of zero.")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if missing := set(columns) - set(header):
            raise ValueError(f"`{path}` needs the columns {','.join(columns)}, missing {','.join(sorted(missing))}.")
        if len(set(header)) < len(header):
            raise ValueError(f"`{path}` has a column twice: {','.join(header)}.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"`{path}` line {reader.line_num} does not have {len(header)} cells.")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"`{path}` line {reader.line_num} is not CSV: {error}.") from error


def number(text: str) -> float:
    """A number as programs write it, ``nan`` and ``inf`` too; no underscores, no digits of other scripts.

    Raises:
        ValueError: If it is none.
    """
    if not text.isascii() or "_" in text or text != text.strip():
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def whole(text: str) -> int:
    """A whole number written out in digits.

    Raises:
        ValueError: If it is none, or longer than 18 digits.
    """
    if not text.isascii() or not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def is_plain_name(value: Any) -> bool:
    """Whether a value is the name of a file in a folder, and not a way out of it."""
    if not isinstance(value, str) or value in ("", ".", "..") or "\0" in value:
        return False
    return Path(value).name == value and len(value.encode(errors="surrogatepass")) < 256


def is_number(value: Any) -> bool:
    """Whether a value of JSON or YAML is a finite number; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return mapping


def _check_plain(value: Any) -> None:
    """Refuses sets, dates and bytes, which tags can make, and keys that are not all texts or all whole numbers."""
    if isinstance(value, dict):
        kinds = {type(key) for key in value}
        if kinds and kinds not in ({str}, {int}):
            raise ValueError(f"the keys of a mapping must be texts, got {list(value)[:9]}")
        for entry in value.values():
            _check_plain(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(entry)
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{type(value).__name__} values are not supported, got {value!r}")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels inside each other")
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
