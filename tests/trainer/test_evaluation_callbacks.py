"""Evaluation callbacks under a real trainer, with models whose right numbers are known beforehand."""

import csv
import inspect
import math
import random
import statistics
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import random_loader, tiny_llama
from known_models import VOCABULARY, Data, Fake, Module, Positional, Repeater, trainer_with
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from small_tokenizers import byte_level, decode

from lightning_longrope.callbacks import (
    DocumentQuestion,
    KeyValueRetrieval,
    Measurement,
    MeasuringCallback,
    NeedleRetrieval,
    PasskeyRetrieval,
    PerplexityByLength,
    PrefixPerplexity,
    SlidingPerplexity,
)
from lightning_longrope.retrieval import PasskeyPrompts

FRAGMENTS = Path(__file__).parents[2] / "callbacks"


def by_name(results):
    return {(m.metric, m.length, m.depth): m for m in results}


# Passkey


@pytest.mark.parametrize("filler", ["appendix", "text"])
def test_a_repeater_finds_exactly_the_keys_it_can_reach(tmp_path, filler):
    callback = PasskeyRetrieval((220, 600), depths=(0.0, 0.5, 1.0), trials=4, filler=filler, batch_tokens=2000)
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(Module(Repeater(reach=215)), datamodule=Data(), verbose=False)
    found = by_name(callback.results)
    distances = PasskeyPrompts(Data().tokenizer, filler, Data().filler("")).prompt
    assert {cell: m.value for cell, m in found.items()} == {
        ("passkey_k_max", 220, None): distances(220, 0.0, 0).distance,  # every distance
        ("passkey_k_max", 600, None): distances(600, 1.0, 0).distance,  # the shortest alone
        ("passkey", 220, 0.0): 1.0,
        ("passkey", 220, 0.5): 1.0,
        ("passkey", 220, 1.0): 1.0,
        ("passkey", 220, None): 1.0,
        ("passkey", 600, 0.0): 0.0,
        ("passkey", 600, 0.5): 0.0,
        ("passkey", 600, 1.0): 1.0,
        ("passkey", 600, None): 4 / 12,
    }
    assert [found["passkey", 600, depth].n for depth in (0.0, None)] == [4, 12]
    assert found["passkey", 600, 0.0].high == pytest.approx(0.4899, abs=1e-4)  # Wilson, 0 of 4
    assert trainer.callback_metrics["passkey/220"] == 1
    assert trainer.callback_metrics["passkey/600"] == pytest.approx(1 / 3)


def test_one_wrong_digit_is_a_miss_whatever_the_number_of_tokens(tmp_path):
    """Keys of 3 to 6 tokens share a batch; a model blind to one digit misses exactly the keys that hold it.

    It is blind to the last word of the question too, which is no part of the answer.
    """

    class Blind(Repeater):
        def logits(self, row):
            logits = super().logits(row)
            logits[:, [token for text, token in tokenizer.get_vocab().items() if "7" in text]] = -1.0
            logits[:, tokenizer.encode("The pass key is")[-1]] = -1.0
            return logits

    tokenizer = byte_level(split_digits=False)
    data = Data(tokenizer)
    data.filler = None  # the prompt of the paper needs no text
    callback = PasskeyRetrieval((300,), depths=2, trials=30, seed=3)
    trainer_with(tmp_path, callback).validate(Module(Blind(reach=1000)), datamodule=data, verbose=False)
    prompts = PasskeyPrompts(tokenizer, seed=3)
    trials = [[prompts.prompt(300, depth, trial) for trial in range(30)] for depth in (0.0, 1.0)]
    keys = [[decode(tokenizer, p.tokens[-p.answer :]) for p in row] for row in trials]
    assert len({p.answer for row in trials for p in row}) > 1
    assert [m.value for m in callback.results[:2]] == [sum("7" not in key for key in row) / 30 for row in keys]
    assert 0 < callback.results[2].value < 1


def test_too_short_a_length_fails_before_training(tmp_path):
    module = Module(Repeater(9))
    trainer = trainer_with(tmp_path, PasskeyRetrieval((80,)))
    with pytest.raises(ValueError, match=r"needs at least \d+ tokens, got length 80"):
        trainer.fit(module, datamodule=Data())
    assert trainer.global_step == 0
    assert module.model.seen == []
    short = PasskeyRetrieval((80,), trials=1, filler="text")  # has no preamble
    trainer_with(tmp_path, short).validate(Module(Repeater(reach=80)), datamodule=Data(), verbose=False)
    assert short.results[-2].value == 1


# Perplexity


def plain_nll(model, row):
    """Nll of tokens 1.. of a row in plain Python."""
    losses = []
    for logits, target in zip(model.logits(row).tolist(), row[1:], strict=False):
        top = max(logits)
        losses.append(top + math.log(math.fsum(math.exp(value - top) for value in logits)) - logits[target])
    return losses


def cut(tokenizer, document, length):
    """Windows of a document that begins with BOS if there is one, as it is cut by hand."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert document[: len(bos)] == bos
    text, step = document[len(bos) :], length - len(bos)
    return [bos + text[start : start + step] for start in range(0, len(text) - step + 1, step)]


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_of_every_length_agrees_with_plain_python(tmp_path, bos):
    model, data = Positional(), Data(byte_level(bos=bos))
    callback = PerplexityByLength((16, 40, 15), documents=5, last=14, seed=2, batch_tokens=32)
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(Module(model), datamodule=data, verbose=False)
    assert data.asked == [("validation", 5, 40, 2)]
    documents = data.excerpts("validation", 5, 40, seed=2).tolist()
    found = by_name(callback.results)
    for length in (16, 40, 15):
        windows = [window for document in documents for window in cut(data.tokenizer, document, length)]
        assert len(windows) == (5 if length == 40 else 10)
        losses = [
            plain_nll(model, window)[bos:] for window in windows
        ]  # a window predicts neither BOS nor its text's start
        flat = [loss for window in losses for loss in window]
        # In a byte-level vocabulary a token has one character for every byte.
        tokens = [data.tokenizer.convert_ids_to_tokens(window[1 + bos :]) for window in windows]
        expected = {
            "perplexity": math.exp(statistics.fmean(flat)),
            "bits_per_byte": sum(flat) / math.log(2) / sum(len(token) for window in tokens for token in window),
        }
        if len(losses[0]) >= 14:
            last = [loss for window in losses for loss in window[-14:]]
            expected["perplexity_last14"] = math.exp(statistics.fmean(last))
        actual = {m.metric: m.value for m in callback.results if m.length == length}
        # A character on the edge of two windows may be off by bytes.
        assert actual.pop("bits_per_byte") == pytest.approx(expected.pop("bits_per_byte"), rel=0.02)
        assert actual == pytest.approx(expected, rel=1e-5)
        for metric in actual:
            m = found[metric, length, None]
            assert m.low < m.value < m.high
            assert m.n == 5
            assert trainer.callback_metrics[f"{metric}/{length}"].item() == pytest.approx(m.value, rel=1e-6)
    assert ("perplexity_last14", 15, None) in found or bos
    assert max(rows * length for rows, length in (seen.shape for seen in model.seen)) == 40  # one row, above 32


def test_bits_per_byte_is_exact_in_plain_letters(tmp_path):
    model, data = Positional(), Data()
    data.filler = lambda split: torch.tensor(data.tokenizer.encode("plain words only, again " * 40))
    callback = PerplexityByLength((20,), documents=3)
    trainer_with(tmp_path, callback).validate(Module(model), datamodule=data, verbose=False)
    rows = data.excerpts("validation", 3, 20).tolist()
    nats = sum(sum(plain_nll(model, row)[1:]) for row in rows)
    letters = sum(len(token) for row in rows for token in data.tokenizer.convert_ids_to_tokens(row[2:]))
    value = by_name(callback.results)["bits_per_byte", 20, None].value
    assert value == pytest.approx(nats / math.log(2) / letters, rel=1e-5)


def test_a_window_without_a_prediction_is_refused(tmp_path):
    trainer = trainer_with(tmp_path, PerplexityByLength((16, 2)))
    with pytest.raises(ValueError, match="`lengths` of PerplexityByLength must be above 2 tokens, got 2"):
        trainer.validate(Module(Positional()), datamodule=Data(), verbose=False)


def test_an_impossible_token_does_not_make_perplexity_infinite(tmp_path):
    class Sure(Fake):
        def logits(self, row):
            return torch.nn.functional.one_hot(torch.tensor(row), VOCABULARY) * 900.0  # wrong, and certain of it

    callback = PerplexityByLength((16,), documents=2, last=20)
    trainer_with(tmp_path, callback).validate(Module(Sure()), datamodule=Data(), verbose=False)
    found = by_name(callback.results)
    assert found["bits_per_byte", 16, None].value > 100
    assert found["perplexity", 16, None].value == math.inf or found["perplexity", 16, None].value > 1e300
    assert not any(math.isnan(x) for m in callback.results for x in (m.value, m.low, m.high))
    assert "perplexity_last20" not in {m.metric for m in callback.results}


# What all share


KINDS = {
    "passkey": lambda **changes: PasskeyRetrieval((230,), depths=2, trials=3, **changes),
    "perplexity": lambda **changes: PerplexityByLength((16, 32), documents=3, **changes),
    "sliding": lambda **changes: SlidingPerplexity((16, 32), stride=5, documents=3, **changes),
    "prefix": lambda **changes: PrefixPerplexity((16, 32), documents=3, **changes),
    "key_value": lambda **changes: KeyValueRetrieval((230,), depths=2, trials=3, **changes),
    "needle": lambda **changes: NeedleRetrieval((230,), depths=2, trials=3, **changes),
    "document": lambda **changes: DocumentQuestion((230,), trials=3, **changes),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def every(**changes):
    return [make(**changes) for make in KINDS.values()]


def test_checkpoints_can_monitor_what_was_measured(tmp_path):
    by_passkey = ModelCheckpoint(tmp_path / "a", monitor="passkey/230", mode="max")
    by_perplexity = ModelCheckpoint(tmp_path / "b", monitor="perplexity/16")
    trainer = trainer_with(tmp_path, by_passkey, by_perplexity, *every())
    trainer.fit(Module(Repeater(reach=1000)), datamodule=Data())
    assert by_passkey.best_model_score == 1
    assert by_perplexity.best_model_score == pytest.approx(trainer.callback_metrics["perplexity/16"].item())


def test_the_sanity_check_measures_nothing_and_every_validation_does(tmp_path):
    class Notes(Callback):
        forwards = []

        def on_sanity_check_end(self, trainer, pl_module):
            self.forwards.append(len(pl_module.model.seen))

        def on_validation_end(self, trainer, pl_module):
            self.forwards.append(len(pl_module.model.seen))

    trainer = trainer_with(
        tmp_path, KINDS["passkey"](), KINDS["perplexity"](), notes := Notes(), num_sanity_val_steps=1
    )
    trainer.fit(Module(Repeater(reach=10)), datamodule=Data())
    assert notes.forwards == [0, 0, 3, 6]  # sanity validation, its end, then one pass a length and validation
    trainer.test(Module(Repeater(reach=10)), datamodule=Data(), verbose=False)
    assert trainer.callback_metrics["passkey/230"] == 0


@pytest.mark.parametrize("when", [{}, {"every_n_steps": 3}, {"every_n_epochs": 1}])
def test_training_is_bit_for_bit_the_same_with_and_without(tmp_path, when):
    def train(*callbacks):
        module = Module(tiny_llama(seed=1, vocab_size=VOCABULARY, attention_dropout=0.3).train())
        torch.manual_seed(5)
        trainer_with(tmp_path, *callbacks, val_check_interval=2).fit(module, datamodule=Data())
        return module.model.state_dict(), torch.get_rng_state(), random.getstate()

    measuring = every(**when)
    (weights, torch_state, state), (plain, plain_torch_state, plain_state) = train(*measuring), train()
    assert all(callback.results for callback in measuring)
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert torch.equal(torch_state, plain_torch_state)
    assert state == plain_state


def test_what_is_measured_between_steps_is_logged_at_once_and_once(tmp_path):
    class Reads(Callback):
        """What a kill after every step would leave."""

        def on_train_batch_end(self, trainer, *rest):
            path = Path(logger.log_dir) / "metrics.csv"
            left.append(list(csv.DictReader(path.read_text().splitlines())) if path.exists() else [])

    left = []
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=100)
    measuring = KINDS["perplexity"](every_n_steps=2)
    trainer = trainer_with(tmp_path, measuring, Reads(), logger=logger, log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(Module(Repeater(reach=10)), datamodule=Data())
    steps = [[row["step"] for row in rows if row.get("perplexity/16")] for rows in left[:5]]
    assert steps == [[], ["1"], ["1"], ["1", "3"], ["1", "3"]]


def attached(tmp_path, callback, module, **kwargs):
    """A trainer outside of any loop, as another callback or a script would have it."""
    trainer = trainer_with(tmp_path, callback, **kwargs)
    trainer.validate(module, datamodule=Data(), verbose=False)
    module.model.seen.clear()
    return trainer


@every_kind
def test_measuring_by_hand_leaves_no_trace(tmp_path, kind):
    callback, module = KINDS[kind](), Module(Repeater(reach=10))
    trainer = attached(tmp_path, callback, module)
    module.train()
    module.model.part.eval()  # a part that was frozen stays frozen
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    callback.measure(trainer, module)
    assert module.model.seen
    assert not any(seen.training or seen.grad for seen in module.model.seen)
    assert (module.training, module.model.training, module.model.part.training) == (True, True, False)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_a_subclass_measures_without_gradients_and_logs_its_means(tmp_path):
    class Weight(MeasuringCallback):
        prepared = None

        def prepare(self, datamodule, lengths):
            self.prepared = (datamodule, tuple(lengths))

        def measure_length(self, trainer, module, length):
            assert not (module.model.weight * 2).requires_grad
            return [Measurement("weight", length, depth, length / 2, 0.0, 1.0, 1) for depth in (None, 0.5)]

    callback, module, data = Weight((8, 4)), Module(Positional()), Data()
    trainer = trainer_with(tmp_path, callback, inference_mode=False)
    trainer.validate(module, datamodule=data, verbose=False)
    assert callback.prepared == (data, (8, 4))
    assert trainer.callback_metrics == {"weight/8": 4.0, "weight/4": 2.0}
    assert [m.length for m in callback.measure(trainer, module)] == [8, 8, 4, 4]


def test_modes_come_back_when_a_measurement_fails(tmp_path):
    callback, module = KINDS["passkey"](), Module(Repeater(reach=10))
    trainer = attached(tmp_path, callback, module)
    module.train()
    module.model.logits = lambda row: 1 / 0
    with pytest.raises(ZeroDivisionError):
        callback.measure(trainer, module)
    assert module.training
    assert module.model.part.training


@every_kind
@pytest.mark.parametrize(("precision", "autocast"), [("bf16-mixed", True), ("32-true", False)])
def test_runs_in_the_precision_of_the_validation_steps(tmp_path, kind, precision, autocast):
    callback, module = KINDS[kind](), Module(Repeater(reach=10))
    trainer_with(tmp_path, callback, precision=precision).validate(module, datamodule=Data(), verbose=False)
    assert {seen.autocast for seen in module.model.seen} == {autocast}


def test_installs_for_each_length_before_it_is_measured(tmp_path, monkeypatch):
    callback, module = KINDS["perplexity"](), Module(Positional())
    trainer = attached(tmp_path, callback, module)

    def install(model, table):
        model.seen.append(SimpleNamespace(shape=("install", table)))
        model.table = model.table * 0 if table == "flat" else model.table

    monkeypatch.setattr("lightning_longrope.callbacks.measurement.install_factors", install)
    found = by_name(callback.measure(trainer, module, {16: "as it is", 32: "flat"}.get))
    kinds = [seen.shape[0] == "install" for seen in module.model.seen]
    assert kinds == [True, False, True, False]
    assert [seen.shape[1] for seen in module.model.seen] == ["as it is", 16, "flat", 32]
    assert found["perplexity", 32, None].value == pytest.approx(VOCABULARY, rel=1e-5)
    assert found["perplexity", 16, None].value != pytest.approx(VOCABULARY, rel=1e-2)
    assert callback.results == list(found.values())


class Ranks:
    """Trainers of a world of threads whose reduction waits for all."""

    def __init__(self, world, data):
        self.world, self.data = world, data
        self.barrier, self.parts = threading.Barrier(world), [None] * world

    def trainer(self, rank):
        def reduce(tensor, reduce_op):
            assert reduce_op == "sum"
            self.parts[rank] = tensor
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()
            return total

        strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
        return SimpleNamespace(
            world_size=self.world,
            global_rank=rank,
            strategy=strategy,
            datamodule=self.data,
            precision_plugin=Precision(),
        )

    def run(self, make, model):
        modules, results = [Module(model()) for _ in range(self.world)], [None] * self.world

        def work(rank):
            results[rank] = make().measure(self.trainer(rank), modules[rank])

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return results, [[seen.shape[1] for seen in module.model.seen] for module in modules]


@pytest.mark.parametrize("world", [2, 3, 7])
@every_kind
def test_any_number_of_ranks_gives_the_same_and_runs_the_same_number_of_passes(world, kind):
    def make():
        return KINDS[kind](batch_tokens=460 if KINDS[kind]().lengths == (230,) else 32)

    data = Data()
    [(alone,), (passes,)] = Ranks(1, data).run(make, lambda: Repeater(reach=200))
    results, shapes = Ranks(world, data).run(make, lambda: Repeater(reach=200))
    assert results == [alone] * world
    a_length = {"document": [2], "perplexity": [3, 3], "sliding": [9, 3]}.get(kind, [3])  # so 2 and 7 ranks have to pad
    assert len(passes) == sum(a_length)
    assert [len(shape) for shape in shapes] == [sum(math.ceil(count / world) for count in a_length)] * world


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(tmp_path):
    def metrics(**kwargs):
        trainer = trainer_with(tmp_path, *every(batch_tokens=460), **kwargs)
        return trainer.validate(Module(Repeater(reach=200)), datamodule=Data(), verbose=False)[0]

    two = metrics(devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    assert two == metrics()
    assert len(two) == 2 * 2 + 2 * 2 + 2 * 1 + 2 + 3


def test_the_default_length_is_that_of_the_data(tmp_path):
    callback = PerplexityByLength(documents=2)
    trainer_with(tmp_path, callback).validate(Module(Positional()), datamodule=Data(), verbose=False)
    assert {m.length for m in callback.results} == {48}


def test_users_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="PasskeyRetrieval takes its text and tokenizer from a datamodule"):
        trainer_with(tmp_path, PasskeyRetrieval()).validate(Module(Repeater(9)), random_loader(), verbose=False)
    for mistake, match in [
        (lambda: PerplexityByLength(()), "`lengths`"),
        (lambda: PerplexityByLength((1,)), "`lengths`"),
        (lambda: PerplexityByLength((8,), batch_tokens=0), "`batch_tokens`"),
        (lambda: PerplexityByLength((8,), documents=0), "`documents`"),
        (lambda: PasskeyRetrieval((256,), depths=0), "`depths`"),
        (lambda: PasskeyRetrieval((256,), depths=(0.5, 2.0)), "`depths`"),
        (lambda: PasskeyRetrieval((256,), trials=0), "`trials`"),
    ]:
        with pytest.raises(ValueError, match=match):
            mistake()


def test_depths_are_evenly_spread_with_the_ends():
    assert PasskeyRetrieval(depths=5).depths == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert PasskeyRetrieval(depths=1).depths == (0.5,)
    assert PasskeyRetrieval(depths=(0.1, 0.9)).depths == (0.1, 0.9)


@pytest.fixture
def from_command_line(monkeypatch):
    """Makes the measuring callbacks that arguments of the command line ask for."""

    def make(*args):
        quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        monkeypatch.setattr("sys.argv", ["longrope", *(f"--trainer.{name}=false" for name in quiet), *args])
        cli = LightningCLI(BoringModel, run=False, seed_everything_default=False, save_config_callback=None)
        return [callback for callback in cli.trainer.callbacks if isinstance(callback, MeasuringCallback)]

    return make


@pytest.mark.parametrize(("name", "kind"), [("perplexity", PerplexityByLength), ("passkey", PasskeyRetrieval)])
def test_the_fragment_names_every_argument_with_its_default(from_command_line, name, kind):
    path = FRAGMENTS / f"{name}.yaml"
    made = from_command_line(f"--trainer.callbacks+={path}", f"--trainer.callbacks+={path}")
    assert [type(callback) for callback in made] == [kind, kind]
    defaults = {n: p.default for n, p in inspect.signature(kind).parameters.items()}
    written = yaml.safe_load(path.read_text())["init_args"]
    assert written == defaults
    comments = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert len(comments) == len(defaults)
    assert all("  # " in line for line in comments)


def test_lengths_and_depths_come_from_a_config_as_lists(from_command_line, tmp_path):
    config = tmp_path / "callback.yaml"
    arguments = {"lengths": [300, 400], "depths": [0.25, 1]}
    config.write_text(
        yaml.dump({"class_path": "lightning_longrope.callbacks.PasskeyRetrieval", "init_args": arguments})
    )
    [made] = from_command_line(f"--trainer.callbacks+={config}")
    assert (made.lengths, made.depths) == ((300, 400), (0.25, 1.0))
