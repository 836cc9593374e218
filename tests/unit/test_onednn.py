"""Linear layers by oneDNN against float64 in numpy, and when they must not be taken."""

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from torch.nn.functional import linear

from lightning_longrope.onednn import fast_linear
from lightning_longrope.scoring import greedy_matches, token_nll

CPU = torch.device("cpu")
needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available(),
    reason="nothing changes without AVX-512 and oneDNN",
)


def random(*shape, seed=0, **kwargs):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def calls(function, *args):
    """How often oneDNN was called for a float32 linear layer."""
    with fast_linear(CPU):  # which tries it once
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


def within(states, weight, bias=None):
    with torch.no_grad(), fast_linear(CPU):
        return linear(states, weight, bias)


@needs_avx512
@pytest.mark.parametrize("bias", [None, random(7, seed=2)])
def test_products_are_those_of_numpy(bias):
    states, weight = random(3, 5, 33), random(7, 33, seed=1)
    expected = states.double().numpy() @ weight.double().numpy().T + (0 if bias is None else bias.double().numpy())
    assert calls(within, states, weight, bias) == 1
    np.testing.assert_allclose(within(states, weight, bias).numpy(), expected, rtol=0, atol=2e-5)
    assert torch.equal(within(states.transpose(0, 1), weight, bias), within(states, weight, bias).transpose(0, 1))


@needs_avx512
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(threads):
    states, weight, before = random(6, 7, 128), random(384, 128, seed=1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = within(states, weight)
        assert all(torch.equal(whole[b:], within(states[b:].clone(), weight)) for b in range(6))
    finally:
        torch.set_num_threads(before)


@needs_avx512
def test_scoring_takes_it_in_every_layer_and_the_head():
    model, tokens = tiny_llama(), torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0))
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert calls(token_nll, model, tokens) == calls(greedy_matches, model, tokens, 3) == linears > 10


@pytest.mark.parametrize(
    "states",
    [random(4, 8, dtype=torch.float64), random(4, 8, dtype=torch.bfloat16), random(4, 8, device="meta"), random(0, 8)],
)
def test_other_types_devices_and_nothing_at_all_go_their_own_way(states):
    weight = random(5, 8).to(states)
    assert calls(within, states, weight) == 0
    found = within(states, weight)
    assert (found.shape, found.dtype, found.device) == ((len(states), 5), states.dtype, states.device)
    with torch.no_grad():
        assert found.is_meta or torch.equal(found, linear(states, weight))


def test_autocast_still_casts():
    states, weight = random(4, 8), random(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert within(states, weight).dtype == torch.bfloat16
    with torch.no_grad(), fast_linear(CPU), torch.autocast("cpu", torch.bfloat16):
        assert linear(states, weight).dtype == torch.bfloat16


def test_gradients_flow():
    weight = random(5, 8).requires_grad_()
    with fast_linear(CPU):
        linear(random(4, 8), weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[0], random(4, 8).sum(0))
