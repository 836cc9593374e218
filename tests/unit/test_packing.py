"""Packing against its drawing, and against its contract read off the rows alone: every text token exactly once."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_longrope.packing import IGNORED, ConcatRows, Documents, excerpts
from lightning_longrope.packing.excerpts import SHUFFLED

BOS, EOS, FIRST = 0, 1, 10  # text tokens count up from FIRST: each is unique, so a lost or doubled one shows


def documents(*lengths: int) -> Documents:
    """Documents of unique tokens, with a gap of foreign tokens in front of each."""
    starts = np.cumsum([length + 3 for length in lengths]) - np.array(lengths)
    tokens = np.full(int(starts[-1]) + lengths[-1], 9, np.uint16)
    for start, length, first in zip(starts, lengths, np.cumsum(lengths) - lengths, strict=True):
        tokens[start : start + length] = np.arange(FIRST + first, FIRST + first + length)
    return Documents(tokens, starts.astype(np.int64), np.array(lengths, np.int64))


def texts(packed: Documents) -> list[list[int]]:
    spans = zip(packed.starts, packed.lengths, strict=True)
    return [packed.tokens[start : start + length].tolist() for start, length in spans]


def test_rows_are_those_of_the_drawing():
    rows = ConcatRows(documents(8, 3, 5), seq_len=8, bos=BOS, eos=EOS, shuffle=False)
    a, i, last = FIRST, FIRST + 8, FIRST + 11
    assert [rows.row(0, number).tokens.tolist() for number in range(len(rows))] == [
        [BOS, a, a + 1, a + 2, a + 3, a + 4, a + 5, EOS],
        [BOS, a + 6, a + 7, EOS, BOS, i, i + 1, EOS],
        [BOS, i + 2, EOS, BOS, last, last + 1, last + 2, EOS],
    ]
    assert rows.tail == 2
    assert rows.row(0, 0).tokens.dtype == np.int64


MARKERS = {  # bos, eos -> head, foot, separator
    (BOS, EOS): ([BOS], [EOS], [EOS, BOS]),
    (None, EOS): ([], [EOS], [EOS]),
    (BOS, None): ([BOS], [], [BOS]),
    (None, None): ([], [], []),
    (EOS, EOS): ([EOS], [EOS], [EOS]),
}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(4, 50),
    markers=st.sampled_from(sorted(MARKERS, key=str)),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_every_text_token_is_in_one_row_or_in_the_counted_tail(lengths, seq_len, markers, seed, epoch):
    packed = documents(*lengths)
    head, foot, separator = MARKERS[markers]
    room = seq_len - len(head) - len(foot)
    whole = sum(lengths) + len(separator) * (len(lengths) - 1)
    if whole < room:
        with pytest.raises(ValueError, match="do not fill one row"):
            ConcatRows(packed, seq_len=seq_len, bos=markers[0], eos=markers[1])
        return
    rows = ConcatRows(packed, seq_len=seq_len, bos=markers[0], eos=markers[1], seed=seed)
    table = [rows.row(epoch, number).tokens.tolist() for number in range(rows.text_rows)]
    stream = []
    for row in table:
        assert len(row) == seq_len
        assert row[: len(head)] == head
        assert row[seq_len - len(foot) :] == foot
        stream += row[len(head) : seq_len - len(foot)]
    assert rows.tail == whole - len(stream) < room
    left, place = texts(packed), 0  # take whole documents off the stream, whatever their order
    while place < len(stream):
        document = next(text for text in left if text[0] == stream[place])
        left.remove(document)
        unit = document + (separator if left else [])
        assert stream[place : place + len(unit)] == unit[: len(stream) - place]
        place += len(unit)
    assert rows.tail == place - len(stream) + sum(map(len, left)) + len(separator) * max(0, len(left) - 1)


def test_the_order_of_documents_and_rows_is_new_every_epoch_and_the_same_every_time():
    packed = documents(*range(20, 60))
    rows, again = (ConcatRows(packed, seq_len=16, bos=BOS, eos=EOS, seed=3) for _ in range(2))
    other = ConcatRows(packed, seq_len=16, bos=BOS, eos=EOS, seed=4)

    def first_tokens(rows, epoch):
        return tuple(int(rows.row(epoch, rows.number(epoch, index)).tokens[1]) for index in range(len(rows)))

    epochs = [first_tokens(rows, epoch) for epoch in range(4)]
    assert len({*epochs, first_tokens(other, 0)}) == 5
    assert first_tokens(again, 2) == epochs[2]  # without having seen the epochs before it
    assert first_tokens(rows, 1) == epochs[1]  # and going back
    numbers = [[rows.number(epoch, index) for index in range(len(rows))] for epoch in range(2)]
    assert numbers[0] != numbers[1]
    assert [sorted(order) for order in numbers] == [list(range(len(rows)))] * 2
    stream = [int(rows.row(0, number).tokens[1]) for number in range(len(rows))]
    assert stream != [
        int(rows.row(1, number).tokens[1]) for number in range(len(rows))
    ]  # the documents moved, not rows alone


def test_documents_and_rows_are_not_shuffled_alike():
    rows = ConcatRows(documents(*[16] * 30), seq_len=16, bos=None, eos=None)  # a row is a document
    shuffled = [(int(rows.row(0, number).tokens[0]) - FIRST) // 16 for number in range(30)]
    assert sorted(shuffled) == list(range(30))
    assert shuffled != [rows.number(0, index) for index in range(30)]


def test_extra_rows_come_on_top_of_the_text_at_places_drawn_anew():
    rows = ConcatRows(documents(*[50] * 20), seq_len=12, bos=BOS, eos=EOS, extra_share=0.3)
    assert rows.text_rows == (20 * 50 + 2 * 19) // 10
    assert rows.extra_rows / len(rows) == pytest.approx(0.3, abs=0.005)
    orders = [[rows.number(epoch, index) for index in range(len(rows))] for epoch in range(2)]
    places = [{index for index, number in enumerate(order) if number >= rows.text_rows} for order in orders]
    assert all(sorted(order) == list(range(len(rows))) for order in orders)
    assert places[0] != places[1]
    assert len(places[0]) == rows.extra_rows


@pytest.mark.parametrize(
    ("bos", "eos", "isolate", "tokens", "labels", "starts"),
    [  # a document of one token, then one of four
        (BOS, EOS, False, [BOS, 10, EOS, BOS, 11, EOS], [IGNORED, 10, EOS, IGNORED, 11, IGNORED], [0, 3]),
        (None, EOS, False, [10, EOS, 11, 12, 13, EOS], [IGNORED, EOS, IGNORED, 12, 13, IGNORED], [0, 2]),
        (BOS, None, False, [BOS, 10, BOS, 11, 12, 13], [IGNORED, 10, IGNORED, 11, 12, 13], [0, 2]),
        (None, None, False, [10, 11, 12, 13, 14], [IGNORED, IGNORED, 12, 13, 14], [0, 1]),
        # one token for both closes one document and opens the next: that the first one ends is learnt
        (EOS, EOS, False, [EOS, 10, EOS, 11, 12, EOS], [IGNORED, 10, EOS, 11, 12, IGNORED], [0, 2]),
        (EOS, EOS, True, [EOS, 10, EOS, EOS, 11, EOS], [IGNORED, 10, EOS, IGNORED, 11, IGNORED], [0, 3]),
    ],
)
def test_labels_are_the_row_but_for_where_a_document_begins_and_the_eos_that_closes_it(
    bos, eos, isolate, tokens, labels, starts
):
    rows = ConcatRows(documents(1, 4), seq_len=len(tokens), bos=bos, eos=eos, shuffle=False, isolate=isolate)
    row = rows.row(0, 0)
    assert row.tokens.tolist() == tokens
    assert row.labels.tolist() == labels
    assert row.starts.tolist() == starts
    assert row.isolated == isolate


@pytest.mark.parametrize(
    ("arguments", "message"), [({"seq_len": 3}, "at least 4"), ({"seq_len": 8, "extra_share": 1.0}, "below 1")]
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConcatRows(documents(20), bos=BOS, eos=EOS, **arguments)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    count=st.integers(1, 20),
    length=st.integers(2, 20),
    bos=st.sampled_from([BOS, None]),
    seed=st.integers(0, 3),
)
def test_excerpts_lie_in_one_document_do_not_overlap_and_spread_over_documents(lengths, count, length, bos, seed):
    packed = documents(*lengths)
    body = length - (bos is not None)
    places = [size // body for size in lengths]
    if sum(places) < count:
        with pytest.raises(ValueError, match=rf"hold only {sum(places)}: the longest has {max(lengths)} tokens"):
            excerpts(packed, count, length, bos=bos, seed=seed)
        return
    table = excerpts(packed, count, length, bos=bos, seed=seed)
    assert table.shape == (count, length)
    owner = {token: number for number, text in enumerate(texts(packed)) for token in text}
    text = table[:, length - body :]
    assert bos is None or (table[:, 0] == bos).all()
    assert (np.diff(text, axis=1) == 1).all()  # consecutive tokens
    assert all(owner[row[0]] == owner[row[-1]] for row in text.tolist())
    assert len(set(text.flatten().tolist())) == count * body  # no token twice
    assert len({owner[row[0]] for row in text.tolist()}) == min(count, sum(place > 0 for place in places))
    np.testing.assert_array_equal(table, excerpts(packed, count, length, bos=bos, seed=seed))


def test_excerpts_start_at_random_places_and_only_the_longest_documents_give_more():
    packed = documents(300, 40, 40)
    starts = {int(excerpts(packed, 1, 11, bos=BOS, seed=seed)[0, 1]) for seed in range(40)}
    assert len(starts) > 20
    more = excerpts(packed, 5, 11, bos=BOS)[:, 1]
    assert Counter((more >= FIRST + 300).tolist()) == {False: 3, True: 2}


def test_further_excerpts_are_of_the_document_of_which_most_is_left():
    packed, ends = documents(40, 100, 60), np.cumsum([40, 100, 60])
    for count, shares in ((4, [1, 2, 1]), (7, [1, 5, 1]), (9, [1, 6, 2]), (10, [1, 7, 2])):
        first = excerpts(packed, count, 10, bos=None)[:, 0] - FIRST
        owners = np.searchsorted(ends, first, side="right")
        assert np.bincount(owners, minlength=3).tolist() == shares


def test_excerpts_of_very_many_documents_are_drawn_evenly_from_all():
    count = SHUFFLED + 1000
    tokens, numbers = np.arange(count, dtype=np.uint32), np.arange(count)
    packed = Documents(tokens, numbers, np.ones(count, np.int64))
    first, again, other = (excerpts(packed, 400, 1, bos=None, seed=seed)[:, 0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(set(first.tolist())) == 400
    assert len(set(first.tolist()) & set(other.tolist())) < 10
    even = np.abs(np.sort(first) / count - (np.arange(400) + 0.5) / 400).max()
    assert even < 1.95 / 400**0.5  # Kolmogorov's bound, which chance exceeds once in a thousand


def test_a_memory_map_travels_to_a_worker_by_its_path(tmp_path):
    tokens = np.arange(50_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    packed = Documents(mapped, np.array([10, 400]), np.array([20, 30_000]))
    sent = pickle.dumps(packed)
    assert len(sent) < 2_000
    arrived = pickle.loads(sent)
    np.testing.assert_array_equal(arrived.joined(), packed.joined())
    assert pickle.loads(pickle.dumps(documents(3, 4))).joined().tolist() == list(range(FIRST, FIRST + 7))


def test_joined_text_has_no_markers_and_keeps_to_its_limit():
    packed = documents(5, 7, 6)
    assert packed.joined().tolist() == list(range(FIRST, FIRST + 18))
    assert packed.joined(limit=8).tolist() == list(range(FIRST, FIRST + 8))
    assert packed.at_least(5) is packed
    assert packed.at_least(6).joined().tolist() == list(range(FIRST + 5, FIRST + 18))
