"""Strategies for long contexts: Lightning's own, with what they lack. Each is imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_longrope.strategies.deepspeed import LongContextDeepSpeedStrategy

_HOMES = {"LongContextDeepSpeedStrategy": "deepspeed"}

__all__ = ["LongContextDeepSpeedStrategy"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
