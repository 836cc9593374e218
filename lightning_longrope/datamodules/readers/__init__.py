"""Documents out of files and hub data sets, one at a time, and every record that is none named and counted."""

from lightning_longrope.datamodules.readers.files import SUFFIXES, FileReading, expand, located, read_documents
from lightning_longrope.datamodules.readers.hub import HubReading, newest_revision, read_hub
from lightning_longrope.datamodules.readers.records import (
    BadRecord,
    Document,
    Fields,
    OnError,
    Place,
    Reading,
    Skipped,
    SourceOf,
    TextOf,
    field_text,
    redpajama_source,
)

__all__ = [
    "SUFFIXES",
    "BadRecord",
    "Document",
    "Fields",
    "FileReading",
    "HubReading",
    "OnError",
    "Place",
    "Reading",
    "Skipped",
    "SourceOf",
    "TextOf",
    "expand",
    "field_text",
    "located",
    "newest_revision",
    "read_documents",
    "read_hub",
    "redpajama_source",
]
