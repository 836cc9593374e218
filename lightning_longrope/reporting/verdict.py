"""What the measurements say, in sentences: computed from the table, and careful where it is within the noise.

Two measurements are compared by the 95 % interval of their difference, made from their own intervals ("square and
add", Zou and Donner 2008; Newcombe's for proportions): accuracies as they are, everything else by its logarithm.
That takes the two as independent. On the same documents they are not, and the true interval is mostly narrower;
where a paired one was measured (metric ``<metric>_over_<baseline>``, a ratio), it is used instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_longrope.reporting.names import (
    ACCURACIES,
    length_text,
    method_name,
    method_order,
    metric_name,
    percent_text,
    points_word,
    value_text,
)
from lightning_longrope.reporting.results import Result, Results

Outcome = Literal["better", "same", "worse", "unknown"]

BASELINES = ("none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3")


@dataclass(frozen=True)
class Comparison:
    """One measurement against another of the same metric and length."""

    ours: Result
    theirs: Result
    change: float
    """Ratio minus 1; for accuracies the difference. Negative is lower."""
    low: float | None
    high: float | None
    """95 % interval of ``change``; None where an interval is missing."""
    outcome: Outcome
    """"same" if the interval holds zero, "unknown" without an interval."""
    paired: bool = False
    """The interval is of the ratio on the same documents."""


@dataclass(frozen=True)
class Extension:
    """One step from a window to a longer one, and the names its measurements go by."""

    prefix: str = ""
    """``second_`` for the second extension."""
    original_length: int | None = None
    target_length: int | None = None
    tuned: str = "tuned"
    score: float | None = None
    """Best score of the search in nats, on its own documents."""
    baseline_scores: Mapping[str, float] = field(default_factory=dict)
    """Scores of the formulas on the same documents."""


@dataclass(frozen=True)
class Tile:
    """One number for the top of the page."""

    label: str
    value: str
    note: str
    outcome: Outcome = "unknown"


@dataclass(frozen=True)
class Verdict:
    """The headline, the sentences under it and the numbers beside it."""

    headline: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]


def compare(ours: Result, theirs: Result, paired: Result | None = None) -> Comparison:
    """Compares two measurements of one metric.

    Args:
        ours: The measurement in question.
        theirs: What it is held against; its value is finite.
        paired: Ratio of the two on the same documents, with its interval, if that was measured.
    """
    plain = ours.metric in ACCURACIES
    if not usable(ours):
        return Comparison(ours, theirs, math.nan, None, None, "worse")
    on_same = paired is not None and _has_interval(paired)
    if paired is not None and on_same:
        change, low, high = paired.value - 1, _shifted(paired.low), _shifted(paired.high)
    else:
        change, low, high = _difference(ours, theirs, logarithm=not plain)
    if low is None or high is None:
        return Comparison(ours, theirs, change, None, None, "unknown")
    if low <= 0 <= high:
        return Comparison(ours, theirs, change, low, high, "same", on_same)
    return Comparison(ours, theirs, change, low, high, "better" if (change > 0) == plain else "worse", on_same)


def ratio_outcome(paired: Result) -> Outcome:
    """What a ratio on the same documents says of a metric of which less is better."""
    if not _has_interval(paired) or paired.low is None or paired.high is None:
        return "unknown"
    return "better" if paired.high < 1 else "worse" if paired.low > 1 else "same"


def _difference(ours: Result, theirs: Result, *, logarithm: bool) -> tuple[float, float | None, float | None]:
    """Difference and its 95 % interval; with ``logarithm`` the ratio minus 1 and its interval."""

    def scaled(value: float) -> float:
        return math.log(value) if logarithm else value

    def unscaled(value: float) -> float:
        return math.expm1(value) if logarithm else value

    a, b = scaled(ours.value), scaled(theirs.value)
    if not (_has_interval(ours) and _has_interval(theirs)):
        return unscaled(a - b), None, None
    ends = (ours.low, ours.high, theirs.low, theirs.high)
    a_low, a_high, b_low, b_high = (scaled(end) for end in ends if end is not None)
    low = a - b - math.hypot(a - a_low, b_high - b)
    high = a - b + math.hypot(a_high - a, b - b_low)
    return unscaled(a - b), unscaled(low), unscaled(high)


def _has_interval(row: Result) -> bool:
    """Whether the ends are there and mean something; a bootstrap over one document has no width."""
    if row.low is None or row.high is None or not (math.isfinite(row.low) and math.isfinite(row.high)):
        return False
    return row.metric in ACCURACIES or 0 < row.low < row.high


def _shifted(end: float | None) -> float | None:
    return None if end is None else end - 1


def usable(row: Result) -> bool:
    """Whether a measurement is a number that can be compared."""
    return math.isfinite(row.value) and (row.metric in ACCURACIES or row.value > 0)


def clause(comparison: Comparison, name: str) -> str:
    """The comparison in words: "5.0 % below YaRN (13.10), 95 % interval −6.3 to −3.6 %"."""
    theirs = f"{name} ({value_text(comparison.theirs.metric, comparison.theirs.value)})"
    if math.isnan(comparison.change):
        return f"which is no finite loss; it was held against {theirs}"
    percent = 100 * comparison.change
    if comparison.ours.metric in ACCURACIES:
        size, unit = f"{abs(percent):.0f}\u00a0{points_word(comparison.change)}", "points"
        words = f"as many as {theirs}" if abs(percent) < 0.5 else f"{size} {_more(percent)} than {theirs}"
    else:
        size, unit = f"{abs(percent):.1f}\u00a0%", "%"
        words = f"level with {theirs}" if abs(percent) < 0.05 else f"{size} {_above(percent)} {theirs}"
    if comparison.low is None or comparison.high is None:
        return f"{words}, which may be noise: no interval was recorded"
    noise = ", which is within the noise" if comparison.outcome == "same" else ""
    ends = f"{percent_text(comparison.low)} to {percent_text(comparison.high)}\u00a0{unit}"
    return f"{words}{noise}, 95\u00a0% interval {ends}{' document by document' if comparison.paired else ''}"


def _more(percent: float) -> str:
    return "more" if percent > 0 else "fewer"


def _above(percent: float) -> str:
    return "above" if percent > 0 else "below"


def verdict(results: Results, extensions: Sequence[Extension]) -> Verdict:
    """Sums up a table of measurements; every number is in the table or is the difference of two that are.

    The last extension makes the headline.
    """
    wanted = extensions or (Extension(),)
    found = [part for extension in wanted if (part := _extension(results, extension)) is not None]
    if not found:
        headline, sentences = _without_search(results)
        alone = [said for extension in extensions for said in _search_alone(extension)]
        return Verdict(headline, (*sentences, *alone), ())
    sentences = []
    for part in found[:-1]:
        sentences += [part.headline, *part.sentences]
    tiles = tuple(tile for part in found for tile in part.tiles)
    return Verdict(found[-1].headline, (*sentences, *found[-1].sentences), tiles)


def _extension(results: Results, extension: Extension) -> Verdict | None:
    """What is said of the searched factors and of what was tuned from them; None if no baseline was measured."""
    made = claims(results, extension)
    if not made:
        return None
    sentences = [
        _SENTENCES[metric].format(
            who="The searched factors" if not extension.prefix else "The factors of the second search",
            value=value_text(metric, claim.ours.value),
            length=length_text(claim.ours.length),
        )
        + f", {clause(claim, baseline_name(claim))}."
        for metric, claim in made.items()
    ]
    tiles = [_tile(claim, baseline_name(claim)) for claim in _main(made).values()]
    after, tuned_tiles = _tuned(results, extension, made)
    return Verdict(_headline(extension, made), (*sentences, *after), (*tiles, *tuned_tiles))


def claims(results: Results, extension: Extension) -> dict[str, Comparison]:
    """The searched factors against the best baseline, by metric; metrics that were not measured are left out."""
    subject, formulas = f"{extension.prefix}searched", [f"{extension.prefix}{method}" for method in BASELINES]
    found = {metric: against_best(results, metric, subject, formulas, extension.target_length) for metric in _SENTENCES}
    return {metric: claim for metric, claim in found.items() if claim is not None}


def baseline_name(claim: Comparison) -> str:
    """Display name of what the searched factors are held against."""
    return method_name(claim.theirs.method.removeprefix("second_"))


_SENTENCES = {
    "perplexity": "{who} read {length} tokens at perplexity {value}",
    "perplexity_last128": "Over the last 128 of {length} tokens the perplexity is {value}",
    "passkey": "At {length} tokens {value} of the hidden pass keys are repeated",
}
SHORT_NAMES = {"perplexity": "perplexity", "perplexity_last128": "the last 128 tokens", "passkey": "pass keys"}
_VERBS: dict[Outcome, tuple[str, str]] = {
    "better": ("beat the best baseline", "beat it"),
    "same": ("are within the noise of the best baseline", "are within the noise"),
    "worse": ("lose to the best baseline", "lose to it"),
    "unknown": ("have no interval to be compared by", "have no interval to be compared by"),
}


def against_best(
    results: Results, metric: str, subject: str, others: Sequence[str], target_length: int | None
) -> Comparison | None:
    """A method against the best of others, at the target length or, if not measured there, the longest one.

    Args:
        results: The measurements.
        metric: What is compared.
        subject: The method in question.
        others: Methods to choose from; the later wins a tie.
        target_length: Length in tokens that is looked at first.

    Returns:
        None if they were not measured at the same length.
    """
    lengths = [length for length in results.lengths(metric) if results.get(subject, metric, length)]
    for length in sorted(lengths, key=lambda length: (length == target_length, length), reverse=True):
        ours = results.get(subject, metric, length)
        found = [results.get(other, metric, length) for other in others]
        theirs = [row for row in found if row is not None and usable(row)]
        if ours and theirs:
            best = _best(theirs)
            return compare(ours, best, results.get(subject, f"{metric}_over_{best.method}", length))
    return None


def _best(rows: Sequence[Result]) -> Result:
    # the later method wins a tie: being level with no change at all says less than being level with YaRN
    order = -1 if rows[0].metric in ACCURACIES else 1
    return min(reversed(rows), key=lambda row: order * row.value)


def _main(made: dict[str, Comparison]) -> dict[str, Comparison]:
    """The claims that a headline is made of; that of the window's end only where the mean over it is too kind."""
    outcomes = {metric: claim.outcome for metric, claim in made.items()}
    names = ["perplexity", "passkey"]
    if outcomes.get("perplexity_last128") == "worse" != outcomes.get("perplexity"):
        names.insert(1, "perplexity_last128")
    return {metric: made[metric] for metric in names if metric in made} or made


def _headline(extension: Extension, made: dict[str, Comparison]) -> str:
    """One sentence: where the searched factors win, tie and lose."""
    main = _main(made)
    groups: dict[Outcome, list[str]] = {}
    for metric, claim in main.items():
        groups.setdefault(claim.outcome, []).append(SHORT_NAMES[metric])
    order: tuple[Outcome, ...] = ("better", "worse", "same", "unknown")
    parts = [(outcome, " and ".join(groups[outcome])) for outcome in order if outcome in groups]
    baselines = {baseline_name(claim) for claim in main.values()}
    named = f" ({baselines.pop()})" if len(baselines) == 1 else ""
    first = f"{_VERBS[parts[0][0]][0]}{named} on {parts[0][1]}"
    others = [f"on {metrics} they {_VERBS[outcome][1]}" for outcome, metrics in parts[1:]]
    who = "the factors of the second search" if extension.prefix else "the searched factors"
    length = length_text(next(iter(main.values())).ours.length)
    return f"At {length} tokens {who} {'; '.join([first, *others])}."


def _tile(claim: Comparison, against: str) -> Tile:
    ours, theirs = claim.ours, claim.theirs
    label = f"{SHORT_NAMES[ours.metric]} at {length_text(ours.length)}, {method_name(ours.method)}"
    unit, digits = (points_word(claim.change), 0) if ours.metric in ACCURACIES else ("%", 1)
    percent = f"{percent_text(claim.change, digits)}\u00a0{unit}"
    change = "no finite loss" if math.isnan(claim.change) else percent
    note = f"{change} against {against} ({value_text(theirs.metric, theirs.value)})"
    return Tile(label[0].upper() + label[1:], value_text(ours.metric, ours.value), note, claim.outcome)


def _tuned(results: Results, extension: Extension, made: dict[str, Comparison]) -> tuple[list[str], list[Tile]]:
    """What tuning added to the searched factors, and what it cost in the pretrained window."""
    parts, tiles = [], []
    for metric, form in (("perplexity", "perplexity {}"), ("passkey", "{} of the pass keys")):
        before = made.get(metric)
        after = results.get(extension.tuned, metric, before.ours.length) if before else None
        if before and after and usable(before.ours):
            change = compare(after, before.ours)
            parts.append(f"{form.format(value_text(metric, after.value))}, {clause(change, 'the untuned factors')}")
            tiles.append(_tile(change, "untuned"))
    sentences = [f"After tuning: {'; '.join(parts)}."] if parts else []
    return sentences + _short_window(results, extension), tiles


def _short_window(results: Results, extension: Extension) -> list[str]:
    """The price of tuning at the pretrained length, if it was measured."""
    length = extension.original_length
    if extension.prefix or length is None:
        return []
    before, after = (results.get(method, "perplexity", length) for method in ("none", extension.tuned))
    if before is None or after is None or not usable(before):
        return []
    paired = results.get(extension.tuned, "perplexity_over_none", length)
    words = clause(compare(after, before, paired), "the unchanged model")
    value = value_text("perplexity", after.value)
    return [f"At the pretrained {length_text(length)} tokens the tuned model reads at perplexity {value}, {words}."]


def _without_search(results: Results) -> tuple[str, list[str]]:
    """The best of what there is, where no searched factors were held against a baseline."""
    for metric in ("perplexity", "passkey", *results.metrics):
        for length in reversed(results.lengths(metric)):
            rows = [results.get(method, metric, length) for method in results.methods(metric)]
            measured = sorted((row for row in rows if row and usable(row)), key=lambda row: method_order(row.method))
            if measured:
                return "No searched factors were held against a baseline.", [_best_of(measured)]
    return "Nothing has been measured yet.", []


def _search_alone(extension: Extension) -> list[str]:
    """What the search saw, where nothing was measured on other text."""
    if extension.score is None or not extension.baseline_scores:
        return []
    method, score = min(extension.baseline_scores.items(), key=lambda item: item[1])
    return [
        f"On the documents of the search the best candidate scores {extension.score:.4f} nats and the best formula,"
        f" {method_name(method)}, {score:.4f} nats. That says nothing about other text: compare on held-out documents."
    ]


def _best_of(rows: Sequence[Result]) -> str:
    best = _best(rows)
    others = [row for row in rows if row is not best]
    value = value_text(best.metric, best.value)
    name = SHORT_NAMES.get(best.metric, metric_name(best.metric))
    start = f"At {length_text(best.length)} tokens {method_name(best.method)} has {name} {value}"
    if not others:
        return f"{start}; no other method was measured."
    second = _best(others)
    return f"{start}, the best of {len(rows)} methods: {clause(compare(best, second), method_name(second.method))}."
