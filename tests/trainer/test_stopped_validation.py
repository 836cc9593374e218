"""A fit that is stopped around a validation goes on as if it had not been: none is lost, no step runs twice."""

import csv
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from stop_signals import SignalAt
from torch.utils.data import DataLoader
from torture.comparing import logged

from lightning_longrope.callbacks import SaveOnStop, Throughput
from lightning_longrope.callbacks.measurement import Measurement, MeasuringCallback
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.stopping import STATUS, StoppedError

STEPS, BATCHES = 8, 3


class Model(LightningModule):
    def __init__(self, events):
        super().__init__()
        self.weight, self.events = torch.nn.Linear(1, 1), events

    def training_step(self, batch, batch_idx):
        self.events.append(("step", self.global_step))
        loss = (self.weight(batch["input_ids"]) - self.global_step).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.events.append(("batch", self.global_step, batch_idx))
        self.log("val_loss", self.weight(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Rows(LightningDataModule):
    tokenizer, seq_len = None, 1

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return DataLoader([{"input_ids": torch.ones(1)}] * self.rows)

    def val_dataloader(self):
        return DataLoader(torch.arange(float(BATCHES))[:, None])


class Measures(MeasuringCallback):
    def prepare(self, datamodule, lengths):
        pass

    def measure_length(self, trainer, module, length):
        module.events.append(("measured", trainer.global_step))
        return [Measurement("weight", length, None, module.weight.weight.item(), 0.0, 0.0, 1)]


class SignalAtTheEnd(SignalAt):
    """Not in a batch, but when all have run."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self._send(trainer, "end")


def fit(folder, interval, signals, ckpt_path=None, save_last=True):
    """Events of a fit, its model, and whether it was stopped. The callback stands before the one that saves."""
    saver = ModelCheckpoint(folder, "{step}", save_last=save_last, save_top_k=-1, every_n_train_steps=4)
    callbacks: list[Callback] = [signals, SaveOnStop(), Measures(lengths=[2]), saver, Throughput()]
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, callbacks=callbacks, logger=CSVLogger(folder, "log"),
        log_every_n_steps=2, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **({"val_check_interval": interval, "check_val_every_n_epoch": None} if interval else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model, code = Model([]), 0
    try:
        trainer.fit(model, datamodule=Rows(20 if interval else 4), ckpt_path=ckpt_path)
    except StoppedError as stop:
        code = stop.code
    return model, code


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable", "ignore:.*exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*callback states")
@pytest.mark.parametrize("interval", [4, None], ids=["steps", "epochs"])
@pytest.mark.parametrize(
    ("signals", "saved"),
    [
        (SignalAt(3), 4),  # in the step with which a validation is due
        (SignalAt(4, batch=0), 4),
        (SignalAt(4, batch=1), 4),
        (SignalAtTheEnd(4, batch="end"), 4),  # before what measures
        (SignalAt(5), 6),
        (SignalAt(7), 8),  # in the last step
        (SignalAt(8, batch=0), 8),
    ],
)
def test_a_validation_is_not_waited_for_and_not_lost(tmp_path, interval, signals, saved):
    whole, code = fit(tmp_path / "whole", interval, SignalAt(-1))
    assert code == 0
    assert whole.events[4:8] == [*(("batch", 4, batch) for batch in range(BATCHES)), ("measured", 4)]
    cut, code = fit(tmp_path / "cut", interval, signals)
    assert code == STATUS
    last = tmp_path / "cut" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    due = {f"step={step}.ckpt" for step in (4, 8) if step <= saved}
    assert {path.name for path in (tmp_path / "cut").glob("step*.ckpt")} == due
    again, code = fit(tmp_path / "cut", interval, SignalAt(-1), str(last))
    assert code == 0
    done = next((number for number, event in enumerate(whole.events) if event == ("step", saved)), len(whole.events))
    waiting = saved % 4 == 0
    kept = [event for event in cut.events if not (waiting and event[0] != "step" and event[1] == saved)]
    assert len([event for event in cut.events if event == ("measured", saved)]) == 0
    assert kept + again.events == whole.events
    assert len(kept) <= done
    assert torch.equal(again.weight.weight, whole.weight.weight)
    for path in (tmp_path / "cut" / "log").rglob("metrics.csv"):
        speeds = [row.get("throughput/tokens_per_second") for row in csv.DictReader(path.read_text().splitlines())]
        assert all(float(speed) > 0 for speed in speeds if speed)
    assert logged(tmp_path / "cut" / "log") == logged(tmp_path / "whole" / "log") != {}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*does not have many workers")
def test_a_last_checkpoint_that_is_a_link_becomes_what_was_said_to_be_saved(tmp_path):
    _, code = fit(tmp_path / "cut", 4, SignalAt(5), save_last="link")
    assert code == STATUS
    steps = {
        path.name: torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "cut").glob("*.ckpt")
    }
    assert steps == {"step=4.ckpt": 4, "last.ckpt": 6}


def test_ranks_decide_only_before_batches_that_all_of_them_have():
    """One with more batches than another would wait in a decision for whoever is through with its validation."""
    asked = []
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        reduce=lambda value, reduce_op: torch.maximum(value, torch.tensor(-2.0)),  # the other rank has 2
        reduce_boolean_decision=lambda decision, all: asked.append(decision),
    )
    trainer = SimpleNamespace(num_val_batches=[3, 1], strategy=strategy, validating=True)
    callback = SaveOnStop()
    callback._training = True
    callback.on_validation_start(trainer, None)
    for batch in range(4):
        callback.on_validation_batch_start(trainer, None, None, batch)
    assert asked == [False] * 3  # at the start and before two batches


class Launcher(_SubprocessScriptLauncher):
    """Of processes that only note what they are sent."""

    def __init__(self):
        self.sent = []

    def kill(self, signum):
        self.sent.append(signum)


def test_a_signal_reaches_the_processes_that_lightning_has_started(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    callback, trainer.strategy._launcher = SaveOnStop(), Launcher()
    callback.setup(trainer, Model([]), "fit")
    callback._take_note(signal.SIGTERM, None)
    assert trainer.strategy.launcher.sent == [signal.SIGTERM]
    trainer._signal_connector._sigterm_notifier_fn(signal.SIGTERM, None)  # without a step under way
    assert trainer.strategy.launcher.sent == [signal.SIGTERM] * 2
    assert not trainer.received_sigterm  # of which Lightning would tell the other ranks in a collective


def test_the_command_line_adds_none_where_one_is_given(monkeypatch):
    monkeypatch.setattr("lightning_longrope.cli.LongRoPECLI._run_subcommand", lambda *arguments: None)
    for given in ([], ["--trainer.callbacks+=lightning_longrope.callbacks.SaveOnStop"]):
        words = ["fit", "--model.config", "{model_type: llama, vocab_size: 99}", "--trainer.logger=false", *given]
        cli = LongRoPECLI([*words, "--trainer.accelerator=cpu", "--data", "lightning.pytorch.LightningDataModule"])
        assert sum(isinstance(callback, SaveOnStop) for callback in cli.trainer.callbacks) == 1
