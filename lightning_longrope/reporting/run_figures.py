"""Figures of several runs in one frame: a colour is a run, the same in every figure."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_longrope.reporting import drawing, figures
from lightning_longrope.reporting.drawing import INK, Plot
from lightning_longrope.reporting.names import look, method_name, method_order, run_look
from lightning_longrope.reporting.results import Result, Results
from lightning_longrope.reporting.run_folder import Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = ("searched", "tuned", "yarn", "none")


def by_length(runs: Sequence[tuple[str, Results]], metric: str) -> Plot | None:
    """A metric by length, a panel for each of the main methods, a line for each run; None if it was not measured."""
    measured = [(number, row) for number, (_, results) in enumerate(runs) for row in results.rows]
    rows = [(n, r) for n, r in measured if r.metric == metric and r.depth is None and math.isfinite(r.value)]
    if not rows:
        return None
    lengths = sorted({row.length for _, row in rows})
    methods = sorted({row.method for _, row in rows}, key=method_order)
    methods = [method for method in _PANELS if method in methods] or methods[:4]
    # what was not changed may break beyond its window, and would press the others into a line
    shown = [row for _, row in rows if row.method in methods and row.method != "none"] or [row for _, row in rows]

    def draw(narrow: bool) -> "Figure":
        columns = min(2, len(methods))
        down = math.ceil(len(methods) / columns)
        figure, panels = drawing.new_grid(narrow, down, columns, height=(2.2 if narrow else 2.7) * down + 0.4)
        for place, (axes, method) in enumerate(zip(panels, methods, strict=False)):
            drawing.dress(axes, "", "length in tokens" if place >= len(methods) - columns else "")
            axes.set_title(method_name(method), loc="left", parse_math=False, color=INK)
            for number in range(len(runs)):
                own = [row for n, row in rows if n == number and row.method == method]
                if own:
                    shift = 2 ** (0.06 * (number - (len(runs) - 1) / 2))
                    points = [(row.length * shift, row.value, *figures.ends(row)) for row in own]
                    drawing.whiskers(axes, run_look(number), points, main=False)
            drawing.length_axis(axes, lengths, margin=0.06 * len(runs) / 2 + 0.15)
            axes.tick_params(labelsize=8)
        highest = max(figures.ends(row)[1] for row in shown)
        for axes in panels[: len(methods)]:
            axes.set_ylim(top=1.25 * highest)
            figures.value_axis(axes, [row for _, row in rows if row.method in methods])
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        names = [(name, run_look(number)) for number, (name, _) in enumerate(runs)]
        drawing.legend(figure, names, narrow, markers=True)
        return figure

    caption = "A panel for each method, a line for each run. Whiskers are 95 % intervals."
    return Plot(metric, caption, ("run", "method", "length", "value", "low", "high", "n"), _rows(runs, rows), draw)


def _rows(runs: Sequence[tuple[str, Results]], rows: Sequence[tuple[int, Result]]) -> list[tuple[object, ...]]:
    return [(runs[n][0], r.method, r.length, r.value, r.low, r.high, r.n) for n, r in rows]


def search_curves(searches: Sequence[tuple[str, Search | None]]) -> Plot | None:
    """The best score so far, less the best formula's, of every run; None if no run has both."""
    curves = {number: _gain(search) for number, (_, search) in enumerate(searches) if search is not None}
    curves = {number: curve for number, curve in curves.items() if curve}
    if not curves:
        return None

    def draw(narrow: bool) -> "Figure":
        title = "best score so far less the best formula's, in nats"
        figure, axes = drawing.new_axes(narrow, title, "evaluation", height=3.4)
        axes.axhline(0, color=drawing.SOFT, linewidth=1.0, zorder=1)
        named = []
        for number, curve in curves.items():
            drawn = run_look(number)
            x, y = zip(*curve, strict=True)
            axes.step(x, y, where="post", color=drawn.light, linestyle=drawn.line, linewidth=2.0)
            named.append((f"{searches[number][0]} {y[-1]:+.3f}".replace("-", "\u2212"), drawn, y[-1]))
        lowest = min(y for curve in curves.values() for _, y in curve)
        highest = sorted(y for curve in curves.values() for _, y in curve)[-1]
        axes.set_ylim(lowest - 0.08 * abs(lowest), max(0.12 * abs(lowest), min(highest, abs(lowest))))
        axes.set_xlim(0, max(curve[-1][0] for curve in curves.values()))
        drawing.name_lines(figure, axes, named, narrow)
        return figure

    rows = [(searches[number][0], x, y) for number, curve in curves.items() for x, y in curve]
    caption = "Each search against the best formula on its own documents, the line at 0; below it the search is ahead."
    return Plot("search_curves", caption, ("run", "evaluation", "gain"), rows, draw)


def _gain(search: Search) -> list[tuple[int, float]]:
    baselines = figures.baseline_scores(search).values()
    scored = figures.candidate_scores(search)
    if not baselines or not scored:
        return []
    best = accumulate((score for _, score in scored), min)
    return [(number, score - min(baselines)) for (number, _), score in zip(scored, best, strict=True)]


def factor_tables(searches: Sequence[tuple[str, Search | None]], base: float | None) -> Plot | None:
    """The searched factors of every run by pair, with YaRN's of the first; None if no run has any."""
    found = [(n, name, s.factors) for n, (name, s) in enumerate(searches) if s is not None and s.factors is not None]
    if not found:
        return None
    first = found[0][2]
    yarn = None if base is None else type(first).yarn(
        rotary_size=2 * first.pairs,
        base=base,
        original_length=first.original_length,
        target_length=first.target_length,
    )  # fmt: skip

    def draw(narrow: bool) -> "Figure":
        figure, axes = drawing.new_axes(narrow, "rescale factor", "frequency pair (0 turns fastest)", height=3.4)
        named = []
        for number, name, factors in found:
            drawn = run_look(number)
            axes.plot(factors.values, color=drawn.light, linestyle=drawn.line, linewidth=2.0, zorder=4)
            named.append((name, drawn, factors.values[-1]))
        if yarn is not None:
            axes.plot(yarn.values, color=look("none").light, linestyle="--", linewidth=1.2, zorder=3)
            named.append(("YaRN", look("none"), yarn.values[-1]))
        figures.power_axis(axes, max(max(factors.values) for _, _, factors in found))
        axes.set_xlim(0, max(factors.pairs for _, _, factors in found) - 1)
        drawing.name_lines(figure, axes, named, narrow)
        return figure

    rows = [(name, pair, value) for _, name, factors in found for pair, value in enumerate(factors.values)]
    caption = "The factors that each run found: how many times slower a frequency pair turns."
    return Plot("factor_tables", caption, ("run", "pair", "factor"), rows, draw)
