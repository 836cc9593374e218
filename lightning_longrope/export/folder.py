"""Writes an extended model as a Hugging Face folder that transformers, vLLM and others load without this package."""

import copy
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_longrope.export.card import Origin, model_card
from lightning_longrope.export.custom_code import code_class, write_code
from lightning_longrope.export.lost import Loss, plain_tables, what_is_lost
from lightning_longrope.factors import FACTORS_FILE, RescaleFactors
from lightning_longrope.files import naming, write_text
from lightning_longrope.loading import PRETRAINED_ROPE
from lightning_longrope.locks import hold
from lightning_longrope.lora import merged_weights
from lightning_longrope.model import candidate_rows, install_factors, installed_tables, probe_logits, rope_geometry
from lightning_longrope.rotary import RescaledRotary, float32_rotary, rotary_output
from lightning_longrope.tables import LengthTables

_ROPE_FIELDS = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
_EXACT = 16_384  # up to this position, float32 angles are good enough to compare logits with ours

log = logging.getLogger(__name__)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    short: RescaleFactors | None = None,
    custom_code: bool = False,
    lossy: bool = False,
    example: Tensor | None = None,
    origin: Origin | None = None,
) -> Path:
    """Writes a model with its installed factors as a Hugging Face folder, reads it back and compares the logits.

    The config has the rope type ``longrope`` and ``max_position_embeddings`` is the target length exactly, from which
    vLLM derives the ratio. ``rescale_factors.json`` next to it lets ``load_model`` restore the exact tables. A model
    with identity factors, or none, is written with its own config; adapters are merged, in a copy. The longest text
    that the tokenizer and ``generation_config`` allow follows the window. Nothing half-written is left behind, and the
    model passed in stays as it is.

    Hugging Face has two tables, one within the pretrained window and one beyond, one attention factor for both, and no
    start tokens. What a model has beyond that is kept by ``custom_code``, or lost if ``lossy`` agrees to it.

    Args:
        model: The model, with its weights in one process.
        tokenizer: Its tokenizer, or None to write none.
        folder: Where to write. A folder that is an earlier export is replaced; any other must be empty or absent.
        short: Table of sequences within the pretrained window, in place of the one the model has for them.
        custom_code: Write code into the folder that says all; ``from_pretrained(folder, trust_remote_code=True)`` runs
            it. Software that does not gets what Hugging Face can say.
        lossy: Write what Hugging Face can say, although that is another model.
        example: Tokens of a text, [S] int64, on which what is lost is measured.
        origin: Where the model comes from, for its card (``README.md``).

    Returns:
        The folder.

    Raises:
        ValueError: If something would be lost without ``lossy``, the folder is in use, or the short table does not fit.
        RuntimeError: If the folder read back is not the model.
    """
    folder, model = Path(folder), _merged(model)
    place = folder.resolve()  # where a link leads, and the link stays
    _check_free(folder, place)
    tables = _tables(model, short)
    plain = tables and plain_tables(tables)
    losses = what_is_lost(model, tables, plain, example) if tables and plain else []
    _agree(losses, custom_code, lossy)
    config, kept = copy.deepcopy(model.config), tables if custom_code else plain
    if tables is not None:
        _rescale(config.get_text_config(), tables)
    with _written_whole(place) as partial:
        if tables is not None and custom_code:
            write_code(partial, model, config, tables)
        with _configs_of(model, config, _generation_config(model, tables)):
            model.save_pretrained(partial)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial, config.get_text_config().max_position_embeddings)
        if kept is not None:
            kept.save(partial / FACTORS_FILE)
            _save_csv(kept, partial)
            card = model_card(
                place.name if folder.name in ("", "..") else folder.name,
                config.get_text_config(),
                kept,
                losses,
                custom_code,
                origin or Origin(),
            )
            write_text(partial / "README.md", card)
        _verify(AutoModelForCausalLM, partial, model, plain)
        if tables is not None and custom_code:
            _verify(code_class(partial), partial, model, tables)
    return folder


def _merged(model: Any) -> PreTrainedModel:
    """The model without adapters that computes the same, a copy; one that never had any as it is."""
    lora, tables = getattr(model, "lora", None), installed_tables(model)
    if lora is None:
        return model
    plain = type(model)(copy.deepcopy(model.config)).eval()
    with float32_rotary(plain):
        plain.to(model.dtype)
    plain.load_state_dict(merged_weights(model.state_dict(), lora))
    if tables is not None:
        install_factors(plain, tables)
    return plain


def _tables(model: PreTrainedModel, short: RescaleFactors | None) -> LengthTables | None:
    """The tables to write; None for a model that is the pretrained one."""
    tables = installed_tables(model)
    if tables is None or (short is None and tables.is_identity):
        return None
    if short is None:
        return tables
    window = tables.longest.original_length
    within = replace(short, original_length=window, target_length=window)
    return LengthTables((within, *(table for table in tables.tables if table.target_length > window)))


def _agree(losses: list[Loss], custom_code: bool, lossy: bool) -> None:
    """Says what is lost, and refuses to lose it without the caller's word."""
    if losses and not (custom_code or lossy):
        raise ValueError(
            f"Hugging Face's `longrope` cannot say all of this model; lost would be {'; '.join(map(str, losses))}."
            " Pass custom_code=True (--custom-code) to keep it by code in the folder, or lossy=True (--lossy) to write"
            " what can be said."
        )
    for loss in losses:
        log.warning("Lost %s: %s.", "without trust_remote_code" if custom_code else "in this export", loss)


def _rescale(config: Any, tables: LengthTables) -> None:
    """Writes the tables into a config and keeps its own rotary fields under a key that ``load_model`` reads."""
    own = {name: copy.deepcopy(getattr(config, name)) for name in _ROPE_FIELDS if hasattr(config, name)}
    longest = replace(tables.longest, start_tokens=0)
    config.rope_parameters = longest.to_hf(
        config, short=replace(tables.for_length(longest.original_length), start_tokens=0)
    )
    config.max_position_embeddings = longest.target_length
    if "original_max_position_embeddings" in own:  # Phi-3's, which wins over the one in rope_parameters
        config.original_max_position_embeddings = longest.original_length
    setattr(config, PRETRAINED_ROPE, own)


def _generation_config(model: PreTrainedModel, tables: LengthTables | None) -> Any:
    """The model's ``generation_config``; one that allows texts up to the pretrained window allows the new one."""
    own = model.generation_config
    if tables is None or own is None or (own.max_length or 0) < tables.longest.original_length:
        return own
    longer = copy.deepcopy(own)
    longer.max_length = max(own.max_length, tables.longest.target_length)
    return longer


@contextmanager
def _configs_of(model: PreTrainedModel, config: Any, generation_config: Any) -> Iterator[None]:
    """Lets a model be saved under other configs."""
    own = model.config, model.generation_config
    model.config, model.generation_config = config, generation_config
    try:
        yield
    finally:
        model.config, model.generation_config = own


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, longest: int) -> None:
    """Writes a tokenizer that does not warn at lengths which the model now takes."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max(tokenizer.model_max_length, longest)
    tokenizer.save_pretrained(folder)


def _save_csv(tables: LengthTables, folder: Path) -> None:
    """Writes the values alone, as Microsoft's code reads them: a file for each table."""
    for table in tables.tables:
        length = f"_{table.target_length}" if len(tables.tables) > 1 else ""
        table.save_csv(folder / f"rescale_factors{length}.csv")


def _check_free(folder: Path, place: Path) -> None:
    """Refuses to replace anything but an earlier export, and the folder one is in; ``place`` is where ``folder`` is."""
    if Path.cwd().is_relative_to(place):
        raise ValueError(f"{folder} is the current folder or one above it: give another folder to export to.")
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to export to.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FACTORS_FILE).is_file():
        raise ValueError(f"{folder} is not empty and no earlier export of an extended model: give another folder.")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A sibling folder to write into, which takes the place of ``folder`` only if all went well."""
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    with hold(folder.with_name(f".{folder.name}.lock"), folder, remedy="export to another"), naming(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        finally:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _verify(kind: Any, folder: Path, model: PreTrainedModel, tables: LengthTables | None) -> None:
    """Reads the folder back with transformers alone and compares weights, angles and logits.

    Raises:
        RuntimeError: If they differ.
    """
    loaded = kind.from_pretrained(folder, dtype=model.dtype).eval()
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(weights[name], tensor.detach().to("cpu", weights[name].dtype)):
            raise RuntimeError(f"The export is not the model: weight {name} differs in the folder read back.")
    if tables is None:
        return
    rotary, geometry = loaded.get_decoder().rotary_emb, rope_geometry(model.config)
    # on other devices and in other types, kernels differ by more than a wrong config might
    allowed = 1e-3 if model.dtype == torch.float32 and model.device.type == "cpu" else 5e-2
    for table, positions in _probes(tables):
        reference = RescaledRotary(getattr(rotary, "stock", rotary), [table], geometry)
        theirs = rotary_output(rotary, positions)
        turned = max(
            (one - other)[:, :-1].abs().max().item()
            for one, other in zip(theirs, rotary_output(reference, positions), strict=True)
        )
        with candidate_rows(model, [table]):
            ours = probe_logits(model, positions)[:, :-1].cpu().float()
        error = ((probe_logits(loaded, positions)[:, :-1].float() - ours).abs().max() / ours.abs().max()).item()
        if not (turned <= 5e-3 and error <= allowed):
            raise RuntimeError(
                f"The export is not the model: at {int(positions.max()) + 1} tokens, cos and sin are off by"
                f" {turned:.2g} and logits by {error:.2g} of their scale."
            )


def _probes(tables: LengthTables) -> Iterator[tuple[RescaleFactors, Tensor]]:
    """Tables to compare and positions that make the software choose them, on both sides of every switch.

    The last position alone chooses the table and is not compared: far out its float32 angles are too rough.
    """
    window = tables.longest.original_length
    positions = torch.linspace(0, min(window - 1, _EXACT), 8, dtype=torch.float64).long().unique()
    for length in sorted({window, *tables.lengths, *(limit + 1 for limit in tables.lengths[:-1])}):
        chosen = positions[positions < length - 1]
        yield tables.for_length(length), torch.cat([chosen, torch.tensor([length - 1])])[None]
