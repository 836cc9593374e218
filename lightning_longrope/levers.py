"""What makes a training step need less memory, in the order in which it is worth trying, and the key that sets it.

    chunked loss, checkpointed layers, layer inputs and states on the CPU, MLP in tiles, sequence parallel, ZeRO stage

``LongRoPEModule`` always has its loss in chunks. ``estimate`` tries the others out; a run that ends out of memory names
the next one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

TILE = 4096
"""Tokens of an MLP tile that is proposed."""

LONG_PASS = 65_536
"""Tokens of a forward pass without gradients beyond which it goes in parts by itself (see ``long_rows``)."""

QUERIES_AT_A_TIME = 2**30
"""Elements of the queries of heads that attend at a time there."""

Moment = Literal["setup", "training", "forward"]

_SHARED = {"zero_stage", "offload_optimizer", "offload_parameters"}
"""What makes weights and states take less room."""

_CLASSES = {
    "ddp": "lightning_longrope.strategies.LongContextDDPStrategy",
    "fsdp2": "lightning_longrope.strategies.LongContextFSDP2Strategy",
    "deepspeed": "lightning_longrope.strategies.LongContextDeepSpeedStrategy",
}


@dataclass(frozen=True)
class Levers:
    """What a run does already to need less memory.

    Attributes:
        strategy: Which kind of strategy it has.
        own: Whether that is one of this package's, which have the arguments named here.
        devices: Number of ranks, over all nodes.
        heads: Attention heads of the model, which ``sequence_parallel_size`` must divide.
        zero_stage: 1 to 3 under DeepSpeed, 3 under FSDP2, else 0.
        offload_optimizer: Optimizer states and gradients are on the CPU.
        offload_parameters: Weights are on the CPU.
        sequence_parallel_size: Ranks that share a row.
        chunked_loss: The logits of a whole row never exist at once.
        gradient_checkpointing: Layers keep only their inputs.
        offload_activations: These are on the CPU.
        mlp_tile: Tokens that go through an MLP at a time.
    """

    strategy: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    own: bool = True
    devices: int = 1
    heads: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    sequence_parallel_size: int = 1
    chunked_loss: bool = True
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    mlp_tile: int | None = None


@dataclass(frozen=True)
class Lever:
    """A saving of memory that a run does not use yet.

    Attributes:
        name: What it is, for people.
        changes: Fields of ``Levers`` that it sets.
    """

    name: str
    changes: Mapping[str, Any]

    def pulled(self, levers: Levers) -> Levers:
        """A run with it."""
        return replace(levers, **self.changes)


def unused_levers(levers: Levers, training: bool = True) -> Iterator[Lever]:
    """What could be done next, in order.

    Args:
        levers: What is done already.
        training: False for forward passes alone, which keep neither inputs of layers nor states.
    """
    if training:
        yield from _for_the_backward_pass(levers)
    if levers.mlp_tile is None:
        yield Lever("tiled MLP", {"mlp_tile": TILE})
    ranks = levers.sequence_parallel_size * 2
    if levers.devices % ranks == 0 and levers.heads % ranks == 0:
        strategy = "ddp" if levers.strategy == "single" else levers.strategy
        yield Lever("sequence parallel", {"strategy": strategy, "own": True, "sequence_parallel_size": ranks})
    if levers.zero_stage < 3:
        changes = {"strategy": "deepspeed", "own": True, "zero_stage": 3}
        if training and levers.devices == 1:  # nobody to share with, but DeepSpeed can offload
            changes["offload_optimizer"] = True
        yield Lever("ZeRO stage 3", changes)


def _for_the_backward_pass(levers: Levers) -> Iterator[Lever]:
    if not levers.chunked_loss:
        yield Lever("chunked loss", {"chunked_loss": True})
    if not levers.gradient_checkpointing:
        yield Lever("activation checkpointing", {"gradient_checkpointing": True})
    elif not levers.offload_activations:
        yield Lever("offload of layer inputs", {"offload_activations": True})
    if levers.strategy == "deepspeed" and levers.zero_stage and not levers.offload_optimizer:
        yield Lever("offload of the optimizer", {"own": True, "offload_optimizer": True})
    if levers.strategy == "deepspeed" and levers.zero_stage == 3 and not levers.offload_parameters:
        yield Lever("offload of the weights", {"own": True, "offload_parameters": True})


def keys(before: Levers, after: Levers) -> list[str]:
    """What to set in a configuration to come from one run to the other."""
    found = []
    if after.chunked_loss != before.chunked_loss:
        found.append("lightning_longrope.losses.chunked_nll as the loss")
    if after.gradient_checkpointing != before.gradient_checkpointing:
        found.append("model.init_args.gradient_checkpointing: true")
    if after.offload_activations != before.offload_activations:
        found.append("model.init_args.memory.offload_activations: true")
    if after.mlp_tile != before.mlp_tile:
        found.append(f"model.init_args.memory.mlp_tile: {after.mlp_tile}")
    old, new = _strategy_arguments(before), _strategy_arguments(after)
    if before.strategy == after.strategy and before.own:
        changed = [name for name in new if new[name] != old.get(name)]
        return found + [f"trainer.strategy.init_args.{name}: {new[name]}" for name in changed]
    if old != new or before.strategy != after.strategy:
        inner = ", ".join(f"{name}: {value}" for name, value in new.items())
        found.append(f"trainer.strategy: {{class_path: {_CLASSES[after.strategy]}, init_args: {{{inner}}}}}")
    return found


def _strategy_arguments(levers: Levers) -> dict[str, str]:
    """Arguments of this package's strategy for a run, as YAML, those at their defaults left out."""
    arguments = {}
    if levers.strategy == "deepspeed":
        arguments["stage"] = str(levers.zero_stage)
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(levers, name):
                arguments[name] = "true"
    if levers.sequence_parallel_size > 1:
        arguments["sequence_parallel_size"] = str(levers.sequence_parallel_size)
    return arguments


def advice(levers: Levers, moment: Moment = "training") -> str:
    """One line: what a run that ended out of memory should try next.

    Args:
        levers: What it does already.
        moment: Where it ended: before the first step, in one, or in a forward pass without gradients.
    """
    possible = unused_levers(levers, moment != "forward")
    if moment == "setup":  # nothing but weights and states so far
        possible = (lever for lever in possible if _SHARED & set(lever.changes))
    lever = next(possible, None)
    if lever is None:
        return (
            "Out of memory with every saving in use. Next: more GPUs, LoRA (`model.init_args.lora`), fewer rows"
            " (`data.init_args.batch_size`) or shorter ones (`data.init_args.seq_len`)."
        )
    setting = ", ".join(f"`{key}`" for key in keys(levers, lever.pulled(levers)))
    return f"Out of memory. Next: {lever.name}, {setting}; `longrope estimate` says what it saves."
