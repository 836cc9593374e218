"""Models whose right numbers are known beforehand, and the trainer and data to measure them with."""

import math
import random
from types import SimpleNamespace

import numpy as np
import torch
from helpers import random_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_tokenizers import TEXT, byte_level
from torch import nn

from lightning_longrope.packing import Documents

VOCABULARY = 720  # more than any of the tokenizers here has


class Fake(nn.Module):
    """What scoring sees of a Hugging Face model. Notes how it was called; a subclass says ``logits(row)``, [S, V]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.part = nn.Dropout()
        self.seen = []
        self.config = SimpleNamespace(model_type="fake", get_text_config=lambda: SimpleNamespace(model_type="fake"))

    @property
    def device(self):
        return self.weight.device

    def get_decoder(self):
        return self

    base_model = property(get_decoder)

    def get_output_embeddings(self):
        return nn.Identity()

    def forward(self, input_ids, **_):
        self.seen.append(
            SimpleNamespace(
                shape=tuple(input_ids.shape),
                autocast=torch.is_autocast_enabled("cpu"),
                training=self.training,
                grad=torch.is_grad_enabled(),
            )
        )
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - a model that moves every random state
        return SimpleNamespace(last_hidden_state=torch.stack([self.logits(row) for row in input_ids.tolist()]))


class Repeater(Fake):
    """Goes on as the text did after the last ``context`` tokens, if they stood at most ``reach`` tokens ago.

    Tokens that are ``alike`` count as the same in what it compares.
    """

    def __init__(self, reach, context=4, alike=None):
        super().__init__()
        self.reach, self.context, self.alike = reach, context, alike or {}

    def logits(self, row):
        last, logits = {}, torch.zeros(len(row), VOCABULARY)
        same = [self.alike.get(token, token) for token in row]
        for t in range(self.context - 1, len(row)):
            context = tuple(same[t + 1 - self.context : t + 1])
            if t - last.get(context, -math.inf) <= self.reach:
                logits[t, row[last[context] + 1]] = 10.0
            last[context] = t
        return logits


class Positional(Fake):
    """A table of logits for the next token, sharper the later in the window: misplaced windows show."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def logits(self, row):
        return self.table[torch.tensor(row)] * (0.5 + torch.arange(len(row))[:, None] / 50)


class Module(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        if isinstance(self.model, Fake):
            return self.model.weight**2
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    seq_len = 48

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer or byte_level()
        self.asked = []

    def excerpts(self, split, count, length, seed=0):
        self.asked.append((split, count, length, seed))
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        body = length - len(bos)
        text = self.filler(split)[seed : seed + count * body].view(count, body)
        return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, -1), text], dim=1)

    def documents(self, split):
        """Documents of 30, 31, 32, ... tokens of the text, without markers."""
        tokens = self.filler(split).numpy()
        starts = np.cumsum([0, *range(30, 60)])
        return Documents(tokens.astype(np.uint16), starts[:-1], np.diff(starts))

    def filler(self, split):
        return torch.tensor(self.tokenizer.encode(TEXT, add_special_tokens=False))

    def train_dataloader(self):
        return random_loader()

    def val_dataloader(self):
        return random_loader(rows=2)

    test_dataloader = val_dataloader


def trainer_with(tmp_path, *callbacks, **kwargs):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**settings, **kwargs})
