"""Datamodules that pack long documents into rows of exactly the window."""

from lightning_longrope.datamodules.chat import ChatDataModule
from lightning_longrope.datamodules.packed import PackedTextDataModule
from lightning_longrope.datamodules.pile import PileDataModule
from lightning_longrope.datamodules.redpajama import RedPajamaDataModule
from lightning_longrope.datamodules.sample_text import SampleTextDataModule

__all__ = ["ChatDataModule", "PackedTextDataModule", "PileDataModule", "RedPajamaDataModule", "SampleTextDataModule"]
