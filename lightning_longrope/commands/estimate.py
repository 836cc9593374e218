"""``longrope estimate``: memory per GPU and hours of every stage, before anything is spent on them."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.parsing import Parser, at_least, positive
from lightning_longrope.commands.train import split_config, staged_words
from lightning_longrope.estimate import (
    GIB,
    HEADROOM,
    SPREAD,
    ModelSize,
    Run,
    fits,
    forward_flops,
    hours,
    levers_that_fit,
    memory_parts,
    parts_text,
    peak,
    step_flops,
    utilisation,
)
from lightning_longrope.levers import Levers, keys
from lightning_longrope.lora import LoRA
from lightning_longrope.module import LongRoPEModule
from lightning_longrope.recipes import Stage, from_model, read_recipe, recipe_folder
from lightning_longrope.run_settings import levers_of, optimizer_bytes, precision_of
from lightning_longrope.scoring import PASS_TOKENS
from lightning_longrope.search import EvolutionSearch
from lightning_longrope.sizes import model_size, read_config

TFLOPS = 989.0
"""Peak of an H100 or H200 in bf16, without sparsity."""


@dataclass(frozen=True)
class Case:
    """One thing that a stage does, and how much of it.

    Attributes:
        what: training, search or evaluation.
        run: How it runs.
        amount: What is done, for people; empty where nobody knows.
        flops: Operations over all GPUs, 0 where nobody knows.
    """

    what: str
    run: Run
    amount: str = ""
    flops: float = 0.0


def estimate(command: str, arguments: list[str]) -> None:
    """``longrope estimate -c CONFIG``: of a configuration, a stage file or a recipe's folder."""
    given, rest = _parser().parse_known_args(arguments)
    total = 0.0
    for name, config, earlier in _stages(split_config(rest), given.command, given.model):
        size = _size(config, earlier)
        trained = f", {_count(size.trainable)} of them trained" if size.trainable < size.parameters else ""
        sys.stdout.write(f"{name}: {_count(size.parameters)} parameters{trained}\n")
        for case in _cases(config, size, given.gpus, given.nodes):
            spent = hours(case.flops, case.run.levers.devices, given.tflops, case.run.seq_len)
            total += spent
            for line in _lines(case, size, spent, given.gpu_memory, given.tflops):
                sys.stdout.write(f"  {line}\n")
    sys.stdout.write(
        f"together {_duration(total)}; GPUs reach other shares of their peak than assumed: 2x either way\n"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="longrope estimate",
        description="Memory per GPU and hours of a configuration, a stage file or a recipe's folder (-c). Further"
        " options are those of `longrope fit`: --model.name_or_path, --data.seq_len, --trainer.strategy, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=at_least(1), help="GPUs of a node; trainer.devices, or 1")
    parser.add_argument("--nodes", type=at_least(1), help="nodes; trainer.num_nodes")
    parser.add_argument(
        "--gpu-memory", type=positive, metavar="GIB", help="memory of a GPU: whether it fits, or what would"
    )
    parser.add_argument(
        "--tflops", type=positive, default=TFLOPS, help=f"peak of a GPU in TFLOP/s ({TFLOPS:.0f}, an H100 in bf16)"
    )
    parser.add_argument(
        "--model.name_or_path", dest="model", help="a pretrained model; stages that make one are left out"
    )
    parser.add_argument(
        "--command",
        choices=LongRoPECLI.subcommands(),
        default="fit",
        help="what a configuration without `command` is for (fit)",
    )
    return parser


def _stages(words: list[str], command: str, model: str | None) -> Iterator[tuple[str, dict[str, Any], Sequence[Stage]]]:
    """Name, parsed configuration and the stages before it, of each stage that was asked for."""
    place = next((i for i, word in enumerate(words[:-1]) if word in ("-c", "--config")), None)
    path = None if place is None else recipe_folder(Path(words[place + 1]))
    if place is None or path is None or not os.path.isdir(path):
        yield _alone(words if model is None else [*words, "--model.name_or_path", model], command, path)
        return
    stages = read_recipe(path, Path("runs") / path.resolve().name)
    stages = stages if model is None else from_model(stages, model)
    for number, stage in enumerate(stages):
        if stage.command != "export":
            overrides = words[:place] + words[place + 2 :]
            parsed = _parsed(stage.command, ["--config", yaml.safe_dump(stage.config), *overrides])
            yield f"{stage.name} ({stage.command})", parsed, stages[:number]


def _alone(words: list[str], command: str, path: Path | None) -> tuple[str, dict[str, Any], Sequence[Stage]]:
    """A configuration or a single stage, whose recipe says where its model comes from."""
    words, stage, _ = staged_words(words)
    if stage is None or path is None:
        return command, _parsed(command, words), []
    earlier = [other for other in read_recipe(path.parent, stage.out) if other.name != stage.name]
    return f"{stage.name} ({stage.command})", _parsed(stage.command, words), earlier


def _parsed(command: str, words: list[str]) -> dict[str, Any]:
    if command not in LongRoPECLI.subcommands():
        raise ValueError(f"there is nothing to estimate in `longrope {command}`.")
    config = LongRoPECLI([command, *words], check=True).config
    return {**config[config.subcommand].as_dict(), "command": command}


def _size(config: dict[str, Any], earlier: Sequence[Stage]) -> ModelSize:
    """The model of a stage, which an earlier one may be about to make."""
    model = _arguments(config)
    source = {name: model.get(name) for name in ("name_or_path", "config")}
    while makers := [stage for stage in earlier if str(source["name_or_path"]).startswith(f"{stage.folder}/")]:
        arguments = makers[0].config.get("model", {}).get("init_args", {})
        source = {name: arguments.get(name) for name in ("name_or_path", "config")}
    if source["name_or_path"] is None and source["config"] is None:
        raise ValueError("`longrope estimate` needs a model: `--model.name_or_path NAME` or `--model.config`.")
    adapters = LoRA(**model["lora"]) if model.get("lora") else None
    trusted = bool(model.get("trust_remote_code"))
    return _counted(yaml.safe_dump(source), adapters, trusted)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model; what a subclass does not have is as in ``LongRoPEModule``, where that is plain."""
    known = {name: parameter.default for name, parameter in signature(LongRoPEModule).parameters.items()}
    plain = {name: default for name, default in known.items() if default is None or isinstance(default, str | bool)}
    return {"optimizer": None, **plain, **config["model"].get("init_args", {})}


@cache
def _counted(source: str, lora: LoRA | None, trust_remote_code: bool) -> ModelSize:
    config = read_config(**yaml.safe_load(source), trust_remote_code=trust_remote_code)
    return model_size(config, lora, trust_remote_code)


def _cases(config: dict[str, Any], size: ModelSize, gpus: int | None, nodes: int | None) -> Iterator[Case]:
    """What a stage does with its model."""
    trainer, model = config["trainer"], _arguments(config)
    data = (config.get("data") or {}).get("init_args", {})
    gpus = gpus or _devices(trainer["devices"])
    levers = levers_of(trainer["strategy"], model, gpus * (nodes or trainer["num_nodes"]), size.heads)
    precision, weight, gradient, copy = precision_of(
        levers.strategy, trainer["precision"], model["dtype"], model["lora"]
    )
    states = gradient + copy + optimizer_bytes(model["optimizer"], 4 if copy else gradient)
    run = Run(data.get("seq_len", 0), 1, levers, True, precision, weight, states, gradient)
    entries = trainer["callbacks"] or []
    entries = entries if isinstance(entries, list) else [entries]
    callbacks = [(entry["class_path"].rsplit(".", 1)[-1], entry.get("init_args", {})) for entry in entries]
    for kind, arguments in callbacks:
        if kind == "FactorSearch":
            yield _search(size, run, arguments)
    if config["command"] == "fit":
        yield _training(size, run, trainer, data)
    else:
        lengths = [length for _, arguments in callbacks for length in arguments.get("lengths") or ()]
        if lengths:
            yield Case("evaluation", replace(run, seq_len=max(lengths), training=False))


def _devices(devices: list[int] | str | int) -> int:
    """GPUs of a node that ``trainer.devices`` stands for, 1 for ``auto``.

    Raises:
        ValueError: If it means all GPUs, and there are none here to count.
    """
    if devices == "auto":
        return 1
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return len(devices)
    count = torch.cuda.device_count() if int(devices) == -1 else int(devices)
    if count < 1:
        raise ValueError(f"`trainer.devices: {devices}` does not say how many GPUs a node has: give --gpus.")
    return count


def _search(size: ModelSize, run: Run, arguments: dict[str, Any]) -> Case:
    length = arguments["target_length"] or run.seq_len
    if not length:
        raise ValueError("FactorSearch needs a `target_length`, or a datamodule with `seq_len`.")
    candidates = arguments["max_evaluations"] or _evaluations(arguments["algorithm"], length)
    formulas = 5 if arguments["recovery"] else 3
    forwards = arguments["documents"] * (candidates + formulas) + arguments["held_out"] * (1 + formulas)
    rows = max(1, (arguments["batch_tokens"] or PASS_TOKENS["cuda"]) // length)
    fewer = any(arguments.get(name) for name in ("race", "patience", "schedule"))
    count = f"at most {forwards}" if fewer else str(forwards)
    amount = f"{count} forward passes of {length:,} tokens ({candidates} candidates, {formulas} baselines)"
    return Case(
        "search",
        replace(run, seq_len=length, rows=rows, training=False),
        amount,
        forwards * forward_flops(size, length),
    )


def _evaluations(algorithm: dict[str, Any] | None, length: int) -> int:
    """Candidates of a search whose configuration names no number."""
    algorithm = algorithm or {"class_path": "lightning_longrope.search.RampSearch"}
    module, name = algorithm["class_path"].rsplit(".", 1)
    made = getattr(import_module(module), name)(**algorithm.get("init_args", {}))
    if made.max_evaluations is None and isinstance(made, EvolutionSearch):
        half = 2 if made.halve_beyond is not None and length > made.halve_beyond else 1
        return (made.population + made.iterations * (made.mutants + made.crossovers)) // half
    if made.max_evaluations is None:
        raise ValueError(f"{name} has no budget of its own: set `max_evaluations` of FactorSearch.")
    return int(made.max_evaluations)


def _training(size: ModelSize, run: Run, trainer: dict[str, Any], data: dict[str, Any]) -> Case:
    if not run.seq_len:
        raise ValueError("`longrope estimate` needs the length of rows: a datamodule with `seq_len`.")
    run = replace(run, rows=data.get("batch_size") or 1)
    groups = run.levers.devices // run.levers.sequence_parallel_size
    rows, steps = run.rows * groups * trainer["accumulate_grad_batches"], max(trainer["max_steps"], 0)
    amount = f"{steps or 'an unknown number of'} steps of {rows} rows of {run.seq_len:,} tokens"
    return Case("training", run, amount, (steps or 1) * rows * step_flops(size, run))


def _lines(case: Case, size: ModelSize, spent: float, card: float | None, tflops: float) -> Iterator[str]:
    need = peak(size, case.run) / GIB
    low, high = (need * (1 + sign * SPREAD) for sign in (-1, 1))
    verdict = "" if card is None else _verdict(size, case.run, card)
    yield f"{case.what:<11}{need:.1f} GiB +- {SPREAD:.0%} per GPU ({low:.1f} to {high:.1f}){verdict}"
    yield f"{'':<11}{parts_text(memory_parts(size, case.run))}"
    if card is not None and not fits(size, case.run, card * GIB):
        yield f"{'':<11}{_remedy(size, case.run, card)}"
    if case.amount:
        share = utilisation(case.run.seq_len)
        what = "one of " if "unknown" in case.amount else ""
        yield (
            f"{'':<11}{_duration(spent)} for {what}{case.amount}: {case.flops:.2g} FLOPs,"
            f" {case.run.levers.devices} GPUs at {share:.0%} of {tflops:g} TFLOP/s"
        )


def _verdict(size: ModelSize, run: Run, card: float) -> str:
    fit = "fits" if fits(size, run, card * GIB) else "does not fit"
    return f", {fit} {card:g} GiB with {HEADROOM:.0%} headroom"


def _remedy(size: ModelSize, run: Run, card: float) -> str:
    levers = levers_that_fit(size, run, card * GIB)
    if levers is None:
        return "no saving makes it fit: more GPUs, LoRA (`model.init_args.lora`), fewer or shorter rows"
    after: Levers = run.levers
    for lever in levers:
        after = lever.pulled(after)
    names, settings = (
        ", ".join(lever.name for lever in levers),
        ", ".join(f"`{key}`" for key in keys(run.levers, after)),
    )
    return f"fits with {names}: {settings} ({peak(size, replace(run, levers=after)) / GIB:.1f} GiB)"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _duration(spent: float) -> str:
    return f"{spent:.1f} h" if spent >= 1 else f"{spent * 60:.1f} min" if spent >= 1 / 60 else f"{spent * 3600:.1f} s"
