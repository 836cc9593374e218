"""Small models and data that several tests share."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    **SIZES,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}

FAMILY: dict[str, Any] = {  # fields that most families have; weights so large that a wrong angle shows
    **SIZES,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {  # what each has besides
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"partial_rotary_factor": 0.5},
}


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A random Llama with 8 frequency pairs and a window of 32 tokens."""
    from lightning_longrope.loading import load_model

    torch.manual_seed(seed)
    return load_model(config={**LLAMA, **changes}).eval()


class RandomRows(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, a function of the index."""

    def __init__(self, rows: int, length: int, vocabulary: int = 96) -> None:
        self.rows, self.length, self.vocabulary = rows, length, vocabulary

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self.vocabulary, (self.length,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def random_loader(rows: int = 8, length: int = 24, batch_size: int = 2) -> DataLoader[dict[str, Tensor]]:
    """Batches of ``RandomRows`` in order."""
    return DataLoader(RandomRows(rows, length), batch_size=batch_size)
