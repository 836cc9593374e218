"""Datamodules that pack long documents into rows of exactly the window."""

from lightning_longrope.datamodules.packed import PackedTextDataModule
from lightning_longrope.datamodules.sample_text import SampleTextDataModule

__all__ = ["PackedTextDataModule", "SampleTextDataModule"]
