"""What each word after ``longrope`` does."""

import argparse
import gc
import logging
import os
import platform
import shlex
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_longrope import __version__
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.datamodules.sample_text import library_sources
from lightning_longrope.files import write_json
from lightning_longrope.model import installed_factors, load_model, load_tokenizer
from lightning_longrope.recipes import Stage, from_model, read_recipe, read_stage, with_seed

log = logging.getLogger("lightning_longrope")

CHECKPOINT = Path("checkpoints") / "last.ckpt"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def trainer(command: str, arguments: list[str]) -> None:
    """``fit``, ``validate``, ``test``, ``search`` and ``compare``: LightningCLI, which also takes a stage file."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    given, words = parser.parse_known_args(arguments)
    out, config = given.out, None
    for index, word in enumerate(words[:-1]):
        if word in ("-c", "--config") and _is_stage(path := Path(words[index + 1])):
            stage = read_stage(path, Path(out or Path("runs") / path.parent.name))
            if stage.command != command:
                raise ValueError(f"{path} is a configuration of `longrope {stage.command}`, not of `{command}`.")
            config = stage
            words[index + 1] = yaml.safe_dump(stage.config)
    if config is not None:
        words += ["--trainer.default_root_dir", str(config.folder)]
    elif out is not None:
        words += ["--trainer.default_root_dir", out]
    LongRoPECLI([command, *words])


def _is_stage(path: Path) -> bool:
    """Whether a file has the key that only stage files have; files that cannot be read are left to LightningCLI."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "command" in content


def run(command: str, arguments: list[str]) -> None:
    """``longrope run RECIPE``: every stage that is not finished, then the report."""
    parser = _Parser(prog="longrope run", description="Runs the numbered stages of a folder in order.")
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
            _export_arguments(stage)
        elif stage.command in LongRoPECLI.subcommands():
            LongRoPECLI(_words(stage, overrides), check=True)
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


def _words(stage: Stage, overrides: list[str]) -> list[str]:
    words = [stage.command, "--config", yaml.safe_dump(stage.config), *overrides]
    words += ["--trainer.default_root_dir", str(stage.folder)]
    if stage.command == "fit" and (stage.folder / CHECKPOINT).exists():
        words += ["--ckpt_path", str(stage.folder / CHECKPOINT)]
    return words


def _run_stage(stage: Stage, overrides: list[str]) -> None:
    begin = time.perf_counter()
    if stage.command == "export":
        export_checkpoint(**_export_arguments(stage))
    else:
        LongRoPECLI(_words(stage, overrides))
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
    write_json(out / "run.json", {**record, "stages": rows})


def _is_main_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}"


def _export_arguments(stage: Stage) -> dict[str, Any]:
    allowed = {"run", "out", "tokenizer", "drop_start_tokens"}
    unknown = sorted(set(stage.config) - allowed)
    missing = sorted({"run", "out"} - set(stage.config))
    if unknown or missing:
        raise ValueError(f"`export` takes {', '.join(sorted(allowed))}; unknown: {unknown}, missing: {missing}.")
    return stage.config


def export(command: str, arguments: list[str]) -> None:
    """``longrope export RUN OUT``."""
    parser = _Parser(prog="longrope export", description="Writes a Hugging Face folder from a run or a checkpoint.")
    parser.add_argument("run", help="output folder of a recipe or a stage, a .ckpt, or a model folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer; the one of the run by default")
    parser.add_argument("--drop-start-tokens", action="store_true", help="export although that changes the model")
    sys.stdout.write(f"{export_checkpoint(**vars(parser.parse_args(arguments)))}\n")


def export_checkpoint(run: str, out: str, tokenizer: str | None = None, drop_start_tokens: bool = False) -> Path:
    """Writes a Hugging Face folder from a run, a stage, a checkpoint or a model folder.

    Args:
        run: Output folder of a recipe or of a stage (its last checkpoint is taken), a ``.ckpt``, or a model folder.
        out: Folder to write.
        tokenizer: Name or folder of the tokenizer; by default the one of the run.
        drop_start_tokens: Export although Hugging Face cannot leave the start tokens as they were pretrained.

    Returns:
        The folder.
    """
    from lightning_longrope.export import export_model

    checkpoint = find_checkpoint(Path(run))
    found = tokenizer or find_tokenizer(checkpoint)
    if found is None:
        log.info("No tokenizer found near %s: exporting the model alone (--tokenizer adds one).", checkpoint)
    model, tokens = load_model(str(checkpoint)), load_tokenizer(found) if found else None
    return export_model(model, tokens, out, drop_start_tokens=drop_start_tokens, example=_example(model, tokens))


def _example(model: Any, tokenizer: Any) -> torch.Tensor | None:
    """Text to measure on what dropping start tokens would cost: at most 32k tokens; None where it is not needed."""
    factors = installed_factors(model)
    if tokenizer is None or factors is None or not factors.start_tokens:
        return None
    length, tokens = min(factors.target_length, 32_768), []
    for text in library_sources():
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= length:
            break
    return torch.tensor(tokens[:length])


def find_tokenizer(checkpoint: Path) -> str | None:
    """The tokenizer in a model folder, or the one that the run around a checkpoint has made."""
    places = ("tokenizer_config.json", "data/tokenizer-*/tokenizer_config.json")
    folders = (checkpoint, *checkpoint.absolute().parents[:3])
    return next((str(path.parent) for folder in folders for place in places for path in folder.glob(place)), None)


def find_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a recipe's or stage's folder; a checkpoint or model folder is returned as it is.

    Raises:
        ValueError: If there is none.
    """
    if run.suffix == ".ckpt" and run.exists() or (run / "config.json").exists():
        return run
    found = sorted(run.glob(f"*/{CHECKPOINT}"), key=lambda path: int(path.parts[-3].split("-")[0]))
    candidates = [run / CHECKPOINT] if (run / CHECKPOINT).exists() else found
    if not candidates:
        raise ValueError(f"No checkpoint in {run}: expected a .ckpt, a model folder, or a run with {CHECKPOINT}.")
    return candidates[-1]


def report(command: str, arguments: list[str]) -> None:
    """``longrope report RUN``."""
    parser = _Parser(prog="longrope report", description="Writes report.html, figures and one results.csv of a run.")
    parser.add_argument("run", type=Path, help="output folder of a recipe or a stage")
    given = parser.parse_args(arguments)
    from lightning_longrope.reporting import write_report

    sys.stdout.write(f"{write_report(given.run)}\n")


def run_command(command: str, arguments: list[str]) -> int:
    """Runs one command of the command line; see ``__main__``.

    Returns:
        The exit status: 2 after one line on what the user can mend, which starts with ``longrope: error:``.
    """
    _quiet()
    known = {**dict.fromkeys(LongRoPECLI.subcommands(), trainer), "run": run}
    known |= {"export": export, "report": report}
    try:
        if command not in known:
            raise ValueError(f"there is no command {command!r}; there are {', '.join(known)}.")
        known[command](command, arguments)
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("LONGROPE_TRACEBACK"):
            raise
        sys.stderr.write(f"longrope: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _is_no_tip(record: logging.LogRecord) -> bool:
    """False for Lightning's hints at products of its makers."""
    return "Tip:" not in record.getMessage()


def _quiet() -> None:
    """Messages of this package on, advice that does not fit its runs off."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
