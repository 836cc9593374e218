"""What a datamodule holds and yields, as text for a terminal."""

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.packing import IGNORED, Row
from lightning_longrope.reporting.names import length_text
from lightning_longrope.summary import SplitSummary

_MARKS = {"\n": "\u21b5", "\r": "", "\t": "\u2192"}  # how white space other than spaces is shown


def summary_text(summary: SplitSummary) -> str:
    """A split in a few lines: what it holds, what an epoch reads, how long the documents of its sources are."""
    rows, total = summary.rows, len(summary.rows)
    kinds = rows.sections if len(rows.sections) > 1 else {}
    shares = ", ".join(f"{count:,} {kind} ({_percent(count / total)})" for kind, count in kinds.items())
    extra = (
        f", of which {rows.extra_rows:,} ({_percent(rows.extra_rows / total)}) are made, not read"
        if rows.extra_rows
        else ""
    )
    tokens = total * rows.seq_len
    cuts = "" if rows.policy == "concat" else f"; {rows.cuts:,} cuts in documents"  # which cuts nearly every row
    lines = [
        f"{summary.split}: {summary.documents:,} documents, {amount_text(summary.tokens)} tokens",
        f"  an epoch: {total:,} rows of {rows.seq_len:,} tokens by `packing: {rows.policy}`{extra}"
        f"{': ' if shares else ''}{shares}",
        f"  left out {rows.tail:,} tokens ({_percent(rows.tail / max(1, summary.tokens))});"
        f" padding {_percent(rows.padding / tokens)}{cuts}",
    ]
    return "\n".join([*lines, "", *_indented(_sources(summary)), "", *_indented(_lengths(summary)), ""])


def row_text(row: Row, kind: str, decode: Callable[[NDArray[np.int64]], str], width: int, columns: int = 100) -> str:
    """A row's documents one below the other, with where each begins; if only a part is learnt, it is in \u27e6 \u27e7.

    Args:
        row: The row.
        kind: What to call it.
        decode: Text of tokens, markers included.
        width: Most characters shown of a document, half of them from its end.
        columns: Width of the terminal.
    """
    learnt = row.labels != IGNORED
    length = len(row.tokens)
    marks = "isolated" if row.isolated else "seeing those before them"
    several = f"{len(row.starts)} documents, {marks}" if len(row.starts) > 1 else "1 document"
    lines = [f"{kind}: {length:,} tokens, {int(learnt.sum()):,} learnt, {several}"]
    for start, end in pairwise([*row.starts.tolist(), length - row.padding]):
        shown = _shown(row.tokens[start:end], learnt[start:end], decode, width)
        lines.append(f"\u251c\u2500 {start:,}: {end - start:,} tokens")
        lines += [f"\u2502 {line}" for line in textwrap.wrap(shown, columns - 2, drop_whitespace=False)]
    padding = f", the last {row.padding:,} padding" if row.padding else ""
    return "\n".join([*lines, f"\u2514\u2500 {length:,}{padding}"])


def amount_text(number: float) -> str:
    """A count in three digits: 950 -> "950", 12_345_678 -> "12.3 M", 1.2e12 -> "1.20 T"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * (10 if unit == "k" else 1):
            value = number / size
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"
    return f"{number:,.0f}"


def _sources(summary: SplitSummary) -> list[str]:
    """A line for every source."""
    head = ["source", "documents", "tokens", "of text"]
    long = any(source.share.short_repeats != source.share.long_repeats for source in summary.sources)
    if summary.mixed:
        head += ["of epoch", "times read" + (": short" if long else ""), *(["long"] if long else [])]
    table = [[*head, "longest"]]
    for source in summary.sources:
        share = source.share
        cells = [
            shown_name(source.share.name),
            f"{share.documents:,}",
            amount_text(share.tokens),
            _percent(share.tokens / summary.tokens),
        ]
        if summary.mixed:
            cells += [_percent(share.share), f"{share.short_repeats:.3g}"]
            cells += [f"{share.long_repeats:.3g}" if share.long_documents else "-"] if long else []
        table.append([*cells, f"{source.longest:,}"])
    return _aligned(table)


def _lengths(summary: SplitSummary) -> list[str]:
    """Share of every source's tokens that are in documents of each length."""
    lines = [
        [shown_name(source.share.name), *(_percent(count / source.share.tokens, 0) for count in source.tokens)]
        for source in summary.sources
    ]
    return _aligned([["its tokens by length of document", *class_names(summary.bounds)], *lines])


def class_names(bounds: Sequence[int]) -> list[str]:
    """Names of the length classes: "<256", "256", "512", ..., "128k+"."""
    names = [short_length(bound) for bound in bounds]
    return ["all"] if not names else [f"<{names[0]}", *names[:-1], f"{names[-1]}+"]


def short_length(length: int) -> str:
    """A number of tokens in as few letters as can be: 2048 -> "2k"."""
    return f"{length // 1024}k" if length % 1024 == 0 else length_text(length)


def shown_name(name: str) -> str:
    """Name of a source as it is shown: what cannot be printed replaced, at most 32 letters, "all" for none."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name) or "all"
    return name if len(name) <= 32 else f"{name[:31]}\u2026"


def _percent(share: float, digits: int = 1) -> str:
    """A share of 1: 0.1234 -> "12.3 %"; "-" for nothing at all."""
    if not share:
        return "-" if digits == 0 else "0 %"
    least = 0.5 * 10.0**-digits
    return f"<{2 * least:g} %" if 100 * share < least else f"{100 * share:.{digits}f} %"


def _aligned(table: list[list[str]]) -> list[str]:
    """Cells in columns two spaces apart, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _shown(
    tokens: NDArray[np.int64], learnt: NDArray[np.bool_], decode: Callable[[NDArray[np.int64]], str], width: int
) -> str:
    """Beginning and end of a text; what is learnt in brackets, if some of its inside is not."""
    if learnt[1:-1].all():
        return _clipped(decode(tokens), width)
    edges = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(tokens)]
    parts = [
        f"\u27e6{_clipped(decode(tokens[a:b]), width)}\u27e7" if learnt[a] else _clipped(decode(tokens[a:b]), width)
        for a, b in pairwise(edges)
    ]
    return "".join(parts)


def _clipped(text: str, width: int) -> str:
    for letter, mark in _MARKS.items():
        text = text.replace(letter, mark)
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    if len(text) <= width:
        return text
    half = width // 2
    return f"{text[: width - half]} [\u2026 {len(text) - width:,} characters \u2026] {text[len(text) - half :]}"
