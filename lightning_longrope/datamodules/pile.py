"""The Pile (arXiv:2101.00027): 22 sources, told apart by ``meta.pile_set_name``."""

from pathlib import Path
from typing import Any

from lightning_longrope.datamodules.base import SPLITS
from lightning_longrope.datamodules.packed import PackedTextDataModule, check_subsets

PILE_SETS = (
    "ArXiv", "BookCorpus2", "Books3", "DM Mathematics", "Enron Emails", "EuroParl", "FreeLaw", "Github",
    "Gutenberg (PG-19)", "HackerNews", "NIH ExPorter", "OpenSubtitles", "OpenWebText2", "PhilPapers", "Pile-CC",
    "PubMed Abstracts", "PubMed Central", "StackExchange", "USPTO Backgrounds", "Ubuntu IRC", "Wikipedia (en)",
    "YoutubeSubtitles",
)  # fmt: skip
"""Names of the sources, as ``meta.pile_set_name`` has them."""


class PileDataModule(PackedTextDataModule):
    r"""The Pile, from the folder it is published in or from the hub.

    The folder holds ``train/00.jsonl.zst`` to ``train/29.jsonl.zst``, ``val.jsonl.zst`` and ``test.jsonl.zst``, or some
    of them; each line has ``text`` and ``meta.pile_set_name``. On the hub, ``monology/pile-uncopyrighted`` is the Pile
    without Books3, BookCorpus2, OpenSubtitles, YoutubeSubtitles and OWT2.

    For long windows choose the sources of long documents and leave the short ones out::

        longrope fit --data=datamodules/pile.yaml --data.folder=/data/pile --data.seq_len=131072 \
            --data.subsets='[Books3, ArXiv, Gutenberg (PG-19), PubMed Central, FreeLaw]' \
            --data.min_document_length=16384

    Args:
        folder: Folder of the Pile; or give the files of each split, or ``hub``.
        train_files: Files, folders or globs of the training split.
        val_files: The same of the validation split.
        test_files: The same of the test split.
        subsets: Names of the sources to read, as in ``PILE_SETS``; all if None.
        hub: Hub name of a data set with the same fields, such as ``monology/pile-uncopyrighted``.
        hub_splits: Its split for ``train``, ``validation`` and ``test``; if None those of the same names.
        source_field: Where the name of a record's source is.
        options: The other arguments of ``PackedTextDataModule``.

    Raises:
        ValueError: If a subset is none of the Pile's, or the folder holds no split.
    """

    def __init__(
        self,
        folder: str | None = None,
        train_files: list[str] | None = None,
        val_files: list[str] | None = None,
        test_files: list[str] | None = None,
        subsets: list[str] | None = None,
        hub: str | None = None,
        hub_splits: dict[str, str] | None = None,
        source_field: str = "meta.pile_set_name",
        **options: Any,
    ) -> None:
        check_subsets(subsets, PILE_SETS)
        if folder is not None:
            if train_files or val_files or test_files:
                raise ValueError("Give either `folder` or `train_files`, `val_files` and `test_files`, got both.")
            train_files, val_files, test_files = pile_files(Path(folder).expanduser())
        super().__init__(
            train_files,
            val_files,
            test_files,
            subsets=subsets,
            hub=hub,
            hub_splits=hub_splits or ({split: split for split in SPLITS} if hub else None),
            source_field=source_field,
            **options,
        )


def pile_files(folder: Path) -> list[list[str] | None]:
    """The files of the three splits in the folder of the Pile; None for a split that is not there.

    Raises:
        ValueError: If there is none.
    """
    places = [[folder / name, folder / f"{name}.jsonl.zst"] for name in ("train", "val", "test")]
    found = [[str(path) for path in paths if path.exists()] or None for paths in places]
    if not any(found):
        raise ValueError(
            f"No split of the Pile in {folder}: expected train/*.jsonl.zst, val.jsonl.zst or test.jsonl.zst."
        )
    return found
