"""Datamodules under a real Trainer: splits, rows, excerpts, and a resumed run that sees the very next row."""

import json
import sysconfig
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_longrope.datamodules import PackedTextDataModule, SampleTextDataModule, sample_text
from lightning_longrope.packing import IGNORED

FRAGMENTS = Path(__file__).parents[2] / "datamodules"


def texts(datamodule, split):
    documents = datamodule.documents(split)
    ends = documents.starts + documents.lengths
    return [
        datamodule.tokenizer.decode(documents.tokens[start:end])
        for start, end in zip(documents.starts, ends, strict=True)
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sample(cache):
    datamodule = SampleTextDataModule(cache_dir=str(cache), passkey_share=0.3)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@pytest.fixture(scope="module")
def tokenizer(sample, cache):
    """Folder of a tokenizer."""
    return str(next(cache.glob("tokenizer-*")))


class Reader(LightningModule):
    """Keeps what it is given; its one weight must be trained by somebody."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["input_ids"].tolist()))
        return self.weight.sum() * 0

    def validation_step(self, batch, batch_idx):
        assert "weights" not in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(datamodule, callbacks=(), ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    reader = Reader()
    trainer = Trainer(**quiet, **{"max_epochs": 1, **options}, callbacks=list(callbacks))
    trainer.fit(reader, datamodule=datamodule, ckpt_path=ckpt_path)
    return reader.seen


# The sample text


def test_sample_text_is_split_by_whole_files(sample):
    held_out = {split: texts(sample, split) for split in ("validation", "test")}
    assert {split: len(files) for split, files in held_out.items()} == {"validation": 30, "test": 40}
    library = {path.read_bytes() for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")}
    for files in held_out.values():
        assert all(9_000 <= len(text.encode()) <= 60_000 for text in files)
        assert all(text.encode() in library for text in files)  # whole, byte for byte
    train = texts(sample, "train")
    assert sum(map(len, train)) > 5_000_000
    assert max(map(len, train)) <= 60_000
    for left, right in combinations([train, *held_out.values()], 2):
        assert not set(left) & set(right)


def test_the_split_is_drawn_from_the_seed_and_parts_are_for_training():
    files, parts = [f"file {number} " * 8000 for number in range(100)], ["part"] * 2
    splits = [sample_text.split_texts(files, parts, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert all(splits[0][split] != splits[2][split] for split in ("train", "validation", "test"))
    assert sorted(sum(splits[2].values(), [])) == sorted(files + parts)
    assert splits[2]["train"][-2:] == parts


def test_cut_parts_are_the_text_and_end_with_lines():
    text = "".join(f"line {number} {'x' * (number % 90)}\n" for number in range(3000))
    parts = sample_text.cut(text)
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    assert all(abs(len(part) - sample_text.PART) < 4_000 for part in parts)
    assert len(parts) > 5
    assert "".join(sample_text.cut("no line end" * 20_000)) == "no line end" * 20_000


def test_the_sample_tokenizer_keeps_digits_single_and_opens_with_bos(sample):
    tokenizer = sample.tokenizer
    assert len(tokenizer) == sample.vocab_size == 1024
    assert (tokenizer.bos_token, tokenizer.eos_token) == (sample_text.BOS, sample_text.EOS)
    tokens = tokenizer("key 90417 ümläut 漢")["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[1:]) == "key 90417 ümläut 漢"
    digits = [token for token in range(1024) if any(char.isdigit() for char in tokenizer.decode([token]))]
    assert all(len(tokenizer.decode([token])) == 1 for token in digits)
    assert len(digits) == 10
    documents = sample.documents("test")
    assert 2.2 < sum(len(text.encode()) for text in texts(sample, "test")) / documents.total < 3.2


def test_the_sample_tokenizer_is_made_once_per_text_and_vocabulary(sample, cache, monkeypatch):
    def untouched(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(sample_text, "train_tokenizer", untouched)
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.parts", untouched)
    again = SampleTextDataModule(cache_dir=str(cache), seq_len=1024)
    assert again.tokenizer.get_vocab() == sample.tokenizer.get_vocab()
    assert texts(again, "test") == texts(sample, "test")
    for other in (SampleTextDataModule(cache_dir=str(cache), seed=1), SampleTextDataModule(vocab_size=512)):
        with pytest.raises(AssertionError, match="trained again"):
            other.tokenizer  # noqa: B018
    borrowed = SampleTextDataModule(tokenizer=str(next(cache.glob("tokenizer-*"))), seed=1)  # trains none
    assert borrowed.tokenizer.get_vocab() == sample.tokenizer.get_vocab()


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("x = 1\n" * 3000)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"holds 0\.\d MB of text in 1 files, but at least 5 MB in more than 70"):
        SampleTextDataModule().setup()


def test_sample_epochs_read_the_whole_text_and_the_declared_share_of_passkey_rows(sample):
    loader = sample.train_dataloader()
    started = time.perf_counter()
    batches = list(loader)
    per_row = (time.perf_counter() - started) / len(loader.dataset)
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels", "weights")}
    bos, eos = sample.tokenizer.bos_token_id, sample.tokenizer.eos_token_id
    assert rows["input_ids"].shape == rows["labels"].shape == rows["weights"].shape == (len(loader.dataset), 128)
    assert (rows["input_ids"][:, 0] == bos).all()
    assert (rows["input_ids"][:, -1] == eos).all()
    labels = rows["input_ids"].masked_fill(rows["input_ids"] == bos, IGNORED)
    labels[:, -1] = IGNORED  # the EOS that only says where the window ends
    assert (rows["labels"] == labels).all()
    passkey = (rows["weights"] == 2).any(1)
    assert passkey.float().mean().item() == pytest.approx(0.3, abs=0.001)
    places = passkey.nonzero().flatten()
    assert places.diff().max() < 60  # all over the epoch
    text = rows["input_ids"][~passkey]
    text_tokens = ((text != bos) & (text != eos)).sum().item()
    assert 0 <= sample.documents("train").total - text_tokens < 128
    questions = set()
    for row, weights in zip(rows["input_ids"][passkey][:50], rows["weights"][passkey][:50], strict=True):
        line = sample.tokenizer.decode(row)
        answers = sample.tokenizer.decode(row[weights == 2]).split()
        questions.add(len(answers))
        assert all(line.count(f"The pass key is {answer}. Remember it. {answer} is the") == 1 for answer in answers)
        assert all(line.count(f"What is the pass key? The pass key is {answer}") == 1 for answer in answers)
    assert questions == {1, 2}
    assert per_row < 1e-3  # about 0.07 ms on one busy core


def test_evaluation_rows_are_plain_text_in_a_fixed_order(sample):
    for split, loader in (("validation", sample.val_dataloader()), ("test", sample.test_dataloader())):
        batches = list(loader)
        assert set(batches[0]) == {"input_ids", "labels", "stretch_lengths"}
        first = sample.documents(split)
        assert batches[0]["input_ids"][0, 1:-1].tolist() == first.joined(126).tolist()
        loader.sampler.set_epoch(3)
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(batches, loader, strict=True))


def test_sample_excerpts_of_the_test_split_reach_the_window_of_the_quick_start(sample):
    excerpts = sample.excerpts("test", 24, 1024)
    assert excerpts.shape == (24, 1024)
    assert excerpts.dtype == torch.int64
    assert (excerpts[:, 0] == sample.tokenizer.bos_token_id).all()
    everything = texts(sample, "test")
    owners = [[text for text in everything if sample.tokenizer.decode(row[1:]) in text] for row in excerpts]
    assert all(len(owner) == 1 for owner in owners)
    assert len({owner[0] for owner in owners}) == 24
    assert not torch.equal(excerpts, sample.excerpts("test", 24, 1024, seed=1))
    assert sample.filler("test").tolist() == sample.documents("test").joined().tolist()
    with pytest.raises(ValueError, match=r"24 excerpts of 100000 tokens .* hold only 0"):
        sample.excerpts("test", 24, 100_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passkey_share": 1.0}, "`passkey_share` must be"),
        ({"vocab_size": 100}, "`vocab_size` must be at least 258"),
        ({"seq_len": 3}, "`seq_len` must be at least 4"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_sample_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleTextDataModule(**arguments)


def test_too_many_questions_for_the_window_fail_before_training(sample, cache):
    datamodule = SampleTextDataModule(cache_dir=str(cache), seq_len=64, passkey_share=0.3, passkey_questions=9)
    with pytest.raises(ValueError, match="passkey row of 9 question"):
        datamodule.train_dataloader()


# Files


def write_jsonl(path, documents):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def stories(count, word="green", length=30):
    return [f"{word} story {number}. " + f"The grass is {word} number {number}. " * length for number in range(count)]


def packed(tmp_path, tokenizer, **options):
    defaults = {"tokenizer": tokenizer, "seq_len": 32, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    return PackedTextDataModule(**{**defaults, **options})


def test_files_for_each_split(tmp_path, tokenizer, caplog):
    paths = {name: [write_jsonl(tmp_path / f"{name}.jsonl", stories(3, name))] for name in ("train", "val", "test")}
    with Path(paths["train"][0]).open("a") as file:
        file.write("broken\n")
    datamodule = packed(tmp_path, tokenizer, **{f"{name}_files": files for name, files in paths.items()})
    with pytest.raises(ValueError, match=r"train\.jsonl, record 4: not JSON"):
        datamodule.prepare_data()
    datamodule = packed(
        tmp_path, tokenizer, **{f"{name}_files": files for name, files in paths.items()}, on_error="skip"
    )
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert texts(datamodule, split) == stories(3, name)
    assert "Skipped 1 records" in caplog.text
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["input_ids"].shape == (2, 32)
    assert "weights" not in batch


def test_one_list_of_files_is_split_by_whole_documents(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / "a.jsonl", stories(40)), write_jsonl(tmp_path / "b.jsonl", stories(10, "blue"))]

    def splits(**options):
        datamodule = packed(tmp_path, tokenizer, files=files, val_share=0.1, test_share=0.2, **options)
        return [texts(datamodule, split) for split in ("train", "validation", "test")]

    found = splits()
    assert [len(split) for split in found] == [35, 5, 10]
    assert sorted(sum(found, [])) == sorted(stories(40) + stories(10, "blue"))
    assert splits() == found
    assert splits(seed=1)[1] != found[1]
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1  # another split needs no second tokenising


def test_tokens_are_made_again_for_other_files_and_only_then(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", stories(5))
    assert texts(packed(tmp_path, tokenizer, train_files=[path]), "train") == stories(5)
    longer = write_jsonl(tmp_path / "a.jsonl", stories(7))
    assert texts(packed(tmp_path, tokenizer, train_files=[longer]), "train") == stories(7)
    monkeypatch.setattr("lightning_longrope.datamodules.packed.read_documents", lambda *a: pytest.fail("read again"))
    packed(tmp_path, tokenizer, train_files=[path], seq_len=64, min_document_length=9).prepare_data()


def test_short_documents_are_left_out_and_none_left_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["short", *stories(3)])
    assert texts(packed(tmp_path, tokenizer, train_files=[path], min_document_length=100), "train") == stories(3)
    with pytest.raises(ValueError, match="train split holds no document of at least `min_document_length` 9999"):
        packed(tmp_path, tokenizer, train_files=[path], min_document_length=9999).train_dataloader()
    with pytest.raises(ValueError, match="was given no text for the test split"):
        packed(tmp_path, tokenizer, train_files=[path]).excerpts("test", 1, 16)
    with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'val'"):
        packed(tmp_path, tokenizer, train_files=[path]).filler("val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none of them"),
        ({"files": ["a"], "train_files": ["b"]}, "got files for each split and `files`"),
        ({"files": ["a"], "val_share": 0.5, "test_share": 0.5}, "together below 1"),
        ({"train_files": ["a"], "val_share": 0.5}, "leave them at 0"),
    ],
)
def test_what_each_split_is_must_be_said_once(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        packed(tmp_path, tokenizer, **options)


def test_a_file_in_two_splits_and_a_missing_tokenizer_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", stories(3))
    both = packed(tmp_path, tokenizer, train_files=[path], val_files=[f"{tmp_path}/*.jsonl"])
    with pytest.raises(ValueError, match=r"a\.jsonl is in the train split and in the validation split"):
        both.prepare_data()
    with pytest.raises(ValueError, match="PackedTextDataModule needs `tokenizer`"):
        packed(tmp_path, None, train_files=[path]).prepare_data()


# Under a trainer


def test_a_run_without_validation_files_trains(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", stories(3))
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        seen = fit(packed(tmp_path, tokenizer, train_files=[path], cache_dir=None), max_epochs=2)
    epochs = [[rows for epoch, rows in seen if epoch == number] for number in range(2)]
    assert len(epochs[0]) == len(epochs[1]) > 5
    assert epochs[0] != epochs[1]


class EveryEpoch(ModelCheckpoint):
    """Lightning wants another class for a second checkpoint callback."""


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (0, {"val_check_interval": 3}),
        (0, {"limit_train_batches": 4}),
        (0, {"accumulate_grad_batches": 2}),
        (2, {}),
    ],
)
def test_a_resumed_run_sees_the_very_next_row(tmp_path, tokenizer, workers, options):
    texts = {"train": stories(9, length=3), "val": stories(9, "blue", length=3)}
    files = {f"{name}_files": [write_jsonl(tmp_path / f"{name}.jsonl", found)] for name, found in texts.items()}
    checkpoints = [
        ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1),
        EveryEpoch(tmp_path / "epochs", "{step}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    datamodule = packed(tmp_path, tokenizer, **files, num_workers=workers)
    whole = fit(datamodule, checkpoints, max_epochs=2, **options)
    assert len({str(rows) for _, rows in whole}) == len(whole) > 7
    paths = sorted(tmp_path.glob("*/step=*.ckpt"))
    assert len(paths) > 7
    for path in paths[:: 1 if not workers else 5]:
        progress = torch.load(path, weights_only=False)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = progress["total"]["ready"]
        resumed = packed(tmp_path, tokenizer, **files, num_workers=workers)
        assert fit(resumed, ckpt_path=path, max_epochs=2, **options) == whole[done:], path


def test_overfitting_some_batches_works(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", stories(5))
    datamodule = packed(tmp_path, tokenizer, files=[path], val_share=0.2)
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(datamodule, max_epochs=2, overfit_batches=2)
    assert len(seen) == 4
    assert [rows for _, rows in seen[:2]] == [rows for _, rows in seen[2:]]


class SharedReader(Reader):
    """Writes what every rank was given."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))


@pytest.mark.distributed
def test_two_ranks_see_every_row_once_between_them(tmp_path, tokenizer):
    files = {"files": [write_jsonl(tmp_path / "a.jsonl", stories(6))], "val_share": 0.2}
    alone = packed(tmp_path, tokenizer, **files)
    expected = [row for batch in alone.train_dataloader() for row in batch["input_ids"].tolist()]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        strategy="ddp_fork", accelerator="cpu", devices=2, max_epochs=1, enable_checkpointing=False, **quiet
    )
    trainer.fit(SharedReader(tmp_path), datamodule=packed(tmp_path, tokenizer, **files))
    shares = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    rows = [[row for _, batch in share for row in batch] for share in shares]
    assert [row for pair in zip(*rows, strict=True) for row in pair] == expected[: len(expected) // 2 * 2]


def test_the_tokenizer_is_that_of_the_model_where_none_is_named(sample, tmp_path):
    sample.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some text " * 50)
    data = PackedTextDataModule([str(tmp_path / "a.txt")], seq_len=16, cache_dir=None)
    with pytest.raises(ValueError, match="needs `tokenizer`"):
        _ = data.tokenizer
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(name_or_path=str(tmp_path / "model")))
    assert data.tokenizer.get_vocab() == sample.tokenizer.get_vocab()
