"""Tokenising that is killed (SIGKILL) at any moment goes on, and ends with the very files of an undisturbed run."""

import gzip
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import TEXT, byte_level

from lightning_longrope.datamodules.readers import expand
from lightning_longrope.datamodules.store_writing import FILES
from lightning_longrope.datamodules.token_store import TokenStore, find_damage

# Forks a child for every number given: it works on the store and kills itself at that event. The last one ends.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

def dies(owner, name, half=None):
    whole = getattr(owner, name)
    def act(*arguments, **options):
        global events
        events += 1
        if events == last:
            if half is not None:
                half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(owner, name, act)

def half_written(file, data):
    file._file.write(bytes(data)[: len(data) // 2])
    file._file.flush()

def work(folder, corpus, workers):
    documents = read_documents(expand([corpus]), source_field="meta.set", on_error="skip")
    store_writing.write_store(folder, documents, byte_level(), workers, "corpus")
    Path(f"{{folder}}.events").write_text(str(events))
    os._exit(0)

if __name__ == "__main__":  # what stands above is also run by the workers of the tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, {tests!r})
    from small_tokenizers import byte_level
    from lightning_longrope import tokenizing
    from lightning_longrope.datamodules import store_writing
    from lightning_longrope.datamodules.readers import expand, read_documents

    byte_level()
    tokenizing.PIECE, store_writing.PIECE, store_writing.TEXTS = 2000, 500, 4
    store_writing.BLOCK, store_writing.COMMIT = 300, 0.0
    os.fsync = lambda number: None  # a killed process loses nothing that it has written
    events, last = 0, 0
    dies(store_writing.Growing, "write", half_written)
    dies(store_writing.Growing, "sync")
    for name in ("replace", "rename", "unlink", "mkdir"):
        dies(Path, name)
    home, total, codes = Path(sys.argv[1]), 0, {{}}
    for name, workers, kills in json.loads(sys.argv[3]):
        for last in kills:
            last += total + 1 if last < 0 else 0
            if (pid := os.fork()) == 0:
                work(home / name / "store", sys.argv[2], workers)
            codes.setdefault(name, []).append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        total = total or int((home / name / "store.events").read_text())
    print(json.dumps([total, codes]))
"""
TIMES = {  # name: workers and the events at which the runs die one after another; negative ones are from the end on
    "undisturbed": (0, [0]),
    "often": (0, [1, 2, 5, 6, 7, 9, 11, 14, 30, 55, 90, 33, 21, 8, 4, 0]),
    "seldom": (0, [200, 50, 30, 0]),
    "processes": (2, [7, 40, 90, 0]),
    **{f"end{number}": (0, [-number, 0]) for number in range(1, 16)},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files of 90 records, some bad, some long, one file damaged at its end."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for number, pack in enumerate((bytes, gzip.compress, bytes)):
        lines = []
        for record in range(30):
            text = f"document {number} {record} " + " ".join(rng.sample(TEXT.split(), rng.randint(0, 60)))
            text *= 20 if record % 11 == 5 else 1
            lines.append(json.dumps({"text": text if record % 9 else "", "meta": {"set": f"set {record % 3}"}}))
        lines[7] = "broken"
        (folder / f"{number}.jsonl{'.gz' if number == 1 else ''}").write_bytes(pack("\n".join(lines).encode()))
    packed = folder / "1.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    return folder


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folder of all stores, events of a run, and how the processes on each store ended."""
    home = tmp_path_factory.mktemp("stores")
    (home / "work.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    plan = [[name, workers, kills] for name, (workers, kills) in TIMES.items()]
    words = [sys.executable, home / "work.py", home, corpus, json.dumps(plan)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return home, *json.loads(done.stdout)


def content(folder):
    return {name: (folder / name).read_bytes() for name in (*FILES, "manifest.json")}


def test_the_undisturbed_store_holds_every_document_once(runs, corpus):
    undisturbed = runs[0] / "undisturbed/store"
    tokenizer, texts, labels, bad = byte_level(), [], [], []
    for file in expand([corpus]):
        data = file.read_bytes()
        if file.suffix == ".gz":
            continue
        for number, line in enumerate(data.decode().splitlines(), start=1):
            record = json.loads(line) if line != "broken" else {"text": ""}
            if record["text"]:
                texts.append(record["text"])
                labels.append(record["meta"]["set"])
            else:
                bad.append((file.name, number))
    store = TokenStore.open(undisturbed, tokenizer)
    stored = [tokenizer.decode(store.tokens[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    plain = [text for text in stored if not text.startswith("document 1")]
    assert plain == texts
    assert len(stored) > len(plain) == 50  # the damaged file gave what it could
    assert len(set(stored)) == len(stored)
    names = [store.source_names[source] for source in store.sources]
    assert [name for name, text in zip(names, stored, strict=True) if not text.startswith("document 1")] == labels
    skipped = [json.loads(line) for line in (undisturbed / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(line["file"]).name, line["record"]) for line in skipped if "1.jsonl" not in line["file"]] == bad
    kinds = [line["kind"] for line in skipped]
    assert store.manifest["skipped"] == {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    assert set(kinds) == {"empty", "malformed", "damaged_file"}
    assert len(store.manifest["files"]["tokens.bin"]["blocks"]) > 10
    assert find_damage(undisturbed, tokenizer) == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(TIMES)[1:])
def test_a_store_whose_writer_was_killed_is_the_undisturbed_one(runs, name):
    home, total, codes = runs
    assert total > 200
    deaths = [code for code in codes[name] if code]
    assert set(deaths) == {-signal.SIGKILL}
    assert len(deaths) >= {"often": 10, "seldom": 1, "processes": 3}.get(name, 1)
    assert codes[name][-1] == 0
    assert content(home / name / "store") == content(home / "undisturbed/store")
    assert sorted(path.name for path in (home / name).iterdir()) == [".store.lock", "store", "store.events"]


def test_a_changed_corpus_or_tokenizer_begins_anew(tmp_path):
    def interrupted():
        yield "the garden"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenStore.write(tmp_path / "store", interrupted(), byte_level(), fingerprint="one")
    assert (tmp_path / ".store.partial").is_dir()
    store = TokenStore.write(tmp_path / "store", ["of the miller"], byte_level(), fingerprint="two")
    assert store.tokens.tolist() == byte_level()("of the miller", add_special_tokens=False)["input_ids"]
    assert np.diff(store.offsets).tolist() == [len(store.tokens)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".store.lock", "store"]


def cut_after(folder, monkeypatch, count):
    """A store whose writer was cut after so many of ``TEXT``'s words, each a document."""
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.COMMIT", 0.0)
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.TEXTS", 1)

    def interrupted():
        yield from TEXT.split()[:count]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenStore.write(folder, interrupted(), byte_level(), fingerprint="one")
    return folder.with_name(f".{folder.name}.partial") / "progress.json"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda saved: saved, True),
        (lambda saved: {key: value for key, value in saved.items() if key != "checksum"}, True),
        (lambda saved: saved | {"place": ["", 1]}, False),
        (lambda saved: {key: value for key, value in saved.items() if key not in ("checksum", "tally")}, False),
    ],
)
def test_the_state_of_an_earlier_version_is_taken_up_and_a_damaged_one_dropped_aloud(
    tmp_path, monkeypatch, caplog, change, kept
):
    progress = cut_after(tmp_path / "store", monkeypatch, 20)
    progress.write_text(json.dumps(change(json.loads(progress.read_text()))))
    with caplog.at_level("INFO"):
        store = TokenStore.write(tmp_path / "store", TEXT.split()[:30], byte_level(), fingerprint="one")
    whole = TokenStore.write(tmp_path / "whole", TEXT.split()[:30], byte_level(), fingerprint="two")
    assert store.tokens.tolist() == whole.tokens.tolist()
    assert store.offsets.tolist() == whole.offsets.tolist()
    assert any("Going on after" in record.message for record in caplog.records) is kept
    assert any(f"begins anew: {progress} is damaged" in record.message for record in caplog.records) is not kept
