"""Names of token stores: the same in every process for the same text, and others as soon as the text may be."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_tokenizers import byte_level

from lightning_longrope.datamodules import PackedTextDataModule, PileDataModule, RedPajamaDataModule, origins
from lightning_longrope.datamodules.base import digest
from lightning_longrope.datamodules.readers import expand, newest_revision, read_documents
from lightning_longrope.datamodules.redpajama import V1Subset, V2Subset

SCRIPT = """
import sys
from lightning_longrope.datamodules import PackedTextDataModule, RedPajamaDataModule


class Mine(PackedTextDataModule):
    def source_of(self):
        return self.label

    @staticmethod
    def label(record, file):
        return "mine"


folder = sys.argv[1]
for datamodule in (
    PackedTextDataModule(files=[folder]),
    PackedTextDataModule(files=[folder], source_field="meta.set"),
    PackedTextDataModule(files=[folder], source_field="@folder"),
    PackedTextDataModule(files=[folder], source_field="@file"),
    Mine(files=[folder]),
    RedPajamaDataModule(folder),
    RedPajamaDataModule(folder, version="v2"),
):
    print(*(corpus.fingerprint for corpus in datamodule.corpora()))
"""


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def names(datamodule):
    return [corpus.fingerprint for corpus in datamodule.corpora()]


def sources(datamodule, split="train"):
    documents = datamodule.documents(split)
    return sorted(documents.source_names[source] for source in documents.sources)


def test_every_process_gives_a_store_the_same_name_and_every_way_to_tell_sources_another(tmp_path):
    write(tmp_path / "arxiv/a.jsonl", ["some text"])
    found = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(set(found[0])) == len(found[0]) == 7


@pytest.mark.parametrize(
    ("build", "source"),
    [
        (lambda folder: PackedTextDataModule(files=[folder], text_field="content"), None),
        (lambda folder: PackedTextDataModule(files=[folder], source_field="meta.set", subsets=["a"]), "meta.set"),
        (lambda folder: PileDataModule(train_files=[folder]), "meta.pile_set_name"),
        (lambda folder: RedPajamaDataModule(folder, version="v2"), V2Subset()),
    ],
)
def test_stores_of_earlier_versions_keep_their_names(tmp_path, build, source):
    """What was hashed before; only functions, whose names had an address in them, are named in another way."""
    file = write(tmp_path / "a.jsonl", ["some text"])
    datamodule = build(str(tmp_path))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns)]
    parts = (datamodule.text_field, datamodule.on_error, repr(source), datamodule.subsets)
    assert names(datamodule) == [digest(states, *parts)]


def capitals(record):
    return record["text"].upper()


class Address:
    """What nobody can name in another process."""

    def __call__(self, record):
        return record["text"]


@dataclass(frozen=True)
class Beginning:
    length: int

    def __call__(self, record):
        return record["text"][: self.length]


def test_a_subclass_that_reads_another_text_has_a_store_of_its_own(tmp_path):
    class Mine(PackedTextDataModule):
        text = "text"

        def text_of(self):
            return self.text

    file = write(tmp_path / "a.jsonl", ["some text"])
    datamodule = Mine(files=[str(file)])
    found = names(PackedTextDataModule(files=[str(file)]))
    assert names(datamodule) == found
    for text in (capitals, Beginning(3), Beginning(4), datamodule.text_of):
        datamodule.text = text
        assert names(datamodule) == names(datamodule)
        found += names(datamodule)
    assert len(set(found)) == 5
    datamodule.text = Address()
    with pytest.raises(ValueError, match="got <.*Address object at 0x.*: make Address a frozen dataclass"):
        datamodule.corpora()


def test_files_keep_the_names_of_links_and_two_links_to_one_file_are_one(tmp_path, monkeypatch):
    """As Hugging Face keeps what it has downloaded: links to files whose names are checksums."""
    snapshot, blobs = tmp_path / "snapshots/1", tmp_path / "blobs"
    for name in ("arxiv/one.jsonl", "book/two.jsonl"):
        write(blobs / f"5f1e{name[:2]}", [f"text of {name}"])
        (snapshot / name).parent.mkdir(parents=True)
        (snapshot / name).symlink_to(blobs / f"5f1e{name[:2]}")
    (snapshot / "book/again.jsonl").symlink_to(blobs / "5f1ebo")
    assert expand([snapshot]) == [snapshot / "arxiv/one.jsonl", snapshot / "book/again.jsonl"]
    assert [document.text for document in read_documents(expand([snapshot]))] == [
        "text of arxiv/one.jsonl", "text of book/two.jsonl"]  # fmt: skip
    given = {"tokenizer": byte_level(), "cache_dir": None, "seq_len": 8}
    assert sources(PackedTextDataModule(files=[str(snapshot)], source_field="@file", **given)) == ["again", "one"]
    assert sources(PackedTextDataModule(files=[str(snapshot)], source_field="@folder", **given)) == ["arxiv", "book"]
    assert sources(RedPajamaDataModule(str(snapshot), **given)) == ["arxiv", "book"]
    splits = {"train_files": [str(snapshot / "book/two.jsonl")], "val_files": [str(snapshot / "book/again.jsonl")]}
    with pytest.raises(ValueError, match="is in the train split and in the validation split"):
        PackedTextDataModule(**splits, **given).corpora()
    monkeypatch.chdir(snapshot / "arxiv")
    assert expand(["../book"]) == [snapshot / "book/again.jsonl"]


@pytest.mark.parametrize(
    ("folder", "files", "name", "label"),
    [
        ("cc/slim", None, "0.jsonl", None),  # what holds the corpus says nothing
        ("cc", None, "0.jsonl", None),  # nor does its own name
        ("cc/slim", None, "arxiv/train/0.jsonl", "arxiv"),
        (None, ["cc/slim"], "0.jsonl", None),
        (None, ["cc/slim/book"], "book/0.jsonl", "book"),  # a folder that was asked for by its name
        (None, ["cc/slim/book/*.jsonl"], "book/0.jsonl", "book"),
        (None, ["cc/slim/book/0.jsonl"], "book/0.jsonl", "book"),
        (None, ["cc/slim", "cc/slim/book"], "book/0.jsonl", "book"),
    ],
)
def test_only_folders_of_the_corpus_tell_the_subset_of_a_file(tmp_path, monkeypatch, folder, files, name, label):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "cc/slim" / name, ["some text"])
    datamodule = RedPajamaDataModule(folder, files=files, subsets=["arxiv", "book"])
    assert isinstance(subset := datamodule.source_of(), V1Subset)
    assert subset({}, file) == label
    assert subset({"source": "c4"}, file) == "c4"
    assert datamodule.pick([file]) == [file]  # nothing, or a subset that was chosen
    assert RedPajamaDataModule(folder, files=files, subsets=["c4"]).pick([file]) == ([] if label else [file])


def test_a_folder_given_as_hub_data_set_is_named_after_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "newest_revision", lambda name: pytest.fail("a folder is not on the hub"))
    file = write(tmp_path / "set/data/train.jsonl", ["some text"])
    found = names(PackedTextDataModule(hub="set"))
    write(tmp_path / "set/.git/index", ["hidden"])
    assert names(PackedTextDataModule(hub="set")) == found
    os.utime(file, ns=(1, 1))
    found += names(PackedTextDataModule(hub="set"))
    write(tmp_path / "set/data/train-1.jsonl", ["more text"])
    found += names(PackedTextDataModule(hub="set"))
    assert len(set(found)) == 3


def test_the_commit_of_a_hub_data_set_is_asked_for_once_a_run_and_kept_where_nobody_answers(
    tmp_path, monkeypatch, caplog
):
    answers, asked, read = ["first", "second", None], [], []

    def newest(name):
        asked.append(name)
        return answers.pop(0)

    def read_hub(name, config, split, *how, **options):
        read.append((name, config, split, options))
        return ["some text"]

    monkeypatch.setattr(origins, "newest_revision", newest)
    monkeypatch.setattr("lightning_longrope.datamodules.readers.read_hub", read_hub)
    given = {"hub": "owner/set:en", "tokenizer": byte_level(), "cache_dir": str(tmp_path), "seq_len": 8}
    found = []
    for _ in range(3):
        datamodule, of_another_rank = PackedTextDataModule(**given), PackedTextDataModule(**given)
        datamodule.prepare_data()
        assert names(datamodule) == names(of_another_rank)
        found += names(datamodule)
    assert asked == ["owner/set"] * 3  # nobody but the process that prepares
    assert found == [found[0], found[1], found[1]]
    assert found[0] != found[1]
    assert read == [("owner/set", "en", "train", {"revision": commit}) for commit in ("first", "second")]
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def test_a_hub_data_set_of_no_known_commit_is_used_as_it_is_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(origins, "newest_revision", lambda name: None)
    monkeypatch.setattr("lightning_longrope.datamodules.readers.read_hub", lambda *arguments: ["some text"])
    datamodule = PackedTextDataModule(hub="owner/set", tokenizer=byte_level(), cache_dir=str(tmp_path), seq_len=8)
    datamodule.prepare_data()
    datamodule.setup()
    assert names(datamodule) == [digest(["owner/set", "train"], "text", "raise", "None", None)]
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1
    assert "does not say at which commit owner/set is" in caplog.text


@pytest.mark.parametrize(
    "error", [OSError("offline"), ValueError("no name"), RuntimeError("of a library nobody knows")]
)
def test_a_hub_that_does_not_answer_is_no_error(monkeypatch, error):
    def dataset_info(self, name, **options):
        if name == "owner/unknown":
            raise error
        return SimpleNamespace(sha="1234")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    assert (newest_revision("owner/set"), newest_revision("owner/unknown")) == ("1234", None)


def test_the_size_of_the_files_is_looked_up_once_however_often_progress_is_shown(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{number:03}.jsonl", ["some text"]) for number in range(40)]
    sizes = [file.stat().st_size for file in files]
    looked, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: looked.append(self) or stat(self, **options))
    reading = read_documents(files)
    assert reading.progress() == (0, sum(sizes))
    done = [reading.progress() for _ in reading]
    assert done == [(sum(sizes[: number + 1]), sum(sizes)) for number in range(40)]
    assert reading.progress() == (sum(sizes), sum(sizes))
    assert len(looked) <= 3 * len(files)
