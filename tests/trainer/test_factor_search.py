"""The search under a real Trainer: when it runs, when it does not, and that it changes nothing but the factors."""

import pytest
import torch
from helpers import LLAMA, random_loader
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar

from lightning_longrope import LongRoPEModule, RescaleFactors
from lightning_longrope.callbacks import FactorSearch, factor_search
from lightning_longrope.cli import LongRoPETrainer
from lightning_longrope.lora import LoRA
from lightning_longrope.model import install_factors, installed_factors
from lightning_longrope.search import RampSearch
from lightning_longrope.searching import search_factors


class Rows(LightningDataModule):
    seq_len = 64
    tokenizer = None

    def train_dataloader(self):
        return random_loader(rows=8, length=64)

    def val_dataloader(self):
        return random_loader(rows=2, length=64)

    def excerpts(self, split, count, length, seed=0):
        assert split == "validation"  # the test split is for the judgement
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(96, (count, length), generator=generator)


def search(**options):
    return FactorSearch(
        documents=2, held_out=2, objective="perplexity", algorithm=RampSearch(), **{"max_evaluations": 6, **options}
    )


def trainer(tmp_path, *callbacks, kind=Trainer, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": 2, "enable_checkpointing": False, **quiet, **options}
    return kind(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **options)


def module():
    torch.manual_seed(0)
    return LongRoPEModule(config=LLAMA, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def test_factors_are_found_before_the_first_step_and_used_in_it(tmp_path):
    class Watch(LongRoPEModule):
        def training_step(self, batch, batch_idx):
            self.seen = installed_factors(self.model)
            return super().training_step(batch, batch_idx)

    model = Watch(config=LLAMA)
    trainer(tmp_path, search()).fit(model, datamodule=Rows())
    found = RescaleFactors.load(tmp_path / "search" / "factors.json")
    assert model.seen == found
    assert not found.is_identity
    assert found.target_length == 64


def test_training_after_a_search_is_training_with_the_found_factors(tmp_path):
    """The search moves no weight and no random state: the same run with the factors given ends bit for bit equal."""
    searched = module()
    trainer(tmp_path, search()).fit(searched, datamodule=Rows())
    given = module()
    given.factors = str(tmp_path / "search" / "factors.json")
    trainer(tmp_path).fit(given, datamodule=Rows())
    for one, other in zip(searched.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_search_is_the_same_whether_all_weights_are_trained_afterwards_or_adapters(tmp_path):
    found = []
    for name, lora in (("all", None), ("adapters", LoRA())):
        callback, model = search(schedule=((0.5, 1),)), module()
        model.lora = lora
        trainer(tmp_path / name, callback).fit(model, datamodule=Rows())
        found.append([{**record, "seconds": 0} for record in callback.result.history])
    assert found[0] == found[1]
    assert {record["status"] for record in found[0]} == {"ok", "partial"}


def test_a_resumed_training_does_not_search_again(tmp_path, monkeypatch):
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    trainer(tmp_path, search(), saver, enable_checkpointing=True, max_steps=4).fit(module(), datamodule=Rows())
    found = RescaleFactors.load(tmp_path / "search" / "factors.json")
    monkeypatch.setattr("lightning_longrope.callbacks.factor_search.search_factors", None)  # calling it would raise
    resumed = module()
    run = trainer(tmp_path, search(), saver, enable_checkpointing=True, max_steps=8)
    run.fit(resumed, datamodule=Rows(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 8
    assert installed_factors(resumed.model) == found


def test_a_finished_search_is_read_and_not_repeated(tmp_path, monkeypatch):
    trainer(tmp_path, search()).fit(module(), datamodule=Rows())
    monkeypatch.setattr("lightning_longrope.evaluating.row_sums", None)
    again = module()
    trainer(tmp_path, search()).fit(again, datamodule=Rows())
    assert installed_factors(again.model) == RescaleFactors.load(tmp_path / "search" / "factors.json")


def test_the_search_command_needs_no_optimizer_and_validates_with_what_it_found(tmp_path):
    model = LongRoPEModule(config=LLAMA, optimizer=None)
    run = trainer(tmp_path, search(), kind=LongRoPETrainer)
    run.search(model, Rows())
    assert installed_factors(model.model) == RescaleFactors.load(tmp_path / "search" / "factors.json")
    assert run.callback_metrics["val_perplexity"] > 1


def test_a_recovery_leaves_the_factors_and_writes_a_short_table(tmp_path):
    model = module()
    model.configure_model()
    long = RescaleFactors.yarn(rotary_size=16, base=10_000.0, original_length=32, target_length=64)
    install_factors(model.model, long)
    trainer(tmp_path, search(recovery=True)).fit(model, datamodule=Rows())
    assert installed_factors(model.model) == long
    short = RescaleFactors.load(tmp_path / "search_short" / "factors.json")
    assert (short.target_length, short.attention_factor) == (32, long.attention_factor)
    assert not (tmp_path / "search").exists()


def test_validation_alone_does_not_search(tmp_path):
    trainer(tmp_path, search()).validate(module(), datamodule=Rows(), verbose=False)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_trainers_kind_of_bar_counts_the_evaluations(tmp_path, capfd, bar):
    trainer(tmp_path, search(), bar(), enable_progress_bar=True).fit(module(), datamodule=Rows())
    shown = capfd.readouterr()
    assert "6/6" in (shown.err if bar is TQDMProgressBar else shown.out)
    assert "generation=2" in shown.err + shown.out


def test_a_target_within_the_window_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="longer than the model's own window"):
        trainer(tmp_path, search(target_length=16)).fit(module(), datamodule=Rows())


def test_a_search_on_no_documents_is_refused_in_one_line():
    with pytest.raises(ValueError, match="`documents` must be at least 1"):
        FactorSearch(documents=0)


def test_a_datamodule_without_excerpts_is_refused_in_setup(tmp_path):
    with pytest.raises(ValueError, match="needs a datamodule with `excerpts`"):
        trainer(tmp_path, search()).fit(module(), random_loader(), random_loader())


def test_documents_of_the_judgement_come_from_anywhere_in_the_corpus(tmp_path, monkeypatch):
    class InOrder(Rows):
        def excerpts(self, split, count, length, seed=0):
            return torch.arange(count)[:, None].expand(count, length).contiguous()

    def noted(model, texts, *words, **options):
        orders.append([int(text[0]) for text in texts])
        return search_factors(model, texts, *words, **options)

    orders = []
    monkeypatch.setattr(factor_search, "search_factors", noted)
    for seed in (0, 1):
        callback = FactorSearch(documents=20, held_out=10, objective="perplexity", max_evaluations=1, seed=seed)
        trainer(tmp_path / str(seed), callback, max_steps=1).fit(module(), datamodule=InOrder())
    assert [sorted(order) for order in orders] == [list(range(30))] * 2
    assert orders[0] != orders[1]
    assert all(min(order[20:]) < 10 and max(order[:20]) > 25 for order in orders)
