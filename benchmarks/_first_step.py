"""What the processes of ``startup.py`` share: the note of when their first step was done."""

import os
import sys
import time
from typing import Any

from lightning.pytorch import Callback


def note() -> None:
    """Says how many processor and wall seconds this process has taken so far."""
    sys.stderr.write(f"\nfirst step: {time.process_time()} {time.time() - float(os.environ['STARTED'])}\n")


class FirstStep(Callback):
    """Notes the end of the first training step."""

    def on_train_batch_end(self, *_: Any) -> None:
        note()


def plain() -> None:
    """The step by hand, with the packages that ``longrope fit`` cannot do without."""
    import jsonargparse  # noqa: F401
    import torch
    from lightning.pytorch import LightningModule, Trainer  # noqa: F401
    from lightning.pytorch.cli import LightningCLI  # noqa: F401
    from startup import BATCH, LENGTH, SIZES
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_scheduler

    AutoTokenizer.from_pretrained(sys.argv[1])
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = get_scheduler("constant", optimizer)
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    note()


if __name__ == "__main__":
    plain()
