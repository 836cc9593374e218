"""The search on real processes: the same result bit for bit however many share it, and however weights are spread."""

import json
import os
from contextlib import suppress

import pytest
import torch
from full_memory import fill_memory
from helpers import LLAMA, random_loader, tiny_llama
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import PARTITIONED, run_ranks

from lightning_longrope import LongRoPEModule
from lightning_longrope.callbacks import FactorSearch
from lightning_longrope.evaluating import ProcessWorkers
from lightning_longrope.search import EvolutionSearch, RampSearch
from lightning_longrope.searching import search_factors
from lightning_longrope.strategies import LongContextDeepSpeedStrategy, LongContextFSDP2Strategy

pytestmark = pytest.mark.distributed
LENGTH = 64
EVOLUTION = EvolutionSearch(population=10, parents=4, mutants=3, crossovers=3)
SCHEDULE = {"algorithm": EVOLUTION, "max_evaluations": 40, "schedule": ((0.3, 3), (0.6, 6))}
KINDS = {"plain": {}, "scheduled": SCHEDULE}
STRATEGIES = ["ddp", "group", "fsdp2", "zero1", "zero2", "zero3"]
FULL = ["ddp", "fsdp2", "zero3"]  # strategies to try with one rank's memory full


def documents(count, seed=2):
    return list(torch.randint(96, (count, LENGTH), generator=torch.Generator().manual_seed(seed)))


def run_search(folder=None, workers=None, **options):
    settings = {"algorithm": RampSearch(max_evaluations=40), "seed": 3, "batch_tokens": 3 * LENGTH, "race": 1.0}
    return search_factors(
        tiny_llama(), documents(11), LENGTH, held_out=2, folder=folder, workers=workers, **{**settings, **options}
    )


def outcome(result):
    """Everything but the time it took, as text: floats with all their digits."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    judged = vars(result.held_out)
    return repr((result.factors, result.score, result.evaluations, result.forwards, history, judged))


def shared_search(folder):
    torch.distributed.init_process_group("gloo")
    found = "".join(outcome(run_search(folder / name, ProcessWorkers(), **options)) for name, options in KINDS.items())
    (folder / f"outcome{os.environ['RANK']}").write_text(found)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_a_search_and_agree_bit_for_bit(tmp_path, world_size):
    run_ranks(world_size, shared_search, tmp_path, logs=tmp_path / "logs")
    alone = [run_search(**options) for options in KINDS.values()]
    assert [{row["status"] for row in found.history} for found in alone] == [
        {"ok", "dropped"},
        {"ok", "dropped", "partial"},
    ]
    for rank in range(world_size):
        assert (tmp_path / f"outcome{rank}").read_text() == "".join(map(outcome, alone))


class Rows(LightningDataModule):
    seq_len = LENGTH
    tokenizer = None

    def train_dataloader(self):
        return random_loader(rows=8, length=LENGTH)

    def val_dataloader(self):
        return random_loader(rows=2, length=LENGTH)

    def excerpts(self, split, count, length, seed=0):
        return torch.stack(documents(count, seed))


class Module(LongRoPEModule):
    """Notes what the search found and how its weights lay then."""

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def on_train_start(self):
        weight = self.model.model.layers[0].mlp.up_proj.weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        self.share = local.numel() / (LLAMA["hidden_size"] * LLAMA["intermediate_size"])


class Group(DDPStrategy):
    """Both ranks read the same samples, as a sequence-parallel group does: they are one worker."""

    distributed_sampler_kwargs = {"num_replicas": 1, "rank": 0}


def strategy(name):
    if name in ("ddp", "group"):
        return DDPStrategy() if name == "ddp" else Group()
    if name == "fsdp2":
        return LongContextFSDP2Strategy()
    return LongContextDeepSpeedStrategy(stage=int(name[-1]), zero=PARTITIONED if name == "zero3" else None)


def fit(folder, devices, strategy="auto"):
    search = FactorSearch(
        documents=3, held_out=2, objective="perplexity", algorithm=RampSearch(max_evaluations=12),
        batch_tokens=2 * LENGTH,
    )  # fmt: skip
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, callbacks=[search], max_steps=1,
        default_root_dir=folder, enable_checkpointing=False, use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    module = Module(config=LLAMA, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    trainer.fit(module, datamodule=Rows())
    state = json.loads((folder / "search" / "state.json").read_text())
    scores = [row["score"] for row in search.result.history]
    return {
        "outcome": outcome(search.result),
        "scores": scores,
        "share": module.share,
        "model": state["fingerprint"]["model"],
    }


def fit_with_every_strategy(folder):
    for name in STRATEGIES:
        found = fit(folder / name, 2, strategy(name))
        (folder / f"{name}{os.environ['RANK']}.json").write_text(json.dumps(found))
    full = fill_memory(rank=1, sizes=(2, 2 * LENGTH))
    for name in FULL:
        full.failures = 0
        found = fit(folder / f"full-{name}", 2, strategy(name))
        found["failures"] = full.failures
        (folder / f"full-{name}{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    with suppress(AssertionError):  # each test says what its strategy came to
        run_ranks(2, fit_with_every_strategy, folder, logs=folder / "logs", timeout=100)
    return folder, fit(folder / "alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_is_the_same_under_every_strategy(fits, name):
    folder, alone = fits
    for rank in range(2):
        path = folder / f"{name}{rank}.json"
        assert path.exists(), (folder / "logs" / f"rank{rank}.log").read_text()[-4000:]
        found = json.loads(path.read_text())
        assert found["outcome"] == alone["outcome"]
        assert found["model"] == alone["model"]
        assert found["share"] == {"fsdp2": 0.5, "zero3": 0.0}.get(name, 1.0)  # weights were really partitioned


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_rank_out_of_memory_leaves_no_other_waiting(fits, name):
    folder, alone = fits
    first, second = (folder / f"full-{name}{rank}.json" for rank in range(2))
    assert second.exists(), (folder / "logs" / "rank1.log").read_text()[-4000:]
    first, second = json.loads(first.read_text()), json.loads(second.read_text())
    assert first["outcome"] == second["outcome"]
    assert first["failures"] == 0
    assert second["failures"] >= 3
    assert first["scores"] == pytest.approx(alone["scores"], rel=1e-5)  # other rows shared a pass, so other last digits
