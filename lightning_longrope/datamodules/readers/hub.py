"""Documents out of Hugging Face data sets: hub names, or folders and files here that ``datasets`` knows to read."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_longrope.datamodules.readers.records import (
    BadRecord,
    Document,
    Fields,
    OnError,
    Place,
    Reading,
    SourceOf,
    TextOf,
)

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for the hub to say at which commit a data set is


def read_hub(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = True,
    text_field: str | TextOf = "text",
    source_field: str | SourceOf | None = None,
    on_error: OnError = "raise",
    only: Iterable[str] | None = None,
    **options: Any,
) -> "HubReading":
    """The documents of a data set, read through ``datasets.load_dataset``.

    Args:
        name: Hub name, a folder, or the name of a builder such as ``json``.
        config: Name of the configuration.
        split: Split, ranges as ``train[:1%]`` included where it is not streamed.
        streaming: Read while it is downloaded, instead of downloading it whole to the cache first.
        text_field: Field of the text, or a function of the record.
        source_field: Dotted path of the name of the source, or a function of the record and the data set's name.
        on_error: ``raise`` stops at a record that gives no document, ``skip`` passes over it and counts.
        only: Names of the sources to keep; None keeps all.
        options: Passed on: ``revision``, ``data_files``, ``data_dir``, ``token``, ...

    Raises:
        ValueError: If ``on_error`` is neither; while reading, if there is no such data set, or for a bad record.
    """
    loading = {"path": name, "name": config, "split": split, "streaming": streaming, **options}
    return HubReading(loading, Fields(text_field, source_field), on_error, only)


def newest_revision(name: str) -> str | None:
    """Commit that a hub data set is at now; None where the hub cannot say: offline, or no such data set."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=PATIENCE).sha
    except Exception as error:  # its HTTP library, and with it the errors, is another in every major version
        log.debug("The hub does not tell the revision of %s: %s", name, error)
        return None


class HubReading(Reading):
    """What ``read_hub`` gives: documents of a data set.

    Going on after a record skips those before it without turning them into documents; shards of a streamed data set
    that were done may be downloaded again.
    """

    unit = " rows"

    def __init__(
        self, loading: dict[str, Any], fields: Fields, on_error: OnError = "raise", only: Iterable[str] | None = None
    ) -> None:
        super().__init__(on_error, only)
        self.loading = loading
        self.fields = fields
        self.name = Path(*filter(None, (loading["path"], loading["name"], loading["split"])))
        self._done = 0
        self._rows: int | None = None

    @override
    def progress(self) -> tuple[float, float | None]:
        """Rows."""
        return self._done, self._rows

    @override
    def _items(self, after: Place | None) -> Iterator[Document | BadRecord]:
        from datasets.exceptions import DatasetsError
        from pyarrow import ArrowException

        self._done = 0 if after is None else after.record
        try:
            for record in self._records(self._done):
                self._done += 1
                yield self.fields.document(record, self.name, self._done)
        except (ArrowException, UnicodeDecodeError, DatasetsError) as error:
            why = f"the data set is cut off or damaged ({' '.join(str(error.__cause__ or error).split())})"
            yield BadRecord("damaged_file", why, self.name, self._done + 1)

    def _records(self, first: int) -> Iterator[Any]:
        import datasets

        try:
            data = datasets.load_dataset(**self.loading)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load the data set {str(self.name)!r}: {' '.join(str(error).split())}") from error
        if not isinstance(data, datasets.IterableDataset):
            self._rows = len(data)
            if first >= len(data):
                return iter(())
        return iter(data.skip(first))
