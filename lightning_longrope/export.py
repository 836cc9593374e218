"""Writes an extended model as a Hugging Face folder that transformers, vLLM and others load without this package."""

import copy
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_longrope.factors import FACTORS_FILE, RescaleFactors
from lightning_longrope.lora import merged_weights
from lightning_longrope.model import (
    PRETRAINED_ROPE,
    candidate_rows,
    install_factors,
    installed_factors,
    installed_tables,
    probe_logits,
    rope_geometry,
)
from lightning_longrope.rotary import RescaledRotary, rotary_output
from lightning_longrope.scoring import token_nll

_ROPE_FIELDS = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
_EXACT = 16_384  # up to this position, float32 angles are good enough to compare logits with ours

log = logging.getLogger(__name__)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    short: RescaleFactors | None = None,
    drop_start_tokens: bool = False,
    example: Tensor | None = None,
) -> Path:
    """Writes a model with its installed factors as a Hugging Face folder, reads it back and compares the logits.

    The config has the rope type ``longrope`` and ``max_position_embeddings`` is the target length exactly, from which
    vLLM derives the ratio. ``rescale_factors.json`` next to it lets ``load_model`` restore the exact table. A model
    with identity factors, or none, is written with its own config; adapters are merged, in a copy. Nothing
    half-written is left behind, and the model passed in stays as it is.

    Args:
        model: The model, with its weights in one process.
        tokenizer: Its tokenizer, or None to write none.
        folder: Where to write. A folder that is an earlier export is replaced; any other must be empty or absent.
        short: Table of sequences within the pretrained window; by default the one the model has, else the long table.
            Hugging Face gives both tables one attention factor, that of the long one.
        drop_start_tokens: Export without the start tokens, which Hugging Face does not know.
        example: Tokens of a text, [S] int64, on which the error about start tokens says what dropping them costs.

    Returns:
        The folder.

    Raises:
        ValueError: If the factors have start tokens, the folder is in use, or the short table does not fit.
        RuntimeError: If the folder read back is not the model.
    """
    folder, model = Path(folder), _merged(model)
    _check_free(folder)
    factors = _expressible(model, drop_start_tokens, example)
    short = short or _short_table(model)
    config = copy.deepcopy(model.config)
    if factors is not None and (short is not None or not factors.is_identity):
        _rescale(config.get_text_config(), factors, short)
    else:
        factors = None
    with _written_whole(folder) as partial:
        with _config_of(model, config):
            model.save_pretrained(partial)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial, config.get_text_config().max_position_embeddings)
        if factors is not None:
            factors.save(partial / FACTORS_FILE)
        _verify(partial, model, factors, short)
    return folder


def _merged(model: Any) -> PreTrainedModel:
    """The model without adapters that computes the same, a copy; one that never had any as it is."""
    lora, tables = getattr(model, "lora", None), installed_tables(model)
    if lora is None:
        return model
    plain = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
    plain.load_state_dict(merged_weights(model.state_dict(), lora))
    if tables is not None:
        install_factors(plain, tables)
    return plain


def _expressible(model: PreTrainedModel, drop_start_tokens: bool, example: Tensor | None) -> RescaleFactors | None:
    """The installed factors, without start tokens if the caller agrees to that."""
    factors = installed_factors(model)
    if factors is None or factors.start_tokens == 0:
        return factors
    dropped = replace(factors, start_tokens=0)
    if not drop_start_tokens:
        cost = "" if example is None else _cost(model, factors, dropped, example)
        raise ValueError(
            f"Hugging Face has no start tokens, but the factors have start_tokens={factors.start_tokens}.{cost}"
            " Pass drop_start_tokens=True to export without them, or search again with start_tokens=(0,)."
        )
    log.warning("Exporting without the %d start tokens of the factors.", factors.start_tokens)
    return dropped


def _short_table(model: PreTrainedModel) -> RescaleFactors | None:
    """The installed table of sequences within the pretrained window, if there is one.

    Raises:
        ValueError: If the model has more tables than Hugging Face can choose from.
    """
    tables = installed_tables(model)
    if tables is None or len(tables.tables) == 1:
        return None
    if tables.lengths[:-1] != (tables.longest.original_length,):
        raise ValueError(
            f"Hugging Face has two tables, for sequences up to {tables.longest.original_length} tokens and for longer"
            f" ones, but the model has tables for {', '.join(map(str, tables.lengths))} tokens: install two of them."
        )
    return tables.tables[0]


def _cost(model: PreTrainedModel, factors: RescaleFactors, dropped: RescaleFactors, example: Tensor) -> str:
    """What dropping the start tokens does to the perplexity of a text, as a sentence."""
    if example.ndim != 1 or len(example) < 2:
        raise ValueError(f"`example` must hold at least 2 tokens in one dimension, got shape {tuple(example.shape)}.")
    device, perplexities = model.get_input_embeddings().weight.device, []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for table in (factors, dropped):
            with candidate_rows(model, [table]):
                nll = token_nll(model, example[None].to(device))
            perplexities.append(math.exp(nll.double().mean().item()))
    finally:
        for module, training in modes:
            module.training = training
    before, after = perplexities
    return f" Without them, perplexity on the {len(example)} example tokens goes from {before:.4g} to {after:.4g}."


def _rescale(config: Any, factors: RescaleFactors, short: RescaleFactors | None) -> None:
    """Writes the factors into a config and keeps its own rotary fields under a key that ``load_model`` reads."""
    own = {name: copy.deepcopy(getattr(config, name)) for name in _ROPE_FIELDS if hasattr(config, name)}
    config.rope_parameters = factors.to_hf(config, short=short)
    config.max_position_embeddings = factors.target_length
    if "original_max_position_embeddings" in own:  # Phi-3's, which wins over the one in rope_parameters
        config.original_max_position_embeddings = factors.original_length
    setattr(config, PRETRAINED_ROPE, own)


@contextmanager
def _config_of(model: PreTrainedModel, config: Any) -> Iterator[None]:
    """Lets a model be saved under another config."""
    own, model.config = model.config, config
    try:
        yield
    finally:
        model.config = own


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, longest: int) -> None:
    """Writes a tokenizer that does not warn at lengths which the model now takes."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max(tokenizer.model_max_length, longest)
    tokenizer.save_pretrained(folder)


def _check_free(folder: Path) -> None:
    """Refuses to replace anything but an earlier export."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to export to.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FACTORS_FILE).is_file():
        raise ValueError(f"{folder} is not empty and no earlier export of an extended model: give another folder.")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A sibling folder to write into, which takes the place of ``folder`` only if all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.parent / f".{folder.name}.{os.getpid()}.{what}" for what in ("partial", "replaced"))
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _verify(folder: Path, model: PreTrainedModel, factors: RescaleFactors | None, short: RescaleFactors | None) -> None:
    """Reads the folder back with transformers alone and compares weights, angles and logits.

    Raises:
        RuntimeError: If they differ.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(weights[name], tensor.detach().to("cpu", weights[name].dtype)):
            raise RuntimeError(f"The export is not the model: weight {name} differs in the folder read back.")
    if factors is None:
        return
    rotary, geometry = loaded.get_decoder().rotary_emb, rope_geometry(model.config)
    # on other devices and in other types, kernels differ by more than a wrong config might
    allowed = 1e-3 if model.dtype == torch.float32 and model.device.type == "cpu" else 5e-2
    for name, table, positions in _probes(
        factors, replace(short or factors, attention_factor=factors.attention_factor)
    ):
        theirs, reference = rotary_output(rotary, positions), RescaledRotary(rotary, [table], geometry)
        turned = max(
            (one - other)[:, :-1].abs().max().item()
            for one, other in zip(theirs, rotary_output(reference, positions), strict=True)
        )
        with candidate_rows(model, [table]):
            ours = probe_logits(model, positions)[:, :-1].cpu().float()
        error = ((probe_logits(loaded, positions)[:, :-1].float() - ours).abs().max() / ours.abs().max()).item()
        if not (turned <= 5e-3 and error <= allowed):
            raise RuntimeError(
                f"The export is not the model: with the {name} table, cos and sin are off by {turned:.2g}"
                f" and logits by {error:.2g} of their scale."
            )


def _probes(factors: RescaleFactors, short: RescaleFactors) -> Iterator[tuple[str, RescaleFactors, Tensor]]:
    """Tables to compare and positions that make transformers choose them.

    The last position alone chooses the table and is not compared: far out its float32 angles are too rough.
    """
    near = min(factors.original_length - 1, _EXACT)
    positions = torch.linspace(0, near, 8, dtype=torch.float64).long().unique()
    for name, table, last in (
        ("short", short, factors.original_length - 1),
        ("long", factors, factors.target_length - 1),
    ):
        if name == "short" or factors.target_length > factors.original_length:
            chosen = positions[positions < last]
            yield name, table, torch.cat([chosen, torch.tensor([last])])[None]
