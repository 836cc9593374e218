"""Memory and hours of a run before anything is spent on it: arithmetic on sizes, no weights.

The peak of a training step on one GPU is

    peak = 5.9 GiB + states + T x (what layers keep + the work of one layer + exchange between ranks)

with T tokens of a row on a GPU. The work of a layer is counted in units of 2h (hidden states), 2(2q + 2k) (queries,
keys, values and output of attention) and 2f (the inside of the MLP), with other numbers of them for layers whose norms
and MLPs are single kernels (``FUSED``, which published runs were fitted with) and for those of Hugging Face as they are
(``PLAIN``, counted on the storages of a Llama's training step).

Shapes: S tokens of a row, h hidden size, q query heads x head size, k key heads x head size, f MLP width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from lightning_longrope.levers import LONG_PASS, QUERIES_AT_A_TIME, Lever, Levers, unused_levers

GIB = 2**30
SPREAD = 0.15
"""Published peaks lie within so much of the estimate."""
HEADROOM = 0.10
"""Share of a card that an estimate must leave free."""
CONSTANT = 5.9 * GIB
"""CUDA, communication, gathered weights, fragments: what published peaks have besides everything that is counted."""
EXCHANGE = 2.25
"""Units of 2(2q + 2k) that sequence parallelism moves to and fro."""
LOGIT = 13.3
"""Bytes per token and vocabulary entry of a loss over all logits at once."""

Precision = Literal["half", "mixed", "full"]


class Work(NamedTuple):
    """Units that the work of one layer takes per token: of 2h, of 2(2q + 2k), of 2f."""

    hidden: float
    attention: float
    mlp: float = 0.0


class Kernels(NamedTuple):
    """Work of a layer when its MLP is at work and when anything else is; the larger counts."""

    mlp: Work
    rest: Work


FUSED = Kernels(Work(10.2, 1.6, 2.9), Work(10.2, 1.6))
"""Backward pass in a half type with norms and MLPs of one kernel each: the published runs."""

PLAIN: dict[Precision, Kernels] = {
    "half": Kernels(Work(10.3, 1.1, 5.7), Work(17.3, 1.1)),
    "mixed": Kernels(Work(15.5, 1.2, 5.5), Work(14.6, 1.9)),
    "full": Kernels(Work(14.6, 2.2, 11.5), Work(12.8, 2.9)),
}
"""Backward pass of Hugging Face's layers: weights in a half type; autocast over float32 weights; float32."""

TILED: dict[Precision, Kernels] = {
    "half": Kernels(Work(6.0, 1.05, 5.7), Work(4.6, 1.7)),
    "mixed": Kernels(Work(14.1, 1.05, 5.5), Work(10.3, 2.7)),
    "full": Kernels(Work(12.1, 2.05, 11.5), Work(9.6, 3.4)),
}
"""The same with norms and MLPs in tiles; of the work of an MLP as much as a tile is of the tokens."""

FORWARD: dict[Precision, Kernels] = {
    "half": Kernels(Work(3.9, 0.0, 3.0), Work(3.6, 1.6)),
    "mixed": Kernels(Work(5.8, 1.2, 2.8), Work(7.7, 2.5)),
    "full": Kernels(Work(7.8, 0.1, 6.0), Work(7.2, 3.3)),
}
"""Forward pass without gradients."""

IN_PARTS: dict[Precision, Kernels] = {
    "half": Kernels(Work(4.1, 0.0), Work(3.1, 1.8)),
    "mixed": Kernels(Work(8.2, 0.0), Work(6.2, 2.9)),
    "full": Kernels(Work(8.2, 0.0), Work(6.1, 3.6)),
}
"""The same of a long pass (``long_rows``), beside what heads give: where no heads are at work, and where some are."""

KEPT: dict[Precision, Work] = {
    "half": Work(8.0, 1.0, 4.0),
    "mixed": Work(14.6, 1.0, 4.0),
    "full": Work(12.0, 2.0, 8.0),
}
"""What every layer keeps for the backward pass without gradient checkpointing."""


@dataclass(frozen=True)
class ModelSize:
    """The geometry that memory and time depend on.

    Attributes:
        parameters: All weights, tied ones once.
        trainable: Those with a gradient.
        per_token: Weights of the layers that a token goes through: of experts those chosen for it.
        layers: Number of decoder layers.
        hidden: h.
        mlp: f, of all experts chosen for a token.
        query: q.
        keys: k.
        vocabulary: V.
        heads: Query heads.
        windows: Tokens that each layer with a sliding window sees; the other layers see all.
    """

    parameters: int
    trainable: int
    per_token: int
    layers: int
    hidden: int
    mlp: int
    query: int
    keys: int
    vocabulary: int
    heads: int
    windows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a command does with a model.

    Attributes:
        seq_len: S, the longest rows.
        rows: Rows of a forward pass.
        levers: Strategy and savings of memory.
        training: False for forward passes alone.
        precision: ``half`` for weights in a half type (DeepSpeed's are), ``mixed`` for autocast over float32, ``full``.
        weight_bytes: Of each weight.
        state_bytes: Of each trainable weight besides: its gradient, a float32 copy if there is one, optimizer moments.
        gradient_bytes: Of these, the gradient.
        kernels: Of the backward pass, for a run that brings its own, such as ``FUSED``. They are taken as they are:
            tiles take the inside of their MLPs down, but not, as ``TILED`` does, their norms. None for Hugging Face's.
    """

    seq_len: int
    rows: int = 1
    levers: Levers = field(default_factory=Levers)
    training: bool = True
    precision: Precision = "half"
    weight_bytes: int = 2
    state_bytes: float = 14.0
    gradient_bytes: int = 2
    kernels: Kernels | None = None

    @property
    def tokens(self) -> int:
        """T, the tokens of a forward pass on one GPU."""
        return self.rows * -(-self.seq_len // self.levers.sequence_parallel_size)


def memory_parts(model: ModelSize, run: Run) -> dict[str, float]:
    """Bytes at the peak of a step on one GPU, by what takes them.

    Args:
        model: Its geometry.
        run: What is done with it.

    Returns:
        Bytes by name; their sum is the peak.
    """
    parts = {"constant": CONSTANT, "weights": weight_bytes(model, run)}
    if run.training:
        parts["gradients and optimizer"] = state_bytes(model, run)
        parts["kept by layers"] = run.tokens * kept_bytes(model, run)
    parts["work of a layer"] = run.tokens * layer_bytes(model, run)
    if run.levers.sequence_parallel_size > 1:
        scale = _element(run) / 2
        parts["exchange between ranks"] = run.tokens * EXCHANGE * scale * _units(model).attention
    if run.training and not run.levers.chunked_loss:
        parts["logits"] = run.tokens * LOGIT * model.vocabulary
    return {name: size for name, size in parts.items() if size}


def weight_bytes(model: ModelSize, run: Run) -> float:
    """Bytes of the weights on one GPU, with the half copies that autocast keeps to the end of a forward pass.

    In training these are gone when the gradients are all there, which take more.
    """
    if run.levers.offload_parameters:
        return 0.0
    copies = 2 * model.parameters if run.precision == "mixed" and run.weight_bytes == 4 and not run.training else 0
    shared = run.levers.devices if run.levers.zero_stage == 3 else 1
    return model.parameters * run.weight_bytes / shared + copies


def state_bytes(model: ModelSize, run: Run) -> float:
    """Bytes of gradients and optimizer states on one GPU; DDP has the gradients a second time, in its buckets."""
    stage, devices = run.levers.zero_stage, run.levers.devices
    twice = 2 if run.levers.strategy == "ddp" and devices > 1 else 1
    gradients = twice * run.gradient_bytes / (devices if stage >= 2 else 1)
    states = (run.state_bytes - run.gradient_bytes) / (devices if stage >= 1 else 1)
    if run.levers.offload_optimizer:
        states, gradients = 0.0, 0.0 if stage >= 2 else gradients
    return model.trainable * (gradients + states)


def kept_bytes(model: ModelSize, run: Run) -> float:
    """Bytes per token that layers keep on the GPU between forward and backward pass."""
    if not run.levers.gradient_checkpointing:
        return model.layers * _bytes(model, KEPT[run.precision])
    return 0.0 if run.levers.offload_activations else model.layers * model.hidden * _stream(run)


def layer_bytes(model: ModelSize, run: Run) -> float:
    """Bytes per token of the work of one layer, at its most."""
    if not run.training and run.tokens > LONG_PASS:
        return _bytes_in_parts(model, run)
    tile = 1.0 if run.levers.mlp_tile is None else min(1.0, run.levers.mlp_tile / run.tokens)
    plain = PLAIN if tile == 1 else TILED
    kernels = (run.kernels or plain[run.precision]) if run.training else FORWARD[run.precision]
    at_mlp = kernels.mlp._replace(mlp=kernels.mlp.mlp * tile)
    return max(_bytes(model, kernels.rest), _bytes(model, at_mlp))


def _bytes_in_parts(model: ModelSize, run: Run) -> float:
    """Bytes per token of the work of one layer where heads and tokens go in parts."""
    idle, working = IN_PARTS[run.precision]
    share = max(1 / model.heads, min(1.0, QUERIES_AT_A_TIME / (run.tokens * model.query)))
    given = 2 * model.query * (2 if run.precision == "full" else 1)  # what all heads give, once there are groups
    at_work = _bytes(model, working._replace(attention=working.attention * share)) + (given if share < 1 else 0)
    return max(at_work, _bytes(model, idle) + given)


def _units(model: ModelSize) -> Work:
    return Work(2 * model.hidden, 2 * (2 * model.query + 2 * model.keys), 2 * model.mlp)


def _bytes(model: ModelSize, work: Work) -> float:
    return sum(count * unit for count, unit in zip(work, _units(model), strict=True))


def _element(run: Run) -> int:
    """Bytes of a number between two matrix products."""
    return 4 if run.precision == "full" else 2


def _stream(run: Run) -> int:
    """Bytes of a number in the stream from layer to layer, which autocast leaves in float32."""
    return 2 if run.precision == "half" else 4


def peak(model: ModelSize, run: Run) -> float:
    """Bytes at the peak of a step on one GPU."""
    return sum(memory_parts(model, run).values())


def fits(model: ModelSize, run: Run, card: float) -> bool:
    """Whether the estimate leaves a card of so many bytes its headroom."""
    return peak(model, run) <= (1 - HEADROOM) * card


def levers_that_fit(model: ModelSize, run: Run, card: float) -> list[Lever] | None:
    """What makes a run fit: the first saving that does alone, else the first ones that do together.

    Returns:
        None if it does not fit with all of them.
    """

    def fit(levers: Sequence[Lever]) -> bool:
        pulled = run.levers
        for lever in levers:
            pulled = lever.pulled(pulled)
        return fits(model, replace(run, levers=pulled), card)

    for lever in unused_levers(run.levers, run.training):
        if fit([lever]):
            return [lever]
    chosen: list[Lever] = []
    levers = run.levers
    while not fit(chosen):
        following = next(unused_levers(levers, run.training), None)
        if following is None:
            return None
        chosen, levers = [*chosen, following], following.pulled(levers)
    for lever in list(chosen):  # the later ones may have made it needless
        rest = [other for other in chosen if other is not lever]
        chosen = rest if fit(rest) else chosen
    return chosen


def forward_flops(model: ModelSize, seq_len: int) -> float:
    """Floating-point operations of the forward pass of one row: matrices, output head, causal attention."""
    linear = 2 * seq_len * (model.per_token + model.vocabulary * model.hidden)
    return linear + attention_flops(model, seq_len)


def attention_flops(model: ModelSize, seq_len: int) -> float:
    """The share of attention in ``forward_flops``: 4 q for each pair of a token and one it sees."""
    every = seq_len**2 / 2
    pairs = (model.layers - len(model.windows)) * every
    pairs += sum(every if window >= seq_len else window * seq_len - window**2 / 2 for window in model.windows)
    return 4 * model.query * pairs


def step_flops(model: ModelSize, run: Run) -> float:
    """Operations for a row of a training step; what is not kept is computed again, frozen weights need no gradient."""
    forward, attention = forward_flops(model, run.seq_len), attention_flops(model, run.seq_len)
    backward = 2 * attention + (1 + model.trainable / model.parameters) * (forward - attention)
    again = forward if run.levers.gradient_checkpointing else 0
    tiles = 0 if run.levers.mlp_tile is None else 6 * run.seq_len * model.hidden * model.mlp * model.layers
    return forward + backward + again + tiles


def utilisation(seq_len: int) -> float:
    """Share of a GPU's peak to expect: 0.40 up to 128k tokens, 0.35 from 1M on, in between along the logarithm."""
    way = (math.log2(seq_len) - 17) / 3
    return 0.40 - 0.05 * min(1.0, max(0.0, way))


def hours(flops: float, devices: int, tflops: float, seq_len: int) -> float:
    """Hours of so many operations on so many GPUs of a stated peak."""
    return flops / (devices * tflops * 1e12 * utilisation(seq_len)) / 3600


def parts_text(parts: Mapping[str, float]) -> str:
    """The parts in GiB, largest first."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in ordered)
