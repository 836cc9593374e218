"""Code in an exported folder, for what Hugging Face's rope types cannot say."""

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from lightning_longrope.files import write_text
from lightning_longrope.loading import CUSTOM_CODE
from lightning_longrope.model import rope_geometry
from lightning_longrope.rotary import table_layout
from lightning_longrope.tables import LengthTables

_SOURCE = Path(__file__).with_name("modeling_longrope.py")
_CLASS, _BASE = "LongRopeForCausalLM", "LlamaForCausalLM"


def write_code(folder: Path, model: PreTrainedModel, config: Any, tables: LengthTables) -> None:
    """Writes the code for a model's class into a folder, and what it reads into the config.

    Args:
        folder: The folder being exported.
        model: The model; one of transformers' own classes.
        config: Its config, which gets the tables and the name of the code.
        tables: The tables.

    Raises:
        ValueError: If the class is not one that transformers exports.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ValueError(f"Custom code builds on a class of transformers, which has no {name}: export without it.")
    write_text(folder / _SOURCE.name, _SOURCE.read_text(encoding="utf-8").replace(_BASE, name))
    geometry = rope_geometry(model.config)
    setattr(
        config.get_text_config(),
        CUSTOM_CODE,
        {
            "base": geometry.base,
            "layout": table_layout(model.get_decoder().rotary_emb, geometry),
            "tables": [table.to_dict() for table in tables.tables],
        },
    )
    config.auto_map = {"AutoModelForCausalLM": f"{_SOURCE.stem}.{_CLASS}"}


def code_class(folder: Path) -> Any:
    """The model class in a folder's code, without a copy in the module cache of transformers."""
    spec = importlib.util.spec_from_file_location(f"{_SOURCE.stem}_read_back", folder / _SOURCE.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, _CLASS)
