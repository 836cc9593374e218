"""Extended models in the formats of other software; each is read back, and what is lost in it is measured and said."""

from lightning_longrope.export.folder import export_model

__all__ = ["export_model"]
