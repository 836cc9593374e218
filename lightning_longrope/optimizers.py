"""Optimizers and schedules that one ``LongRoPEModule`` needs and torch does not have as one object."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, overload

import torch
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

ENDLESS = ("constant", "constant_with_warmup")
"""Schedules that take no last step."""


class MuonAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as the one optimizer Lightning's automatic mode takes.

    Groups marked ``matrices: True`` (see ``LongRoPEModule.parameter_groups``) go to ``torch.optim.Muon`` with updates
    scaled to AdamW's size, so both share a learning rate.

    Args:
        params: Parameter groups; a group without the mark goes to AdamW.
        lr: Learning rate of both.
        momentum: Momentum of Muon.
        weight_decay: Weight decay of the matrices; the others have none.
        betas: Betas of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 6e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        groups = [dict(group) for group in params]
        matrices = [group for group in groups if group.get("matrices")]
        others = [group for group in groups if not group.get("matrices")]
        if not matrices or not others:
            raise ValueError(
                "MuonAdamW needs a group marked `matrices: True` and one without, as `LongRoPEModule.parameter_groups`"
                f" gives them; got {len(matrices)} with and {len(others)} without."
            )
        self._muon = Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, betas=betas, weight_decay=0.0)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        # The same dictionaries as the parts': a schedule that sets `lr` here reaches them.
        self.param_groups = self._muon.param_groups + self._adamw.param_groups

    @property
    def _parts(self) -> tuple[Optimizer, Optimizer]:
        return self._muon, self._adamw

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Any) -> Any: ...

    def step(self, closure: Any = None) -> Any:
        """One step of both parts, after the closure if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        self._share_state()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave, the state of both parts in the form of one optimizer."""
        super().load_state_dict(state_dict)
        matrices = len(self._muon.param_groups)
        for part, groups in zip(self._parts, (self.param_groups[:matrices], self.param_groups[matrices:]), strict=True):
            part.param_groups = groups
            own = [parameter for group in groups for parameter in group["params"] if parameter in self.state]
            part.state.clear()
            part.state.update({parameter: self.state[parameter] for parameter in own})

    def _share_state(self) -> None:
        self.state.update(chain.from_iterable(part.state.items() for part in self._parts))


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the optimizer steps of a run.

    Attributes:
        name: A name of ``transformers.get_scheduler``: linear, cosine_with_min_lr, constant_with_warmup, ...
        warmup_steps: Steps over which the rate rises.
        warmup_start: Share of the rate that it rises from, 0.1 in Position Interpolation.
        options: Further arguments of that schedule, such as ``min_lr_rate``.

    Raises:
        ValueError: If ``warmup_start`` is no share.
    """

    name: str = "linear"
    warmup_steps: int = 20
    warmup_start: float = 0.0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"`schedule.warmup_start` is a share of the rate, from 0 to 1, got {self.warmup_start}.")

    def build(self, optimizer: Optimizer, total_steps: float) -> Any:
        """The scheduler for a run of ``total_steps`` optimizer steps, inf for one without a last step.

        Raises:
            ValueError: If the rate depends on how many steps there are, and nobody knows.
        """
        if math.isinf(total_steps) and self.name not in ENDLESS:
            raise ValueError(
                f"The schedule {self.name!r} needs to know the last step: set trainer.max_steps or trainer.max_epochs,"
                f" or take {' or '.join(ENDLESS)}."
            )
        steps = None if math.isinf(total_steps) else int(total_steps)
        scheduler = get_scheduler(self.name, optimizer, self.warmup_steps, steps, self.options)
        if not self.warmup_start:
            return scheduler
        return LambdaLR(optimizer, [partial(self._raised, share=share) for share in scheduler.lr_lambdas])

    def _raised(self, step: int, share: Callable[[int], float]) -> float:
        """Share of the rate at a step: the warm-up compressed into what is above ``warmup_start``."""
        found = share(step)
        return self.warmup_start + (1 - self.warmup_start) * found if step < self.warmup_steps else found
