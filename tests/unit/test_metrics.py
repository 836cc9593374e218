"""Metrics from sums against plain Python, in any split of the work, and their intervals against simulation."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_longrope.metrics import (
    BitsPerByte,
    DocumentSums,
    Perplexity,
    RetrievalAccuracy,
    WindowMeanPerplexity,
    bootstrap_interval,
    bootstrap_ratio_interval,
    paired_ratio,
)

NLL = [[2.0, 0.5, 7.25], [1.0], [0.125, 3.0]]  # windows of different sizes: a mean of means must show


def test_perplexity_weighs_tokens():
    metric = Perplexity()
    for window in NLL:
        metric.update(torch.tensor(window).sum(), len(window))
    flat = [nll for window in NLL for nll in window]
    assert metric.compute().item() == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-12)
    assert metric.compute().dtype == torch.float64


def test_window_mean_weighs_windows():
    metric = WindowMeanPerplexity()
    sums, tokens = torch.tensor([sum(w) for w in NLL]), torch.tensor([len(w) for w in NLL])
    metric.update(sums[:1], tokens[:1])
    metric.update(sums[1:], tokens[1:])
    expected = math.exp(statistics.mean(sum(window) / len(window) for window in NLL))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_a_uniform_guess_over_bytes_costs_eight_bits():
    metric = BitsPerByte()
    metric.update(torch.tensor([10 * math.log(256), 20 * math.log(256)], dtype=torch.float64), torch.tensor([10, 20]))
    assert metric.compute().item() == pytest.approx(8, rel=1e-12)


def test_accuracy_is_hits_over_trials():
    metric = RetrievalAccuracy()
    metric.update(torch.tensor([True, False, True]), 3)
    metric.update(0, 5)
    assert metric.compute().item() == 2 / 8


def test_one_confident_wrong_token_leaves_perplexity_finite():
    metric = Perplexity()
    metric.update(torch.tensor(5000.0), 1000)  # one token of probability e^-5000 among sure ones
    assert metric.compute().item() == pytest.approx(math.exp(5), rel=1e-12)
    metric.update(torch.tensor(math.inf), 1)
    assert metric.compute().item() == math.inf


def test_sums_keep_what_float32_and_int32_lose():
    metric = Perplexity()
    metric.update(torch.tensor(3e9), 2**31)
    for _ in range(100):
        metric.update(torch.tensor(1.0), 1)
    expected = math.exp((float(torch.tensor(3e9)) + 100) / (2**31 + 100))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_sums_stay_float64_in_a_module_of_low_precision(cast):
    module = LightningModule()
    module.metric = Perplexity()
    module.metric.update(torch.tensor(1e-9), 0)
    getattr(module, cast)(*[torch.bfloat16] * (cast == "to"))
    assert module.metric.above.item() == torch.tensor(1e-9).double().item()  # nor is rounded what was there
    module.metric.reset()
    module.metric.update(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 2)
    assert module.metric.above.dtype == torch.float64
    assert module.metric.compute().item() == pytest.approx(math.exp(1.5), rel=1e-12)


@pytest.mark.parametrize("make", [Perplexity, WindowMeanPerplexity, BitsPerByte, RetrievalAccuracy])
def test_two_ranks_give_what_one_gives(make):
    updates = [(torch.tensor([i * i + 1]), torch.tensor([3 * i + 17])) for i in range(5)]
    whole, parts = make(), [make(), make()]
    for i, update in enumerate(updates):
        whole.update(*update)
        parts[i % 2].update(*update)
    states = [[part.above for part in parts], [part.below for part in parts]]
    gathered = iter(states)
    parts[0].dist_sync_fn = lambda state, group=None: next(gathered)
    parts[0].distributed_available_fn = lambda: True
    assert parts[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    assert parts[1].compute().item() != pytest.approx(whole.compute().item(), rel=1e-3)
    whole.reset()
    whole.update(*updates[0])
    fresh = make()
    fresh.update(*updates[0])
    assert whole.compute() == fresh.compute()


def test_bootstrap_agrees_with_one_written_in_plain_python():
    draw = random.Random(1)
    sums = [draw.uniform(100, 400) for _ in range(24)]
    counts = [draw.randint(80, 160) for _ in range(24)]
    ratios = []
    for _ in range(4000):
        chosen = [draw.randrange(24) for _ in range(24)]
        ratios.append(math.exp(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen)))
    ratios.sort()
    low, high = bootstrap_interval(sums, counts, resamples=4000)
    assert low == pytest.approx(ratios[100], rel=0.02)
    assert high == pytest.approx(ratios[3900], rel=0.02)
    logs = bootstrap_ratio_interval(sums, counts, resamples=4000)
    assert [math.exp(end) for end in logs] == pytest.approx([low, high], rel=1e-12)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        counts = rng.integers(50, 200, size=40)
        sums = counts * (2 + rng.normal(0, 0.5, size=40))
        low, high = bootstrap_interval(sums, counts, seed=trial, resamples=300)
        hits += low <= math.exp(2) <= high
    assert 0.88 < hits / 300 < 0.98


def test_bootstrap_is_the_same_each_time_and_touches_no_random_state():
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the state that must not move
    first = bootstrap_interval([1.0, 2.0, 5.0], [1, 1, 2])
    assert first == bootstrap_interval(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1, 1, 2]))
    assert first != bootstrap_interval([1.0, 2.0, 5.0], [1, 1, 2], resamples=7)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_bootstrap_of_one_document_and_of_an_infinite_one():
    assert bootstrap_interval([3.0], [2]) == pytest.approx((math.exp(1.5), math.exp(1.5)))
    low, high = bootstrap_interval([1.0] * 9 + [math.inf], [1] * 10)
    assert (low, high) == (math.e, math.inf)
    assert bootstrap_interval([1e6], [1]) == (math.inf, math.inf)


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_bootstrap_refuses_what_are_not_two_equal_rows(sums, counts):
    with pytest.raises(ValueError, match="two equally long rows"):
        bootstrap_interval(sums, counts)


def test_a_paired_ratio_knows_what_both_have_in_common():
    """Documents differ much from each other and the two models little: only a paired interval shows the difference."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(50, 150, 40)
    common = rng.normal(3, 1, 40)  # how hard a document is
    theirs = DocumentSums(tuple(common * tokens), tuple(tokens))
    ours = DocumentSums(tuple((common - 0.1 + rng.normal(0, 0.02, 40)) * tokens), tuple(tokens))
    ratio, low, high = paired_ratio(ours, theirs)
    expected = [math.exp(sum(sums.nll) / sum(tokens)) for sums in (ours, theirs)]
    assert ratio == pytest.approx(expected[0] / expected[1], rel=1e-12)
    assert low < math.exp(-0.1) < high
    assert high - low < 0.03
    alone = [bootstrap_interval(sums.nll, sums.weight) for sums in (ours, theirs)]
    assert alone[0][1] / alone[1][0] - alone[0][0] / alone[1][1] > 0.5
    # the same draw for both: by hand
    draws = np.random.default_rng(0).integers(40, size=(1000, 40))
    means = [(np.array(sums.nll)[draws].sum(1) / tokens[draws].sum(1)) for sums in (ours, theirs)]
    by_hand = np.quantile(np.exp(means[0] - means[1]), [0.025, 0.975], method="inverted_cdf")
    assert [low, high] == pytest.approx(by_hand.tolist(), rel=1e-12)


def test_a_paired_ratio_of_other_documents_is_refused():
    ours = DocumentSums((1.0, 2.0), (3, 4))
    for theirs in (DocumentSums((1.0,), (3,)), DocumentSums((1.0, 2.0), (4, 3))):
        with pytest.raises(ValueError, match="the same documents twice"):
            paired_ratio(ours, theirs)
