"""Keeps credentials out of what a run writes down about itself. It may be shown to anybody.

Three things give a credential away: it is the value of an environment variable with a telling name, it has the shape
that a well-known service gives its tokens, or it stands behind a telling key in a configuration or a command.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "REDACTED"

_TELLING = r"token|(?:api|access|secret|private)[_-]?keys?|secrets?|passw(?:or)?ds?|credentials?"
_VARIABLE = re.compile(rf"(?i)(^|_)({_TELLING}|key|pat|auth)$")
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|wandb_v1_[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abp]-[\w-]{10,}|AKIA[A-Z0-9]{16})"
)
_URL_USER = re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)")  # an address taken for a path has one slash
_URL_PART = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|signature|sig|credential|password))=)[^&\s'\"]+")
# `api_key: x`, `"api_key": "x"`, `--data.api_key x`, `api_key=x`; not a tokenizer's special tokens, nor what is unset
_SPECIAL = r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)(?<!extra_)"
_VALUE = r"(?!(?:null|none|true|false)\b)(\"[^\"\n]*\"|'[^'\n]*'|\[[^\[\]\n]*\]|[^\s,}\]\"']+)"
_KEY = rf"(?<![A-Za-z0-9]){_SPECIAL}(?:{_TELLING})"
_IN_FILE = re.compile(rf"({_KEY}[\"']?[ \t]*[:=][ \t]*){_VALUE}", re.IGNORECASE)
# what is before the dashes keeps a line of nothing but dashes from being tried at each of them
_IN_COMMAND = re.compile(rf"((?<![\w.-])--[\w.-]*?{_KEY}[ =]){_VALUE}", re.IGNORECASE)

_OPTION = re.compile(rf"--([\w.-]*[^A-Za-z0-9])?{_SPECIAL}(?:{_TELLING})", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with every credential in it replaced by ``REDACTED``.

    Knows no credential that has neither a telling name nor a well-known shape.
    """
    for value in _environment():
        text = text.replace(value, MARK)
    text = _URL_PART.sub(rf"\1{MARK}", _URL_USER.sub(rf"\1{MARK}", _SHAPES.sub(MARK, text)))
    return _IN_COMMAND.sub(rf"\1{MARK}", _IN_FILE.sub(rf"\1{MARK}", text))


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
        return {name: redact_all(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(entry, key) for entry in value]
    if isinstance(value, str):
        return MARK if value and re.search(rf"{_KEY}$", key, re.IGNORECASE) else redact(value)
    return value


def _environment() -> list[str]:
    """Values of environment variables with telling names, the longest first: one may hold another."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and _VARIABLE.search(name)}
    return sorted(found, key=len, reverse=True)
