"""``longrope data``: what the datamodule of a configuration holds and yields, before a step is spent on it."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_longrope.cli import LongRoPECLI, LongRoPEParser
from lightning_longrope.commands.parsing import Parser, alone
from lightning_longrope.commands.train import staged_words
from lightning_longrope.datamodules.base import SPLITS, TokenDataModule
from lightning_longrope.datamodules.loader import RowDataset
from lightning_longrope.packing import Rows
from lightning_longrope.reporting.data_figures import data_figure, data_rows
from lightning_longrope.reporting.data_tables import row_text, summary_text


def data(command: str, arguments: list[str]) -> None:
    """``longrope data -c CONFIG``: counts, lengths and rows of every split, and figures of them."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    for name, least in {"rows": 0, "epoch": 0, "width": 1}.items():
        if (value := getattr(given, name)) < least:
            raise ValueError(f"`--{name}` must be at least {least}, got {value}.")
    words, stage, out = staged_words(rest)
    datamodule = build_datamodule(LongRoPECLI([stage.command if stage else "fit", *words], check=True))
    summaries = datamodule.summaries()
    for summary in summaries:
        _show(summary_text(summary))
    rows = {summary.split: summary.rows for summary in summaries}
    if given.rows and given.split not in rows:
        raise ValueError(f"`--split {given.split}` has no text; there is {', '.join(rows)}.")
    if given.rows:
        extra = datamodule.extra_rows()[0] if given.split == "train" else None
        dataset = RowDataset(rows[given.split], extra)
        for place in range(min(given.rows, len(dataset))):
            _show(place_text(dataset, datamodule.tokenizer.decode, given.epoch, place, given.width))
    run = stage.folder if stage is not None and out is not None else out
    if (folder := given.figures or (run and run / "figures")) is not None:
        for summary in summaries:
            plot = data_figure(summary.split, data_rows(summary))
            plot.save(folder)
            _show(f"{folder / plot.name}.png")


def _parser() -> Parser:
    parser = Parser(
        prog="longrope data",
        description="Shows what the datamodule of a configuration holds and yields. Further options are those of"
        " `longrope fit`: -c CONFIG, --data=datamodules/pile.yaml, --data.seq_len=131072, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=0, metavar="N", help="show the first N rows of an epoch")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of these rows")
    parser.add_argument("--epoch", type=int, default=0, help="epoch of these rows")
    parser.add_argument("--width", type=int, default=300, help="characters shown of each document in a row")
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="write figures there; with --out RUN to RUN/figures"
    )
    return parser


def build_datamodule(cli: LongRoPECLI) -> TokenDataModule:
    """The datamodule of a parsed configuration, alone: neither trainer nor model is built.

    Raises:
        ValueError: If it is none of this package's kind.
    """
    config = cli.config[cli.config.subcommand]
    if config.get("data") is None:
        raise ValueError("`longrope data` needs a datamodule: -c CONFIG, or --data=datamodules/packed_text.yaml.")
    parser = LongRoPEParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    datamodule = parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data
    return alone(datamodule, "data", config.get("model"))


def place_text(dataset: RowDataset, decode: Callable[[Any], str], epoch: int, place: int, width: int) -> str:
    """The row at a place of an epoch as training sees it, with its kind and number."""
    number, kind = dataset.rows.number(epoch, place), _kind(dataset.rows, place)
    made = ", made by the datamodule" if number >= dataset.rows.text_rows else ""
    title = f"epoch {epoch}, place {place}: row {number} ({kind}{made})"
    return row_text(dataset.row(epoch, place)[0], title, decode, width, shutil.get_terminal_size((100, 24)).columns)


def _kind(rows: Rows[Any], place: int) -> str:
    """The kind of row at a place: kinds follow one another in the order of the places."""
    for kind, count in rows.sections.items():
        if place < count:
            return kind
        place -= count
    raise IndexError(place)


def _show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
