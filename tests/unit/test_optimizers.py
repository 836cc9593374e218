"""One optimizer that is two: the same steps as Muon and AdamW run by hand, and a state that continues them."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_longrope.optimizers import MuonAdamW, Schedule


def model_and_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    return model, [
        {"params": [model[0].weight, model[1].weight], "matrices": True},
        {"params": [model[0].bias, model[1].bias], "matrices": False},
    ]


def train(model, optimizers, steps, start=0):
    for step in range(start, start + steps):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_steps_are_those_of_the_two_optimizers_side_by_side():
    model, groups = model_and_groups()
    ours = train(model, [MuonAdamW(groups, lr=0.01)], 4)
    model, groups = model_and_groups()
    muon = torch.optim.Muon(
        groups[0]["params"], lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(groups[1]["params"], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for one, other in zip(ours, train(model, [muon, adamw], 4), strict=True):
        assert torch.equal(one, other)


def test_a_restored_optimizer_continues_as_if_nothing_had_happened():
    model, groups = model_and_groups()
    optimizer = MuonAdamW(groups, lr=0.01)
    train(model, [optimizer], 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, [optimizer], 3, start=3)

    model, groups = model_and_groups()
    optimizer = MuonAdamW(groups, lr=0.5)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for one, other in zip(expected, train(model, [optimizer], 3, start=3), strict=True):
        assert torch.equal(one, other)


def test_a_schedule_reaches_both_parts():
    model, groups = model_and_groups()
    optimizer = MuonAdamW(groups, lr=0.01)
    scheduler = Schedule("linear", warmup_steps=2).build(optimizer, total_steps=4)
    before = train(model, [], 0)
    assert all(
        torch.equal(old, new) for old, new in zip(before, train(model, [optimizer], 1), strict=True)
    )  # a rate of 0 at the first warm-up step
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[0.0] * 2, [0.005] * 2, [0.01] * 2, [0.005] * 2]


def test_groups_without_the_mark_are_refused_in_one_line():
    with pytest.raises(ValueError, match="parameter_groups"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2, 2))]}])


def test_a_warm_up_may_start_above_zero():
    """Position Interpolation: 20 steps from a tenth of the rate, here 4, then a constant rate or a linear decay."""
    for name, after in (("constant_with_warmup", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5])):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = Schedule(name, warmup_steps=4, warmup_start=0.1).build(optimizer, total_steps=8)
        rates = []
        for _ in range(7):
            rates.append(optimizer.param_groups[0]["lr"] / 2.0)
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([0.1, 0.325, 0.55, 0.775, *after])
    with pytest.raises(ValueError, match=r"warmup_start.*1\.5"):
        Schedule(warmup_start=1.5)


def test_its_state_has_the_form_of_any_optimizer():
    model, groups = model_and_groups()
    optimizer = MuonAdamW(groups, lr=0.01)
    train(model, [optimizer], 1)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}  # which FSDP2 and other tools read
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]
    assert [sorted(saved["state"][number]) for number in range(4)] == [
        *[["momentum_buffer"]] * 2,
        *[["exp_avg", "exp_avg_sq", "step"]] * 2,
    ]


def test_a_run_without_a_last_step_takes_schedules_that_need_none():
    _, groups = model_and_groups()
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for name, rates in (("constant", [0.5] * 3), ("constant_with_warmup", [0.0, 0.25, 0.5])):
        scheduler, found = Schedule(name, warmup_steps=2).build(optimizer, math.inf), []
        for _ in range(3):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert found == rates
    with pytest.raises(ValueError, match=r"'linear' needs to know the last step: set trainer\.max_steps"):
        Schedule().build(optimizer, math.inf)
