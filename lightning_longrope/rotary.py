"""The rotary module that takes the place of a model's own, with float64 tables and one table for each row if wanted.

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

    Args:
        stock: The rotary module of the model.
        factors: One table for all rows, or one for each row of the batch.
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
            }
        }
        self._identity = [f.is_identity for f in factors]
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
        cos, sin = cos_sin(position_ids.to(device), **self._tables_on(device), dtype=x.dtype)
        cos, sin = (self._arrange(part).to(x.device) for part in (cos, sin))
        if not any(self._identity):
            return cos, sin
        like = torch.tensor(self._identity, device=x.device)[:, None, None]
        stock = self.stock(x, position_ids) if layer_type is None else self.stock(x, position_ids, layer_type)
        return torch.where(like, stock[0], cos), torch.where(like, stock[1], sin)

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


def _halves(table: Tensor) -> Tensor:
    return table


def _interleaved(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def _single(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2]


def rotary_output(rotary: nn.Module, position_ids: Tensor) -> Any:
    """What a rotary module, its own or ours, gives the full-attention layers of its model in float32."""
    x = torch.zeros(len(position_ids), position_ids.shape[1], 1, device=position_ids.device)
    stock = rotary.stock if isinstance(rotary, RescaledRotary) else rotary
    layered = isinstance(getattr(stock, "rope_type", None), dict)
    with torch.no_grad():
        return rotary(x, position_ids, LAYER_TYPE) if layered else rotary(x, position_ids)


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
