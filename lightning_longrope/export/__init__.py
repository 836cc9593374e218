"""Extended models in the formats of other software; each is read back, and what is lost in it is measured and said."""

from lightning_longrope.export.card import Origin, origin_of
from lightning_longrope.export.folder import export_model
from lightning_longrope.export.gguf_file import write_gguf

__all__ = ["Origin", "export_model", "origin_of", "write_gguf"]
