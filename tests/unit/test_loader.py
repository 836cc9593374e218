"""The sampler's shares and the loader's place in them, without a trainer."""

import pickle
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_longrope.datamodules.loader import FILLING, ResumableLoader, RowDataset, RowSampler, collate
from lightning_longrope.packing import IGNORED, ConcatRows, Documents, make_rows


def dataset(rows: int, extra_share: float = 0.0, extra=None) -> RowDataset:
    """Rows of 6 tokens with 4 unique ones in the middle."""
    tokens = np.arange(10, 10 + rows * 4).astype(np.uint16)
    documents = Documents(tokens, np.array([0]), np.array([len(tokens)]))
    packed = ConcatRows(documents, seq_len=6, bos=0, eos=1, seed=7, extra_share=extra_share)
    assert packed.text_rows == rows
    return RowDataset(packed, extra)


@given(rows=st.integers(1, 60), world=st.integers(1, 7), training=st.booleans(), start=st.integers(0, 30))
def test_ranks_share_out_the_rows_without_overlap_and_equally_many(rows, world, training, start):
    data = dataset(rows)
    if training and rows < world:
        with pytest.raises(ValueError, match=f"{rows} concat rows cannot be shared by {world} ranks"):
            RowSampler(data, world, 0, drop_last=True)
        return
    shares = []
    for rank in range(world):
        sampler = RowSampler(data, world, rank, drop_last=training)
        sampler.set_epoch(5)
        sampler.done = [start if training and start <= rows - world else 0]
        shares.append(list(sampler))
        assert sampler.done[0] or len(shares[-1]) == len(sampler)
    first = sampler.done[0]
    assert len({len(share) for share in shares}) == 1
    assert {epoch for share in shares for epoch, _ in share} <= {5}
    indices = [index for step in zip(*shares, strict=True) for _, index in step]  # in the order of the steps
    real = [index for index in indices if index != FILLING]
    if training:
        assert real == indices == list(range(first, first + (rows - first) // world * world))
    else:
        assert real == list(range(rows))
        assert len(indices) - rows < world


def test_filling_rows_have_no_label_and_a_plain_index_is_of_epoch_0():
    data = dataset(5)
    assert (data[3, FILLING]["labels"] == IGNORED).all()
    assert data[3, FILLING]["input_ids"].shape == (6,)
    assert data[2]["input_ids"].tolist() == data[0, 2]["input_ids"].tolist()
    assert data[2]["labels"].tolist() == [IGNORED, *data[2]["input_ids"].tolist()[1:-1], IGNORED]
    assert "weights" not in data[2]


def test_extra_rows_are_made_from_seed_epoch_and_number():
    def extra(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([0, *(rng.randrange(1000, 2000) for _ in range(4)), 1]), torch.full((6,), 3.0)

    data, again = dataset(20, 0.5, extra), dataset(20, 0.5, extra)
    made = [data[epoch, index] for epoch in (0, 1) for index in range(40)]
    extras = [tuple(row["input_ids"].tolist()) for row in made if row["weights"][0] == 3]
    assert len(extras) == len(set(extras)) == 40  # half of two epochs, no two alike
    assert all(row["labels"].tolist() == [IGNORED, *row["input_ids"].tolist()[1:-1], IGNORED] for row in made)
    text = sorted(token for row in made[:40] if row["weights"][0] == 1 for token in row["input_ids"].tolist()[1:5])
    assert text == list(range(10, 90))  # the text is read whole nevertheless
    for index in (33, 4, 17):
        torch.testing.assert_close(again[1, index]["input_ids"], data[1, index]["input_ids"], rtol=0, atol=0)


def batches(loader):
    return [batch["input_ids"].tolist() for batch in loader]


def loader(rows=20, batch_size=3, world=1, rank=0, epoch=0, seq=None):
    made = ResumableLoader(
        seq or dataset(rows), batch_size=batch_size, sampler=RowSampler(seq or dataset(rows), world, rank)
    )
    made.sampler.set_epoch(epoch)
    return made


@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_a_loaded_state_goes_on_with_the_next_row_of_its_epoch_only(done):
    whole, next_epoch = batches(loader(epoch=2)), batches(loader(epoch=3))
    cut = loader(epoch=2)
    taken = iter(cut)
    for _ in range(done):
        next(taken)
    resumed = loader()
    state = pickle.loads(pickle.dumps(cut.state_dict())) if done else {**cut.state_dict(), "epoch": 2}
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # saved again before any row
    resumed.sampler.set_epoch(2)
    iter(resumed)  # Lightning makes an iterator that it may not use
    assert len(resumed) == 7
    assert batches(resumed) == whole[done:]
    resumed.sampler.set_epoch(3)
    assert batches(resumed) == next_epoch
    resumed.load_state_dict(state)
    assert batches(resumed) == next_epoch  # the state is of an epoch that is over


def test_the_place_is_kept_when_ranks_or_batch_size_change():
    whole = [row for batch in batches(loader(rows=24, batch_size=1)) for row in batch]
    ranks = [loader(rows=24, batch_size=2, world=2, rank=rank) for rank in range(2)]
    for made in ranks:
        taken = iter(made)
        next(taken), next(taken)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    resumed = [loader(rows=24, batch_size=4, world=4, rank=rank) for rank in range(4)]
    for made in resumed:
        made.load_state_dict(ranks[0].state_dict())
    shares = [[row for batch in batches(made) for row in batch] for made in resumed]
    assert [row for step in zip(*shares, strict=True) for row in step] == whole[8:]


def test_an_epoch_hands_out_every_row():
    text = [token for batch in batches(loader(epoch=4)) for row in batch for token in row[1:5]]
    assert sorted(text) == list(range(10, 90))


def test_a_state_of_other_rows_is_not_taken():
    cut = loader(rows=21)
    next(iter(cut))
    resumed = loader(rows=20)
    with pytest.warns(UserWarning, match="was cut in other rows .* begins with its first row"):
        resumed.load_state_dict(cut.state_dict())
    assert batches(resumed) == batches(loader(rows=20))


def test_workers_give_the_same_batches_and_count_what_was_handed_out():
    plain = batches(loader())
    made = ResumableLoader(dataset(20), batch_size=3, sampler=RowSampler(dataset(20)), num_workers=2)
    taken = iter(made)
    assert [next(taken)["input_ids"].tolist() for _ in range(2)] == plain[:2]
    assert made.state_dict()["rows"] == [6]  # the workers are ahead of that
    taken.close()
    sent = pickle.loads(pickle.dumps(made.dataset))  # what a spawned worker gets, after the rows were used
    assert sent[0, 3]["input_ids"].tolist() == made.dataset[0, 3]["input_ids"].tolist() == plain[1][0]


# All policies

POLICIES = {
    "concat": {},
    "isolated": {"isolate": True},
    "document": {},
    "best_fit": {},
    "mixed": {"short_seq_len": 6, "short_share": 0.4},
}


def policy_dataset(policy, documents=150) -> RowDataset:
    lengths = np.random.default_rng(0).integers(1, 40, documents)
    packed = Documents(np.arange(10, 10 + lengths.sum()).astype(np.uint16), np.cumsum(lengths) - lengths, lengths)
    name = "concat" if policy == "isolated" else policy
    return RowDataset(make_rows(name, packed, seq_len=16, bos=0, eos=1, seed=7, **POLICIES[policy]))


def ranks_of(data, world, batch_size, state=None, epoch=2, workers=0):
    """One loader for each rank."""
    loaders = []
    for rank in range(world):
        sampler = RowSampler(data, world, rank, batch_size=batch_size)
        made = ResumableLoader(data, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=collate)
        sampler.set_epoch(epoch)
        if state is not None:
            made.load_state_dict(state)
        loaders.append(made)
    return loaders


def steps(loaders, limit=None):
    """Rows of all ranks, step by step: (kind, its rows as tuples), in the order they have among the ranks' shares."""
    taken = []
    for number, batches in enumerate(zip(*map(iter, loaders), strict=True)):
        kinds = {batch.get("original_rope") for batch in batches}
        assert len(kinds) == 1  # all ranks read one kind of row
        rows = zip(*(batch["input_ids"].tolist() for batch in batches), strict=True)
        taken.append((kinds.pop(), [tuple(row) for turn in rows for row in turn]))
        if limit is not None and number + 1 == limit:
            break
    return taken


def by_kind(taken):
    return {kind: [row for one, rows in taken if one == kind for row in rows] for kind, _ in taken}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_ranks_hold_disjoint_rows_that_are_all_there_are(policy, world, batch_size):
    data = policy_dataset(policy)
    loaders = ranks_of(data, world, batch_size)
    taken = by_kind(steps(loaders))
    assert len(loaders[0]) == len(list(loaders[0]))
    whole = by_kind(steps(ranks_of(data, 1, 1)))
    for kind, rows in whole.items():
        assert taken[kind] == rows[: len(taken[kind])]  # the same order with any number of ranks
        assert len(rows) - len(taken[kind]) < world * (batch_size if policy == "mixed" else 1)
    assert sum(map(len, whole.values())) == len(data)
    assert len(whole) == (2 if policy == "mixed" else 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_changes_ranks_and_batches_goes_on_with_the_very_next_rows(policy, workers):
    data = policy_dataset(policy)
    if workers and policy not in ("mixed", "best_fit"):
        pytest.skip("workers are the same to all policies")
    whole = by_kind(steps(ranks_of(data, 1, 1)))
    seen: dict = {kind: [] for kind in whole}
    state = None
    for world, batch_size, limit in ((2, 2, 5), (1, 3, 4), (2, 1, 7), (3, 2, None)):
        loaders = ranks_of(data, world, batch_size, state, workers=workers if world == 1 else 0)
        for kind, rows in by_kind(steps(loaders, limit)).items():
            seen[kind] += rows
        states = [made.state_dict() for made in loaders]
        assert all(one == states[0] for one in states)  # any rank's checkpoint will do
        state = pickle.loads(pickle.dumps(states[0]))
    for kind, rows in whole.items():
        assert seen[kind] == rows[: len(seen[kind])]
        assert len(rows) - len(seen[kind]) < 6


def test_kinds_are_mixed_over_the_epoch():
    taken = [kind for kind, _ in steps(ranks_of(policy_dataset("mixed", 600), 2, 2))]
    share = sum(taken) / len(taken)
    assert 0.3 < share < 0.5
    for cut in range(20, len(taken), 10):
        assert sum(taken[:cut]) / cut == pytest.approx(share, abs=1.5 / cut + 0.01)


@pytest.mark.parametrize("policy", ["isolated", "best_fit", "mixed"])
def test_a_batch_says_where_its_documents_are(policy):
    data = policy_dataset(policy)
    short = 0
    for batch in ranks_of(data, 1, 3)[0]:
        rows, length = batch["input_ids"].shape
        if policy == "mixed":
            short += batch["original_rope"]
            if not batch["original_rope"]:
                assert set(batch) == {"input_ids", "labels", "original_rope", "stretch_lengths"}
                assert batch["stretch_lengths"].tolist() == [length] * rows
                continue
        bounds = batch["cu_seq_lens"].tolist()
        assert batch["cu_seq_lens"].dtype == torch.int32
        assert (bounds[0], bounds[-1]) == (0, rows * length)
        assert set(range(0, rows * length, length)) <= set(bounds)
        positions = [place - max(b for b in bounds if b <= place) for place in range(rows * length)]
        assert batch["position_ids"].flatten().tolist() == positions
        assert batch["max_length"] == max(np.diff(bounds))
        learnt = batch["labels"].flatten() != IGNORED
        stretches = [(a, b) for a, b in pairwise(bounds) if policy == "isolated" or learnt[a:b].any()]  # no padding
        assert batch["stretch_lengths"].tolist() == [b - a for a, b in stretches]
        first = batch["position_ids"] == 0
        assert (batch["labels"][first] == IGNORED).all()
        marked = (batch["input_ids"] == 0) & (batch["labels"] == IGNORED)
        assert (first & ~marked).sum() <= rows  # every document begins with BOS; all else that begins is padding
    assert bool(short) == (policy == "mixed")
