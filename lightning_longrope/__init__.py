"""A PyTorch Lightning plugin that gives any RoPE language model a context window up to 2,048k tokens."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_longrope.export import export_model
    from lightning_longrope.factors import RescaleFactors
    from lightning_longrope.loading import load_model
    from lightning_longrope.model import install_factors
    from lightning_longrope.module import LongRoPEModule
    from lightning_longrope.searching import search_factors
    from lightning_longrope.tables import LengthTables

__version__ = "0.1.0"

# Resolved on first use: importing the package must not cost the seconds that torch and Lightning take.
_HOMES = {
    "LengthTables": "lightning_longrope.tables",
    "LongRoPEModule": "lightning_longrope.module",
    "RescaleFactors": "lightning_longrope.factors",
    "export_model": "lightning_longrope.export",
    "install_factors": "lightning_longrope.model",
    "load_model": "lightning_longrope.loading",
    "search_factors": "lightning_longrope.searching",
}

__all__ = [
    "LengthTables",
    "LongRoPEModule",
    "RescaleFactors",
    "__version__",
    "export_model",
    "install_factors",
    "load_model",
    "search_factors",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lightning_longrope' has no attribute {name!r}")
