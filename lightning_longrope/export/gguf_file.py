"""Tables in a GGUF file for llama.cpp, whose converter leaves them out for Llama and Mistral models without a word.

llama.cpp has a long and a short table and one attention factor. It takes the long one for a whole run whose context per
sequence exceeds the pretrained window. By its source it refuses files with tensors it has no use for, and divides all
speeds once more by ``rope.scaling.factor``, so that entries of other methods must go.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_longrope.export.lost import plain_tables, what_is_lost
from lightning_longrope.files import naming
from lightning_longrope.locks import hold
from lightning_longrope.tables import LengthTables

log = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "phi3", "phimoe", "minicpm", "minicpm3")
"""Those whose graph in llama.cpp reads the tables; Mistral models are ``llama`` there."""

_REPLACED = ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")


def write_gguf(source: str | Path, out: str | Path, tables: LengthTables, lossy: bool = False) -> Path:
    """Copies a GGUF file with the tables of a model in it, and reads them back.

    All other entries and weights are kept as they are, quantized ones too; earlier entries about rescaling are not.

    Args:
        source: What llama.cpp's converter has made of the exported model.
        out: File to write; another than ``source``.
        tables: The tables of the model.
        lossy: Write what llama.cpp can have of them, although that is another model.

    Returns:
        ``out``.

    Raises:
        ValueError: If the file is none of such a model, or something would be lost without ``lossy``.
        RuntimeError: If the file read back does not hold the tables.
    """
    import gguf

    source, out, plain = Path(source), Path(out), plain_tables(tables)
    if not source.is_file() or out.resolve() == source.resolve():
        raise ValueError(f"`--gguf` needs a GGUF file to read and another path to write, got {source} and {out}.")
    try:
        reader = gguf.GGUFReader(source)
    except ValueError as error:
        raise ValueError(f"{source} is no GGUF file: {error}") from error
    architecture = _checked_architecture(reader, plain, source)
    losses = what_is_lost(None, tables, plain)
    if losses and not lossy:
        raise ValueError(
            "llama.cpp has two tables, one attention factor for both, and no start tokens; lost would be"
            f" {'; '.join(map(str, losses))}. Pass lossy=True (--lossy) to write what can be said."
        )
    for loss in losses:
        log.warning("Lost in %s: %s.", out, loss)
    partial = out.with_name(f".{out.name}.partial")
    with hold(out.with_name(f".{out.name}.lock"), out, remedy="export to another"), naming(out):
        try:
            _copy(gguf, reader, partial, architecture, plain)
            _verify(gguf, partial, reader, plain)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    return out


def _checked_architecture(reader: Any, tables: LengthTables, source: Path) -> str:
    """The architecture of a file that can take the tables."""
    architecture = reader.get_field("general.architecture").contents()
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"llama.cpp reads tables for {', '.join(ARCHITECTURES)}, but {source} is a {architecture} model."
        )
    size = reader.get_field(f"{architecture}.rope.dimension_count")
    if size is not None and size.contents() != 2 * tables.longest.pairs:
        raise ValueError(
            f"{source} rotates {size.contents()} channels, but the tables are for {2 * tables.longest.pairs}:"
            " they belong to another model."
        )
    return str(architecture)


def _copy(gguf: Any, reader: Any, out: Path, architecture: str, tables: LengthTables) -> None:
    """Writes the entries and weights of a file with the tables among them."""
    longest, little = tables.longest, gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(out, architecture, endianess=getattr(reader, "endianess", little))
    writer.data_alignment = reader.alignment  # which `general.alignment`, copied below, says
    written = {"general.architecture", f"{architecture}.context_length"}
    for field in reader.fields.values():
        known = field.name.startswith("GGUF.") or field.name in written
        if not known and not field.name.startswith(f"{architecture}.rope.scal"):  # scaling.* and the older scale_linear
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(
                field.name, field.contents(), kind, inner if kind == gguf.GGUFValueType.ARRAY else None
            )
    writer.add_context_length(longest.target_length)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(longest.original_length)
    writer.add_rope_scaling_attn_factors(longest.attention_factor)
    added = dict(_tensors(tables))
    for name, values in added.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    kept = [tensor for tensor in reader.tensors if tensor.name not in _REPLACED]
    for tensor in kept:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in (*added.values(), *(tensor.data for tensor in kept)):
        writer.write_tensor_data(values)
    writer.close()


def _tensors(tables: LengthTables) -> Iterator[tuple[str, Any]]:
    """The long and the short table as llama.cpp names them, [F] float32."""
    short = tables.for_length(tables.longest.original_length)
    for name, table in (("long", tables.longest), ("short", short)):
        yield f"rope_factors_{name}.weight", np.array(table.values, dtype=np.float32)


def _verify(gguf: Any, path: Path, source: Any, tables: LengthTables) -> None:
    """Reads a written file back.

    Raises:
        RuntimeError: If a tensor is not what it should be.
    """
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    expected = {tensor.name: tensor.data for tensor in source.tensors if tensor.name not in _REPLACED}
    expected |= dict(_tensors(tables))
    for name in found.keys() | expected.keys():
        if name not in found or name not in expected or not np.array_equal(found[name], expected[name]):
            raise RuntimeError(f"The GGUF file read back is not the model: tensor {name} differs.")
