"""``longrope export``: a Hugging Face folder from a checkpoint or run."""

import logging
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_longrope.checkpoints import is_checkpoint
from lightning_longrope.commands.parsing import Parser
from lightning_longrope.datamodules.sample_text import library_sources
from lightning_longrope.factors import FACTORS_FILE, RescaleFactors
from lightning_longrope.loading import find_tokenizer, load_model, load_tokenizer
from lightning_longrope.model import install_factors, installed_tables, window
from lightning_longrope.recipes import Stage
from lightning_longrope.tables import LengthTables

log = logging.getLogger("lightning_longrope")

CHECKPOINT = Path("checkpoints") / "last.ckpt"


def export_arguments(stage: Stage) -> dict[str, Any]:
    """What a stage file gives to ``export_checkpoint``, its keys checked."""
    allowed = {"run", "out", "tokenizer", "lossy", "custom_code", "short", "tables", "gguf"}
    unknown = sorted(set(stage.config) - allowed)
    missing = sorted({"run", "out"} - set(stage.config))
    if unknown or missing:
        raise ValueError(f"`export` takes {', '.join(sorted(allowed))}; unknown: {unknown}, missing: {missing}.")
    return stage.config


def export(command: str, arguments: list[str]) -> None:
    """``longrope export RUN OUT``."""
    parser = Parser(prog="longrope export", description="Writes a Hugging Face folder from a run or a checkpoint.")
    parser.add_argument("run", help="output folder of a recipe or a stage, a checkpoint, or a model folder")
    parser.add_argument("out", help="folder to write; with --gguf the .gguf file to write")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer; the one of the run by default")
    parser.add_argument("--short", help="file of factors for texts within the pretrained window")
    parser.add_argument("--tables", nargs="+", metavar="FILE", help="files of factors by length, in place of its own")
    parser.add_argument("--custom-code", action="store_true", help="keep by code what Hugging Face has no words for")
    parser.add_argument("--lossy", action="store_true", help="export although something of the model is lost")
    parser.add_argument("--gguf", metavar="FILE", help="write the tables into a copy of this GGUF file, for llama.cpp")
    sys.stdout.write(f"{export_checkpoint(**vars(parser.parse_args(arguments)))}\n")


def export_checkpoint(
    run: str,
    out: str,
    tokenizer: str | None = None,
    custom_code: bool = False,
    lossy: bool = False,
    short: str | None = None,
    tables: list[str] | None = None,
    gguf: str | None = None,
) -> Path:
    """Writes a Hugging Face folder from a run, a stage, a checkpoint or a model folder.

    Args:
        run: Output folder of a recipe or of a stage (its last checkpoint is taken), a ``.ckpt``, or a model folder.
        out: Folder to write.
        tokenizer: Name or folder of the tokenizer; by default the one of the run.
        custom_code: Write code into the folder for what Hugging Face cannot say: start tokens, further tables.
        lossy: Export although Hugging Face cannot say all of the model.
        short: File of factors for texts within the pretrained window, as ``FactorSearch(recovery=True)`` writes it.
        tables: Files of factors for sequences up to the target length of each, in place of what the model has; ``none``
            among them stands for the pretrained RoPE within its window.
        gguf: What llama.cpp's converter has made of the model: ``out`` is a copy with the tables, and no folder.

    Returns:
        The folder, or the GGUF file.
    """
    from lightning_longrope.export import export_model, origin_of

    checkpoint = find_checkpoint(Path(run))
    if gguf is not None:
        return _export_gguf(checkpoint, out, gguf, tables, lossy)
    found = tokenizer or find_tokenizer(checkpoint)
    if found is None:
        log.info("No tokenizer found near %s: exporting the model alone (--tokenizer adds one).", checkpoint)
    model, tokens = load_model(str(checkpoint)), load_tokenizer(found) if found else None
    if tables:
        install_factors(model, LengthTables.load(*tables))
    table = RescaleFactors.load(short) if short else None
    example = None if tokens is None or installed_tables(model) is None else _example(model, tokens)
    options = {"tokenizer": tokenizer, "short": short, "tables": tables, "custom-code": custom_code, "lossy": lossy}
    origin = origin_of(checkpoint, _command_line(run, out, options))
    return export_model(
        model, tokens, out, short=table, custom_code=custom_code, lossy=lossy, example=example, origin=origin
    )


def _export_gguf(checkpoint: Path, out: str, gguf: str, files: list[str] | None, lossy: bool) -> Path:
    """A GGUF file with the tables of a checkpoint, of a model folder or of files."""
    from lightning_longrope.export import write_gguf

    if not files and (checkpoint / FACTORS_FILE).is_file():
        files = [str(checkpoint / FACTORS_FILE)]
    tables = LengthTables.load(*files, monotone=False) if files else installed_tables(load_model(str(checkpoint)))
    if tables is None:
        raise ValueError(f"{checkpoint} has no rescale factors to write.")
    return write_gguf(gguf, out, tables, lossy=lossy)


def _command_line(run: str, out: str, options: dict[str, Any]) -> str:
    """The command line of an export."""
    words = ["longrope", "export", run, out]
    for name, value in options.items():
        if value:
            words += [f"--{name}", *([] if value is True else [value] if isinstance(value, str) else value)]
    return shlex.join(words)


def _example(model: Any, tokenizer: Any) -> torch.Tensor:
    """Text to measure on what an export loses: at most 32k tokens."""
    length, tokens = min(window(model), 32_768), []
    for text in library_sources():
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= length:
            break
    return torch.tensor(tokens[:length])


def find_checkpoint(run: Path) -> Path:
    """The newest last checkpoint of a recipe's or stage's folder; a checkpoint or model folder is returned as it is.

    A stage has several, ``last.ckpt`` and ``last-v1.ckpt``, where ``fit`` has run more than once in its folder, or more
    than one ``ModelCheckpoint`` keeps one there. In a recipe's folder it is the stage with the highest number.

    Raises:
        ValueError: If there is none.
    """
    if (is_checkpoint(run) and run.exists()) or (run / "config.json").exists():
        return run
    stages = [folder for folder in run.glob("*") if folder.name.split("-")[0].isdecimal() and _last_ones(folder)]
    stages.sort(key=lambda folder: int(folder.name.split("-")[0]))
    candidates = _last_ones(run) or (_last_ones(stages[-1]) if stages else [])
    if not candidates:
        raise ValueError(f"No checkpoint in {run}: expected a .ckpt, a model folder, or a run with {CHECKPOINT}.")
    newest = max(candidates, key=_written)
    if len(candidates) > 1:
        others = ", ".join(path.name for path in sorted(candidates) if path != newest)
        log.info("Taking %s, which is newer than %s beside it: name another one to take that.", newest, others)
    return newest


def _last_ones(stage: Path) -> list[Path]:
    """``last.ckpt``, ``last-v1.ckpt`` and so on of a stage."""
    folder, name = stage / CHECKPOINT.parent, CHECKPOINT.stem
    found = folder.glob(f"{name}*.ckpt")
    return [path for path in found if re.fullmatch(rf"{name}(-v\d+)?", path.stem) and path.exists()]


def _written(path: Path) -> int:
    """When a checkpoint was written, which may be a folder of shards."""
    return max(file.stat().st_mtime_ns for file in (path, *(path.iterdir() if path.is_dir() else ())))
