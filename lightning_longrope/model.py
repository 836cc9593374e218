"""Causal language models with exchangeable rotary tables: put rescale factors in one, and prove that it took them.

The rotary module is replaced as a whole. Hugging Face's own has float32 tables that ``.to(bfloat16)`` rounds, chooses
between its two tables from the longest position of a batch, and knows no start tokens.

Shapes: B batch, S sequence, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from lightning_longrope.attention import evaluating, probing
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.generating import follow_tables
from lightning_longrope.geometry import RopeGeometry, rope_geometry, rope_parameters
from lightning_longrope.heads import OutputHead
from lightning_longrope.isolation import Stretches, fit_for_long_rows, isolated_documents, plain_rows
from lightning_longrope.long_rows import in_parts
from lightning_longrope.rotary import RescaledRotary, forgetting
from lightning_longrope.sequence_parallel import sequence_group, shared_rows
from lightning_longrope.sliding import say_reach
from lightning_longrope.tables import LengthTables, tables_in_force

__all__ = [
    "RopeGeometry",
    "candidate_rows",
    "evaluating",
    "hidden_states",
    "install_factors",
    "installed_factors",
    "installed_tables",
    "original_rope",
    "output_head",
    "probe_logits",
    "rope_geometry",
    "table_for",
    "table_of_length",
    "window",
]


def install_factors(model: PreTrainedModel, factors: RescaleFactors | LengthTables | Iterable[RescaleFactors]) -> None:
    """Puts rescale factors into a model, in place of any it has, and proves that its logits changed.

    Identity factors put the model's own rotary module back, so its logits are those of the pretrained model bit for
    bit. Of several tables each row of a batch is read with the one for its length (see ``RescaledRotary``), in
    ``model.generate`` too. Weights, the config, training mode and random state are not touched. Where the model cannot
    run yet (weights on the meta device or partitioned by ZeRO stage 3) the proof is left out.

    Args:
        model: Any Hugging Face causal language model with one rotary module.
        factors: The factors, or one table for each range of lengths; kept as ``model.length_tables``.

    Raises:
        ValueError: If the model has no rotary embedding, another number of frequency pairs, or a kind that cannot be
            replaced.
        RuntimeError: If the logits do not depend on the table installed.
    """
    installed = LengthTables.of(factors)
    say_reach(model, installed.longest.target_length)
    decoder, geometry = _rotary_owner(model), _checked_geometry(model, installed.tables)
    current, earlier, longest = decoder.rotary_emb, installed_factors(model), installed.longest
    stock, positions = _own(current), _spread(longest.target_length)
    rotary = _rotary_with(model, stock, installed)
    before = probe_logits(model, positions) if _runs(model) and _tables_differ(earlier, longest) else None
    decoder.rotary_emb = rotary
    try:
        if before is not None and torch.equal(before, probe_logits(model, positions)):
            _check_wired(model, decoder, stock, geometry, longest)
    except BaseException:
        decoder.rotary_emb = current
        raise
    model.length_tables = installed
    follow_tables(model)


def installed_tables(model: PreTrainedModel) -> LengthTables | None:
    """What was last installed in a model, or None."""
    return getattr(model, "length_tables", None)


def installed_factors(model: PreTrainedModel) -> RescaleFactors | None:
    """The factors last installed in a model, or None; of several tables that of the whole window."""
    tables = installed_tables(model)
    return tables.longest if tables else None


def table_of_length(model: PreTrainedModel, length: int) -> int | None:
    """Target length of the table with which a row of ``length`` tokens is read; None where all rows share one."""
    tables = installed_tables(model) or tables_in_force(model.config)
    return tables.for_length(length).target_length if tables else None


def window(model: PreTrainedModel) -> int:
    """Tokens a model can read: the target length of its factors, or what its config says."""
    tables = installed_tables(model) or tables_in_force(model.config)
    if tables is not None:
        return tables.longest.target_length
    return int(model.config.get_text_config().max_position_embeddings)


@contextmanager
def candidate_rows(model: PreTrainedModel, factors: Sequence[RescaleFactors]) -> Iterator[None]:
    """Lets row ``b`` of every forward inside the context use ``factors[b]``.

    Many candidates share one forward this way, with the logits each would have alone. What was installed before is
    back afterwards, whatever happens inside.

    Args:
        model: Any Hugging Face causal language model with one rotary module.
        factors: One for each row of the batches inside, B.

    Raises:
        ValueError: If there are no factors, they do not fit the model, or a batch has another number of rows.
    """
    if not factors:
        raise ValueError("candidate_rows needs at least one set of factors, got none.")
    geometry = _checked_geometry(model, factors)
    with _exchanged(model, lambda own: RescaledRotary(own, factors, geometry, per_row=True)):
        yield


@contextmanager
def table_for(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Lets every forward inside the context use the installed table for sequences of ``length`` tokens.

    For a text that is read in parts: each part alone would be read with the table for what was read so far.

    Args:
        model: The causal language model; without factors nothing changes.
        length: Tokens of the whole text.
    """
    tables = installed_tables(model)
    with _exchanged(model, lambda own: _rotary_with(model, own, tables and LengthTables.of(tables.for_length(length)))):
        yield


@contextmanager
def original_rope(model: PreTrainedModel) -> Iterator[None]:
    """Lets every forward inside the context use the model's own rotary embedding, as if no factors were installed.

    The tables are read once a forward, outside of the layers, so a backward pass after the context, that of
    checkpointed layers too, has those of its forward.
    """
    with _exchanged(model, lambda own: own):
        yield


@contextmanager
def _exchanged(model: PreTrainedModel, rotary: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Lets every forward inside the context use the rotary module that is made from the model's own."""
    decoder = _rotary_owner(model)
    current = decoder.rotary_emb
    decoder.rotary_emb = rotary(_own(current))
    try:
        yield
    finally:
        decoder.rotary_emb = current


def _own(rotary: nn.Module) -> nn.Module:
    """The rotary module that a model came with."""
    return rotary.stock if isinstance(rotary, RescaledRotary) else rotary


def _rotary_with(model: PreTrainedModel, own: nn.Module, tables: LengthTables | None) -> nn.Module:
    """The rotary module with tables; the model's own where they change nothing."""
    if tables is None or tables.is_identity:
        return own
    return RescaledRotary(own, tables.tables, rope_geometry(model.config))


def _rotary_owner(model: PreTrainedModel) -> Any:
    """The decoder stack that holds the rotary module as ``rotary_emb``."""
    rope_parameters(model.config)
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no `rotary_emb` in {type(decoder).__name__}:"
            " expected a model with one rotary embedding shared by its layers."
        )
    return decoder


def _checked_geometry(model: PreTrainedModel, factors: Sequence[RescaleFactors]) -> RopeGeometry:
    """The model's geometry, if all factors fit it."""
    geometry = rope_geometry(model.config)
    for table in factors:
        if table.pairs != geometry.pairs:
            raise ValueError(
                f"The model has {geometry.pairs} frequency pairs (rotary size {geometry.rotary_size}),"
                f" but the factors have {table.pairs} values: they belong to another model."
            )
    return geometry


def _tables_differ(one: RescaleFactors | None, other: RescaleFactors) -> bool:
    """Whether two sets of factors make different angles."""

    def table(factors: RescaleFactors | None) -> Any:
        if factors is None or factors.is_identity:
            return None
        return factors.values, factors.start_tokens, factors.attention_factor

    return bool(table(one) != table(other))


def _runs(model: PreTrainedModel) -> bool:
    """Whether a forward is possible now: weights are real and whole."""
    return not any(p.is_meta or p.numel() == 0 for p in model.parameters())


def probe_logits(model: PreTrainedModel, position_ids: Tensor) -> Tensor:
    """Logits of a few fixed tokens at given positions, whatever state the model is in; it leaves no trace.

    Args:
        model: The causal language model.
        position_ids: Increasing positions in tokens, [1, S] int64; gaps do not part documents here.

    Returns:
        [1, S, V] in the type of the model.
    """
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    position_ids = position_ids.to(device)
    input_ids = (torch.arange(position_ids.shape[1], device=device)[None] * 7919 + 1) % vocabulary
    # the mask is what tells transformers that jumps in the positions are not borders of documents
    mask = torch.ones_like(input_ids)
    with probing(model), forgetting(_rotary_owner(model).rotary_emb):
        output = model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
        return output.logits.clone()


def _spread(target_length: int) -> Tensor:
    """A few positions over the whole window, [1, S] int64."""
    positions = torch.linspace(0, target_length - 1, 8, dtype=torch.float64, device="cpu")
    return positions.long().unique()[None]


def _check_wired(
    model: PreTrainedModel, decoder: Any, stock: nn.Module, geometry: RopeGeometry, factors: RescaleFactors
) -> None:
    """Tells a change too small for the model's precision from a rotary module that nobody reads.

    Raises:
        RuntimeError: If the logits stay the same under tables as far apart as they can be.
    """
    installed, positions = decoder.rotary_emb, _spread(factors.target_length)
    extreme = RescaleFactors((float(factors.target_length),) * geometry.pairs, 2, max(2, factors.target_length))
    decoder.rotary_emb = RescaledRotary(stock, [extreme], geometry)
    frozen = probe_logits(model, positions)
    decoder.rotary_emb = stock
    moves = not torch.equal(frozen, probe_logits(model, positions))
    decoder.rotary_emb = installed
    if not moves:
        raise RuntimeError(
            f"The logits of {type(model).__name__} do not change with its rotary table, so the factors would have no"
            " effect: its attention layers do not read `rotary_emb`."
        )


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    stretches: Stretches | None = None,
) -> Tensor:
    """Final hidden states of a causal model, without its output head, a key-value cache or an attention mask.

    Where ranks share the rows of a model (see ``sequence_parallel``), all of them are given whole rows, and each gets
    the states of its part.

    Args:
        model: The causal language model.
        input_ids: Tokens, [B, S] int64.
        position_ids: Positions, [B, S] int64; 0 to S - 1 if None.
        stretches: Where documents lie that must not see each other; the positions begin again with each of them.

    Returns:
        [B, S, H], normalised as the output head expects it; [B, ceil(S / P), H] where P ranks share the rows.
    """
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    isolation: AbstractContextManager[dict[str, Any]] = nullcontext({})
    sharing: AbstractContextManager[dict[str, Any]] = nullcontext({})
    shared = sequence_group(model).size > 1
    fit_for_long_rows(model, input_ids.shape[1])
    if stretches is None and position_ids is None and not shared:
        stretches = plain_rows(model, input_ids)
    if stretches is not None:
        isolation = isolated_documents(model, stretches)
    if shared:
        sharing = shared_rows(model, input_ids, position_ids, stretches)
    tokens = len(input_ids) * sequence_group(model).share_of(input_ids.shape[1])
    with isolation as apart, sharing as share, in_parts(model, tokens):
        return model.get_decoder()(**{**inputs, **apart, **share}, use_cache=False).last_hidden_state


def output_head(model: PreTrainedModel) -> OutputHead:
    """What turns final hidden states [..., H] into the logits [..., V] of a model's own forward."""
    return OutputHead(model)
