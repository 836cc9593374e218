"""Policies document, best_fit and mixed against contracts read off the rows alone, and best_fit against witnesses.

Every text token is unique, so a lost or doubled one shows, and where a token is from is known from its number.
"""

import hashlib
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_longrope.mixing import Mixture
from lightning_longrope.packing import IGNORED, ConcatRows, Documents, make_rows
from lightning_longrope.packing.best_fit import best_fit_decreasing

BOS, EOS, FIRST = 0, 1, 10
MARKERS = [(BOS, EOS), (None, EOS), (BOS, None), (None, None), (EOS, EOS)]

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=25)
markers_of = st.sampled_from(MARKERS)


def documents(lengths) -> Documents:
    lengths = np.array(lengths, np.int64)
    tokens = np.arange(FIRST, FIRST + lengths.sum()).astype(np.uint32)
    return Documents(tokens, np.cumsum(lengths) - lengths, lengths)


def stretches(row):
    """Tokens and labels of each document of a row, then those of its padding."""
    bounds = [*row.starts.tolist(), len(row.tokens) - row.padding, len(row.tokens)]
    return [(row.tokens[a:b].tolist(), row.labels[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


def check_documents(rows, epoch, owner, numbers=None):
    """Checks rows of isolated documents; returns their text tokens and how many documents began and ended in them."""
    text, began, ended = [], 0, 0
    numbers = range(rows.text_rows) if numbers is None else numbers
    for row in (rows.row(epoch, number) for number in numbers):
        *parts, padding = stretches(row)
        assert row.isolated
        assert set(padding[1]) <= {IGNORED}
        for tokens, labels in parts:
            assert labels[0] == IGNORED  # nothing is predicted from another document
            assert labels[1:] == tokens[1:]  # and everything within one
            if rows.bos is not None:
                assert tokens.pop(0) == rows.bos
            closed = rows.eos is not None and tokens[-1] == rows.eos
            piece = tokens[:-1] if closed else tokens
            assert piece == list(range(piece[0], piece[-1] + 1))
            (document,) = {owner[token] for token in piece}
            begins, ends = owner.get(piece[0] - 1) != document, owner.get(piece[-1] + 1) != document
            assert ends or not closed
            began, ended = began + begins, ended + (ends if rows.eos is None else closed)
            text += piece
    return text, began, ended


def owners(lengths) -> dict[int, int]:
    return dict(enumerate(np.repeat(np.arange(len(lengths)), lengths).tolist(), FIRST))


@given(lengths=lengths_of, seq_len=st.integers(4, 40), markers=markers_of, epoch=st.integers(0, 2))
def test_best_fit_reads_every_token_once_in_documents_by_themselves(lengths, seq_len, markers, epoch):
    bos, eos = markers
    rows = make_rows("best_fit", documents(lengths), seq_len=seq_len, bos=bos, eos=eos, seed=1)
    text, began, ended = check_documents(rows, epoch, owners(lengths))
    assert sorted(text) == list(range(FIRST, FIRST + sum(lengths)))
    assert began == len(lengths)
    room = seq_len - (bos is not None)
    fitting = [length for length in lengths if length + (eos is not None) <= room]
    assert ended >= len(fitting)  # whole documents keep their EOS
    # as few cuts as there can be
    assert rows.cuts == sum(math.ceil(length / room) - 1 for length in lengths)
    cut_rows = [rows.row(epoch, number) for number in range(rows.text_rows)]
    assert rows.padding == sum(row.padding for row in cut_rows)
    assert rows.tail == 0


def naive_best_fit(sizes, capacity):
    """Room left in each bin, item by item as the textbook says."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    return sorted(rooms)


@given(st.integers(3, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_best_fit_is_the_textbooks(case):
    capacity, sizes = case
    bins = best_fit_decreasing(np.array(sizes), capacity)
    fill = np.bincount(bins, sizes)
    assert sorted((capacity - fill).tolist()) == naive_best_fit(sizes, capacity)
    assert set(bins.tolist()) == set(range(len(fill)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_best_fit_is_as_near_to_the_optimum_as_is_proved(sizes):
    def fewest(left, rooms):  # every way to place them
        if not left:
            return len(rooms)
        size, rest = left[0], left[1:]
        ways = [
            fewest(rest, [*rooms[:i], room - size, *rooms[i + 1 :]]) for i, room in enumerate(rooms) if room >= size
        ]
        return min([*ways, fewest(rest, [*rooms, 12 - size])] if len(rooms) < len(sizes) else ways)

    bins = best_fit_decreasing(np.array(sizes), 12).max() + 1
    assert fewest(sorted(sizes, reverse=True), []) <= bins <= 11 / 9 * fewest(sorted(sizes, reverse=True), []) + 1


def test_best_fit_wastes_little_on_documents_as_they_are():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 20_000), 1, 50_000).astype(np.int64)
    packed = Documents(np.zeros(int(lengths.sum()), np.uint16), np.cumsum(lengths) - lengths, lengths)
    rows = make_rows("best_fit", packed, seq_len=2048, bos=BOS, eos=EOS)
    held = len(rows) * 2048 - rows.padding
    assert packed.total < held < packed.total * 1.01
    assert len(rows) <= math.ceil(held / 2048) + 1  # no packing needs fewer than that, less one
    joined = make_rows("concat", packed, seq_len=2048, bos=BOS, eos=EOS)
    assert rows.cuts < 0.7 * len(joined)  # which cuts at the end of nearly every row


@given(
    lengths=lengths_of, seq_len=st.integers(4, 40), markers=markers_of, epoch=st.integers(0, 2), shuffle=st.booleans()
)
def test_document_rows_are_consecutive_pieces_of_long_documents(lengths, seq_len, markers, epoch, shuffle):
    bos, eos = markers
    options = {"seq_len": seq_len, "bos": bos, "eos": eos, "shuffle": shuffle}
    packed, owner = documents(lengths), owners(lengths)
    if max(lengths) < seq_len:
        with pytest.raises(ValueError, match=f"at least `seq_len` {seq_len} tokens, but the longest of {len(lengths)}"):
            make_rows("document", packed, **options)
        return
    rows = make_rows("document", packed, **options)
    seen: dict[int, list[int]] = {}
    for row in (rows.row(epoch, number) for number in range(rows.text_rows)):
        assert (row.starts.tolist(), row.padding, row.isolated) == ([0], 0, False)
        assert row.labels[0] == IGNORED
        assert row.labels[1:].tolist() == row.tokens[1:].tolist()
        piece = row.tokens.tolist()
        assert len(piece) == seq_len
        assert bos is None or piece.pop(0) == bos
        if eos is not None and piece[-1] == eos:
            piece.pop()
            assert owner.get(piece[-1] + 1) != owner[piece[-1]]  # an EOS says that a document ends
        assert piece == list(range(piece[0], piece[-1] + 1))
        seen.setdefault(owner[piece[0]], []).extend(piece)
        assert owner[piece[0]] == owner[piece[-1]]
    room = seq_len - (bos is not None)
    assert sorted(seen) == [number for number, length in enumerate(lengths) if length >= seq_len]
    for number, tokens in seen.items():
        body = lengths[number] + (eos is not None)
        assert sorted(tokens) == list(range(min(tokens), min(tokens) + len(tokens)))  # consecutive, none twice
        assert body // room * room - 1 <= len(tokens) <= body // room * room  # as many as there is room for
    everything = sum(lengths[number] + (eos is not None) for number in seen)
    assert rows.tail == everything - rows.text_rows * room


def test_over_the_epochs_document_rows_read_the_whole_of_a_document():
    rows = make_rows("document", documents([50]), seq_len=40, bos=BOS, eos=EOS)
    read = {token for epoch in range(80) for token in rows.row(epoch, 0).tokens.tolist()}
    assert read == {BOS, EOS, *range(FIRST, FIRST + 50)}


def test_a_corpus_without_long_documents_says_what_there_is():
    with pytest.raises(
        ValueError, match=r"longest of 4 has 90 tokens \(there are 1 of at least 64, 2 of at least 32, 3 of .* 16"
    ):
        make_rows("document", documents([90, 33, 20, 2]), seq_len=128, bos=BOS, eos=EOS)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=20, max_size=40),
    markers=markers_of,
    share=st.floats(0.2, 0.8),
    epoch=st.integers(0, 2),
)
def test_mixed_rows_read_every_token_once_the_short_documents_in_short_rows(lengths, markers, share, epoch):
    bos, eos = markers
    assume(sum(lengths) * min(share, 1 - share) > 120)  # enough for a row of either kind
    rows = make_rows(
        "mixed", documents(lengths), seq_len=48, bos=bos, eos=eos, short_seq_len=12, short_share=share, extra_share=0.1
    )
    order = [rows.number(epoch, place) for place in range(len(rows))]
    assert sorted(order) == list(range(len(rows)))
    places = rows.sections["long"]
    kinds = [rows.row(epoch, number).short if number < rows.text_rows else False for number in order]
    assert kinds == [False] * places + [True] * rows.sections["short"]
    owner = owners(lengths)
    short = [number for number in order[places:] if number < rows.text_rows]
    text, _, _ = check_documents(rows, epoch, owner, short)
    assert max(np.diff(rows.row(epoch, number).bounds).max() for number in short) <= max(12, rows.padding)
    assert all(max(len(tokens) for tokens, _ in stretches(rows.row(epoch, number))[:-1]) <= 12 for number in short)
    long = [number for number in order[:places] if number < rows.text_rows]
    assert not any(rows.row(epoch, number).isolated for number in long)
    found = [token for number in long for token in rows.row(epoch, number).tokens.tolist() if token >= FIRST]
    assert len(set(found)) == len(found)
    assert not set(found) & set(text)
    in_short = {owner[token] for token in text}
    assert sorted(text) == [token for token in owner if owner[token] in in_short]  # whole documents
    assert max(lengths[d] for d in in_short) <= min(n for d, n in enumerate(lengths) if d not in in_short)
    assert 0 <= sum(lengths) - len(found) - len(text) <= rows.tail
    assert len(text) / sum(lengths) == pytest.approx(share, abs=60 / sum(lengths) + 1e-9)


# What all policies share


POLICIES = {
    "concat": {},
    "document": {},
    "best_fit": {},
    "mixed": {"short_seq_len": 8, "short_share": 0.4},
}


def rows_of(policy, lengths=tuple(range(5, 65)), **options):
    options = {"seq_len": 24, "bos": BOS, "eos": EOS, **POLICIES[policy], **options}
    return make_rows(policy, documents(lengths), **options)


def epoch_of(rows, epoch):
    numbers = [rows.number(epoch, place) for place in range(len(rows))]
    return [rows.row(epoch, number).tokens.tolist() for number in numbers]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_is_a_function_of_seed_epoch_and_number_alone(policy):
    rows, again = rows_of(policy, seed=3), rows_of(policy, seed=3)
    epochs = [epoch_of(rows, epoch) for epoch in range(3)]
    assert epoch_of(again, 2) == epochs[2]  # without having seen the epochs before it
    assert epoch_of(rows, 1) == epochs[1]  # going back
    assert epoch_of(pickle.loads(pickle.dumps(rows)), 1) == epochs[1]  # in another process
    different = [epochs[0], epochs[1], epochs[2], epoch_of(rows_of(policy, seed=4), 0)]
    assert all(sorted(a) != sorted(b) for a, b in itertools.combinations(different, 2)) or policy == "best_fit"
    assert all(a != b for a, b in itertools.combinations(different, 2))
    still = rows_of(policy, shuffle=False)
    assert epoch_of(still, 0) == epoch_of(still, 1)


class Alternating:
    """Even epochs read the first half of 60 documents twice, or once, odd ones all of them once."""

    multiplicities = np.ones(60)

    def __init__(self, times):
        self.times = times

    def order(self, epoch):
        half = np.tile(np.arange(30), self.times)
        return np.random.default_rng(epoch).permutation(np.arange(60) if epoch % 2 else half)

    def least(self, sizes):
        return min(int(sizes[self.order(epoch)].sum()) for epoch in range(2))

    def next_epoch(self, epoch, wanted):
        return next(epoch for epoch in range(epoch, epoch + 2) if wanted[self.order(epoch)].any())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("times", [1, 2])
def test_an_order_says_which_documents_an_epoch_reads(policy, times):
    order = Alternating(times)
    lengths = np.random.default_rng(1).integers(10, 50, 60)
    rows = rows_of(policy, lengths, order=order)
    first_half = int(lengths[:30].sum())
    for epoch in range(4):
        found = [token for row in epoch_of(rows, epoch) for token in row if token >= FIRST]
        assert len(epoch_of(rows, epoch)) == len(rows)
        assert (max(found) >= FIRST + first_half) == bool(epoch % 2)
        if policy != "document":  # which leaves the short ones out
            assert len(found) > 0.8 * order.least(lengths)
    assert epoch_of(rows, 1) == epoch_of(rows_of(policy, lengths, order=order), 1)


scarce = st.integers(2, 7).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "lengths": st.lists(st.integers(5, 60), min_size=count, max_size=count),
            "sources": st.lists(st.integers(0, 1), min_size=count, max_size=count),
            "rare": st.floats(0, 0.3),
            "seed": st.integers(0, 99),
        }
    )
)


@pytest.mark.parametrize("policy", POLICIES)
@given(scarce)
def test_scarce_documents_give_every_epoch_its_rows_or_are_refused_at_once(policy, case):
    """Few documents of which an epoch reads none, or none long enough, or too few to fill a row."""
    lengths, sources = np.array(case["lengths"]), np.array(case["sources"])
    assume(len(set(case["sources"])) == 2)
    order = Mixture(lengths, sources, "ab", {"a": 1 - case["rare"], "b": case["rare"]}, seed=case["seed"])
    read = lengths[(sources == 0) | (case["rare"] > 0)]
    usable = {
        "concat": read.sum() + 2 * (len(read) - 1) >= 22,
        "document": read.max() >= 24,
        "best_fit": True,
    }
    try:
        rows = rows_of(policy, lengths, order=order, seed=case["seed"])
    except ValueError:
        assert not usable.get(policy, False)
        return
    assert usable.get(policy, True)
    owner, epochs = owners(lengths), [epoch_of(rows, epoch) for epoch in range(6)]
    for epoch in epochs:
        assert len(epoch) == len(rows) > 0
        text = {owner[token] for row in epoch for token in row if token >= FIRST}
        assert all(order.multiplicities[number] for number in text)
    assert epoch_of(rows_of(policy, lengths, order=order, seed=case["seed"]), 5) == epochs[5]  # before all others


def test_an_epoch_without_a_long_document_reads_those_of_the_next_that_has_one():
    lengths, sources = np.array([40] + [10] * 200), np.array([1] + [0] * 200)
    order = Mixture(lengths, sources, "ab", {"a": 0.997, "b": 0.003}, seed=0)
    assert 0.1 < order.multiplicities[0] < 0.2
    assert not (order.order(0) == 0).any()  # so epoch 0 alone would be called too short
    rows = rows_of("document", lengths, order=order)
    assert len(rows) == 1
    texts = {tuple(epoch_of(rows, epoch)[0]) for epoch in range(20)}
    assert {owners(lengths)[token] for text in texts for token in text if token >= FIRST} == {0}
    assert len(texts) > 1  # from another place in it now and then
    none_read = Mixture(lengths, sources, "ab", {"a": 1, "b": 0})
    with pytest.raises(ValueError, match="at least `seq_len` 24 tokens, but the longest of 200 has 10"):
        rows_of("document", lengths, order=none_read)


@given(st.integers(0, 99), st.sampled_from([3, 20]), st.sampled_from(MARKERS))
def test_rows_of_a_mixture_leave_out_what_they_say_and_less_than_documents_an_epoch_may_lack(seed, mean, markers):
    """Short documents: with most of the stream separators, rows counted by text alone left a tenth of it out."""
    rng = np.random.default_rng(seed)
    lengths, sources = rng.integers(mean // 2 + 1, 3 * mean // 2 + 1, 150), rng.integers(0, 2, 150)
    order = Mixture(lengths, sources, "ab", {"a": 0.7, "b": 0.3}, seed=seed)
    bos, eos = markers
    rows = rows_of("concat", lengths, order=order, bos=bos, eos=eos)
    separator = 1 if bos == eos and bos is not None else (bos is not None) + (eos is not None)
    room = 24 - (bos is not None) - (eos is not None)
    for epoch in range(3):
        held = sum(token >= FIRST for row in epoch_of(rows, epoch) for token in row)
        left_out = int(lengths[order.order(epoch)].sum()) - held
        # less than a row, and what an epoch can have more than the shortest: two documents of each of the two sources
        assert 0 <= left_out < room + 4 * (int(lengths.max()) + separator)
        if epoch == 0:
            assert left_out <= rows.tail < room + 4 * (int(lengths.max()) + separator)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_say_what_a_checkpoint_must_agree_on(policy):
    assert rows_of(policy).identity == rows_of(policy).identity
    others = [rows_of(policy, seed=1), rows_of(policy, seq_len=25), rows_of(policy, lengths=range(5, 60))]
    others += [rows_of(other) for other in POLICIES if other != policy]
    assert all(rows_of(policy).identity != other.identity for other in others)


def test_rows_of_concat_are_those_of_every_version():
    """Runs that resume, and results that were published, depend on them."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 400, 200)
    tokens = rng.integers(10, 60000, int(lengths.sum())).astype(np.uint16)
    packed = Documents(tokens, np.cumsum(lengths) - lengths, lengths)
    found = {}
    for bos, eos in MARKERS[:3] + MARKERS[4:]:
        rows, content = ConcatRows(packed, seq_len=128, bos=bos, eos=eos, seed=3, extra_share=0.25), hashlib.sha256()
        for epoch, place in itertools.product((0, 1, 7), range(len(rows))):
            number = rows.number(epoch, place)
            content.update(str(number).encode())
            if number < rows.text_rows:
                content.update(rows.row(epoch, number).tokens.tobytes())
        found[bos, eos] = content.hexdigest()[:16]
    assert found == {
        (BOS, EOS): "50234d9a137d4d8a",
        (EOS, EOS): "9e377cc7fa7a9553",
        (None, EOS): "473297ed2d465b84",
        (BOS, None): "650abc3620689f53",
    }


@given(
    lengths=lengths_of | st.lists(st.integers(1, 3), min_size=100, max_size=200),
    seq_len=st.integers(5, 40),
    bos_is_eos=st.booleans(),
)
def test_isolated_concat_rows_hold_the_stream_with_documents_marked(lengths, seq_len, bos_is_eos):
    bos = EOS if bos_is_eos else BOS
    assume(sum(lengths) > seq_len)
    rows = make_rows("concat", documents(lengths), seq_len=seq_len, bos=bos, eos=EOS, isolate=True)
    owner, text = owners(lengths), []
    for number in range(rows.text_rows):
        row = rows.row(0, number)
        assert row.labels[-1] == IGNORED
        for number, (tokens, labels) in enumerate(stretches(row)):
            # a row may be cut in front of a BOS and has it twice then
            assert bos_is_eos or tokens[1:].count(bos) <= (number == 0 and tokens[:2] == [bos, bos])
            held = [token for token in tokens if token >= FIRST]
            assert len({owner[token] for token in held}) <= 1
            assert not tokens or (tokens[0] == bos and labels[0] == IGNORED)
            assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))
            assert all(label == token for token, label in zip(tokens, labels, strict=True) if token >= FIRST)
            text += held
    assert len(set(text)) == len(text) >= sum(lengths) - rows.tail


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("mixed", {"short_share": 1.0}, "`short_share` must be above 0 and below 1"),
        ("mixed", {"short_seq_len": 24}, "`short_seq_len` must be at least 4 and below `seq_len` 24"),
        ("mixed", {"lengths": [400]}, "leaves no document for short rows"),
        ("best_fit", {"longest": 3}, "need at least 4 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(policy, options, message):
    with pytest.raises(ValueError, match=message):
        rows_of(policy, **options)
