"""How figures are drawn, saved and put into a page. No pyplot: the caller's backend and figures are left alone.

Each figure exists twice in a page, for wide and for narrow screens, as vector graphics whose colours are variables of
the page's style sheet, so that it follows dark mode; and once as a file, on white.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_longrope.files import write_text, write_whole
from lightning_longrope.reporting.names import Look, length_text, palette
from lightning_longrope.reporting.results import table_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE, PAPER = "#1b1f25", "#5c6673", "#d8dde4", "#fffffe"
_DOTS_PER_INCH = 180
_MOST_VECTORS = 1500  # more points than this are drawn as pixels


@dataclass(frozen=True)
class Plot:
    """A figure and the numbers in it."""

    name: str
    """File name without ending, of the PNG and the CSV."""
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]
    draw: Callable[[bool], "Figure"]
    """Draws it; True asks for the narrow version."""

    def save(self, folder: Path) -> None:
        """Writes ``<name>.png`` and ``<name>.csv``."""
        write_text(folder / f"{self.name}.csv", table_text(self.columns, self.rows))
        write_whole(folder / f"{self.name}.png", lambda file: file.write(self.png()))

    def png(self) -> bytes:
        """The figure as a PNG file, on white."""
        return self._render(narrow=False, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})

    def svg(self, *, narrow: bool) -> str:
        """The figure as an SVG element for a page; all text in it is escaped."""
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        text = self._render(narrow=narrow, format="svg", transparent=True, metadata=nothing).decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and a page holds many figures
        # the size comes from the page, the shape from the viewBox
        text = re.sub(
            r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', text
        )
        for slot, light, _ in palette():
            text = text.replace(light, f"var(--c{slot})")
        for variable, colour in (("ink", INK), ("soft", SOFT), ("rule", RULE), ("paper", PAPER)):
            text = text.replace(colour, f"var(--{variable})")
        return text

    def _render(self, *, narrow: bool, **options: Any) -> bytes:
        file = io.BytesIO()
        with _style(f"{self.name}-{narrow}"):
            self.draw(narrow).savefig(file, **options)
        return file.getvalue()


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Fonts and inks inside; the caller's settings afterwards. ``salt`` keeps the ids of two figures apart."""
    import matplotlib

    inks = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.titlecolor"), SOFT)
    settings = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.8,
        "axes.titlesize": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        **inks,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in another script
        yield


def new_axes(narrow: bool, title: str, x_label: str, height: float = 3.9) -> "tuple[Figure, Axes]":
    """A figure with one frame, its y label above it."""
    figure, grid = new_grid(narrow, 1, 1, height)
    dress(grid[0], title, x_label)
    return figure, grid[0]


def new_grid(narrow: bool, rows: int, columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    """A figure with several frames; ``height`` in inches, at most 3.4 a row for narrow screens."""
    from matplotlib.figure import Figure

    size = (3.7, min(height, 3.4 * rows)) if narrow else (7.4, height)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)  # type: ignore[union-attr, call-arg]
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def dress(axes: "Axes", title: str, x_label: str) -> None:
    """Title at the left above the frame, faint horizontal lines, no box."""
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def length_axis(axes: "Axes", lengths: Sequence[int], margin: float) -> None:
    """A base-2 logarithmic x axis with ``margin`` doublings at either end and a tick at every measured length.

    Lengths are named from the longest down, as many as there is room for.
    """
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 2**margin, lengths[-1] * 2**margin)
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert place is not None
    inches = figure.get_figwidth() / place.get_gridspec().ncols - 0.8
    doubling = inches / (math.log2(lengths[-1] / lengths[0]) + 2 * margin or 1.0)
    named: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = doubling * math.log2(named[-1] / length) if named else math.inf
        if room >= 0.05 * (len(length_text(length)) + len(length_text((named or [length])[-1]))):
            named.append(length)
    axes.set_xticks(list(lengths), labels=[length_text(length) if length in named else "" for length in lengths])
    axes.set_xticks([], minor=True)


def log_ticks(axes: "Axes", low: float, top: float) -> None:
    """A logarithmic y axis from ``low`` up to ``top`` at most, with plain numbers, as many as the range needs.

    The axis stays as it is where there is no such range: of values of 0, or below.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not 0 < low < top:
        return
    axes.set_yscale("log")
    high = min(axes.get_ylim()[1], top)
    axes.set_ylim(low, high)
    steps = (1.0, 2.0, 5.0) if high / low > 15 else (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def whiskers(axes: "Axes", drawn: Look, points: Sequence[tuple[float, float, float, float]], main: bool) -> None:
    """A line through (x, value, low, high), with its intervals; ``main`` ones are thick and in front."""
    x, y, low, high = zip(*points, strict=True)
    axes.vlines(x, low, high, color=drawn.light, linewidth=1.1, alpha=0.55, zorder=2)
    axes.plot(
        x,
        y,
        color=drawn.light,
        linestyle=drawn.line,
        linewidth=2.4 if main else 1.4,
        marker=drawn.marker,
        markersize=7 if drawn.marker in "PX" else 5.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        zorder=4 if main else 3,
    )


def name_lines(
    figure: "Figure", axes: "Axes", named: Sequence[tuple[str, Look, float]], narrow: bool, *, markers: bool = False
) -> None:
    """Says which line is which: at their right ends, or below the frame where a narrow screen has no room.

    Names of lines that have left the frame get an arrow.

    Args:
        figure: The figure of ``axes``.
        axes: Where the lines are.
        named: (name, look, height of the line's right end in data units) of each line.
        narrow: Write below.
        markers: The lines have markers.
    """
    top = axes.get_ylim()[1]
    named = [(f"{_short(name)} ↑" if y > top else _short(name), drawn, min(y, top)) for name, drawn, y in named]
    if narrow:
        legend(figure, [(name, drawn) for name, drawn, _ in named], narrow, markers=markers)
        return
    figure.draw_without_rendering()  # the layout is needed to know how many letters fit
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1] for _, _, y in named]
    room = axes.get_window_extent().height / figure.dpi * 72  # points
    places = spread(heights, gap=11.5 / room)
    for (name, drawn, _), height, place in zip(named, heights, places, strict=True):
        ends = ([1.0, 1.025], [min(max(height, 0), 1), place])
        axes.plot(*ends, transform=axes.transAxes, color=drawn.light, linewidth=0.9, clip_on=False)
        axes.text(1.035, place, name, transform=axes.transAxes, va="center", color=INK, parse_math=False)


def _short(name: str) -> str:
    return name if len(name) < 24 else f"{name[:22]}…"


def legend(figure: "Figure", named: Sequence[tuple[str, Look]], narrow: bool, *, markers: bool = False) -> None:
    """Says below the frames which line is which."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=one.light, linestyle=one.line, marker=one.marker if markers else "", markersize=5)
        for _, one in named
    ]
    names = [_short(name) for name, _ in named]
    fit = (54 if narrow else 96) // (max(len(name) for name in names) + 6)
    found = figure.legend(
        lines, names, loc="outside lower center", ncols=max(1, min(fit, len(named))), frameon=False, fontsize=8.5
    )
    for text in found.get_texts():
        text.set_parse_math(False)
        text.set_color(INK)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves numbers apart, as little as it takes, so that neighbours are at least ``gap`` apart and in the same order.

    >>> spread([0.5, 0.5, 0.0], gap=0.2)
    [0.4, 0.6, 0.0]
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    clusters: list[tuple[float, list[int]]] = []  # (centre, members), each member a gap above the one before
    for index in order:
        clusters.append((heights[index], [index]))
        while len(clusters) > 1 and _too_close(clusters[-2], clusters[-1], gap):
            upper, lower = clusters.pop(), clusters.pop()
            members = lower[1] + upper[1]
            centre = (lower[0] * len(lower[1]) + upper[0] * len(upper[1])) / len(members)
            clusters.append((centre, members))
    places = [0.0] * len(heights)
    for centre, members in clusters:
        for rank, index in enumerate(members):
            places[index] = centre + (rank - (len(members) - 1) / 2) * gap
    return places


def _too_close(lower: tuple[float, list[int]], upper: tuple[float, list[int]], gap: float) -> bool:
    top = lower[0] + (len(lower[1]) - 1) / 2 * gap
    bottom = upper[0] - (len(upper[1]) - 1) / 2 * gap
    return bottom - top < gap - 1e-12


def scatter(axes: "Axes", x: Sequence[float], y: Sequence[float], marker: str = "o") -> None:
    """Many faint points; as pixels where there are thousands."""
    if not x:
        return  # nothing at all would be laid out at the corner of the figure
    axes.plot(
        x,
        y,
        marker,
        color=SOFT,
        alpha=0.5,
        clip_on=False,
        markersize=3.2,
        markeredgewidth=0,
        rasterized=len(x) > _MOST_VECTORS,
        zorder=2,
    )
