"""Chunked losses against one softmax in float64 that shares no code with them."""

import pytest
import torch

from lightning_longrope.losses import chunked_nll, token_nll

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[[2, 11]] = -100
    weights = torch.rand(TOKENS, generator=generator) + 0.5
    return hidden, weight, labels, weights


def witness(hidden, weight, labels):
    """nll by the definition, one token at a time, in float64; 0 where the label is -100."""
    values = []
    for state, label in zip(hidden.double(), labels.tolist(), strict=True):
        logits = [float(torch.dot(state, row)) for row in weight.double()]
        total = torch.tensor(logits, dtype=torch.float64).exp().sum().log().item()
        values.append(0.0 if label == -100 else total - logits[label])
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, 23, 4096])
def test_token_nll_is_the_definition_whatever_the_chunk(case, chunk):
    hidden, weight, labels, _ = case
    actual = token_nll(hidden, lambda states: states @ weight.T, labels, chunk)
    torch.testing.assert_close(actual.double(), witness(hidden, weight, labels), rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [5, 23])
def test_weights_and_masked_labels_count_in_both_sums(case, chunk):
    hidden, weight, labels, weights = case
    nll, count = chunked_nll(hidden, lambda states: states @ weight.T, labels, weights, chunk)
    kept = labels != -100
    assert count.item() == pytest.approx(weights[kept].double().sum().item(), rel=1e-6)
    expected = (witness(hidden, weight, labels) * weights.double()).sum().item()
    assert nll.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [5, 4096])
def test_gradients_are_those_of_the_unchunked_loss(case, chunk):
    hidden, weight, labels, _ = case
    gradients = []
    for loss in ("ours", "torch"):
        states, matrix = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if loss == "ours":
            nll, count = chunked_nll(states, lambda s, m=matrix: s @ m.T, labels, chunk=chunk)
            (nll / count).backward()
        else:
            torch.nn.functional.cross_entropy(states @ matrix.T, labels).backward()
        gradients.append((states.grad, matrix.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_confident_wrong_token_gives_a_finite_loss():
    hidden = torch.tensor([[200.0, 0.0]])
    assert token_nll(hidden, lambda states: states, torch.tensor([1])).item() == pytest.approx(200.0)
