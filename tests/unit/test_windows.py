"""Sliding windows against the loop of the published evaluation scripts, written down again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_longrope.windows import sliding_windows


def loop(size, window, stride):
    """(begin, end, tokens that get a label) of each pass; a label on the very first token is never predicted."""
    passes, previous = [], 0
    for begin in range(0, size, stride):
        end = min(begin + window, size)
        labels = end - previous
        passes.append((begin, end, labels - (begin == 0)))
        previous = end
        if end == size:
            break
    return [entry for entry in passes if entry[2]]


@given(st.integers(0, 200), st.integers(2, 60), st.data())
def test_windows_are_those_of_the_loop_and_predict_every_token_once(size, window, data):
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows(size, window, stride)
    assert [(w.start, w.end, w.predicted) for w in windows] == loop(size, window, stride)
    predicted = [token for w in windows for token in range(w.end - w.predicted, w.end)]
    assert predicted == list(range(1, size))
    # every token but those of the first window has nearly a whole window before it
    assert all(w.end - w.predicted - w.start >= window - stride for w in windows[1:])


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 0), (8, 9)])
def test_a_stride_that_leaves_tokens_out_is_refused(window, stride):
    with pytest.raises(ValueError, match="A stride must be at least 1 and below the window"):
        sliding_windows(20, window, stride)
