"""The figures of a report, from the data of a run. Each says in its caption what is drawn and how to read it."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.reading import is_number
from lightning_longrope.reporting import drawing
from lightning_longrope.reporting.drawing import INK, PAPER, Plot
from lightning_longrope.reporting.names import ACCURACIES, length_text, look, method_name, method_order, metric_name
from lightning_longrope.reporting.results import Result, Results
from lightning_longrope.reporting.run_folder import Search, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMULAS = ("linear", "ntk", "yarn")
_MOST_NUMBERS = 20  # columns of a heat map that can have a number each
_READABLE = 30  # times the lowest loss: what lies higher has broken, and would press the rest into one line


def search_curve(search: Search, name: str = "search_curve") -> Plot | None:
    """Every candidate's score and the best so far against evaluations; None if no candidate has a finite score."""
    baselines = baseline_scores(search)
    scored, raced = candidate_scores(search), candidate_scores(search, dropped=True)
    if not scored:
        return None
    numbers, scores = zip(*scored, strict=True)
    best = list(accumulate(scores, min))
    top = _frame_top(scores, list(baselines.values()))
    outside = sum(score > top for _, score in [*scored, *raced])

    def draw(narrow: bool) -> "Figure":
        figure, axes = drawing.new_axes(narrow, "score of a candidate in nats (lower is better)", "evaluation")
        lowest = min(*scores, *baselines.values())
        low = lowest - 0.06 * (top - lowest)
        for points, marker in ((scored, "o"), (raced, "x")):
            drawing.scatter(axes, [x for x, _ in points], [min(max(y, low), top) for _, y in points], marker)
        axes.step(numbers, best, where="post", color=look("searched").light, linewidth=2.4, zorder=4)
        for method, score in baselines.items():
            axes.axhline(score, color=look(method).light, linewidth=1.4, zorder=3)
        axes.set_ylim(low, top)
        axes.set_xlim(numbers[0] - 1, max(number for number, _ in [*scored, *raced]) + 1)
        named = [(f"{method_name(method)} {score:.3f}", look(method), score) for method, score in baselines.items()]
        drawing.name_lines(figure, axes, [*named, (f"best {best[-1]:.3f}", look("searched"), best[-1])], narrow)
        return figure

    caption = (
        "Each dot is a candidate, the red line the best so far; level lines are the formulas on the same documents."
    )
    if raced:
        caption += f" Crosses: judged on part of the documents ({len(raced):,})."
    if outside:
        caption += f" Above the frame, drawn at its edge: {outside:,}."
    return Plot(name, caption, ("evaluation", "origin", "score", "best", "text", "answer"), _search_rows(search), draw)


def baseline_scores(search: Search) -> dict[str, float]:
    """Scores of PI, NTK and YaRN on the documents of the search, those that are finite."""
    known = search.state.get("baselines")
    if not isinstance(known, dict):
        known = {
            str(line["origin"]).removeprefix("baseline:"): line.get("score")
            for line in search.evaluations
            if _is_baseline(line)
        }
    return {str(name): float(score) for name, score in known.items() if is_number(score)}


def candidate_scores(search: Search, *, dropped: bool = False) -> list[tuple[int, float]]:
    """(evaluation, score) of candidates with a finite score: those judged on all documents, or on part of them."""
    lines = [line for line in search.evaluations if not _is_baseline(line) and _on_part(line) == dropped]
    return [(int(line["evaluation"]), float(line["score"])) for line in lines if line.get("score") is not None]


def _is_baseline(line: dict[str, object]) -> bool:
    return str(line.get("origin")).startswith("baseline:")


def _on_part(line: dict[str, object]) -> bool:
    """Whether a candidate was judged on part of the documents, by a race or a schedule."""
    return line.get("status") in ("dropped", "partial")


def _frame_top(scores: Sequence[float], baselines: Sequence[float]) -> float:
    """Upper end of the frame: most candidates, the best baseline, and others that do not squeeze them to a line."""
    low = min(*scores, *baselines)
    usual = sorted(scores)[math.ceil(0.75 * (len(scores) - 1))]
    near = [score for score in baselines if score - low <= 2.5 * (usual - low)]
    top = max([usual, *near, *sorted(baselines)[:1]])
    return top + 0.08 * (top - low) if top > low else low + 1e-3


def _search_rows(search: Search) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    best: float | None = None
    for line in search.evaluations:
        score, parts = line.get("score"), line.get("parts") or {}
        if score is not None and not _is_baseline(line) and not _on_part(line):
            best = score if best is None else min(best, score)
        rows.append((line["evaluation"], line.get("origin"), score, best, parts.get("text"), parts.get("answer")))
    return rows


def factors_by_pair(factors: RescaleFactors, base: float | None, name: str = "factors") -> Plot:
    """The searched table beside those of the formulas; alone where ``base`` is not known."""
    tables = {"searched": factors.values}
    if base is not None:
        for method in _FORMULAS:
            formula: RescaleFactors = getattr(RescaleFactors, method)(
                rotary_size=2 * factors.pairs,
                base=base,
                original_length=factors.original_length,
                target_length=factors.target_length,
            )
            tables[method] = formula.values

    def draw(narrow: bool) -> "Figure":
        figure, axes = drawing.new_axes(narrow, "rescale factor", "frequency pair (0 turns fastest)")
        for method, values in tables.items():
            drawn, main = look(method), method == "searched"
            axes.plot(values, color=drawn.light, linewidth=2.4 if main else 1.4, zorder=4 if main else 3)
        power_axis(axes, max(max(values) for values in tables.values()))
        axes.set_xlim(0, factors.pairs - 1)
        named = [(method_name(method), look(method), values[-1]) for method, values in tables.items()]
        drawing.name_lines(figure, axes, named, narrow)
        return figure

    columns = ("pair", *tables)
    rows: list[tuple[object, ...]] = list(zip(range(factors.pairs), *tables.values(), strict=True))
    caption = "How many times slower each frequency pair turns: 1 keeps the pretrained speed."
    return Plot(name, caption, columns, rows, draw)


def power_axis(axes: "Axes", highest: float) -> None:
    """Logarithmic y axis from 1, with ticks at powers of two."""
    powers = [2**power for power in range(math.ceil(math.log2(max(highest, 2))) + 1)]
    axes.set_yscale("log", base=2)
    axes.set_yticks(powers[:: max(1, len(powers) // 8)], labels=[f"{p:,}" for p in powers[:: max(1, len(powers) // 8)]])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.93, max(highest, 2) * 1.12)


def by_length(results: Results, metric: str, name: str) -> Plot | None:
    """A metric of every method by length, with 95 % intervals; None if it was not measured."""
    rows = [row for row in results.rows if row.metric == metric and row.depth is None and math.isfinite(row.value)]
    if not rows:
        return None
    lengths = sorted({row.length for row in rows})
    methods = [method for method in results.methods(metric) if any(row.method == method for row in rows)]
    accuracy = metric in ACCURACIES
    top = _READABLE * min(row.value for row in rows)

    def draw(narrow: bool) -> "Figure":
        figure, axes = drawing.new_axes(narrow, metric_name(metric), "length in tokens")
        named = []
        # beside each other, or the intervals of one length would hide each other
        step = 0.008 * (math.log2(lengths[-1] / lengths[0]) + 1)
        for place, method in enumerate(methods):
            shift = 2 ** (step * (place - (len(methods) - 1) / 2))
            own = [row for row in rows if row.method == method]
            points = [(row.length * shift, row.value, *ends(row)) for row in own]
            drawing.whiskers(axes, look(method), points, main=method in ("searched", "tuned"))
            named.append((method_name(method), look(method), own[-1].value))
        drawing.length_axis(axes, lengths, margin=step * (len(methods) / 2 + 3))
        value_axis(axes, rows)
        drawing.name_lines(figure, axes, named, narrow, markers=True)
        return figure

    table: list[tuple[object, ...]] = [(r.method, r.length, r.value, r.low, r.high, r.n) for r in rows]
    caption = "Whiskers are 95 % intervals; methods are drawn slightly beside each other."
    if not accuracy and any(row.value > top for row in rows):
        caption += " Lines that leave the frame go on above it; the table has their values."
    return Plot(name, caption, ("method", "length", "value", "low", "high", "n"), table, draw)


def value_axis(axes: "Axes", rows: Sequence[Result]) -> None:
    """Per cent for accuracies; else a logarithmic axis from the lowest value to what can still be read beside it."""
    if rows[0].metric in ACCURACIES:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    else:
        top = _READABLE * min(row.value for row in rows)
        drawing.log_ticks(axes, 0.93 * min(ends(row)[0] for row in rows), top)


def ends(row: Result) -> tuple[float, float]:
    """Ends of the whisker; the value itself where there is no finite interval."""
    low, high = (end if end is not None and math.isfinite(end) else row.value for end in (row.low, row.high))
    return low, high


def heat_maps(results: Results, metric: str, name: str) -> Plot | None:
    """Accuracy by length and depth, one panel a method; None if it was not measured by depth."""
    rows = [row for row in results.rows if row.metric == metric and row.depth is not None]
    if not rows:
        return None
    methods = [method for method in results.methods(metric) if any(row.method == method for row in rows)]

    def draw(narrow: bool) -> "Figure":
        across, high = len(results.lengths(metric)), len(results.depths(metric))
        columns = max(1, min(2 if narrow else 3, len(methods), 20 // across))
        down = math.ceil(len(methods) / columns)
        figure, panels = drawing.new_grid(narrow, down, columns, height=0.5 + max(1.75, 0.26 * high + 0.45) * down)
        for axes, method in zip(panels, methods, strict=False):
            _heat_map(axes, results, metric, method)
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel("length in tokens", fontsize=9)
        figure.supylabel("depth of the key in the prompt", fontsize=9)
        return figure

    table: list[tuple[object, ...]] = [(r.method, r.length, r.depth, r.value, r.low, r.high, r.n) for r in rows]
    caption = "Per cent of trials, by length of the prompt and depth of the key in it."
    return Plot(name, caption, ("method", "length", "depth", "value", "low", "high", "n"), table, draw)


def _heat_map(axes: "Axes", results: Results, metric: str, method: str) -> None:
    lengths, depths = results.lengths(metric), results.depths(metric)
    cells = [[results.get(method, metric, length, depth) for length in lengths] for depth in depths]
    axes.imshow(
        [[math.nan if cell is None else cell.value for cell in line] for line in cells],
        cmap="Blues", vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if cell is not None and len(lengths) <= _MOST_NUMBERS:
                ink = PAPER if cell.value > 0.55 else INK
                axes.text(x, y, f"{100 * cell.value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_title(method_name(method), loc="left", parse_math=False, color=INK)
    step = math.ceil(len(lengths) / _MOST_NUMBERS)
    axes.set_xticks(
        range(0, len(lengths), step), labels=[length_text(length) for length in lengths[::step]], fontsize=7.5
    )
    axes.set_yticks(range(len(depths)), labels=[f"{depth:.0%}" for depth in depths], fontsize=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def by_position(stages: Sequence[Stage], name: str = "positions") -> Plot | None:
    """Mean nll of every method by position in the longest window that was measured; None if none was."""
    rows = [row for stage in stages for row in stage.positions if math.isfinite(row.nll)]
    longest = max((row.length for row in rows), default=0)
    rows = [row for row in rows if row.length == longest]
    if not rows:
        return None
    methods = sorted({row.method for row in rows}, key=method_order)
    lowest = min(row.nll for row in rows)
    top = lowest + math.log(_READABLE)

    def draw(narrow: bool) -> "Figure":
        figure, axes = drawing.new_axes(narrow, "nll in nats per token (lower is better)", "position in the window")
        named = []
        for method in methods:
            own = sorted((row for row in rows if row.method == method), key=lambda row: row.start)
            x = [(row.start + row.end) / 2 for row in own]
            drawn, main = look(method), method in ("searched", "tuned")
            if main:
                band = ([row.low for row in own], [row.high for row in own])
                axes.fill_between(x, *band, color=drawn.light, alpha=0.12, linewidth=0, zorder=2)
            width = 2.4 if main else 1.4
            axes.plot(
                x, [row.nll for row in own], color=drawn.light, linestyle=drawn.line, linewidth=width, zorder=3 + main
            )
            named.append((method_name(method), drawn, own[-1].nll))
        axes.set_xlim(0, longest)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, top))
        drawing.name_lines(figure, axes, named, narrow)
        return figure

    table: list[tuple[object, ...]] = [(r.method, r.length, r.start, r.end, r.nll, r.low, r.high) for r in rows]
    caption = (
        f"How well tokens at each place of a window of {length_text(longest)} tokens are predicted; a method that rises"
        " has run out of its window. Bands, of the searched and the tuned model, are 95 % intervals over documents."
    )
    return Plot(name, caption, ("method", "length", "start", "end", "nll", "low", "high"), table, draw)


def training_curves(stages: Sequence[Stage], name: str = "training") -> Plot | None:
    """Logged losses by step, one panel a stage; None if no stage logged any."""
    trained = [stage for stage in stages if stage.losses]
    if not trained:
        return None

    def draw(narrow: bool) -> "Figure":
        columns = 1 if narrow else min(2, len(trained))
        down = math.ceil(len(trained) / columns)
        figure, panels = drawing.new_grid(narrow, down, columns, height=(2.5 if narrow else 3.0) * down)
        for axes, stage in zip(panels, trained, strict=False):
            drawing.dress(axes, f"{stage.name}: loss in nats", "step")
            _losses(axes, stage)
        for axes in panels[len(trained) :]:
            axes.set_visible(False)
        return figure

    rows: list[tuple[object, ...]] = [
        (stage.name, curve.metric, step, value)
        for stage in trained
        for curve in stage.losses
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    caption = "The loss of training batches as it was logged, not smoothed; dots where a validation loss was."
    return Plot(name, caption, ("stage", "metric", "step", "value"), rows, draw)


def _losses(axes: "Axes", stage: Stage) -> None:
    """Lines for training losses, dots for others."""
    for curve in stage.losses:
        training = curve.metric.startswith("train")
        drawn = look("tuned" if training else "searched")
        marker = "" if training and len(curve.steps) > 1 else "o"
        axes.plot(curve.steps, curve.values, color=drawn.light, linewidth=1.4, marker=marker, markersize=4)
