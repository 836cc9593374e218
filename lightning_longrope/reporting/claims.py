"""What LongRoPE claims and a run can show: which claims hold here, which do not, and which are within the noise.

Every number is in the table of measurements or is the difference of two that are, compared by the rules of ``verdict``:
paired on the same documents where that was measured, else as if the documents were different.

Source: LongRoPE, arXiv:2402.13753.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lightning_longrope.reporting.names import length_text, method_name, percent_text, value_text
from lightning_longrope.reporting.results import Result, Results
from lightning_longrope.reporting.verdict import Comparison, Extension, against_best, clause, compare, usable

Standing = Literal["holds", "fails", "noise", "unmeasured"]

KEYS = 0.9
"""Share of the pass keys that the paper's model repeats at every length."""

RECOVERED = 0.03
"""How far above the base model's a perplexity may be that counts as recovered, relative."""

_FORMULAS = ("linear", "ntk", "yarn")
_NUMBERS = {"perplexity": "Perplexity {}", "passkey": "{} of the pass keys"}
_GAINS = {"perplexity": "read text better", "passkey": "repeat more pass keys"}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what the run says to it."""

    text: str
    standing: Standing
    numbers: str
    """What was measured, in sentences; what is missing where it was not."""


def paper_claims(results: Results, extensions: Sequence[Extension]) -> tuple[Claim, ...]:
    """The claims in the order of the paper; none of a run that measured a first extension and its tuning alone.

    Args:
        results: All measurements of the run.
        extensions: What its searches extended from and to.
    """
    if not any(_goes_further(row.method) for row in results.rows):
        return ()
    first = next((step for step in extensions if not step.prefix), Extension())
    second = next((step for step in extensions if step.prefix), Extension("second_"))
    return (
        *_search_wins(results, first, _FORMULAS, "Without tuning, searched factors {} than PI, NTK and YaRN"),
        *_tuning_wins(results, first),
        *_falling(results, first),
        *_search_wins(
            results,
            second,
            ("linear", "yarn"),
            "A second extension without tuning: searched factors {} than PI and YaRN",
        ),
        _keys(results, first.tuned, first.target_length, "after tuning"),
        _keys(results, "second_searched", second.target_length, "after the second extension"),
        *_short_window(results, first),
    )


def _goes_further(method: str) -> bool:
    return method == "short" or method.startswith(("second_", "tuned_"))


def _search_wins(results: Results, step: Extension, formulas: Sequence[str], text: str) -> Iterable[Claim]:
    """Searched factors against the best formula, in perplexity and in pass keys."""
    others = [f"{step.prefix}{method}" for method in formulas]
    for metric, gain in _GAINS.items():
        found = against_best(results, metric, f"{step.prefix}searched", others, step.target_length)
        yield _claim(text.format(gain), metric, [found] if found else [])


def _tuning_wins(results: Results, first: Extension) -> Iterable[Claim]:
    """The model tuned from the searched factors against those factors alone."""
    for metric, gain in _GAINS.items():
        found = against_best(results, metric, first.tuned, ["searched"], first.target_length)
        yield _claim(f"Tuned from the searched factors, the model learns to {gain}", metric, [found] if found else [])


def _claim(text: str, metric: str, found: Sequence[Comparison]) -> Claim:
    """A claim that comparisons of one metric are all won."""
    if not found:
        return Claim(text, "unmeasured", "The methods were not measured beside each other.")
    return Claim(text, _all_won(found), " ".join(_sentence(metric, one) for one in found))


def _all_won(found: Sequence[Comparison]) -> Standing:
    outcomes = {one.outcome for one in found}
    return "fails" if "worse" in outcomes else "holds" if outcomes == {"better"} else "noise"


def _sentence(metric: str, one: Comparison) -> str:
    value = _NUMBERS[metric].format(value_text(metric, one.ours.value))
    return f"{value} at {length_text(one.ours.length)} tokens, {clause(one, method_name(one.theirs.method))}."


def _falling(results: Results, first: Extension) -> Iterable[Claim]:
    """Perplexity of every tuned model by length, up to its window."""
    windows = {first.tuned: first.target_length}
    for method in results.methods("perplexity"):
        if (length := method.removeprefix("tuned_")).isdecimal():
            windows[method] = int(length)
    for method, window in sorted(windows.items(), key=lambda item: item[1] or 0):
        rows = _up_to(results, method, "perplexity", window)
        yield _falls(f"Perplexity falls with length up to the window, {method_name(method)}", rows)


def _falls(text: str, rows: Sequence[Result]) -> Claim:
    if len(rows) < 2:
        return Claim(text, "unmeasured", "It was not measured at two lengths within that window.")
    values = ", ".join(value_text("perplexity", row.value) for row in rows)
    numbers = f"{values} at {_listed(row.length for row in rows)} tokens"
    if not all(map(usable, rows)):
        return Claim(text, "fails", f"{numbers}.")
    steps, whole = [compare(after, before) for before, after in pairwise(rows)], compare(rows[-1], rows[0])
    rising = [step for step in steps if step.change >= 0]
    if any(step.outcome == "worse" for step in steps):
        standing: Standing = "fails"
    else:
        standing = "holds" if not rising and whole.outcome == "better" else "noise"
    numbers += f"; from first to last {percent_text(whole.change)}\u00a0%"
    if whole.low is not None and whole.high is not None:
        numbers += f", 95\u00a0% interval {percent_text(whole.low)} to {percent_text(whole.high)}\u00a0%"
    if rising:
        numbers += f". It does not fall from {_listed((step.theirs.length for step in rising), 'or')} tokens on"
    return Claim(text, standing, f"{numbers}.")


def _keys(results: Results, method: str, window: int | None, when: str) -> Claim:
    """Whether the lowest share of pass keys is high enough, and known well enough."""
    text = f"At least {value_text('passkey', KEYS)} of the pass keys are repeated at every length, {when}"
    rows = _up_to(results, method, "passkey", window)
    if not rows:
        return Claim(text, "unmeasured", "Pass keys of that model were not measured.")
    worst = min(rows, key=lambda row: row.value)
    if any(row.high is not None and row.high < KEYS for row in rows):
        standing: Standing = "fails"
    else:
        standing = "holds" if all(row.low is not None and row.low >= KEYS for row in rows) else "noise"
    ends = [value_text("passkey", end).removesuffix("\u00a0%") for end in (worst.low, worst.high)]
    trials = f" of {worst.n} trials" if worst.n else ""
    interval = f", 95\u00a0% interval {ends[0]} to {ends[1]}\u00a0%" if worst.low is not None else ", no interval"
    measured = f"measured at {_listed(row.length for row in rows)} tokens"
    lowest = f"Lowest: {value_text('passkey', worst.value)}{trials} at {length_text(worst.length)} tokens{interval}"
    return Claim(text, standing, f"{lowest}; {measured}.")


def _short_window(results: Results, first: Extension) -> Iterable[Claim]:
    """The short tables against the base model and against the long table, within the pretrained window."""
    rows = [] if first.original_length is None else _up_to(results, "short", "perplexity", first.original_length)
    base = _beside(results, rows, ["none"])
    text = f"Short tables give the pretrained window back: within {100 * RECOVERED:.0f}\u00a0% of the base model"
    yield Claim(text, _recovered(base), _claim(text, "perplexity", base).numbers)
    long = _beside(results, rows, ["second_searched", first.tuned])
    yield _claim("Within the pretrained window short tables read better than the long table", "perplexity", long)


def _recovered(found: Sequence[Comparison]) -> Standing:
    if not found:
        return "unmeasured"
    if any(one.low is not None and one.low > RECOVERED for one in found):
        return "fails"
    return "holds" if all(one.high is not None and one.high <= RECOVERED for one in found) else "noise"


def _beside(results: Results, rows: Sequence[Result], others: Sequence[str]) -> list[Comparison]:
    """Rows against the first of some methods that was measured at the same length."""
    found = []
    for row in rows:
        theirs = (results.get(other, row.metric, row.length) for other in others)
        if (other := next((one for one in theirs if one is not None and usable(one)), None)) is not None:
            paired = results.get(row.method, f"{row.metric}_over_{other.method}", row.length)
            found.append(compare(row, other, paired))
    return found


def _up_to(results: Results, method: str, metric: str, window: int | None) -> list[Result]:
    """Means of a metric by length, within a window if it is known."""
    lengths = [length for length in results.lengths(metric) if window is None or length <= window]
    return [row for length in lengths if (row := results.get(method, metric, length)) is not None]


def _listed(lengths: Iterable[int], word: str = "and") -> str:
    """Lengths in words: "64, 128 and 256"."""
    *most, last = map(length_text, lengths)
    return f"{', '.join(most)} {word} {last}" if most else last
