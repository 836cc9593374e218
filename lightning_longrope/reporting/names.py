"""What a reader sees: display names, one colour and marker for each method, and how numbers are written."""

import math
from dataclasses import dataclass

ACCURACIES = ("passkey", "key_value", "needle", "document_question")  # fractions of trials, shown in per cent

# Display name, colour on white, colour on a dark page, marker. No two of the seven that share most figures come closer
# than 9 (Oklab x 100) in any of three simulated colour-vision deficiencies.
_METHODS = {
    "none": ("no change", "#888888", "#8d8d8d", "X"),
    "linear": ("PI", "#d09600", "#f0dc30", "s"),
    "ntk": ("NTK", "#1e9cf0", "#8ae4ff", "^"),
    "dynamic_ntk": ("dynamic NTK", "#8931dd", "#c39aff", "v"),
    "yarn": ("YaRN", "#00756b", "#5fc795", "D"),
    "llama3": ("Llama 3", "#3f3316", "#cfc3a0", "h"),
    "searched": ("searched", "#c9300c", "#ff4a2e", "o"),
    "short": ("short table", "#e85cc0", "#d974c8", "p"),
    "tuned": ("tuned", "#14237a", "#3d84ff", "P"),
}
_RUN_SLOTS = (8, 6, 2, 4, 1, 3, 7, 0)  # of runs side by side: neighbours far apart
_METRIC_NAMES = {
    "perplexity": "perplexity",
    "perplexity_sliding": "perplexity, sliding window",
    "perplexity_window_mean": "perplexity, mean of window means",
    "perplexity_prefix": "perplexity of the first tokens",
    "perplexity_last128": "perplexity of the last 128 tokens",
    "bits_per_byte": "bits per byte",
    "passkey": "pass keys repeated",
    "passkey_k_max": "tokens over which enough pass keys are repeated (k_max)",
    "key_value": "key/value pairs recalled",
    "needle": "needles found",
    "document_question": "document questions answered",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every figure and table of a report."""

    slot: int
    """Place in the palette; `--c<slot>` is its colour in the page's style sheet."""
    light: str
    """Colour on white paper, `#rrggbb`."""
    dark: str
    """Colour on a dark page, `#rrggbb`."""
    marker: str
    line: str
    """Matplotlib line style."""


def look(method: str) -> Look:
    """Colour, marker and line of a method: earlier tuned models and second extensions dashed, unknown names dotted."""
    plain = method.removeprefix("second_")
    family = "tuned" if plain.startswith("tuned_") else plain
    known = family in _METHODS
    slot = list(_METHODS).index(family) if known else sum(method.encode()) % len(_METHODS)
    _, light, dark, marker = list(_METHODS.values())[slot]
    return Look(slot, light, dark, marker, ":" if not known else "-" if method == family else "--")


def palette() -> list[tuple[int, str, str]]:
    """Every (slot, light colour, dark colour), for the style sheet."""
    return [(slot, light, dark) for slot, (_, light, dark, _) in enumerate(_METHODS.values())]


def run_slot(number: int) -> int:
    """Colour of the ``number``-th of several runs, as its place in the palette."""
    return _RUN_SLOTS[number % len(_RUN_SLOTS)]


def run_look(number: int) -> Look:
    """How the ``number``-th of several runs is drawn; more runs than colours get dashes, then dots."""
    slot = run_slot(number)
    _, light, dark, marker = list(_METHODS.values())[slot]
    return Look(slot, light, dark, marker, ("-", "--", ":")[number // len(_RUN_SLOTS) % 3])


def method_order(method: str) -> tuple[int, int, str]:
    """Sort key: formulas, then searched, then tuned by length, the last tuned model at the end; unknown names last."""
    if method.startswith("tuned_"):
        length = method.removeprefix("tuned_")
        return (2, int(length) if length.isdecimal() else 0, method)
    if method == "tuned":
        return (4, 0, method)
    plain = method.removeprefix("second_")
    if plain in _METHODS:
        return (3 if plain != method else 1, list(_METHODS).index(plain), method)
    return (5, 0, method)


def method_name(method: str) -> str:
    """Display name of a method, ``none`` -> "no change"; names this project does not know are shown as they are."""
    if method.startswith("tuned_") and (length := method.removeprefix("tuned_")).isdecimal():
        return f"tuned at {length_text(int(length))}"
    if method.startswith("second_"):
        return f"2nd {method_name(method.removeprefix('second_'))}"
    if method in _METHODS:
        return _METHODS[method][0]
    return "".join(letter for letter in method if letter.isprintable()).replace("_", " ").strip()


def metric_name(metric: str) -> str:
    """Display name of a metric, ``perplexity_last128`` -> "perplexity of the last 128 tokens"."""
    if ratio := split_ratio(metric):
        return f"{metric_name(ratio[0])} over that of {method_name(ratio[1])}"
    return _METRIC_NAMES.get(metric, metric.replace("_", " "))


def split_ratio(metric: str) -> tuple[str, str] | None:
    """Metric and baseline of a ratio on the same documents, ``perplexity_over_yarn``; None for other metrics."""
    base, over, baseline = metric.rpartition("_over_")
    return (base, baseline) if over else None


def length_text(length: int) -> str:
    """A number of tokens: 1024 -> "1,024", 131072 -> "128k"."""
    return f"{length // 1024:,}k" if length >= 16384 and length % 1024 == 0 else f"{length:,}"


def value_text(metric: str, value: float | None) -> str:
    """A measured value with the digits that mean something: 12.44, 103.2, 6.87e6, 93 %."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if metric in ACCURACIES:
        return f"{100 * value:.1f}".removesuffix(".0") + "\u00a0%"
    if metric.endswith("_k_max"):
        return f"{value:,.0f}"
    if metric == "bits_per_byte" or split_ratio(metric):
        return f"{value:.3f}"
    if abs(value) >= 1e6:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def percent_text(change: float, digits: int = 1) -> str:
    """A signed change for intervals: -0.025 -> "−2.5"."""
    return f"{100 * change:+.{digits}f}".replace("-", "\u2212")


def points_word(change: float) -> str:
    """The unit of a change of an accuracy: 0.01 -> "point", 0.02 -> "points"."""
    return "point" if f"{abs(100 * change):.0f}" == "1" else "points"


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign: -0.025 -> "−0.0250"."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def seconds_text(seconds: float | None) -> str:
    """A duration: 42.3 -> "42 s", 151 -> "2 min 31 s", 7300 -> "2 h 2 min"."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
