"""Keeps credentials out of what a run writes down about itself. It may be shown to anybody.

Three things give a credential away: it is the value of an environment variable with a telling name, it has the shape
that a well-known service gives its tokens, or it stands behind a telling key in a configuration or a command.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "REDACTED"

_NUMBER = r"[\"']?[ \t]*[:=][ \t]*[+-]?\d[\d._]*(?:e[+-]?\d+)?[ \t]*(?:$|[,}\]#])"
_TELLING = (
    r"token|(?:api|access|secret|private)[_-]?keys?|secrets?|passw(?:or)?ds?|passphrases?|credentials?"
    rf"|auth(?:orization)?|(?<=[A-Za-z0-9][_-])key(?!{_NUMBER})"
)
_VARIABLE = re.compile(rf"(?i)(^|_)({_TELLING}|key|pat|auth)$")
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|wandb_v1_[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abp]-[\w-]{10,}|AKIA[A-Z0-9]{16})|(?<=\b[Bb]earer )[^\s\"',}\]]+"
)
_URL_USER = re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)")  # an address taken for a path has one slash
_URL_PART = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|signature|sig|credential|password))=)[^&\s'\"]+")
# `api_key: x`, `"api_key": "x"`, `--data.api_key x`, `api_key=x`; not a tokenizer's special tokens, nor what is unset
_SPECIAL = r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)(?<!extra_)"
_KEY = rf"(?<![A-Za-z0-9]){_SPECIAL}(?:{_TELLING})"
_NAMED = rf"{_KEY}(?:\.\d{{1,9}})?[\"']?[ \t]*"
_BELOW = r"(?:\.[\w-]{1,64}){0,4}\+?"  # `--data.secrets.0`, and `+` for one more
_UNSET = rf"(?!(?:(?:null|none|true|false)[ \t]*(?:[,}})\]#\s\"']|$)|{MARK}))"
_WHOLE = r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\n]|'')*'(?!')|\[[^\[\]\n]*\]|\{[^{}\n]*\}"
_ASSIGNED = re.compile(rf"({_NAMED}\+?=[ \t]*){_UNSET}({_WHOLE}|[^\s,}}\]\"']+)", re.IGNORECASE)
# what is before the dashes keeps a line of nothing but dashes from being tried at each of them
_IN_COMMAND = re.compile(rf"((?<![\w.-])--[\w.-]*?{_KEY}{_BELOW}[ =]){_UNSET}({_WHOLE}|[^\s\"']+)", re.IGNORECASE)
# among braces a plain value ends at a comma, elsewhere with its line
_NOTHING = r"(?:null|none|true|false)[ \t]*(?:,[ \t]*(?:$|[\"']?[\w.-]+[\"']?[ \t]*:)|[})\]#]|$)"
_AMONG_OTHERS = re.compile(
    rf"([{{,][ \t]*[\"']?[\w.-]*?{_NAMED}:[ \t]*)(?!{_NOTHING}|{MARK})"
    rf"({_WHOLE}|[\[{{\"'].*|[^\s,}}\]][^,}}\]]*)",
    re.IGNORECASE,
)
_TO_THE_END = re.compile(rf"({_NAMED}:[ \t]*)(?!{_NOTHING}|{MARK})({_WHOLE}|\S.*)", re.IGNORECASE)
# nothing, or what may go on in lines that are further in: `|`, two words, half a list
_OPEN = re.compile(rf"{_NAMED}:(?![ \t]*(?:{_WHOLE}|{_NOTHING}))", re.IGNORECASE)
_DEPTH = re.compile(r"[ \t]*(?:-[ \t]+)*")

_OPTION = re.compile(rf"--([\w.-]*[^A-Za-z0-9])?{_SPECIAL}(?:{_TELLING}){_BELOW}", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with every credential in it replaced by ``REDACTED``.

    Knows no credential that has neither a telling name nor a well-known shape.
    """
    for value in _environment():
        text = text.replace(value, MARK)
    text = _URL_PART.sub(rf"\1{MARK}", _URL_USER.sub(rf"\1{MARK}", _SHAPES.sub(MARK, text)))
    return "\n".join(_without_blocks(text.split("\n")))


def _without_blocks(lines: Sequence[str]) -> list[str]:
    """Lines without values behind telling names, and without those further in below such a name: they are its value."""
    kept: list[str] = []
    within = None  # how far in the name stands whose value may go on, and its line
    for line in lines:
        depth = len(line) - len(line.lstrip(" \t"))
        if within and line.strip():
            if depth > within[0] or (depth == within[0] and line.lstrip().startswith("- ")):
                if not kept[within[1]].endswith(MARK):
                    kept[within[1]] = f"{kept[within[1]].rstrip()} {MARK}"
                continue
            within = None
        if _OPEN.search(line) and (start := _DEPTH.match(line)):
            within = start.end(), len(kept)
        kept.append(_hide(line))
    return kept


def _hide(line: str) -> str:
    for pattern in (_AMONG_OTHERS, _TO_THE_END, _ASSIGNED, _IN_COMMAND):
        line = pattern.sub(rf"\1{MARK}", line)
    return line


def redact_words(words: Sequence[str]) -> list[str]:
    """The words of a command, where a value may hold spaces: all of one behind a telling option is replaced."""
    hidden = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, _ = word.partition("=")
        if equals and _OPTION.fullmatch(option):
            hidden.append(f"{option}={MARK}")
        else:
            hidden.append(MARK if _OPTION.fullmatch(before) and not word.startswith("--") else redact(word))
    return hidden


def redact_all(value: Any, key: str = "") -> Any:
    """The same for every string in nested mappings and lists, and whatever stands under a telling key."""
    if isinstance(value, Mapping):
        return {name: redact_all(entry, key if _tells(key) else str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(entry, key) for entry in value]
    if isinstance(value, str):
        return MARK if value and _tells(key) else redact(value)
    return value


def _tells(key: str) -> bool:
    return re.search(rf"{_KEY}$", key, re.IGNORECASE) is not None


def _environment() -> list[str]:
    """Values of environment variables with telling names, the longest first: one may hold another."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and _VARIABLE.search(name)}
    return sorted(found, key=len, reverse=True)
