"""Sizes of the parts of ``gpu.py``, the rows that are held to goals, and what follows from the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from _gpu_kernels import RIGHT, kernels
from _results import Row, failed
from loss import FULL, Case

from lightning_longrope import long_rows
from lightning_longrope.callbacks import FactorSearch
from lightning_longrope.estimate import forward_flops, utilisation
from lightning_longrope.loading import new_config
from lightning_longrope.losses import LOSSES
from lightning_longrope.search import RampSearch
from lightning_longrope.sizes import model_size

CARD = 141  # GB of an H200
FLOOR_AT = 131_072  # tokens at which a search is held to the operations of the model
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TOY = {**LLAMA_2_7B, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
TOY |= {"num_hidden_layers": 4, "vocab_size": 96}
LOSS_SIZES = (*FULL, *(replace(case, hidden=4096, goal=None) for case in FULL), Case(32_000, None, 65_536, 4096))
"""The cases of ``loss.py`` with its goals; the same at the width of a 7B; a long row."""


@dataclass(frozen=True)
class Plan:
    """Sizes of all parts.

    Attributes:
        device: Where it runs.
        fields: Config of the whole model.
        attention: Lengths at which kernels are timed, forwards; backwards up to the first but one.
        slices: Lengths of the two-layer slice.
        windows: Lengths of the one-layer pass, the last that of the whole window.
        losses: Sizes of the losses.
        batched: Lengths of the rows that candidates share a pass with.
        candidates: How many there are.
        repeats: Timings of which the best counts.
        enough: Seconds of timings after which there are no more.
    """

    device: str = "cuda"
    fields: Any = None
    attention: tuple[int, ...] = (8_192, 32_768, 70_000, 131_072, 262_144)
    slices: tuple[int, ...] = (8_192, 32_768, 131_072, 262_144)
    windows: tuple[int, ...] = (524_288, 2_097_152)
    losses: tuple[Case, ...] = LOSS_SIZES
    batched: tuple[int, ...] = (512, 2_048, 8_192)
    candidates: int = 32
    repeats: int = 3
    enough: float = 1.0

    @property
    def gpu(self) -> bool:
        """Whether there is a device whose memory can be told."""
        return self.device == "cuda"


def plan_for(toy: bool, quick: bool) -> Plan | None:
    """Sizes for this machine; None where there is no GPU and it is no toy."""
    if toy:
        long_rows.TOKENS, long_rows.TILE, long_rows.GROUP = 255, 100, 2 * 256 * 16
        return Plan("cpu", TOY, (128, 192), (128, 192), (224, 256), (Case(96, "<= 0.25", 128, 64),), (32,), 4, 1)
    if not torch.cuda.is_available():
        return None
    plan = Plan(fields=LLAMA_2_7B)
    short = {name: tuple(s for s in getattr(plan, name) if s <= 131_072) for name in ("attention", "slices", "windows")}
    return replace(plan, **short) if quick else plan


def sides(plan: Plan) -> list[str]:
    """Losses that this machine has; Liger's needs a GPU."""
    return [name for name in LOSSES if name != "liger" or (plan.gpu and find_spec("liger_kernel") is not None)]


def goals(plan: Plan) -> dict[str, str]:
    """What rows are held to, by the names that they must come under."""
    right = [name for name in kernels(plan.device) if name in RIGHT]
    held = {error_name(name, length): "<= 0.02" for length in plan.attention for name in right}
    if FLOOR_AT in plan.slices:
        held[search_name(FLOOR_AT)] = "<= 1.25"
    if plan.gpu:
        held |= {taken_name(length): f"<= {CARD}" for length in plan.windows[-1:]}
        held |= {share_name(case, side): case.goal for case in plan.losses if case.goal for side in sides(plan)}
    return held


def missing(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """A failed row for each goal that no row came to be held to."""
    came = {row.name for row in rows}
    return [failed(name, "never came", goal) for name, goal in goals(plan).items() if name not in came]


def projection(plan: Plan, rows: Sequence[Row], peak: float | None) -> list[Row]:
    """Hours of a default search of the whole model at each length that was timed, beside those of its operations.

    Args:
        plan: Sizes of all parts.
        rows: What they found.
        peak: Operations a second of the device in half types; None where it is not known: nothing is projected then.
    """
    if peak is None:
        return []
    figures, found = {row.name: row.ours for row in rows}, []
    size, layers = model_size(new_config(dict(plan.fields))), plan.fields["num_hidden_layers"]
    for length in sorted({*plan.slices, *plan.windows}):
        if layer_name(length) not in figures or head_name(length) not in figures:
            continue
        seconds = layers * figures[layer_name(length)] + figures[head_name(length)]
        floor = forward_flops(size, length) / (peak * utilisation(length))
        name, hours = search_name(length), (forwards() * seconds / 3600, forwards() * floor / 3600)
        found.append(Row(name, *hours, "h", hours[0] / hours[1], goals(plan).get(name)))
    return found


def forwards() -> int:
    """Forward passes of a search with the default settings: candidates, the formulas beside them, held-out text."""
    defaults = {name: parameter.default for name, parameter in signature(FactorSearch).parameters.items()}
    candidates = defaults["max_evaluations"] or signature(RampSearch).parameters["max_evaluations"].default
    return int(defaults["documents"] * (candidates + 3) + defaults["held_out"] * 4)


def error_name(kernel: str, length: int) -> str:
    """Row of the error of a kernel."""
    return f"attention by {kernel}, {length:,} tokens: error of the largest value"


def layer_name(length: int) -> str:
    """Row of the time of one layer."""
    return f"1 layer without gradients, {length:,} tokens"


def head_name(length: int) -> str:
    """Row of the time of output head and loss."""
    return f"output head and loss without gradients, {length:,} tokens"


def taken_name(length: int) -> str:
    """Row of the memory that an evaluation of a row takes from the card."""
    return f"taken from the card with the weights of all layers, {length:,} tokens"


def search_name(length: int) -> str:
    """Row of the projected search."""
    return f"default search, {forwards()} forwards of {length:,} tokens, projected"


def loss_name(case: Case, side: str) -> str:
    """What the rows of a loss begin with."""
    return f"{side} loss, {case.tokens:,} tokens x {case.vocabulary:,}, width {case.hidden:,}"


def share_name(case: Case, side: str) -> str:
    """Row of the memory of a loss as a share of Hugging Face's."""
    return f"{loss_name(case, side)}: peak memory (share)"
