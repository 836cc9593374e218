"""The published corpora in their real formats, made small: read, mixed, packed, trained on, and shown."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
import zstandard
from helpers import LLAMA
from lightning.pytorch import Trainer
from small_tokenizers import byte_level

from lightning_longrope import LongRoPEModule
from lightning_longrope.__main__ import main
from lightning_longrope.datamodules import PackedTextDataModule, PileDataModule, RedPajamaDataModule

ROOT = Path(__file__).parents[2]
MODEL = {**LLAMA, "vocab_size": 704, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
TRAINER = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.logger=false",
           "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false",
           "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=2"]  # fmt: skip
WORDS = {"arxiv": "green", "book": "yellow", "c4": "garden", "common_crawl": "mountains", "github": "queen",
         "stackexchange": "miller", "wikipedia": "harbour"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return str(folder)


def write(path, records, meta=None):
    """Records as JSON lines in a file that is packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.name.endswith(".zst"):
        lines = zstandard.ZstdCompressor().compress(lines)
    path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)


def texts(word, lengths, first=0):
    return [f"Document {number}:" + f" {word}" * length for number, length in enumerate(lengths, first)]


def options(tmp_path, tokenizer, **more):
    return {"tokenizer": tokenizer, "seq_len": 64, "cache_dir": str(tmp_path / "cache"), **more}


def fit(datamodule):
    trainer = Trainer(accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(LongRoPEModule(config=MODEL), datamodule=datamodule)
    assert trainer.global_step == 3
    assert trainer.callback_metrics["train_loss"].isfinite()


def sources(datamodule, split="train"):
    documents = datamodule.documents(split)
    return Counter(documents.source_names[source] for source in documents.sources)


def word_shares(datamodule, epochs=1):
    """Share of every word of WORDS in the rows of some epochs, as they are decoded."""
    loader, seen = datamodule.train_dataloader(), Counter()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen.update(re.findall("|".join(WORDS.values()), datamodule.tokenizer.decode(batch["input_ids"].flatten())))
    total = sum(seen[word] for word in WORDS.values())
    return {name: seen[word] / total for name, word in WORDS.items() if seen[word]}


# The Pile


@pytest.fixture
def pile(tmp_path):
    def records(name, word, lengths, first=0):
        return [{"text": text, "meta": {"pile_set_name": name}} for text in texts(word, lengths, first)]

    files = {
        "train/00.jsonl.zst": [*records("ArXiv", "green", [300] * 20), *records("Github", "queen", [5] * 80)],
        "train/01.jsonl.zst": [*records("Pile-CC", "garden", [20] * 50), *records("ArXiv", "green", [100] * 10, 20)],
        "val.jsonl.zst": records("ArXiv", "green", [90] * 5, 30),
        "test.jsonl.zst": [*records("Github", "queen", [8] * 20, 80), *records("Pile-CC", "garden", [20] * 5, 50)],
    }
    for name, lines in files.items():
        write(tmp_path / "pile" / name, lines)
    return tmp_path / "pile"


def test_the_pile_is_read_by_its_folder_subsets_and_weights(pile, tmp_path, tokenizer):
    given = options(tmp_path, tokenizer, folder=str(pile), subsets=["ArXiv", "Github"])
    plain, mixed = PileDataModule(**given), PileDataModule(**given, weights={"ArXiv": 1, "Github": 3})
    assert sources(plain) == {"ArXiv": 30, "Github": 80}
    assert sources(plain, "validation") == {"ArXiv": 5}
    assert sources(plain, "test") == {"Github": 20}
    assert word_shares(plain)["github"] == pytest.approx(400 / 7400, abs=0.01)
    tokens = {name: sum(plain.documents("train").lengths[plain.documents("train").sources == number])
              for number, name in enumerate(plain.documents("train").source_names)}  # fmt: skip
    # Words are counted but weights are of tokens: "Document 7:" is a larger part of a short document.
    words = {"ArXiv": 7000 / tokens["ArXiv"], "Github": 400 / tokens["Github"]}
    expected = 3 * words["Github"] / (3 * words["Github"] + words["ArXiv"])
    assert word_shares(mixed, epochs=8)["github"] == pytest.approx(expected, abs=0.03)
    assert len(mixed.rows("train")) == pytest.approx(len(plain.rows("train")), rel=0.1)
    fit(mixed)


def test_long_documents_come_more_often_and_arxiv_no_more_often(pile, tmp_path, tokenizer):
    given = options(tmp_path, tokenizer, folder=str(pile), subsets=["ArXiv", "Github"])
    mixed = PileDataModule(**given, long_length=200, long_weight=4)
    assert word_shares(mixed)["arxiv"] == pytest.approx(word_shares(PileDataModule(**given))["arxiv"], abs=0.02)
    documents, order = mixed.documents("train"), mixed.mixture().order(0)
    counts = np.bincount(order, minlength=len(documents))
    arxiv = documents.sources == documents.source_names.index("ArXiv")
    long = documents.lengths >= 200
    assert counts[arxiv & long].mean() / counts[arxiv & ~long].mean() == pytest.approx(4, rel=0.35)


def test_the_pile_from_the_command_line(pile, tmp_path, tokenizer, capsys):
    words = [f"--data={ROOT}/datamodules/pile.yaml", f"--data.folder={pile}", f"--data.tokenizer={tokenizer}",
             "--data.seq_len=64", f"--data.cache_dir={tmp_path}/cache",
             "--data.weights={ArXiv: 1, Github: 1, Pile-CC: 2}", f"--model.config={json.dumps(MODEL)}"]  # fmt: skip
    assert main(["fit", *words, *TRAINER, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    capsys.readouterr()
    assert main(["data", *words, "--rows=2", f"--figures={tmp_path}/figures"]) == 0
    shown = capsys.readouterr().out
    assert "train: 160 documents" in shown
    lines = [line.split() for line in shown.splitlines()]
    table = {line[0]: line for line in lines if line and line[0] in ("ArXiv", "Github", "Pile-CC")}
    assert len(table) == 3
    assert "epoch 0, place 0: row" in shown
    assert (tmp_path / "figures" / "data_train.png").stat().st_size > 10_000
    with (tmp_path / "figures" / "data_train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["documents"]) for row in rows) == 160
    shares = {row["source"]: float(row["share_of_epoch"]) for row in rows}
    assert shares == {"ArXiv": 0.25, "Github": 0.25, "Pile-CC": 0.5}


def test_subsets_and_folders_that_are_none_of_the_piles_are_refused(tmp_path, pile, tokenizer):
    with pytest.raises(ValueError, match=r"`subsets` names Arxiv, but there are ArXiv, BookCorpus2"):
        PileDataModule(str(pile), subsets=["Arxiv"])
    with pytest.raises(ValueError, match=r"No split of the Pile in .*: expected train"):
        PileDataModule(str(tmp_path))
    with pytest.raises(ValueError, match="got both"):
        PileDataModule(str(pile), train_files=["x"])
    left_out = PileDataModule(**options(tmp_path, tokenizer, folder=str(pile), weights={"ArXiv": 1, "Github": 1}))
    with pytest.raises(ValueError, match=r"`weights` does not name Pile-CC"):
        left_out.train_dataloader()
    with pytest.raises(ValueError, match=r"`weights` names Github, which `subsets` leaves out"):
        PileDataModule(str(pile), subsets=["ArXiv"], weights={"ArXiv": 1, "Github": 1})
    short = PileDataModule(**options(tmp_path, tokenizer, folder=str(pile), min_document_length=5000))
    with pytest.raises(
        ValueError, match=r"`min_document_length` 5000 tokens: the longest of 160 has \d+ tokens \(there"
    ):
        short.train_dataloader()


# RedPajama


@pytest.fixture
def red_pajama(tmp_path):
    names = {
        "arxiv/arxiv_023.jsonl": {"arxiv_id": "1"},
        "book/book.jsonl.zst": {"short_book_title": "a"},
        "c4/c4-train.00000-of-01024.jsonl": {"url": "x"},
        "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst": {"source": "cc/2019-30/en_head_0000"},
        "github/filtered_0a.sampled.jsonl.gz": {"path": "a.py"},
        "stackexchange/stackexchange.jsonl": {"question_score": "3"},
        "wikipedia/wiki.jsonl": {"title": "a"},
    }
    root = tmp_path / "redpajama"
    for name, meta in names.items():
        lengths = [100] * 40 if name.startswith(("arxiv", "book")) else [30] * 20
        write(root / name, [{"text": text, "meta": meta} for text in texts(WORDS[name.split("/")[0]], lengths)])
    return root


def test_red_pajama_is_read_by_its_folders(red_pajama, tmp_path, tokenizer):
    given = options(tmp_path, tokenizer, folder=str(red_pajama), val_share=0.2)
    data = RedPajamaDataModule(**given)
    assert sources(data) + sources(data, "validation") == {
        name: 40 if name in ("arxiv", "book") else 20 for name in WORDS}  # fmt: skip
    weights = {"arxiv": 2.5, "book": 4.5, "c4": 15, "common_crawl": 67, "github": 4.5, "stackexchange": 2,
               "wikipedia": 4.5}  # fmt: skip
    shares = word_shares(RedPajamaDataModule(**given, weights=weights), epochs=3)
    assert {name: round(100 * share) for name, share in shares.items()} == pytest.approx(weights, abs=3)
    fit(data)


def test_files_of_other_subsets_are_not_opened(red_pajama, tmp_path, tokenizer):
    (red_pajama / "c4" / "c4-train.00000-of-01024.jsonl").write_text("broken\n")
    given = options(tmp_path, tokenizer, folder=str(red_pajama))
    assert sources(RedPajamaDataModule(**given, subsets=["arxiv", "book"])) == {"arxiv": 40, "book": 40}
    with pytest.raises(ValueError, match="c4-train.00000-of-01024.jsonl, record 1: not JSON"):
        RedPajamaDataModule(**given).prepare_data()
    with pytest.raises(ValueError, match="names books, but there are arxiv, book, c4"):
        RedPajamaDataModule(**given, subsets=["books"])


def test_red_pajama_from_the_command_line_by_the_name_of_its_fragment(red_pajama, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["fit", "--data=datamodules/redpajama.yaml", f"--data.folder={red_pajama}", "--data.subsets=[arxiv, book]",
             f"--data.tokenizer={tokenizer}", "--data.seq_len=64", "--data.packing=document",
             f"--data.cache_dir={tmp_path}/cache", "--data.val_share=0.2",
             f"--model.config={json.dumps(MODEL)}"]  # fmt: skip
    assert main([*words, *TRAINER, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert kept["subsets"] == ["arxiv", "book"]


def test_red_pajama_v2_reads_documents_and_leaves_signals_alone(tmp_path, tokenizer):
    root = tmp_path / "v2"
    for name, word in (("en_head", "green"), ("en_middle", "yellow"), ("de_head", "garden")):
        for shard in ("0000", "0001"):
            records = [
                {"url": "x", "raw_content": text, "language": name[:2]}
                for text in texts(word, [60] * 6, 6 * int(shard))
            ]
            write(root / "documents" / "2023-06" / shard / f"{name}.json.gz", records)
            signals = [{"id": "x", "quality_signals": {}}] * 6
            write(root / "quality_signals" / "2023-06" / shard / f"{name}.signals.json.gz", signals)
    given = options(tmp_path, tokenizer, folder=str(root), version="v2", val_share=0.25)
    data = RedPajamaDataModule(**given, subsets=["en_head", "en_middle"])
    assert sources(data) + sources(data, "validation") == {"en_head": 12, "en_middle": 12}
    assert sources(RedPajamaDataModule(**given)).total() == 27
    with pytest.raises(ValueError, match="names fr_top, but there are en_head"):
        RedPajamaDataModule(**given, subsets=["fr_top"])
    fit(data)


# Others, through PackedTextDataModule


def test_pg19_is_a_folder_of_books_per_split(tmp_path, tokenizer):
    for split, count in (("train", 4), ("validation", 2), ("test", 3)):
        for number in range(count):
            path = tmp_path / "pg19" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts(split, [300 + number])[0])
    files = {name: [str(tmp_path / "pg19" / split)] for name, split in
             (("train_files", "train"), ("val_files", "validation"), ("test_files", "test"))}  # fmt: skip
    data = PackedTextDataModule(**options(tmp_path, tokenizer, **files, source_field="@folder"))
    assert sources(data, "test") == {"test": 3}
    assert data.excerpts("test", 3, 128).shape == (3, 128)
    fit(data)


def test_a_document_is_never_in_two_splits_not_even_as_a_copy(tmp_path, tokenizer, caplog):
    train, val, test = (texts(word, range(20, 30)) for word in ("green", "yellow", "queen"))
    files = {"train_files": [*train, val[3], test[4], test[4]], "val_files": [*val, test[5]], "test_files": test}
    for name, found in files.items():
        write(tmp_path / f"{name}.jsonl", [{"text": text} for text in found])
    given = {name: [str(tmp_path / f"{name}.jsonl")] for name in files}
    data = PackedTextDataModule(**options(tmp_path, tokenizer, **given))
    assert [len(data.documents(split)) for split in ("train", "validation", "test")] == [10, 10, 10]
    assert "train: 3 of 13 documents are in another split too" in caplog.text
    assert "validation: 1 of 11 documents are in another split too" in caplog.text
    write(tmp_path / "copy.jsonl", [{"text": text} for text in test])
    copied = PackedTextDataModule(**options(tmp_path, tokenizer, **{**given, "val_files": [f"{tmp_path}/copy.jsonl"]}))
    with pytest.raises(ValueError, match="All documents of the validation split are in another split too"):
        copied.setup()
    write(tmp_path / "all.jsonl", [{"text": text} for text in train * 4])
    shared = PackedTextDataModule(**options(tmp_path, tokenizer, files=[str(tmp_path / "all.jsonl")], val_share=0.1))
    held, kept = (set(shared.documents(split).hashes.tolist()) for split in ("validation", "train"))
    assert held
    assert kept
    assert not held & kept


def test_sources_of_ones_own_files_are_told_by_folder_file_or_field(tmp_path, tokenizer):
    for source, word in (("books", "green"), ("code", "queen")):
        lines = [{"text": text, "meta": json.dumps({"set": source})} for text in texts(word, [40] * 10)]
        write(tmp_path / "mine" / source / f"{source}.part.jsonl.zst", lines)
    given = options(tmp_path, tokenizer, files=[str(tmp_path / "mine")], weights={"books": 3, "code": 1})
    for field in ("@folder", "@file", "meta.set"):
        shares = word_shares(PackedTextDataModule(**given, source_field=field))
        assert shares["arxiv"] == pytest.approx(0.75, abs=0.04)
    with pytest.raises(ValueError, match="`source_field` must say where"):
        PackedTextDataModule(**given)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_evaluation_texts_build(path):
    arguments = yaml.safe_load(path.read_text())["init_args"]
    assert PackedTextDataModule(**arguments).origins


def test_there_are_three_evaluation_texts():
    assert len(list((ROOT / "configs" / "data").glob("*.yaml"))) == 3
