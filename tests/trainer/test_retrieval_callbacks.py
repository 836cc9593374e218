"""Retrieval callbacks with a model that can copy up to a known distance, and when they run in a fit."""

import logging

import pytest
import torch
from helpers import tiny_llama
from known_models import VOCABULARY, Data, Fake, Module, Repeater, trainer_with
from lightning.pytorch.callbacks import ModelCheckpoint
from small_tokenizers import byte_level

from lightning_longrope.callbacks import (
    DocumentQuestion,
    KeyValueRetrieval,
    NeedleRetrieval,
    PasskeyRetrieval,
)
from lightning_longrope.callbacks.passkey import _reach
from lightning_longrope.metrics import Measurement
from lightning_longrope.retrieval import KeyValuePrompts, Needle

# The question repeats the words before the answer, so a model that copies finds it.
NEEDLES = (
    Needle(
        "Everyone knows that the house of the sky watcher is 7316.",
        "the house of the sky watcher is",
        "7316",
    ),
    Needle(
        "Everyone knows that the lamp of the three brothers is 52.",
        "the lamp of the three brothers is",
        "52",
    ),
)


def values(tmp_path, callback, reach, **kind):
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(Module(Repeater(reach, **kind)), datamodule=Data(), verbose=False)
    return {(m.metric, m.length, m.depth): m for m in callback.results}, trainer.callback_metrics


def test_pairs_within_reach_are_all_found_and_pairs_beyond_it_never(tmp_path):
    callback = KeyValueRetrieval((250, 700), depths=(0.0, 1.0), trials=3, batch_tokens=1500)
    # "'key' is" is to the model what "'key' =" is, and 8 tokens back there are some of the key
    asked, listed = (Data().tokenizer.encode(text) for text in ("' is", "' ="))
    alike = dict(zip(asked, listed, strict=True))
    found, logged = values(tmp_path, callback, reach=249, context=8, alike=alike)
    prompts = KeyValuePrompts(Data().tokenizer)
    assert [prompts.prompt(700, depth, 0).distance > 249 for depth in (0.0, 1.0)] == [True, False]
    assert {cell[1:]: m.value for cell, m in found.items()} == {
        (250, 0.0): 1.0, (250, 1.0): 1.0, (250, None): 1.0, (700, 0.0): 0.0, (700, 1.0): 1.0, (700, None): 0.5,
    }  # fmt: skip
    assert {metric for metric, _, _ in found} == {"key_value"}
    assert logged["key_value/700"] == 0.5
    assert (found["key_value", 700, None].n, found["key_value", 700, 0.0].n) == (6, 3)


def test_needles_within_reach_are_all_found_and_needles_beyond_it_never(tmp_path):
    callback = NeedleRetrieval((250, 700), NEEDLES, depths=(0.0, 1.0), trials=5)  # an odd number: 3 and 2 of each
    found, logged = values(tmp_path, callback, reach=249)
    assert {cell[1:]: m.value for cell, m in found.items()} == {
        (250, 0.0): 1.0, (250, 1.0): 1.0, (250, None): 1.0, (700, 0.0): 0.0, (700, 1.0): 1.0, (700, None): 0.5,
    }  # fmt: skip
    assert logged["needle/250"] == 1


class Reader(Fake):
    """Gives the title at the end of a document that opens with it, if that was at most ``reach`` tokens ago."""

    def __init__(self, reach, tokenizer, title):
        super().__init__()
        self.reach = reach
        self.opening, self.answer = (tokenizer.encode(text) for text in (title, f" {title}"))

    def logits(self, row):
        logits = torch.zeros(len(row), VOCABULARY)
        knows = row[1 : 1 + len(self.opening)] == self.opening and len(row) - len(self.answer) - 1 <= self.reach
        for place, token in enumerate(self.answer, len(row) - len(self.answer) - 1):
            logits[place, token] = 10.0 if knows else -10.0
        return logits


def test_titles_are_asked_for_in_turn_and_found_as_far_as_the_model_reaches(tmp_path):
    for name in ("The Miller", "The Queen"):
        (tmp_path / f"{name}.txt").write_text(f"\n{name} and Others\n\n" + "In the valley there was some grass. " * 60)
    files = tuple(str(tmp_path / f"{name}.txt") for name in ("The Miller", "The Queen"))
    data = Data()
    callback = DocumentQuestion((250, 600), files, batch_tokens=600)
    trainer_with(tmp_path, callback).validate(
        Module(Reader(300, data.tokenizer, "The Queen and Others")), datamodule=data, verbose=False
    )
    assert [(m.metric, m.length, m.depth, m.value, m.n) for m in callback.results] == [
        ("document_question", 250, None, 0.5, 2),
        ("document_question", 600, None, 0.0, 2),
    ]


def test_k_max_is_the_last_distance_of_an_unbroken_row_of_successes():
    assert _reach([10, 20, 30, 40], [1.0, 0.2, 0.1, 0.9]) == 20
    assert _reach([10, 20], [0.19, 1.0]) == 0
    assert _reach([10, 20], [0.5, 0.2]) == 20


def test_k_max_of_32_distances(tmp_path):
    callback = PasskeyRetrieval((600,), depths=32, trials=1, batch_tokens=10_000)
    found, logged = values(tmp_path, callback, reach=300)
    k_max = found["passkey_k_max", 600, None]
    successes = [m for m in callback.results if m.value == 1 and m.depth is not None]
    assert 10 < len(successes) < 22
    # one step of distances below what the model reaches: the key's second mention is nearer than the needle's begin
    assert 260 < k_max.value < 320
    assert k_max.low <= k_max.value <= k_max.high
    assert (k_max.n, logged["passkey_k_max/600"]) == (32, k_max.value)


def test_answers_are_what_the_model_writes(tmp_path):
    data, module = Data(byte_level()), Module(tiny_llama(vocab_size=VOCABULARY))
    callback = KeyValueRetrieval((120, 150), depths=3, trials=2)
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(module, datamodule=data, verbose=False)
    answers = list(callback.answers(trainer, module, count=3))
    assert [(a.length, a.depth) for a in answers] == [(n, d) for n in (120, 150) for d in (0.0, 0.5, 1.0)]
    prompt = KeyValuePrompts(data.tokenizer).prompt(150, 0.5, 1)
    row, written = prompt.tokens[: -prompt.answer], []
    for _ in range(prompt.answer + 8):  # greedy decoding without a cache
        with torch.no_grad():
            row = torch.cat([row, module.model(row[None]).logits[0, -1].argmax()[None]])
        written.append(int(row[-1]))
        if written[-1] == module.model.generation_config.eos_token_id:
            break
    assert answers[4].given == data.tokenizer.decode(written).strip()
    assert answers[4].expected == data.tokenizer.decode(prompt.tokens[-prompt.answer :]).strip()


class Notes(ModelCheckpoint):
    """Notes the step of each checkpoint and the score it was judged by."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scores = []

    def _save_topk_checkpoint(self, trainer, monitor_candidates):
        self.scores.append((trainer.global_step, float(monitor_candidates[self.monitor])))
        super()._save_topk_checkpoint(trainer, monitor_candidates)


class Counting(PasskeyRetrieval):
    """Counts its measurements instead of measuring."""

    count = 0

    def measure_length(self, trainer, module, length):
        self.count += 1
        return [Measurement("passkey", length, None, float(self.count), 0.0, 1.0, 1)]


@pytest.mark.parametrize(
    ("when", "checkpoint", "accumulate", "expected"),
    [
        ({"every_n_steps": 3}, {"every_n_train_steps": 3}, 1, [(3, 1), (6, 2)]),
        ({"every_n_steps": 2}, {"every_n_train_steps": 2}, 2, [(2, 1), (4, 2)]),
        ({"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, 1, [(4, 1), (8, 2)]),
        ({}, {}, 1, [(2, 1), (4, 2), (6, 3), (8, 4)]),
    ],
)
def test_checkpoints_see_what_was_measured_at_their_step(tmp_path, when, checkpoint, accumulate, expected):
    callback = Counting((230,), trials=1, **when)
    notes = Notes(tmp_path / "saved", monitor="passkey/230", mode="max", **checkpoint)
    validation = {"limit_val_batches": 0} if when else {"val_check_interval": 2}
    trainer = trainer_with(tmp_path, callback, notes, accumulate_grad_batches=accumulate, **validation)
    trainer.fit(Module(Repeater(reach=10)), datamodule=Data())
    assert notes.scores == expected
    assert callback.count == len(expected)
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(Module(Repeater(reach=10)), datamodule=Data(), verbose=False)
    assert callback.count == len(expected) + 1  # a validation of its own measures whatever a fit was told


def test_a_resumed_fit_does_not_measure_its_first_step_again(tmp_path):
    first = trainer_with(tmp_path, max_steps=4)
    first.fit(Module(Repeater(10)), datamodule=Data())
    first.save_checkpoint(tmp_path / "at.ckpt")
    callback = Counting((230,), trials=1, every_n_steps=4)
    trainer = trainer_with(tmp_path, callback, max_steps=7, max_epochs=-1, accumulate_grad_batches=2)
    trainer.fit(Module(Repeater(10)), datamodule=Data(), ckpt_path=tmp_path / "at.ckpt")
    assert (trainer.global_step, callback.count) == (7, 0)


def test_text_is_read_once_for_all_callbacks(tmp_path):
    data, asked = Data(), []
    filler = data.filler
    data.filler = lambda split: asked.append(split) or filler(split)
    callbacks = [
        NeedleRetrieval((230,), trials=1),
        PasskeyRetrieval((230,), trials=1, filler="text"),
        DocumentQuestion((230,), trials=1),
    ]
    trainer = trainer_with(tmp_path, *callbacks)
    trainer.validate(Module(Repeater(9)), datamodule=data, verbose=False)
    trainer.validate(Module(Repeater(9)), datamodule=data, verbose=False)
    assert asked == ["validation"]


def test_a_trial_that_cannot_be_written_is_named_before_anything_runs(tmp_path):
    module, data = Module(Repeater(9)), Data()
    for name, words in (("long", 200), ("short", 3)):
        (tmp_path / f"{name}.txt").write_text(f"The {name} one\n\n" + "grass " * words)
    files = tuple(str(tmp_path / f"{name}.txt") for name in ("long", "short"))
    wordy = Needle("Everyone knows that " + "and so on " * 40 + "it is 7316.", "it is", "7316")
    for callback, message in (
        (DocumentQuestion((230,), files), "'The short one' has"),
        (NeedleRetrieval((230,), (*NEEDLES, wordy), trials=3), "needs at least"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_with(tmp_path, callback).validate(module, datamodule=data, verbose=False)
    assert module.model.seen == []


def test_a_file_that_cannot_be_read_is_named_before_anything_runs(tmp_path, caplog):
    module = Module(Repeater(9))
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"Cannot read the document .*missing\.txt"):
        trainer_with(tmp_path, DocumentQuestion((230,), (str(tmp_path / "missing.txt"),))).fit(
            module, datamodule=Data()
        )
    assert module.model.seen == []
