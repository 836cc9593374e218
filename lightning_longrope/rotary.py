"""The rotary module that takes the place of a model's own, with float64 tables chosen row by row.

Shapes: B batch, S sequence, R rotary size, F = R / 2 frequency pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.geometry import LAYER_TYPE, RopeGeometry
from lightning_longrope.rope import cos_sin, pretrained_inv_freq, rescaled_inv_freq


class RescaledRotary(nn.Module):
    """Takes the place of a model's rotary module and computes cos and sin from float64 tables.

    The tables are plain attributes, not buffers: casting the model must not round them. The module it replaces stays
    inside, for layers that are not rescaled and for rows with identity factors, which must get its very numbers.

    Of several tables a row is read with the one for its length, which is its last position plus one: in a decoding step
    all that came before it counts. Documents packed into one row share the table of the longest of them.

    Args:
        stock: The rotary module of the model.
        factors: The tables by rising ``target_length``, or one for each row of the batch.
        geometry: Size and base of the embedding.
        per_row: Whether ``factors`` holds one table for each row.

    Raises:
        ValueError: If the module's output has a layout that is not known.
    """

    def __init__(
        self, stock: nn.Module, factors: Sequence[RescaleFactors], geometry: RopeGeometry, per_row: bool = False
    ) -> None:
        super().__init__()
        self.stock = stock
        self.rows = len(factors) if per_row else None
        self._arrange = _layout(stock, geometry)
        size, base = geometry.rotary_size, geometry.base
        values = torch.tensor([f.values for f in factors], dtype=torch.float64, device="cpu")
        self._tables = {
            torch.device("cpu"): {
                "inv_freq": rescaled_inv_freq(values, rotary_size=size, base=base),
                "pretrained": pretrained_inv_freq(rotary_size=size, base=base),
                "start_tokens": torch.tensor([f.start_tokens for f in factors], device="cpu"),
                "attention_factor": torch.tensor(
                    [f.attention_factor for f in factors], dtype=torch.float64, device="cpu"
                ),
                "identity": torch.tensor([f.is_identity for f in factors], device="cpu"),
                "limits": torch.tensor([f.target_length for f in factors[:-1]], dtype=torch.int64, device="cpu"),
            }
        }
        self._some_identity = any(f.is_identity for f in factors)
        self.train(stock.training)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin of the positions in the type of ``x``, as the replaced module would give them.

        Args:
            x: Anything of the type and on the device wanted, [B, ...].
            position_ids: Positions in tokens, [B, S] or [1, S] int64.
            layer_type: Which kind of layer asks, in models with several kinds.
        """
        if layer_type not in (None, LAYER_TYPE):
            return self.stock(x, position_ids, layer_type)
        if self.rows is not None and self.rows != len(x):
            raise ValueError(f"candidate_rows was given {self.rows} factors, but the batch has {len(x)} rows.")
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
        tables = self._tables_of_rows(position_ids.to(device))
        identity = tables.pop("identity").to(x.device)[:, None, None]
        cos, sin = cos_sin(position_ids.to(device), **tables, dtype=x.dtype)
        cos, sin = (self._arrange(part).to(x.device) for part in (cos, sin))
        if not self._some_identity:
            return cos, sin
        stock = self.stock(x, position_ids) if layer_type is None else self.stock(x, position_ids, layer_type)
        return torch.where(identity, stock[0], cos), torch.where(identity, stock[1], sin)

    def chosen(self, lengths: Tensor) -> Tensor | None:
        """Which table rows of these lengths are read with, or None where the length makes no difference.

        Args:
            lengths: Tokens of each row, [B] int64.

        Returns:
            Index of the table by rising ``target_length``, [B] int64.
        """
        limits = self._tables_on(lengths.device)["limits"]
        return torch.bucketize(lengths, limits) if self.rows is None and len(limits) else None

    def _tables_of_rows(self, position_ids: Tensor) -> dict[str, Tensor]:
        """The table of each row, or the one of all of them."""
        tables = {name: table for name, table in self._tables_on(position_ids.device).items() if name != "limits"}
        index = self.chosen(position_ids.amax(-1) + 1)
        if index is None:
            return tables
        return {name: table if name == "pretrained" else table[index] for name, table in tables.items()}

    def _tables_on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables on a device; copied there once."""
        if device not in self._tables:
            host = self._tables[torch.device("cpu")]
            self._tables[device] = {name: table.to(device) for name, table in host.items()}
        return self._tables[device]


@contextmanager
def float32_rotary(model: nn.Module) -> Iterator[None]:
    """Lets the float32 tables of a model's own rotary modules survive a cast inside the context.

    Rounded to bfloat16, some angles are off by 100 radians at 128k tokens.
    """
    tables = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and buffer.dtype == torch.float32
    ]
    yield
    for module, name, table in tables:
        setattr(module, name, table.to(module.get_buffer(name).device))


def recompute_rotary(model: nn.Module) -> None:
    """Computes those tables of a model's own rotary modules again that were made in half precision.

    DeepSpeed rounds them while it partitions a model that transformers 5.17 makes.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq") and buffer.dtype != torch.float32 and hasattr(module, "config"):
                with torch.device("cpu"):
                    fresh = type(module)(module.config)
                setattr(module, name, fresh.get_buffer(name).to(buffer.device))


def _halves(table: Tensor) -> Tensor:
    return table


def _interleaved(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def _single(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2]


@contextmanager
def forgetting(rotary: nn.Module) -> Iterator[None]:
    """Lets a rotary module forget what it reads inside: a ``dynamic`` one keeps the longest position it has seen."""
    module = rotary.stock if isinstance(rotary, RescaledRotary) else rotary
    attributes, buffers = dict(vars(module)), dict(module._buffers)
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


def rotary_output(rotary: nn.Module, position_ids: Tensor) -> Any:
    """Float32 cos and sin for full-attention layers, of a model's rotary module or one that keeps it as ``stock``."""
    x = torch.zeros(len(position_ids), position_ids.shape[1], 1, device=position_ids.device)
    stock = getattr(rotary, "stock", rotary)
    layered = isinstance(getattr(stock, "rope_type", None), dict)
    with torch.no_grad(), forgetting(rotary):
        return rotary(x, position_ids, LAYER_TYPE) if layered else rotary(x, position_ids)


def table_layout(rotary: nn.Module, geometry: RopeGeometry) -> str:
    """How a rotary module lays out its pairs: ``halves``, ``interleaved`` or ``single``."""
    arranged = _layout(rotary.stock if isinstance(rotary, RescaledRotary) else rotary, geometry)
    names: dict[Any, str] = {_halves: "halves", _interleaved: "interleaved", _single: "single"}
    return names[arranged]


def _layout(stock: nn.Module, geometry: RopeGeometry) -> Callable[[Tensor], Tensor]:
    """How a rotary module lays out its pairs: twice in halves (Llama), each twice (Cohere) or once (GPT-OSS)."""
    if any(buffer.is_meta for buffer in stock.buffers()):
        with torch.device("cpu"):
            stock = type(stock)(stock.config)
    device = next((buffer.device for buffer in stock.buffers()), torch.device("cpu"))
    output = rotary_output(stock, torch.tensor([[1, 2]], device=device))
    cos = output[0] if isinstance(output, tuple) else None
    if cos is not None and cos.shape == (1, 2, geometry.rotary_size):
        if torch.equal(cos[..., : geometry.pairs], cos[..., geometry.pairs :]):
            return _halves
        if torch.equal(cos[..., ::2], cos[..., 1::2]):
            return _interleaved
    if cos is not None and cos.shape == (1, 2, geometry.pairs):
        return _single
    raise ValueError(
        f"{type(stock).__name__} is not a rotary module this package can replace: expected cos and sin of"
        f" {geometry.pairs} frequency pairs, got {tuple(cos.shape) if cos is not None else type(output).__name__}."
    )
