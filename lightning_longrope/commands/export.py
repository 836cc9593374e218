"""``longrope export``: a Hugging Face folder from a checkpoint or run."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_longrope.commands.parsing import Parser
from lightning_longrope.datamodules.sample_text import library_sources
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import find_tokenizer, installed_tables, load_model, load_tokenizer, window
from lightning_longrope.recipes import Stage

log = logging.getLogger("lightning_longrope")

CHECKPOINT = Path("checkpoints") / "last.ckpt"


def export_arguments(stage: Stage) -> dict[str, Any]:
    """What a stage file gives to ``export_checkpoint``, its keys checked."""
    allowed = {"run", "out", "tokenizer", "lossy", "custom_code", "short"}
    unknown = sorted(set(stage.config) - allowed)
    missing = sorted({"run", "out"} - set(stage.config))
    if unknown or missing:
        raise ValueError(f"`export` takes {', '.join(sorted(allowed))}; unknown: {unknown}, missing: {missing}.")
    return stage.config


def export(command: str, arguments: list[str]) -> None:
    """``longrope export RUN OUT``."""
    parser = Parser(prog="longrope export", description="Writes a Hugging Face folder from a run or a checkpoint.")
    parser.add_argument("run", help="output folder of a recipe or a stage, a .ckpt, or a model folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer; the one of the run by default")
    parser.add_argument("--short", help="file of factors for texts within the pretrained window")
    parser.add_argument("--custom-code", action="store_true", help="keep by code what Hugging Face has no words for")
    parser.add_argument("--lossy", action="store_true", help="export although something of the model is lost")
    sys.stdout.write(f"{export_checkpoint(**vars(parser.parse_args(arguments)))}\n")


def export_checkpoint(
    run: str,
    out: str,
    tokenizer: str | None = None,
    custom_code: bool = False,
    lossy: bool = False,
    short: str | None = None,
) -> Path:
    """Writes a Hugging Face folder from a run, a stage, a checkpoint or a model folder.

    Args:
        run: Output folder of a recipe or of a stage (its last checkpoint is taken), a ``.ckpt``, or a model folder.
        out: Folder to write.
        tokenizer: Name or folder of the tokenizer; by default the one of the run.
        custom_code: Write code into the folder for what Hugging Face cannot say: start tokens, further tables.
        lossy: Export although Hugging Face cannot say all of the model.
        short: File of factors for texts within the pretrained window, as ``FactorSearch(recovery=True)`` writes it.

    Returns:
        The folder.
    """
    from lightning_longrope.export import export_model

    checkpoint = find_checkpoint(Path(run))
    found = tokenizer or find_tokenizer(checkpoint)
    if found is None:
        log.info("No tokenizer found near %s: exporting the model alone (--tokenizer adds one).", checkpoint)
    model, tokens = load_model(str(checkpoint)), load_tokenizer(found) if found else None
    table = RescaleFactors.load(short) if short else None
    example = None if tokens is None or installed_tables(model) is None else _example(model, tokens)
    return export_model(model, tokens, out, short=table, custom_code=custom_code, lossy=lossy, example=example)


def _example(model: Any, tokenizer: Any) -> torch.Tensor:
    """Text to measure on what an export loses: at most 32k tokens."""
    length, tokens = min(window(model), 32_768), []
    for text in library_sources():
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= length:
            break
    return torch.tensor(tokens[:length])


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
