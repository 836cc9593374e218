"""Quality of factor searches against what they cost, on trained models and held-out text.

Every search gets the same models; the judge is text and pass keys of the test split, which no search has seen:
perplexity at 1,024 tokens, that of the last eighth of the window, and passkey accuracy over 100 prompts. Costs are
forward passes of one document. What is finished is kept in the cache folder, so a run that was cut goes on.

    python benchmarks/search.py [--quick] [--check] [--bases sources-3 headers-1 ...] [--searches default paper ...]
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bases import CACHE, TARGET, Base, trained_base
from _released import ReleasedSearch
from _results import RESULTS, Row, commit, finish, parser

from lightning_longrope import RescaleFactors, install_factors, search_factors
from lightning_longrope.files import write_json
from lightning_longrope.model import rope_geometry
from lightning_longrope.objectives import Objective, ObjectiveName
from lightning_longrope.retrieval import PasskeyPrompts
from lightning_longrope.scoring import greedy_matches, token_nll
from lightning_longrope.search import EvolutionSearch, LongRoPE2Search, RampSearch, SearchAlgorithm, SmoothSearch
from lightning_longrope.search.space import PAPER_START_TOKENS

BASES = ("sources-3", "sources-4", "sources-5", "headers-1", "headers-2", "headers-3")
LAST = TARGET // 8


@dataclass(frozen=True)
class Contestant:
    """A search and how it is asked."""

    algorithm: Callable[[], SearchAlgorithm] = RampSearch
    objective: ObjectiveName | Objective = "mixed"
    documents: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    shorter: bool = False
    """Whether it starts from what a search for half the window has found, which is not counted."""


PAPER = {"pinned": 0, "start_tokens": PAPER_START_TOKENS}
SCHEDULED = "8, then 16 documents"
SEARCHES = {
    "default": Contestant(),
    "paper": Contestant(EvolutionSearch, "perplexity", 5, PAPER),
    "released": Contestant(ReleasedSearch, "perplexity", 5, {"pinned": 0}),
    "perplexity": Contestant(objective="perplexity"),
    "unweighted": Contestant(objective=Objective(answer=1.0, end_weight=1.0)),
    "last half": Contestant(objective=Objective(text_from=0.5, end_weight=1.0)),
    "five documents": Contestant(documents=5, options={"max_evaluations": 80}),
    "eight documents": Contestant(documents=8),
    "4, then 16 documents": Contestant(options={"schedule": ((0.9, 4),)}),
    SCHEDULED: Contestant(options={"schedule": ((0.9, 8),)}),
    "patience 8": Contestant(options={"patience": 8}),
    "10 evaluations": Contestant(options={"max_evaluations": 10}),
    "10 from half the window": Contestant(options={"max_evaluations": 10}, shorter=True),
    "race": Contestant(options={"race": 3.0, "max_evaluations": 48}),
    "smooth": Contestant(SmoothSearch, options={"max_evaluations": 100}),
    "ramps, then genes": Contestant(partial(RampSearch, ramp_share=0.25), options={"max_evaluations": 96}),
    "not pinned": Contestant(options={"pinned": 0}),
    "LongRoPE2": Contestant(
        partial(LongRoPE2Search, 32, 8),
        Objective(text=0.0, answer=1.0, end_weight=1.0, needle_depths=(0.0, 0.0)),
        10,
    ),
}
MAIN = ("default", "paper", "released")


@torch.no_grad()
def judge(base: Base, table: RescaleFactors, *, keys: bool = True) -> dict[str, float]:
    """Perplexity of 24 test excerpts, that of the last eighth, and the share of 100 pass keys repeated."""
    model, data = base.model, base.datamodule
    install_factors(model, table)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            texts = data.excerpts("test", 24, TARGET, 0)
            nll = torch.cat([token_nll(model, rows) for rows in texts.split(8)])[:, 1:].double()
            found = {"perplexity": nll.mean().exp().item(), "end": nll[:, -LAST:].mean().exp().item()}
            if keys:
                prompts = PasskeyPrompts(data.tokenizer, filler="text", text=data.filler("test"), seed=0)
                trials = [prompts.prompt(TARGET, depth, n) for depth in (0, 0.25, 0.5, 0.75, 1) for n in range(20)]
                rows = torch.stack([trial.tokens for trial in trials])
                hits = [greedy_matches(model, part, trials[0].answer).all(1) for part in rows.split(16)]
                found["passkey"] = torch.cat(hits).double().mean().item()
    finally:
        install_factors(model, RescaleFactors((1.0,) * len(table.values), table.original_length, TARGET))
    return found


def measure(base: Base, name: str, folder: Path) -> dict[str, Any]:
    """Runs a search, or goes on with it, and judges what it found and the best tables on the way."""
    done = folder / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    asked = SEARCHES[name]
    options = dict(asked.options)
    if asked.shorter:
        run_search(base, asked, TARGET // 2, folder / "shorter", {})
        options["space"] = {"warm_start": str(folder / "shorter" / "factors.json")}
    result = run_search(base, asked, TARGET, folder, options)
    row = {"forwards": result.forwards, "evaluations": result.evaluations, "score": result.score}
    row |= {"values": list(result.factors.values), **judge(base, result.factors)}
    row["curve"] = curve(base, result) if name in MAIN else []
    row["commit"] = commit()  # runs of several are collected
    write_json(done, row)
    return row


def run_search(base: Base, asked: Contestant, target: int, folder: Path, options: dict[str, Any]) -> Any:
    """The search of a contestant for a window, in a folder of its own."""
    texts = list(base.datamodule.excerpts("validation", asked.documents, TARGET, base.seed))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return search_factors(
            base.model,
            texts,
            target,
            tokenizer=base.datamodule.tokenizer,
            algorithm=asked.algorithm(),
            objective=asked.objective,
            seed=base.seed,
            folder=folder,
            **options,
        )


def curve(base: Base, result: Any) -> list[list[float]]:
    """(document-forwards, held-out perplexity) of the best table after ever more evaluations."""
    records = [record for record in result.history if not record["origin"].startswith("baseline")]
    documents, points = result.forwards / len(result.history), []
    for count in sorted({int(c) for c in np.geomspace(1, len(records), 8)}):
        best = min(records[:count], key=lambda record: record["score"] if record["score"] is not None else np.inf)
        table = RescaleFactors(
            tuple(best["values"]),
            result.factors.original_length,
            TARGET,
            best["start_tokens"],
            best["attention_factor"],
        )
        forwards = (count + len(result.history) - len(records)) * documents
        points.append([forwards, judge(base, table, keys=False)["perplexity"]])
    return points


def yarn(base: Base, folder: Path) -> dict[str, Any]:
    """The judgement of YaRN, which the searches are held against."""
    done = folder / "result.json"
    if not done.exists():
        geometry = rope_geometry(base.model.config)
        shape = {name: getattr(geometry, name) for name in ("rotary_size", "base", "original_length")}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(done, judge(base, RescaleFactors.yarn(**shape, target_length=TARGET)))
    return dict(json.loads(done.read_text()))


def rows_of(runs: dict[str, dict[str, Any]], quick: bool) -> list[Row]:
    """What is held to goals: a ratio is the median, least or largest of the bases' own, the figures are medians."""
    bases = [run for run in runs.values() if {"default", "paper"} <= run.keys()]
    if not bases:
        return []
    ratio = [run["default"]["perplexity"] / run["paper"]["perplexity"] for run in bases]
    cost = [run["paper"]["forwards"] / run["default"]["forwards"] for run in bases]
    over_yarn = [run["default"]["perplexity"] / run["yarn"]["perplexity"] for run in bases]
    end = [run["default"]["end"] / run["yarn"]["end"] for run in bases]
    gain = [run["default"]["passkey"] - run["yarn"]["passkey"] for run in bases]
    middle = statistics.median

    def median(name: str, key: str) -> float:
        return middle(run[name][key] for run in bases)

    least = "<= 1.03" if quick else "<= 1.01"
    rows = [
        Row(
            "held-out perplexity over that of the paper's search, median",
            median("default", "perplexity"),
            median("paper", "perplexity"),
            "perplexity",
            middle(ratio),
            least,
        ),
        Row(
            "document-forwards of the paper's search over ours, least",
            max(run["default"]["forwards"] for run in bases),
            min(run["paper"]["forwards"] for run in bases),
            "forwards",
            min(cost),
            ">= 2" if quick else ">= 20",
        ),
        Row(
            "perplexity over YaRN's, largest",
            median("default", "perplexity"),
            median("yarn", "perplexity"),
            "perplexity",
            max(over_yarn),
            "<= 1",
        ),
        Row(
            "perplexity of the last eighth over YaRN's, median",
            median("default", "end"),
            median("yarn", "end"),
            "perplexity",
            middle(end),
            "<= 1.05" if quick else "<= 1",
        ),
        Row(
            "passkey minus YaRN's, median",
            median("default", "passkey"),
            median("yarn", "passkey"),
            "accuracy",
            middle(gain),
            ">= 0" if quick else ">= 0.2",
        ),
        Row(
            "passkey minus YaRN's, least",
            median("default", "passkey"),
            median("yarn", "passkey"),
            "accuracy",
            min(gain),
            ">= 0",
        ),
    ]
    if all(SCHEDULED in run for run in bases):
        cost = [run["paper"]["forwards"] / run[SCHEDULED]["forwards"] for run in bases]
        ratio = [run[SCHEDULED]["perplexity"] / run["paper"]["perplexity"] for run in bases]
        ours, theirs = median(SCHEDULED, "perplexity"), median("paper", "perplexity")
        rows.append(Row(f"{SCHEDULED}: perplexity, median", ours, theirs, "perplexity", middle(ratio), "<= 1.005"))
        ours, theirs = median(SCHEDULED, "forwards"), median("paper", "forwards")
        rows.append(Row(f"{SCHEDULED}: forwards, least", ours, theirs, "forwards", min(cost), ">= 20"))
    return rows


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out perplexity over YaRN's against document-forwards, one line a base and search."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = {"default": "#1768ac", "paper": "#c8553d", "released": "#8a8a8a"}
    labels = {"default": "default (ramps)", "paper": "the paper's evolution", "released": "released operators"}
    figure, axes = pyplot.subplots(figsize=(7.5, 4.4), layout="constrained")
    for name, colour in colours.items():
        kinds = [run for run in runs.values() if run.get(name, {}).get("curve")]
        for index, run in enumerate(kinds):
            forwards, values = zip(*run[name]["curve"], strict=True)
            ratio = [value / run["yarn"]["perplexity"] for value in values]
            label = labels[name] if not index else None
            axes.plot(forwards, ratio, color=colour, marker="o", markersize=3, linewidth=1.2, alpha=0.8, label=label)
    axes.axhline(1, color="#444", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(0.88, 1.06)  # a first population begins far above
    axes.set_xlabel("document-forwards")
    axes.set_ylabel("held-out perplexity over YaRN's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Every run in one line, relative to YaRN on the same base."""
    lines = [f"{'base':<17}{'search':<20}{'forwards':>9}{'perplexity':>12}{'last eighth':>13}{'passkey':>9}"]
    for base, run in runs.items():
        for name, found in run.items():
            ratios = (found[key] / run["yarn"][key] for key in ("perplexity", "end"))
            cells = "".join(f"{ratio:>{width}.3f}" for ratio, width in zip(ratios, (12, 13), strict=True))
            lines.append(f"{base:<17}{name:<20}{found.get('forwards', 0):>9}{cells}{found['passkey']:>9.2f}")
    return "\n".join(lines)


def main() -> int:
    """Measures, writes ``results/search.json`` and the plot; 1 if a goal is missed under ``--check``."""
    options = parser(__doc__)
    options.add_argument("--bases", nargs="+", default=None, help="kind-seed, such as headers-1")
    options.add_argument("--searches", nargs="+", default=list(MAIN), choices=list(SEARCHES))
    options.add_argument("--cache", type=Path, default=CACHE)
    given = options.parse_args()
    if given.quick:
        SEARCHES["paper"] = Contestant(partial(EvolutionSearch, 32, 10, 16, 8, 8), "perplexity", 5, PAPER)
        given.searches = ["default", "paper"]
    for name in given.bases or (["sources-0"] if given.quick else BASES):
        kind, seed = name.split("-")
        base = trained_base(kind, int(seed), short=given.quick, cache=given.cache)
        folder = given.cache / "search" / (f"{name}-short" if given.quick else name)
        yarn(base, folder / "yarn")
        for search in given.searches:
            found = measure(base, search, folder / search)
            sys.stderr.write(f"{name} {search}: {found['forwards']} forwards, perplexity {found['perplexity']:.3f}\n")
    runs = collect(given.cache / "search", given.quick)
    rows = rows_of(runs, given.quick)
    sys.stdout.write(table(runs) + "\n")
    if not given.quick:
        plot(runs, RESULTS / "search.png")
    return finish("search", rows, given, ("torch", "transformers", "lightning_longrope", "cma"), {"runs": runs})


def collect(folder: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """All finished runs, by base and search."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*/result.json")):
        if path.parts[-3].endswith("-short") == quick:
            runs.setdefault(path.parts[-3], {})[path.parts[-2]] = json.loads(path.read_text())
    order = ["yarn", *SEARCHES]
    return {base: dict(sorted(run.items(), key=lambda item: order.index(item[0]))) for base, run in runs.items()}


if __name__ == "__main__":
    sys.exit(main())
