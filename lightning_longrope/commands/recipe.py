"""``longrope run``: the numbered stages of a folder, in order.

Where a launcher has started several processes, all of them run every stage together; what is finished and where a stage
goes on is decided by the first, which alone exports, keeps ``done.json`` and ``run.json``, and writes the report. The
output folder must be on a file system that all nodes share.
"""

import argparse
import gc
import json
import logging
import os
import platform
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_longrope import __version__, peers
from lightning_longrope.checkpoints import put_back, saved_step
from lightning_longrope.cli import LongRoPECLI, only_run
from lightning_longrope.commands.export import CHECKPOINT, export_arguments, export_checkpoint
from lightning_longrope.commands.parsing import Parser, folder_name
from lightning_longrope.files import write_json
from lightning_longrope.recipes import Stage, from_model, read_recipe, recipe_folder, with_seed
from lightning_longrope.redaction import redact_all, redact_words

log = logging.getLogger("lightning_longrope")

_WITHIN = "LONGROPE_WITHIN"
"""Tells processes that Lightning starts in the midst of a stage which one that is, and its words."""


def run(command: str, arguments: list[str]) -> None:
    """``longrope run RECIPE``: every stage that is not finished, then the report."""
    parser = Parser(
        prog="longrope run", description="Runs the numbered stages of a folder in order.", allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="folder with files such as 1-search.yaml, or quickstart, ...")
    parser.add_argument("--out", type=folder_name, help="output folder; runs/<recipe> by default")
    parser.add_argument("--seed", type=int, help="seed of every stage, in place of those in the files")
    parser.add_argument("--short", action="store_true", help="few steps, for tests")
    parser.add_argument(
        "--model.name_or_path", dest="model", help="a pretrained model; stages that make one are left out"
    )
    given, overrides = parser.parse_known_args(arguments)
    out = given.out or Path("runs") / given.recipe.resolve().name
    folder = recipe_folder(given.recipe)
    stages = read_recipe(folder, out, short=given.short)
    stages = stages if given.model is None else from_model(stages, given.model)
    stages = stages if given.seed is None else [with_seed(stage, given.seed) for stage in stages]
    stages = [replace(stage, overrides=tuple(overrides)) for stage in stages]
    for stage in stages:
        _check(stage)
        if stage.root not in (None, str(stage.folder)):
            log.info("%s writes to %s: `trainer.default_root_dir` is set aside in a recipe.", stage.name, stage.folder)
    with only_run(out):
        if peers.current() is not None:
            _check_shared(out)
        _run_all(out, given, folder, shlex.join(redact_words(["longrope", command, *arguments])), stages)


def _run_all(out: Path, given: argparse.Namespace, folder: Path, command: str, stages: list[Stage]) -> None:
    """Runs what is not finished, and writes the report."""
    record = {
        "recipe": str(given.recipe),
        "folder": str(folder.resolve()),
        "command": command,
        "seed": given.seed,
        "versions": {"python": platform.python_version(), "lightning_longrope": __version__}
        | {name: version(name) for name in ("torch", "lightning", "transformers")},
        "machine": _machine(),
    }
    for number, stage, words in _unfinished(stages):
        log.info("[%d/%d] %s (%s)", number, len(stages), stage.name, stage.command)
        _run_stage(stage, words)
        _write_record(out, record, stages)
    _write_record(out, record, stages)
    if peers.is_first():
        from lightning_longrope.reporting import write_report

        sys.stdout.write(f"{write_report(out)}\n")


def _check(stage: Stage) -> None:
    """Parses a stage's configuration, so that a misspelt key stops the recipe before its first hour."""
    try:
        if stage.command == "export":
            export_arguments(stage)
        elif stage.command in LongRoPECLI.subcommands():
            LongRoPECLI(stage_words(stage), check=True)
        else:
            raise ValueError(f"`command` must be export or one of {', '.join(LongRoPECLI.subcommands())}.")
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error


def _check_shared(out: Path) -> None:
    """Raises ValueError where this process does not see what the first one writes."""

    def write() -> str:
        for earlier in out.glob(".seen-*"):  # of a run that was killed
            earlier.unlink()
        (mark := out / f".seen-{secrets.token_hex(8)}").touch()
        return mark.name

    mark, end = out / peers.decide(write), time.monotonic() + 10
    try:
        while not mark.exists():
            if time.monotonic() > end:
                raise ValueError(
                    f"{socket.gethostname()} does not see {out.resolve()} of the first node: --out must name a folder"
                    " on a file system that all nodes share."
                )
            time.sleep(0.2)
        peers.wait()
    finally:
        if peers.is_first():
            mark.unlink(missing_ok=True)


def _unfinished(stages: list[Stage]) -> Iterator[tuple[int, Stage, list[str]]]:
    """Number, stage and words of every stage that is not finished, the same on every process.

    Raises:
        ValueError: If a stage was finished or cut with another configuration, or the nodes have different ones.
    """
    within = json.loads(os.environ.pop(_WITHIN, "null"))
    if within is None:
        theirs = peers.decide(lambda: [(stage.digest, _is_finished(stage)) for stage in stages])
        if [digest for digest, _ in theirs] != [stage.digest for stage in stages]:
            raise ValueError(f"{socket.gethostname()} has another recipe than the first node: give all nodes the same.")
        peers.wait()  # before anything runs
    try:
        for number, stage in enumerate(stages, 1):
            if within is not None and number < within[0]:
                continue
            if within is not None and number == within[0]:
                words = within[1]
            elif (words := peers.decide(partial(_words, stage))) is None:
                log.info("[%d/%d] %s is finished, skipped", number, len(stages), stage.name)
                continue
            os.environ[_WITHIN] = json.dumps([number, words])
            yield number, stage, words
    finally:
        os.environ.pop(_WITHIN, None)


def _words(stage: Stage) -> list[str] | None:
    """The words of a stage, None if it is finished."""
    if _is_finished(stage):
        return None
    if (begun := stage.begun) is None or not stage.is_of(begun):
        write_json(stage.folder / "begun.json", {"config": stage.digest})
    return [] if stage.command == "export" else stage_words(stage)


def _is_finished(stage: Stage) -> bool:
    done, begun = stage.finished, stage.begun
    put_back(stage.folder / CHECKPOINT)
    resumed = begun if stage.command == "fit" and (stage.folder / CHECKPOINT).exists() else None
    if (note := done or resumed) is not None and not stage.is_of(note):
        raise ValueError(
            f"stage {stage.name} was {'finished' if done else 'begun'} in {stage.folder} with another configuration or"
            " other options of the command line. Choose another folder with --out, or delete that one to run the stage"
            " again."
        )
    return done is not None


def stage_words(stage: Stage) -> list[str]:
    """The command line of a stage; one that was cut goes on from its last checkpoint."""
    words = [stage.command, "--config", yaml.safe_dump(stage.config), *stage.overrides]
    words += ["--trainer.default_root_dir", str(stage.folder)]
    put_back(stage.folder / CHECKPOINT)
    if stage.command == "fit" and (stage.folder / CHECKPOINT).exists():
        words += ["--ckpt_path", str(stage.folder / CHECKPOINT)]
    return words


def _run_stage(stage: Stage, words: list[str]) -> None:
    begin = time.perf_counter()
    if stage.command != "export":
        trainer = LongRoPECLI(words).trainer
        if stage.command == "fit":
            peers.decide(partial(_check_last, stage, trainer))
    elif peers.is_first():
        export_checkpoint(**export_arguments(stage))
    # What a stage leaves in memory is no business of the next one.
    gc.collect()
    torch.compiler.reset()
    seconds = round(time.perf_counter() - begin, 1)
    peers.wait()  # a stage is finished when all have ended it
    if peers.is_first():
        write_json(stage.folder / "done.json", {"config": stage.digest, "seconds": seconds})


def _check_last(stage: Stage, trainer: Trainer) -> None:
    """Raises ValueError where the last checkpoint, which later stages take, is not the last one that was saved."""
    last = stage.folder / CHECKPOINT
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint) and saver.save_last]
    savers = [saver for saver in savers if saver.dirpath == os.path.realpath(last.parent)]
    if not last.exists() or not any(saver._last_global_step_saved for saver in savers):
        return
    ours = [saver._last_global_step_saved for saver in savers if Path(saver.last_model_path).name == last.name]
    if (step := saved_step(last)) != max(ours, default=None):
        others = ", ".join(sorted(saver.last_model_path for saver in savers))
        raise ValueError(
            f"stage {stage.name} has left {last} of step {step} as it was, and saved {others}: choose another folder"
            " with --out, or delete that one to run the stage again."
        )
    if step < trainer.global_step:
        log.warning("%s is of step %d of %d: its ModelCheckpoint saved no later one.", last, step, trainer.global_step)


def _write_record(out: Path, record: dict[str, Any], stages: list[Stage]) -> None:
    if not peers.is_first():
        return
    rows = [
        {"name": stage.name, "command": stage.command}
        | ({"seconds": done["seconds"], "status": "finished"} if (done := stage.finished) else {"status": "waiting"})
        for stage in stages
    ]
    write_json(out / "run.json", redact_all({**record, "stages": rows}))


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}"
