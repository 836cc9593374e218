"""The figure of what a datamodule holds: its sources and how long their documents are.

``longrope data`` draws it of a datamodule and writes its numbers beside it; a report draws it again from those.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longrope.reading import blaming, number, read_table, whole
from lightning_longrope.reporting import drawing
from lightning_longrope.reporting.data_tables import amount_text, class_names, shown_name
from lightning_longrope.reporting.drawing import INK, RULE, SOFT, Plot
from lightning_longrope.reporting.names import look
from lightning_longrope.summary import SplitSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("source", "shortest", "documents", "tokens", "share_of_text", "share_of_epoch")
_MOST = 24  # sources drawn
_COLOUR = look("ntk").light


@dataclass(frozen=True)
class DataRow:
    """Documents of one source and length class, a row of the figure's CSV.

    Attributes:
        source: Name of the source.
        shortest: Least length of the class, in tokens.
        documents: Documents of that source and class.
        tokens: Their tokens.
        share_of_text: Share of the source in all tokens of the split, whatever the class.
        share_of_epoch: Share of the source in the tokens an epoch reads.
    """

    source: str
    shortest: int
    documents: int
    tokens: int
    share_of_text: float
    share_of_epoch: float


def data_rows(summary: SplitSummary) -> list[DataRow]:
    """The numbers of the figure."""
    total = summary.tokens
    return [
        DataRow(s.share.name, shortest, int(count), int(tokens), s.share.tokens / total, s.share.share)
        for s in summary.sources
        for shortest, count, tokens in zip((1, *summary.bounds), s.documents, s.tokens, strict=True)
    ]


def read_data_rows(path: Path) -> list[DataRow]:
    """The numbers of a figure that was saved.

    Raises:
        ValueError: If the file does not hold them.
    """
    with blaming(f"{path} does not hold the numbers of a figure"):
        return [_data_row([row[name] for name in _COLUMNS]) for _, row in read_table(path, _COLUMNS)]


def _data_row(cells: list[str]) -> DataRow:
    source, *counts = cells[:4]
    return DataRow(source, *map(whole, counts), *map(number, cells[4:]))


def data_figure(split: str, rows: list[DataRow]) -> Plot:
    """Sources of a split: their shares of the text and of an epoch, and their tokens by length of document."""
    sources: dict[str, list[DataRow]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row)
    shown = dict(list(sources.items())[:_MOST])
    mixed = any(abs(row.share_of_text - row.share_of_epoch) > 5e-4 for row in rows)

    def draw(narrow: bool) -> "Figure":
        height = 1.15 + 0.3 * len(shown)
        if len(shown) == 1:
            figure, grid = drawing.new_grid(narrow, 1, 1, 2.6)
            _draw_bars(grid[0], next(iter(shown.values())))
            return figure
        figure, grid = drawing.new_grid(narrow, 2 if narrow else 1, 1 if narrow else 2, height * (2 if narrow else 1))
        figure.set_size_inches(figure.get_figwidth(), height * (2 if narrow else 1))
        _draw_shares(grid[0], shown, mixed)
        _draw_lengths(grid[1], shown, names=narrow)
        return figure

    documents, tokens = sum(row.documents for row in rows), sum(row.tokens for row in rows)
    caption = f"The {split} split: {documents:,} documents, {amount_text(tokens)} tokens"
    if len(shown) == 1:
        caption += ", by the length of the document they are in. Only long documents teach a long window."
    else:
        caption += " of several sources, with their shares"
        caption += " of the text (grey) and of what an epoch reads (blue)." if mixed else "."
        caption += (
            " The table says which share of a source's tokens is in documents of which length: only long ones teach a"
            " long window."
        )
    if len(sources) > _MOST:
        caption += f" The {_MOST} largest of {len(sources)} sources are drawn."
    cells = [(r.source, r.shortest, r.documents, r.tokens, r.share_of_text, r.share_of_epoch) for r in rows]
    return Plot(f"data_{split}", caption, _COLUMNS, [tuple(cell) for cell in cells], draw)


def _classes(rows: list[DataRow]) -> list[str]:
    return class_names([row.shortest for row in rows[1:]])


def _draw_bars(axes: "Axes", rows: list[DataRow]) -> None:
    """One source: its tokens by length."""
    total = sum(row.tokens for row in rows)
    shares = [100 * row.tokens / total for row in rows]
    drawing.dress(axes, "share of tokens in %", "tokens of the document they are in")
    axes.bar(range(len(rows)), shares, 0.8, color=_COLOUR)
    axes.set_xticks(range(len(rows)), labels=_classes(rows))
    for place, (share, row) in enumerate(zip(shares, rows, strict=True)):
        words = f"{row.documents:,} doc." if row.documents else ""
        axes.text(place, share + 0.02 * max(shares), words, ha="center", va="bottom", color=SOFT, fontsize=7)
    axes.set_ylim(0, 1.12 * max(shares))


def _draw_shares(axes: "Axes", sources: dict[str, list[DataRow]], mixed: bool) -> None:
    """Bars of every source's share of the text, and of an epoch where that is another."""
    places = list(range(len(sources)))
    text = [100 * rows[0].share_of_text for rows in sources.values()]
    epoch = [100 * rows[0].share_of_epoch for rows in sources.values()]
    drawing.dress(axes, "share of tokens in %" + (": text \u2192 an epoch" if mixed else ""), "")
    if mixed:
        axes.barh([place - 0.19 for place in places], text, 0.34, color=RULE)
        axes.barh([place + 0.19 for place in places], epoch, 0.34, color=_COLOUR)
    else:
        axes.barh(places, text, 0.62, color=_COLOUR)
    top = max(*text, *epoch)
    for place, one, other in zip(places, text, epoch, strict=True):
        words = f"{one:.1f} \u2192 {other:.1f}" if mixed else f"{one:.1f}"
        axes.text(max(one, other) + 0.02 * top, place, words, va="center", color=SOFT, fontsize=8)
    _name_sources(axes, sources)
    axes.set_xlim(0, (1.4 if mixed else 1.2) * top)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _draw_lengths(axes: "Axes", sources: dict[str, list[DataRow]], names: bool) -> None:
    """A table with a cell for every source and length class, the darker the larger the share."""
    from matplotlib.patches import Rectangle

    drawing.dress(axes, "of which, by length of document, in %", "tokens of the document")
    for y, rows in enumerate(sources.values()):
        total = max(1, sum(row.tokens for row in rows))
        for x, share in enumerate(row.tokens / total for row in rows):
            if share >= 0.005:
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, color=_COLOUR, alpha=0.05 + 0.6 * share, linewidth=0)
                )
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=INK)
    labels = _classes(next(iter(sources.values())))
    axes.set_xticks(range(len(labels)), labels=labels, fontsize=7.5)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    _name_sources(axes, sources)
    if not names:
        axes.set_yticks([])


def _name_sources(axes: "Axes", sources: dict[str, list[DataRow]]) -> None:
    axes.set_yticks(range(len(sources)), labels=[shown_name(name) for name in sources], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(sources) - 0.5, -0.5)
