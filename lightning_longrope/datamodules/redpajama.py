"""RedPajama: LLaMA's pretraining mix made again (v1), and the annotated web (v2)."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from lightning_longrope.datamodules.packed import PackedTextDataModule, check_subsets, hub_name
from lightning_longrope.datamodules.readers import SourceOf, field_text, located, redpajama_source
from lightning_longrope.datamodules.readers.records import REDPAJAMA

V1_SUBSETS = REDPAJAMA
V2_SUBSETS = tuple(
    f"{tongue}_{part}" for tongue in ("en", "de", "fr", "es", "it") for part in ("head", "middle", "tail")
)

_V2_FILE = re.compile(r"([a-z]{2}_(?:head|middle|tail))\.jsonl?(?:\.gz|\.zst)?", re.IGNORECASE)


@dataclass(frozen=True)
class V1Subset:
    """Subset of a record of RedPajama v1, such as ``arxiv``: what its fields say, else its path below the corpus.

    Attributes:
        above: Folders that the corpus is in; their names, and those of the folders they are in, say nothing.
    """

    above: tuple[str, ...] = ()

    def __call__(self, record: dict[str, Any], file: Path) -> str | None:
        """The subset; None where nothing tells it."""
        return redpajama_source(record, _below(self.above, file))

    def of_file(self, file: Path) -> str | None:
        """The subset that the path of a file tells."""
        return self({}, file)


@lru_cache(maxsize=64)
def _below(above: tuple[str, ...], file: Path) -> Path:
    """Path of a file below the nearest of some folders; its name alone if it is in none of them."""
    paths = [file.relative_to(folder) for folder in above if file.is_relative_to(folder)]
    return min(paths, key=lambda path: len(path.parts), default=Path(file.name))


@dataclass(frozen=True)
class V2Subset:
    """Subset of a record of RedPajama-v2, such as ``en_head``: the name of its file, else its language and bucket."""

    def __call__(self, record: dict[str, Any], file: Path) -> str | None:
        """The subset; None where nothing tells it."""
        if found := self.of_file(file):
            return found
        language, bucket = field_text(record, "language"), field_text(record, "bucket")
        return f"{language}_{bucket}" if language and bucket else None

    @staticmethod
    def of_file(file: Path) -> str | None:
        """The subset that the name of a file tells."""
        match = _V2_FILE.fullmatch(file.name)
        return match and match[1].lower()


class RedPajamaDataModule(PackedTextDataModule):
    r"""RedPajama from the folder it was downloaded to, in both its versions.

    ``v1`` (1.2 T tokens): folders ``arxiv``, ``book``, ``c4``, ``common_crawl``, ``github``, ``stackexchange`` and
    ``wikipedia`` with JSON lines (plain, ``.gz`` or ``.zst``), or the files of the published sample
    (``arxiv_sample.jsonl``, ...). The subset is what a record's fields say, else the name of its file or of a folder
    below ``folder``; of ``files`` the name of the folder that was given counts too, of those above it none. Files of
    subsets that were not chosen are not opened.

    ``v2`` (the web): ``documents/<snapshot>/<shard>/<language>_<bucket>.json.gz``, with the text in ``raw_content``.
    Subsets are ``en_head``, ``en_middle``, ``de_head`` and so on. Files of quality signals, duplicates and minhashes
    may lie beside them and are not read.

    RedPajama has no validation split: hold out a share of the documents. A person with all of v1 on disk who trains at
    128k tokens would take the sources of long documents, and of those the long ones::

        longrope fit --data=datamodules/redpajama.yaml --data.folder=/data/redpajama --data.seq_len=131072 \
            --data.subsets='[arxiv, book]' --data.min_document_length=16384 --data.val_share=0.001

    or keep the whole mix and read its long documents five times as often::

        longrope fit --data=datamodules/redpajama.yaml --data.folder=/data/redpajama --data.seq_len=131072 \
            --data.long_length=32768 --data.long_weight=5 --data.val_share=0.0001

    Args:
        folder: Folder of RedPajama; or give ``files``, or files of each split, or ``hub``.
        version: Which of the two it is.
        subsets: Names of the subsets to read; all if None.
        text_field: Field of a record that holds the text; ``text`` in v1 and ``raw_content`` in v2 if None.
        files: Instead of ``folder``: files, folders or globs.
        options: The other arguments of ``PackedTextDataModule``; ``source_field`` only to read it from elsewhere.

    Raises:
        ValueError: If a subset is none of the version's.
    """

    def __init__(
        self,
        folder: str | None = None,
        version: Literal["v1", "v2"] = "v1",
        subsets: list[str] | None = None,
        text_field: str | None = None,
        files: list[str] | None = None,
        **options: Any,
    ) -> None:
        if version not in ("v1", "v2"):
            raise ValueError(f"`version` must be v1 or v2, got {version!r}.")
        check_subsets(subsets, V1_SUBSETS if version == "v1" else V2_SUBSETS)
        if folder is not None and files:
            raise ValueError("Give either `folder` or `files`, got both.")
        self.version, self.folder = version, folder
        text_field = text_field or ("text" if version == "v1" else "raw_content")
        super().__init__(files=[folder] if folder else files, subsets=subsets, text_field=text_field, **options)

    @override
    def source_of(self) -> str | SourceOf | None:
        return super().source_of() or self._subset()

    @override
    def pick(self, files: list[Path]) -> list[Path]:
        if self.source_field is not None:
            return files
        subset = self._subset()
        named = {file: subset.of_file(file) for file in files}
        if self.version == "v2" and any(named.values()):
            files = [file for file in files if named[file]]  # beside quality signals and the like
        return [file for file in files if not (self.subsets and named[file]) or named[file] in self.subsets]

    def _subset(self) -> V1Subset | V2Subset:
        return V1Subset(self._above()) if self.version == "v1" else V2Subset()

    def _above(self) -> tuple[str, ...]:
        """The folder given as ``folder``; of files, folders and globs the folder around the one that holds them."""
        if self.folder is not None:
            return (str(located(Path(self.folder).expanduser())),)
        found: dict[str, None] = {}
        for origin in self.origins.values():
            holders = [Path(hub_name(origin[0]))] if isinstance(origin, tuple) else map(_holder, origin)
            found.update((str(holder.parent), None) for holder in holders)
        return tuple(found)


def _holder(entry: str) -> Path:
    """The folder that an entry of ``files`` is or is in; of a glob the last one without a wildcard."""
    path = located(Path(entry).expanduser())
    while not path.is_dir():
        path = path.parent
    return path
