"""``longrope run``: the numbered stages of a folder, in order."""

import gc
import logging
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from lightning_longrope import __version__
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.export import CHECKPOINT, export_arguments, export_checkpoint
from lightning_longrope.commands.parsing import Parser
from lightning_longrope.files import write_json
from lightning_longrope.recipes import Stage, from_model, read_recipe, with_seed
from lightning_longrope.redaction import redact_all

log = logging.getLogger("lightning_longrope")


def run(command: str, arguments: list[str]) -> None:
    """``longrope run RECIPE``: every stage that is not finished, then the report."""
    parser = Parser(prog="longrope run", description="Runs the numbered stages of a folder in order.")
    parser.add_argument("recipe", type=Path, help="folder with files such as 1-search.yaml")
    parser.add_argument("--out", type=Path, help="output folder; runs/<recipe> by default")
    parser.add_argument("--seed", type=int, help="seed of every stage, in place of those in the files")
    parser.add_argument("--short", action="store_true", help="few steps, for tests")
    parser.add_argument(
        "--model.name_or_path", dest="model", help="a pretrained model; stages that make one are left out"
    )
    given, overrides = parser.parse_known_args(arguments)
    out = given.out or Path("runs") / given.recipe.resolve().name
    stages = read_recipe(given.recipe, out, short=given.short)
    stages = stages if given.model is None else from_model(stages, given.model)
    stages = stages if given.seed is None else [with_seed(stage, given.seed) for stage in stages]
    for stage in stages:
        _check(stage, overrides)
    pending = [stage for stage in stages if not _is_finished(stage)]
    record = {
        "recipe": str(given.recipe),
        "command": shlex.join(["longrope", command, *arguments]),
        "seed": given.seed,
        "versions": {"python": platform.python_version(), "lightning_longrope": __version__}
        | {name: version(name) for name in ("torch", "lightning", "transformers")},
        "machine": _machine(),
    }
    for number, stage in enumerate(stages, 1):
        if stage in pending:
            log.info("[%d/%d] %s (%s)", number, len(stages), stage.name, stage.command)
            _run_stage(stage, overrides)
        else:
            log.info("[%d/%d] %s is finished, skipped", number, len(stages), stage.name)
        _write_record(out, record, stages)
    if _is_main_process():
        from lightning_longrope.reporting import write_report

        sys.stdout.write(f"{write_report(out)}\n")


def _check(stage: Stage, overrides: list[str]) -> None:
    """Parses a stage's configuration, so that a misspelt key stops the recipe before its first hour."""
    try:
        if stage.command == "export":
            export_arguments(stage)
        elif stage.command in LongRoPECLI.subcommands():
            LongRoPECLI(stage_words(stage, overrides), check=True)
        else:
            raise ValueError(f"`command` must be export or one of {', '.join(LongRoPECLI.subcommands())}.")
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error


def _is_finished(stage: Stage) -> bool:
    done = stage.finished
    if done is not None and done["config"] != stage.digest:
        raise ValueError(
            f"stage {stage.name} was finished in {stage.folder} with another configuration."
            " Choose another folder with --out, or delete that one to run the stage again."
        )
    return done is not None


def stage_words(stage: Stage, overrides: list[str]) -> list[str]:
    """The command line of a stage; one that was cut goes on from its last checkpoint."""
    words = [stage.command, "--config", yaml.safe_dump(stage.config), *overrides]
    words += ["--trainer.default_root_dir", str(stage.folder)]
    if stage.command == "fit" and (stage.folder / CHECKPOINT).exists():
        words += ["--ckpt_path", str(stage.folder / CHECKPOINT)]
    return words


def _run_stage(stage: Stage, overrides: list[str]) -> None:
    begin = time.perf_counter()
    if stage.command == "export":
        export_checkpoint(**export_arguments(stage))
    else:
        LongRoPECLI(stage_words(stage, overrides))
    # What a stage leaves in memory is no business of the next one.
    gc.collect()
    torch.compiler.reset()
    if _is_main_process():
        seconds = round(time.perf_counter() - begin, 1)
        write_json(stage.folder / "done.json", {"config": stage.digest, "seconds": seconds})


def _write_record(out: Path, record: dict[str, Any], stages: list[Stage]) -> None:
    if not _is_main_process():
        return
    rows = [
        {"name": stage.name, "command": stage.command}
        | ({"seconds": done["seconds"], "status": "finished"} if (done := stage.finished) else {"status": "waiting"})
        for stage in stages
    ]
    write_json(out / "run.json", redact_all({**record, "stages": rows}))


def _is_main_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}"
