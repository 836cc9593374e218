"""A training project of one's own on top of ``LongRoPEModule``: a penalty on the distance from the pretrained weights.

Tuning on long texts costs some of what a model could do with short ones; weights that stay close lose less of it
(L2-SP, arXiv:1802.01483). Run it with a model, factors and a text file::

    python examples/stays_close.py my/model search/factors.json text.txt

or from a configuration::

    PYTHONPATH=examples longrope fit -c CONFIG --model=stays_close.StaysClose --model.anchor=0.1
"""

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_longrope import LongRoPEModule, RescaleFactors
from lightning_longrope.datamodules import PackedTextDataModule


class StaysClose(LongRoPEModule):
    """Adds ``anchor`` times the squared distance from the weights of the start to the loss, and logs ``distance``.

    Args:
        anchor: Weight of the penalty.
        settings: Arguments of ``LongRoPEModule``.
    """

    def __init__(self, anchor: float = 0.01, **settings: Any) -> None:
        super().__init__(**settings)
        self.anchor = anchor
        self._start: dict[str, Tensor] = {}

    def on_fit_start(self) -> None:
        """Keeps the weights of the start."""
        super().on_fit_start()
        self._start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the text and the penalty."""
        distance = self.distance()
        self.log("distance", distance.detach(), prog_bar=True)
        return super().training_step(batch, batch_idx) + self.anchor * distance

    def distance(self) -> Tensor:
        """Squared distance of all trainable weights from where they started."""
        weights = dict(self.model.named_parameters())
        return torch.stack([(weights[name] - start).square().sum() for name, start in self._start.items()]).sum()


def main(name: str, factors: str, text: str, anchor: float = 0.01, steps: int = 20) -> StaysClose:
    """Trains for a few steps on rows as long as the window of the factors, and prints how far the weights have gone."""
    module = StaysClose(anchor, name_or_path=name, factors=factors)
    length = RescaleFactors.load(factors).target_length
    data = PackedTextDataModule(train_files=[text], tokenizer=name, seq_len=length, cache_dir=None)
    trainer = Trainer(max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    sys.stdout.write(f"squared distance after {steps} steps: {module.distance():.6f}\n")
    return module


if __name__ == "__main__":
    main(*sys.argv[1:4])
