"""Losses in chunks on real processes against a loop of plain PyTorch on the logits of the model's own forward."""

import json
import os
from contextlib import suppress

import pytest
import torch
from helpers import LLAMA
from lightning.pytorch import Trainer
from processes import PARTITIONED, run_ranks, whole
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_longrope import LongRoPEModule, heads
from lightning_longrope.lora import LoRA
from lightning_longrope.optimizers import Schedule
from lightning_longrope.strategies import (
    LongContextDDPStrategy,
    LongContextDeepSpeedStrategy,
    LongContextFSDP2Strategy,
)

pytestmark = pytest.mark.distributed
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "phi": {**LLAMA, "model_type": "phi", "num_key_value_heads": 4},  # whose output layer has a bias
    "adapted": LLAMA,
}
ADAPTERS = {"adapted": LoRA(targets=("q_proj", "lm_head"))}
STRATEGIES = {
    "ddp": LongContextDDPStrategy,
    "fsdp2": LongContextFSDP2Strategy,
    "zero2": LongContextDeepSpeedStrategy,
    "zero3": lambda: LongContextDeepSpeedStrategy(3, zero=PARTITIONED),
}
LOSSES = ("fused", "checkpointed")
STEPS, ACCUMULATED, RANKS, LENGTH, RATE = 3, 2, 2, 21, 0.5


def rows():
    """A row for each rank and batch; the second rank's have fewer labels, and tokens have weights of their own."""
    generator, made = torch.Generator().manual_seed(5), []
    for index in range(STEPS * ACCUMULATED * RANKS):
        tokens = torch.randint(1, 96, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: 15 * (index % RANKS)] = -100
        made.append({"input_ids": tokens, "labels": labels, "weights": torch.rand(LENGTH, generator=generator) + 0.5})
    return made


class Seeded(LongRoPEModule):
    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()


def trained(folder, strategy, name, loss):
    """Every parameter after a few steps of SGD."""
    module = Seeded(
        config=MODELS[name], optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE),
        schedule=Schedule("constant", 0), loss=loss, lora=ADAPTERS.get(name),
    )  # fmt: skip
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=STRATEGIES[strategy](), max_steps=STEPS, default_root_dir=folder,
        accumulate_grad_batches=ACCUMULATED, use_distributed_sampler=False, **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows()[int(os.environ["RANK"]) :: RANKS], batch_size=1))
    return {key: whole(parameter).tolist() for key, parameter in module.model.named_parameters()}


def on_every_strategy(folder):
    heads.LOGITS_AT_A_TIME = 5 * LLAMA["vocab_size"]  # chunks of 5 tokens
    for strategy in STRATEGIES:
        for name in MODELS:
            for loss in LOSSES:
                found = trained(folder, strategy, name, loss)
                (folder / f"{strategy}-{name}-{loss}-{os.environ['RANK']}.json").write_text(json.dumps(found))


def witness(name):
    """The same steps of one process, on all rows of a batch at once and in double precision."""
    module, given = Seeded(config=MODELS[name], lora=ADAPTERS.get(name)), rows()
    module.configure_model()
    model = module.model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for micro in range(ACCUMULATED):
            first = (step * ACCUMULATED + micro) * RANKS
            batch = {key: torch.stack([row[key] for row in given[first : first + RANKS]]) for key in given[0]}
            logits = model(batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
            labels, weights = batch["labels"][:, 1:].flatten(), batch["weights"][:, 1:].flatten().double()
            weights = weights * (labels != -100)
            nll = cross_entropy(logits, labels, reduction="none")
            ((nll * weights).sum() / weights.sum() / ACCUMULATED).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    with suppress(AssertionError):  # each test says what its strategy came to
        run_ranks(RANKS, on_every_strategy, folder, logs=folder / "logs", timeout=150)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_trains_what_plain_pytorch_does(runs, name):
    expected, seen = witness(name), 0
    for strategy in STRATEGIES:
        for loss in LOSSES:
            for rank in range(RANKS):
                path = runs / f"{strategy}-{name}-{loss}-{rank}.json"
                assert path.exists(), (runs / "logs" / f"rank{rank}.log").read_text()[-4000:]
                found = json.loads(path.read_text())
                assert found.keys() == expected.keys()
                for key, values in expected.items():
                    torch.testing.assert_close(
                        torch.tensor(found[key]), values.float(), rtol=1e-5, atol=1e-6,
                        msg=lambda text, of=(strategy, loss, key): f"{of}: {text}",
                    )  # fmt: skip
                seen += 1
    assert seen == len(STRATEGIES) * len(LOSSES) * RANKS
