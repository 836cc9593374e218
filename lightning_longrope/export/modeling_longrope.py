"""A language model whose rotary embedding has one table for each range of lengths.

Needs torch and transformers alone: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. The tables
are in ``config.json`` under ``longrope``. A sequence is read with the first table whose ``target_length`` holds it; its
first ``start_tokens`` positions keep the pretrained angles, and cos and sin are multiplied by ``attention_factor``.

Written by lightning_longrope. Source: LongRoPE, arXiv:2402.13753.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import LlamaForCausalLM as Base

_POSITIONS = 1 << 16  # angles are float64 and made for this many positions at a time


class LengthRotary(nn.Module):
    """Takes the place of a rotary module, which stays inside for layers and rows that are not rescaled.

    Tables are float64 and no buffers, so that casting the model does not round them.
    """

    def __init__(self, stock: nn.Module, longrope: dict[str, Any]) -> None:
        super().__init__()
        self.stock = stock
        self.layout = longrope["layout"]
        tables = longrope["tables"]
        columns = {
            name: torch.tensor([table[name] for table in tables], dtype=torch.float64, device="cpu")
            for name in ("values", "start_tokens", "attention_factor")
        }
        pairs = columns["values"].shape[1]
        pretrained = float(longrope["base"]) ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        identity = (columns["values"] == 1).all(1) & (columns["start_tokens"] == 0) & (columns["attention_factor"] == 1)
        limits = torch.tensor([table["target_length"] for table in tables[:-1]], dtype=torch.int64, device="cpu")
        self.some_identity = bool(identity.any())
        columns |= {"inv_freq": pretrained / columns.pop("values"), "pretrained": pretrained.repeat(len(tables), 1)}
        self.columns = {torch.device("cpu"): {**columns, "identity": identity, "limits": limits}}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables on a device."""
        if device not in self.columns:
            host = self.columns[torch.device("cpu")]
            self.columns[device] = {name: column.to(device) for name, column in host.items()}
        return self.columns[device]

    def chosen(self, lengths: Tensor) -> Tensor:
        """Which table sequences of these lengths are read with, [B] int64."""
        return torch.bucketize(lengths, self.on(lengths.device)["limits"])

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin of the positions, as the replaced module gives them."""
        own = () if layer_type is None else (layer_type,)
        if layer_type not in (None, "full_attention"):
            return self.stock(x, position_ids, *own)
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
        positions = position_ids.to(device)
        index = self.chosen(positions.amax(-1) + 1)
        rows = {name: column[index] for name, column in self.on(device).items() if name != "limits"}
        parts = [self._turned(part, rows) for part in positions.split(_POSITIONS, dim=1)]
        cos, sin = (torch.cat([part[i].to(x.dtype) for part in parts], dim=1).to(x.device) for i in (0, 1))
        if not self.some_identity:
            return cos, sin
        stock, like = self.stock(x, position_ids, *own), rows["identity"].to(x.device)[:, None, None]
        return torch.where(like, stock[0], cos), torch.where(like, stock[1], sin)

    def _turned(self, positions: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cos and sin in float64, [B, S, R]."""
        positions = positions[:, :, None]
        started = positions >= rows["start_tokens"][:, None, None]
        angles = positions * torch.where(started, rows["inv_freq"][:, None], rows["pretrained"][:, None])
        if self.layout == "halves":
            angles = torch.cat([angles, angles], dim=-1)
        elif self.layout == "interleaved":
            angles = angles.repeat_interleave(2, dim=-1)
        scale = rows["attention_factor"][:, None, None]
        return angles.cos() * scale, angles.sin() * scale


class LongRopeForCausalLM(Base):
    """The model with its rotary module replaced, in generation with a cache too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decoder, text = self.get_decoder(), config.get_text_config()
        pretrained = copy.deepcopy(text)
        for name, value in text.pretrained_rope.items():
            setattr(pretrained, name, value)
        decoder.rotary_emb = LengthRotary(type(decoder.rotary_emb)(pretrained), text.longrope)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its weights are those of the class it builds on, under the same names."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The model's own inputs; the cache is computed again where a sequence goes on with another table."""
        names = ("cache", "past_key_values")  # from transformers 5.24 on, and before
        cache, position_ids = next((kwargs[name] for name in names if name in kwargs), None), kwargs.get("position_ids")
        if cache is not None:
            ends = torch.tensor([input_ids.shape[1]]) if position_ids is None else position_ids[:, -1] + 1
            new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            rotary = self.get_decoder().rotary_emb
            chosen = rotary.chosen(ends).tolist()
            held = getattr(cache, "longrope_tables", None) or rotary.chosen(ends - new).tolist()
            if cache.get_seq_length() > 0 and held != chosen:
                if input_ids.shape[1] < int(ends.max()):
                    raise ValueError("The cache must be computed again here: give `generate` all tokens at once.")
                if type(cache) is DynamicCache:
                    cache.layers = DynamicCache(config=self.config).layers
                else:
                    cache.reset()
                next_sequence_length = None
            cache.longrope_tables = chosen
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)


LongRopeForCausalLM.__name__ = Base.__name__  # by which transformers knows how weights are called in files
