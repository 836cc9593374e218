"""What jsonargparse says of a value it cannot take, without the lines that help nobody.

Of a value that may be of several types jsonargparse lists what each of them says, ``NoneType`` among them, and dumps
the value with everything in it: a thousand characters around the one sentence that counts. Its text is

    Does not validate against any of the Union subtypes
    Subtypes: [...]
    Errors:
      - what one type says, and in further lines, further in, what it has to add
      - what the next one says
    Given value type: ...
    Given value: ...

where any entry may be such a text again. Versions 4.40 to 4.53 write it alike, with the types in another order.
"""

import re
from collections.abc import Iterator

_UNION = "Does not validate against any of the Union subtypes"
_NOTHING = "- Expected a <class 'NoneType'>"
_NO_SUBCLASS = "- Not a valid subclass of "
_NUMBERED = re.compile(r'Parser key "([^"]+)":.*?unrecognized arguments: --(\d[\w.]*)', re.DOTALL | re.IGNORECASE)
_NESTED = re.compile(r'Parser key "([^"]+)":\s+Parser key "([^"]+)":')
_EMPTY = re.compile(r"\b(Given|Got) value:[^\S\n]*$", re.MULTILINE)
_SHORT = 80  # characters of a value that is worth showing


def plain(message: str) -> str:
    """The sentences of an error of jsonargparse that say what is wrong; another text stays as it is.

    Args:
        message: As it came: its lines and how far in they stand tell where an entry and a value end.
    """
    if found := _NUMBERED.search(message):
        return (
            f"`--{found[1]}.{found[2]}`: an entry of a list goes by its number in files only, under `short` of a stage."
            f" Change the entry in the file, or give the whole list with --{found[1]}."
        )
    message = _EMPTY.sub(r"\1 value: ''", message)
    if _UNION in message:
        lines = message.split("\n")
        said = _sentence(_entries(lines, (_NOTHING, _NO_SUBCLASS))) or _sentence(_entries(lines, (_NOTHING,)))
        value = _value(message)
        message = said if value is None or " got " in said.lower() else f"{said.rstrip('.')}. Got value: {value}"
    while _NESTED.search(message):
        message = _NESTED.sub(r'Parser key "\1.\2":', message)
    message = re.sub(r"Expected a typing\.Literal\[([^]]*)\]", r"Expected one of \1", message)
    return re.sub(r"Expected an? <class '(?:\w+\.)*(\w+)'>", r"Expected \1", message)


def _entries(lines: list[str], left_out: tuple[str, ...]) -> Iterator[str]:
    """The lines that say something, but for entries that begin with what is left out, and all that is further in."""
    end = None  # how far in lines are that belong to what is left out
    for line in lines:
        depth = len(line) - len(line.lstrip())
        text = line.strip().removesuffix(_UNION).rstrip()
        if end is not None and (depth >= end or not text):
            continue
        end = None
        if text.startswith(left_out):
            end = depth + 1
        elif text.startswith("Given value: "):
            end = depth
        elif text not in ("", "-", "Errors:") and not text.startswith(("Subtypes: [", "Given value type: ")):
            yield text


def _sentence(entries: Iterator[str]) -> str:
    """Entries in one line; empty if there is nothing but what stands before an entry, such as the name of the key."""
    said = ""
    for entry in entries:
        between = "" if not said else "; " if entry.startswith("- ") and not said.endswith(":") else " "
        said = f"{said.removesuffix('.') if between == '; ' else said}{between}{entry.removeprefix('- ')}"
    return "" if said.endswith(":") and "value: " not in said else said


def _value(message: str) -> str | None:
    """The value that was given, if it is short and says something."""
    for line in re.findall(r"^ *Given value: (.*)", message, re.MULTILINE):  # the innermost comes first
        if len(line) <= _SHORT and not any(mark in line for mark in ("Namespace(", "NestedArg(", " object at 0x")):
            return line
    return None
