"""The report of a run: figures, joined table and one HTML page that needs nothing but itself."""

import base64
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_longrope.files import write_text
from lightning_longrope.locks import hold
from lightning_longrope.reporting import figures, tables
from lightning_longrope.reporting.claims import paper_claims
from lightning_longrope.reporting.drawing import Plot
from lightning_longrope.reporting.names import (
    length_text,
    method_name,
    metric_name,
    palette,
    seconds_text,
    signed,
    split_ratio,
)
from lightning_longrope.reporting.results import results_text
from lightning_longrope.reporting.run_folder import Run, Search, Stage, read_run
from lightning_longrope.reporting.verdict import Extension, verdict

_PERPLEXITIES = ("perplexity", "perplexity_last128")
TASKS = ("passkey", "key_value", "needle", "document_question")


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
    path = data.folder / "report.html"
    with hold(data.folder / ".report.lock", path, wait=True):  # a report is also made while a run is at work
        for plot in plots.values():
            plot.save(data.folder / "figures")
        if len(data.results):
            write_text(data.folder / "results.csv", results_text(data.results))
        write_text(path, render(data, plots))
    return path


def make_plots(run: Run) -> dict[str, Plot]:
    """Every figure that the run has data for, by name."""
    results = run.results
    found = [figures.by_length(results, metric, metric) for metric in (*_PERPLEXITIES, *TASKS)]
    found += [figures.heat_maps(results, metric, f"{metric}_depth") for metric in TASKS]
    found += [figures.by_position(run.stages), figures.training_curves(run.stages)]
    for stage, search, suffix in [*_searches(run), *_recoveries(run)]:
        found.append(figures.search_curve(search, f"search_curve{suffix}"))
        if search.factors is not None:
            found.append(figures.factors_by_pair(search.factors, run.rope_base(stage), f"factors{suffix}"))
    return {plot.name: plot for plot in found if plot is not None}


def _searches(run: Run) -> list[tuple[Stage, Search, str]]:
    """Stages that searched, with an ending for the names of their figures; the first has none."""
    stages = [stage for stage in run.stages if stage.search is not None]
    endings = ["", *(f"_{_plain(stage.name)}" for stage in stages[1:])]
    return [(stage, stage.search, end) for stage, end in zip(stages, endings, strict=False) if stage.search]


def _recoveries(run: Run) -> list[tuple[Stage, Search, str]]:
    """Stages that searched a table for short texts, with an ending for the names of their figures."""
    return [(stage, stage.recovery, f"_{_plain(stage.name)}_short") for stage in run.stages if stage.recovery]


def _plain(name: str) -> str:
    """A name of letters, digits and hyphens, for files."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def render(run: Run, plots: dict[str, Plot]) -> str:
    """The page as text; everything that comes from files is escaped."""
    results, steps = run.results, extensions(run)
    others = [m for m in results.metrics if m not in (*_PERPLEXITIES, *TASKS) and not split_ratio(m)]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            verdict=verdict(results, steps),
            claims=paper_claims(results, steps),
            palette=palette(),
            # heat maps are tables in the page
            figures={name: inline(plot) for name, plot in plots.items() if not name.endswith("_depth")},
            searches=[_search_facts(run, *found) for found in _searches(run)],
            recoveries=[_search_facts(run, *found) for found in _recoveries(run)],
            tables={metric: tables.by_length(results, metric) for metric in results.metrics},
            ratios={metric: tables.against_baselines(results, metric) for metric in results.metrics},
            tasks=[(metric, tables.heat_tables(results, metric)) for metric in TASKS if metric in results.metrics],
            others=others,
            names={metric: metric_name(metric) for metric in results.metrics},
            pictures=[_picture(run, path) for path in run.data_pictures],
            commands=[command for stage in run.stages if (command := stage_command(run, stage))],
            versions=mapping(run.about.get("versions")),
            total_seconds=total_seconds(run.stages),
        )
    )


def environment() -> Environment:
    """Where the templates of the pages are found and how they are filled."""
    found = Environment(
        loader=PackageLoader("lightning_longrope", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["seconds"] = seconds_text
    return found


def _picture(run: Run, path: Path) -> dict[str, str]:
    """A PNG file as text for the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    name = path.stem.removeprefix("data").strip("_") or "data"
    return {"source": f"data:image/png;base64,{data}", "link": path.relative_to(run.folder).as_posix(), "name": name}


def stage_command(run: Run, stage: Stage) -> str | None:
    """The words that run a stage once more from the configuration in its folder; None if it has none."""
    if stage.folder is None or stage.config is None or stage.command is None:
        return None
    config = stage.folder.relative_to(run.folder) / "config.yaml"
    return shlex.join(["longrope", stage.command, "-c", config.as_posix()])


def extensions(run: Run) -> list[Extension]:
    """What the run's last search of each kind extended from and to, and which tuned model came of it.

    A search whose formulas multiply earlier factors is a second extension.
    """
    last: dict[str, Search] = {}
    for _, search, _ in _searches(run):
        second = any(name.startswith("second_") for name in figures.baseline_scores(search))
        last["second_" if second else ""] = search
    return [_extension(run, prefix, last[prefix]) for prefix in ("", "second_") if prefix in last]


def _extension(run: Run, prefix: str, search: Search) -> Extension:
    source: Any = vars(search.factors) if search.factors else search.state
    original, target = source.get("original_length"), source.get("target_length")
    earlier = f"tuned_{target}"
    tuned = earlier if earlier in run.results.methods("perplexity") else "tuned"
    return Extension(prefix, original, target, tuned, search.state.get("best"), figures.baseline_scores(search))


def inline(plot: Plot) -> dict[str, Any]:
    """A figure for the page, in its wide and narrow version."""
    # matplotlib has escaped every text in its SVG
    wide, narrow = (Markup(plot.svg(narrow=narrow)) for narrow in (False, True))
    return {"wide": wide, "narrow": narrow, "caption": plot.caption, "name": plot.name}


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def total_seconds(stages: Sequence[Stage]) -> float | None:
    """Seconds of all stages whose time is known."""
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(known) if known else None


def _search_facts(run: Run, stage: Stage, search: Search, suffix: str) -> dict[str, Any]:
    """What a search did, as (name, text) pairs."""
    state, factors = search.state, search.factors
    source: Any = vars(factors) if factors else state
    window = [source.get(name) for name in ("original_length", "target_length")]
    dropped, cached = state.get("dropped") or None, state.get("cached") or None
    failed = sum(line.get("score") is None for line in search.evaluations) or None
    facts = [
        ("window", f"{length_text(window[0])} to {length_text(window[1])} tokens" if all(window) else None),
        ("objective", state.get("objective")),
        ("documents", state.get("documents")),
        ("evaluations", state.get("evaluations")),
        ("of them given up early", dropped),
        ("of them known before", cached),
        ("of them without a finite score", failed),
        ("forward passes of a document", state.get("forwards")),
        ("best score", f"{state['best']:.4f} nats" if isinstance(state.get("best"), float) else None),
        *(
            (f"score of {method_name(name)}", f"{score:.4f} nats")
            for name, score in figures.baseline_scores(search).items()
        ),
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
        "held_out": _held_out(mapping(state.get("held_out"))),
        "finished": bool(state.get("finished", factors is not None)),
        "curve": f"search_curve{suffix}",
        "factors": f"factors{suffix}",
        "base_known": run.rope_base(stage) is not None,
    }


def _held_out(judged: dict[str, Any]) -> str | None:
    """The judgement of the winner in a sentence; None if there was none."""
    names = ("score", "low", "high", "difference", "difference_low", "difference_high")
    if not all(isinstance(judged.get(name), int | float) for name in names):
        return None
    low, high = judged["difference_low"], judged["difference_high"]
    outcome = "better than" if high < 0 else "worse than" if low > 0 else "within the noise of"
    return (
        f"On {judged.get('documents')} documents that the search has not seen the winner scores {judged['score']:.4f}"
        f" nats (95\u00a0% interval {judged['low']:.4f} to {judged['high']:.4f}), {outcome} the best formula,"
        f" {method_name(str(judged.get('best_baseline')))}: the difference is {signed(judged['difference'])} nats"
        f" ({signed(low)} to {signed(high)})."
    )


def _search_seconds(search: Search) -> str | None:
    seconds = [float(line["seconds"]) for line in search.evaluations if isinstance(line.get("seconds"), int | float)]
    return seconds_text(sum(seconds)) if seconds else None
