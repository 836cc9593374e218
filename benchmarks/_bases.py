"""Small trained models for the benchmarks, made once and kept: two kinds of text, two extension ratios, any seed.

``sources`` is the quick start's own base: Python's standard library, window 128, searched at 8 times that. ``headers``
reads C and C++ headers that every installation of torch has, window 256, searched at 4 times that.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_longrope import load_model
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.recipe import stage_words
from lightning_longrope.datamodules import SampleTextDataModule
from lightning_longrope.datamodules.sample_text import LONGEST, SHORTEST, cut, split_texts
from lightning_longrope.recipes import read_stage, with_seed

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart" / "1-pretrain.yaml"
CACHE = Path(os.environ.get("LONGROPE_BENCH_CACHE", Path.home() / ".cache" / "lightning_longrope" / "benchmarks"))
TARGET = 1024


class HeaderTextDataModule(SampleTextDataModule):
    """C and C++ headers of torch instead of Python's sources; files over 60 kB are cut in parts for training."""

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        texts = header_sources()
        files = [text for text in texts if len(text.encode()) <= LONGEST]
        parts = [part for text in texts if len(text.encode()) > LONGEST for part in cut(text)]
        return split_texts(files, parts, self.seed)


def header_sources() -> list[str]:
    """Headers of at least 9 kB, each text once, in an order that does not depend on the file system."""
    root = Path(torch.__file__).parent / "include"
    texts: dict[str, None] = {}
    for path in sorted(path for suffix in ("h", "hpp", "cuh") for path in root.rglob(f"*.{suffix}")):
        text = path.read_bytes().decode("utf-8", "ignore")
        if len(text.encode()) >= SHORTEST:
            texts[text] = None
    return list(texts)


@dataclass(frozen=True)
class Base:
    """A trained model, the text to search and judge it on, and the window to reach in tokens."""

    name: str
    seed: int
    model: Any
    datamodule: SampleTextDataModule
    target: int = TARGET


CHANGES: dict[str, dict[str, Any]] = {
    "sources": {},
    "headers": {
        "data.class_path": "_bases.HeaderTextDataModule",
        "data.init_args.seq_len": 256,
        "data.init_args.batch_size": 16,
        "model.init_args.config.max_position_embeddings": 256,
    },
}
"""Kinds of base, and what each changes in the first stage of the quick start."""


def trained_base(name: str, seed: int, *, short: bool = False, cache: Path = CACHE) -> Base:
    """The base of a kind and seed: from the cache, else trained now (about four minutes on two cores).

    Args:
        name: ``sources`` or ``headers``.
        seed: Of weights, split and order.
        short: Train for a tenth of the steps.
        cache: Folder that keeps the models.
    """
    folder = cache / f"{name}-{seed}{'-short' if short else ''}"
    stage = with_seed(read_stage(RECIPE, folder), seed)
    config = stage.config
    for key, value in CHANGES[name].items():
        set_key(config, key, value)
    if short:
        config["trainer"]["max_steps"] //= 10
    done = folder / "trained"
    if not done.exists():
        LongRoPECLI(stage_words(replace(stage, template=config)))
        torch.compiler.reset()
        done.touch()
    kind = HeaderTextDataModule if name == "headers" else SampleTextDataModule
    datamodule = kind(seq_len=TARGET, cache_dir=str(folder / "data"), seed=seed)
    datamodule.setup()
    return Base(name, seed, load_model(str(stage.folder / "checkpoints" / "last.ckpt")).eval(), datamodule)


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value of nested mappings by its dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value
