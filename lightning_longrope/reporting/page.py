"""The report of a run: figures, joined table and one HTML page that needs nothing but itself."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_longrope.files import write_text
from lightning_longrope.reporting import figures
from lightning_longrope.reporting.drawing import Plot
from lightning_longrope.reporting.names import (
    ACCURACIES,
    length_text,
    look,
    method_name,
    metric_name,
    palette,
    seconds_text,
    value_text,
)
from lightning_longrope.reporting.results import Result, Results, results_text
from lightning_longrope.reporting.run_folder import Run, Search, Stage, read_run
from lightning_longrope.reporting.verdict import Extension, verdict

_OWN_SECTIONS = ("perplexity", "perplexity_last128", "passkey")


def write_report(run: str | Path) -> Path:
    """Writes ``report.html``, ``figures/`` and the joined ``results.csv`` into a run folder.

    Parts that the run does not have are left out, with a sentence that says so. No number in the report is absent from
    the files beside it. Writing again replaces the files; nothing else in the folder changes.

    Args:
        run: Folder of a recipe, or of a single stage.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If the folder is missing or holds nothing to report, or a ``results.csv`` is damaged.
    """
    data = read_run(run)
    plots = make_plots(data)
    for plot in plots.values():
        plot.save(data.folder / "figures")
    if len(data.results):
        write_text(data.folder / "results.csv", results_text(data.results))
    path = data.folder / "report.html"
    write_text(path, render(data, plots))
    return path


def make_plots(run: Run) -> dict[str, Plot]:
    """Every figure that the run has data for, by name."""
    results = run.results
    found: list[Plot | None] = [
        figures.by_length(results, "perplexity", "perplexity"),
        figures.by_length(results, "perplexity_last128", "perplexity_last128"),
        figures.by_length(results, "passkey", "passkey"),
        figures.heat_maps(results, "passkey", "passkey_depth"),
        figures.training_curves(run.stages),
    ]
    for stage, search, suffix in _searches(run):
        found.append(figures.search_curve(search, f"search_curve{suffix}"))
        if search.factors is not None:
            found.append(figures.factors_by_pair(search.factors, run.rope_base(stage), f"factors{suffix}"))
    return {plot.name: plot for plot in found if plot is not None}


def _searches(run: Run) -> list[tuple[Stage, Search, str]]:
    """Stages that searched, with an ending for the names of their figures; the first has none."""
    stages = [stage for stage in run.stages if stage.search is not None]
    endings = ["", *(f"_{re.sub(r'[^A-Za-z0-9-]+', '-', stage.name)}" for stage in stages[1:])]
    return [(stage, stage.search, end) for stage, end in zip(stages, endings, strict=False) if stage.search]


def render(run: Run, plots: dict[str, Plot]) -> str:
    """The page as text; everything that comes from files is escaped."""
    environment = Environment(
        loader=PackageLoader("lightning_longrope", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = seconds_text
    return environment.get_template("report.html.j2").render(
        run=run,
        verdict=verdict(run.results, extensions(run)),
        palette=palette(),
        # heat maps are tables in the page
        figures={name: _inline(plot) for name, plot in plots.items() if name != "passkey_depth"},
        searches=[_search_facts(run, *found) for found in _searches(run)],
        tables={metric: _by_length(run.results, metric) for metric in run.results.metrics},
        others=[metric for metric in run.results.metrics if metric not in _OWN_SECTIONS],
        heat=_heat_tables(run.results, "passkey"),
        names={metric: metric_name(metric) for metric in run.results.metrics},
        versions=_mapping(run.about.get("versions")),
        total_seconds=_total(run.stages),
    )


def extensions(run: Run) -> list[Extension]:
    """What the run's searches extended from and to, and which tuned model came of each."""
    found = []
    for prefix, (_, search, _) in zip(("", "second_"), _searches(run), strict=False):
        source: Any = vars(search.factors) if search.factors else search.state
        original, target = source.get("original_length"), source.get("target_length")
        earlier = f"tuned_{target}"
        tuned = earlier if earlier in run.results.methods("perplexity") else "tuned"
        score, baselines = search.state.get("best"), figures.baseline_scores(search)
        found.append(Extension(prefix, original, target, tuned, score, baselines))
    return found


def _inline(plot: Plot) -> dict[str, Any]:
    # matplotlib has escaped every text in its SVG
    wide, narrow = (Markup(plot.svg(narrow=narrow)) for narrow in (False, True))
    return {"wide": wide, "narrow": narrow, "caption": plot.caption, "name": plot.name}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _total(stages: Sequence[Stage]) -> float | None:
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(known) if known else None


def _search_facts(run: Run, stage: Stage, search: Search, suffix: str) -> dict[str, Any]:
    """What a search did, as (name, text) pairs."""
    state, factors = search.state, search.factors
    source: Any = vars(factors) if factors else state
    window = [source.get(name) for name in ("original_length", "target_length")]
    scores = [line["score"] for line in search.evaluations if line.get("score") is not None]
    failed = len(search.evaluations) - len(scores)
    facts = [
        ("window", f"{length_text(window[0])} to {length_text(window[1])} tokens" if all(window) else None),
        ("objective", state.get("objective")),
        ("documents", state.get("documents")),
        ("evaluations", state.get("evaluations")),
        ("forward passes of a document", state.get("forwards")),
        ("best score", f"{state['best']:.4f} nats" if isinstance(state.get("best"), float) else None),
        *(
            (f"score of {method_name(name)}", f"{score:.4f} nats")
            for name, score in figures.baseline_scores(search).items()
        ),
        ("candidates without a finite score", failed or None),
        ("pairs held at 1", state.get("pinned")),
        ("start tokens", factors.start_tokens if factors else None),
        ("attention factor", f"{factors.attention_factor:.4f}" if factors else None),
        ("time in forward passes", _search_seconds(search)),
    ]
    return {
        "stage": stage.name,
        "facts": [
            (name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in facts if value is not None
        ],
        "finished": bool(state.get("finished", factors is not None)),
        "curve": f"search_curve{suffix}",
        "factors": f"factors{suffix}",
        "base_known": run.rope_base(stage) is not None,
    }


def _search_seconds(search: Search) -> str | None:
    seconds = [float(line["seconds"]) for line in search.evaluations if isinstance(line.get("seconds"), int | float)]
    return seconds_text(sum(seconds)) if seconds else None
