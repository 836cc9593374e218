"""Sliding windows over a text: which tokens a window sees and which of them it predicts.

With ``window = 6`` and ``stride = 2``, ``.`` for seen and ``x`` for seen and predicted::

    text      a b c d e f g h i j k
    window 0  . x x x x x                 the first one predicts all its tokens but the first
    window 1      . . . . x x             each later one ``stride`` tokens, with ``window - stride`` or more before them
    window 2          . . . . x x
    window 3              . . . . x       the last one what is left

Source: Press, Smith and Lewis, "Shortformer", arXiv:2012.15832.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Part of a text that one forward pass sees.

    Attributes:
        start: First token it sees.
        end: Token after the last.
        predicted: Number of tokens at its end that it predicts.
    """

    start: int
    end: int
    predicted: int


def sliding_windows(size: int, window: int, stride: int) -> list[Window]:
    """Windows in which every token but the first is predicted once; none for a text without a second token.

    A text shorter than the window is one window.

    Args:
        size: Tokens of the text.
        window: Most tokens that a forward pass sees.
        stride: Tokens from the start of a window to the start of the next, at most ``window - 1``.

    Raises:
        ValueError: If ``window`` is below 2 or ``stride`` is out of range.
    """
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"A stride must be at least 1 and below the window, got stride {stride}, window {window}.")
    ends = [*range(min(window, size), size, stride), size]
    starts = range(0, stride * len(ends), stride)
    known = [1, *ends]
    windows = zip(starts, ends, known, strict=False)
    return [Window(start, end, end - before) for start, end, before in windows if end > before]
