"""Times tokenising and reading against Hugging Face ``datasets``, and weighs the memory of tokenising.

    python benchmarks/data.py [--quick] [--check]

- Reading: random rows of 131,072 tokens as int64, from the flat file of a token store and from an Arrow data set of the
  same tokens in rows of that length, in numpy format, by turns in one process. For information also the rows that the
  packing policy ``concat`` joins from pieces of documents, with their labels: Arrow's rows are joined already.
- Tokenising: the same tokenizer and number of processes. ``datasets.map`` is given a data set that is in Arrow already;
  ours reads JSON lines. Tokens per second of processor time over all processes, so that other work on the machine
  counts less, and of the wall for information; each side in processes of its own.
- Memory: peak resident memory of the process that reads and writes, for corpora of three sizes and for a single
  document of as much text as the whole corpus. Workers hold a few pieces of 512 Ki characters, whatever the corpus.

``ratio`` says how many times better ours is.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import Row, finish, higher_is_better, lower_is_better, parser

ROW = 131_072  # tokens
VOCABULARY = 16_384
SIZES = {"quick": (4, 12, 36), "full": (16, 48, 144)}  # megabytes of text
TOKENS = {"quick": 1 << 25, "full": 1 << 27}  # in the stores that are read


def make_text(folder: Path, megabytes: int) -> Path:
    """JSON lines of files of Python's library, shuffled anew every time they come round."""
    from lightning_longrope.datamodules.sample_text import library_sources

    path, texts, rng = folder / f"{megabytes}.jsonl", library_sources(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            text = "".join(rng.sample(lines := rng.choice(texts).splitlines(keepends=True), len(lines)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer, trained once."""
    from lightning_longrope.datamodules.sample_text import library_sources, train_tokenizer
    from lightning_longrope.loading import load_tokenizer

    if not (folder / "tokenizer").is_dir():
        train_tokenizer(library_sources(), VOCABULARY).save_pretrained(folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


def tokenise_ours(folder: Path, text: str, workers: int) -> int:
    """Tokens written to a store."""
    from lightning_longrope.datamodules.readers import expand, read_documents
    from lightning_longrope.datamodules.token_store import TokenStore

    target = folder / f"store-{workers}"
    shutil.rmtree(target, ignore_errors=True)
    store = TokenStore.write(target, read_documents(expand([folder / text])), tokenizer_of(folder), workers)
    return int(store.manifest["tokens"])


def tokenise_peer(folder: Path, text: str, workers: int) -> int:
    """Tokens written to an Arrow data set."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_from_disk(str(folder / f"{text}.arrow"))
    tokenizer = tokenizer_of(folder)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return {"input_ids": tokenizer(batch["text"], **options, verbose=False)["input_ids"]}

    done = data.map(encode, batched=True, num_proc=workers or None, remove_columns=["text"], load_from_cache_file=False)
    return sum(len(batch) for chunk in done.data["input_ids"].chunks for batch in chunk)


def to_arrow(folder: Path, text: str) -> int:
    """JSON lines as an Arrow data set, for the peer."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=str(folder / text), split="train", cache_dir=str(folder / "cache"))
    data.save_to_disk(str(folder / f"{text}.arrow"))
    return len(data)


def read_both(folder: Path, tokens: int) -> dict[str, float]:
    """Tokens a second that random rows are read at, from a store and from Arrow; the median of seven turns."""
    import datasets
    import numpy as np

    from lightning_longrope.packing import Documents, make_rows

    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    np.memmap(folder / "flat.bin", np.uint16, "w+", shape=(tokens,))[:] = rng.integers(0, 50_000, tokens, np.uint16)
    flat = np.memmap(folder / "flat.bin", np.uint16, "r")
    cuts = np.sort(rng.choice(tokens - 1, tokens // 20_000, replace=False)) + 1  # documents of 20,000 tokens on average
    starts = np.concatenate([[0], cuts])
    documents = Documents(flat, starts, np.diff(np.append(starts, tokens)))
    ours = make_rows("concat", documents, seq_len=ROW, bos=None, eos=None)
    table = {"input_ids": [flat[first : first + ROW] for first in range(0, tokens, ROW)]}
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    datasets.Dataset.from_dict(table, features).save_to_disk(str(folder / "rows.arrow"))
    theirs = datasets.load_from_disk(str(folder / "rows.arrow")).with_format("numpy")
    assert len(theirs) == ours.text_rows == tokens // ROW
    order = rng.permutation(len(theirs)).tolist()
    ours.row(0, 0)  # lays out the epoch, once

    def seconds(read: Any) -> float:
        begun = time.process_time()
        for number in order:
            row = read(number)
            assert len(row) == ROW
            assert row.dtype == np.int64
        return time.process_time() - begun

    reads = {
        "ours": lambda number: flat[number * ROW : (number + 1) * ROW].astype(np.int64),
        "packed": lambda number: ours.row(0, number).tokens,
        "peer": lambda number: theirs[number]["input_ids"],
    }
    turns = [[seconds(read) for read in reads.values()] for _ in range(7)]
    rates = [float(len(order) * ROW / np.median(side)) for side in zip(*turns, strict=True)]
    return dict(zip(reads, rates, strict=True))


def measured(part: str, folder: Path, *words: Any) -> dict[str, Any]:
    """What a part gives in a process of its own, with its wall and processor seconds and peak memory."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--part", part, str(folder), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_part(part: str, folder: Path, words: list[str]) -> None:
    """Inside such a process. Modules are imported before the clock starts; the start of workers counts."""
    import datasets  # noqa: F401

    import lightning_longrope.datamodules.token_store  # noqa: F401

    if part == "read":
        sys.stdout.write(json.dumps(read_both(folder, int(words[0]))) + "\n")
        return
    tokenizer_of(folder)
    begun, used = time.perf_counter(), processor_seconds()
    tokens = {"ours": tokenise_ours, "peer": tokenise_peer}[part](folder, words[0], int(words[1]))
    found = {"tokens": tokens, "wall": time.perf_counter() - begun, "processor": processor_seconds() - used}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps(found | {"peak": peak}) + "\n")


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def tokenising_rows(folder: Path, text: str, repeats: int) -> list[Row]:
    """Ours and ``datasets.map`` by turns; the best of each."""
    rows = []
    for workers in (1, 2):
        turns = [
            (measured("ours", folder, text, workers), measured("peer", folder, text, workers)) for _ in range(repeats)
        ]
        assert {found["tokens"] for turn in turns for found in turn} == {turns[0][0]["tokens"]}, "not the same tokens"
        for clock in ("processor", "wall"):
            rates = [max(found["tokens"] / found[clock] for found in side) for side in zip(*turns, strict=True)]
            name = f"tokenising, {workers} process{'es' * (workers > 1)}: tokens per second of {clock} time"
            rows.append(higher_is_better(name, *rates, "tokens/s", ">= 1" if clock == "processor" else None))
    return rows


def memory_rows(folder: Path, sizes: tuple[int, ...]) -> list[Row]:
    """Peak memory over the size of the corpus, and that of one document."""
    rows = []
    for workers in (0, 2):
        found = {size: measured("ours", folder, f"{size}.jsonl", workers) for size in sizes}
        for size in sizes[1:]:
            what = f"peak memory, {workers} workers: {size} MB of text (ours) against {sizes[0]} MB (peer)"
            rows.append(lower_is_better(what, found[size]["peak"], found[sizes[0]]["peak"], "MiB", ">= 0.9"))
    small = found[sizes[0]]["peak"]
    with (folder / "one.jsonl").open("w") as file:
        text = "".join(json.loads(line)["text"] for line in (folder / f"{sizes[-1]}.jsonl").open())
        file.write(json.dumps({"text": text}) + "\n")
    for kind, letter in (("ASCII", ""), ("with one emoji, 4 bytes a character in memory", "\U0001f600")):
        if letter:
            (folder / "one.jsonl").write_text(json.dumps({"text": text + letter}) + "\n")
        peak = measured("ours", folder, "one.jsonl", 2)["peak"] - small
        size = len(text) / (1 << 20)
        name = f"one document of {size:.0f} MiB, {kind}: peak above a small corpus (ours), 10x the document (peer)"
        rows.append(lower_is_better(name, peak, 10 * size, "MiB", ">= 1"))
    return rows


def main() -> int:
    """Runs everything and writes the results; 1 if a goal is missed and ``--check`` asks."""
    options = parser(__doc__)
    options.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.part:
        run_part(given.part[0], Path(given.part[1]), given.part[2:])
        return 0
    kind = "quick" if given.quick else "full"
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), SIZES[kind]
        for size in sizes:
            make_text(folder, size)
        tokenizer_of(folder)
        to_arrow(folder, f"{sizes[1]}.jsonl")
        read = measured("read", folder, TOKENS[kind])
        name = f"reading random rows of {ROW} tokens"
        joined = f"{name}, joined from 7 documents, with labels"
        rows = [higher_is_better(name, read["ours"], read["peer"], "tokens/s", ">= 3")]
        rows += [higher_is_better(joined, read["packed"], read["peer"], "tokens/s")]
        rows += tokenising_rows(folder, f"{sizes[1]}.jsonl", repeats=2 if given.quick else 3)
        rows += memory_rows(folder, sizes)
    return finish("data", rows, given, ("datasets", "tokenizers", "transformers", "numpy", "pyarrow"))


if __name__ == "__main__":
    sys.exit(main())
