"""Every reader of the package: whole files to begin with, how it is called, and what tells a silent wrong value.

A reader either refuses a file, with a ``ValueError`` or ``OSError`` that names it, or gives a value that ``judge``
allows: the one that was written where a checksum covers it, else what another program reads in the same bytes.
"""

import gzip
import io
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
import zstandard

from lightning_longrope.callbacks.comparison import MethodResults
from lightning_longrope.commands.generate import _text_of
from lightning_longrope.datamodules.chat import AnswerTokenizer, RenderedText
from lightning_longrope.datamodules.readers import read_documents
from lightning_longrope.datamodules.store_writing import _read_progress
from lightning_longrope.datamodules.token_store import TokenStore
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.recipes import Stage, read_recipe
from lightning_longrope.reporting.data_figures import read_data_rows
from lightning_longrope.reporting.results import read_results
from lightning_longrope.reporting.run_folder import read_run
from lightning_longrope.score_book import ScoreBook
from lightning_longrope.search.journal import Journal, read_journal
from lightning_longrope.tables import LengthTables
from lightning_longrope.tracking import _kept_id

RECORDED = {"seed": 0, "model": "m", "document_digests": ["a", "b"]}
TABLE = RescaleFactors((1.0, 1.5, 2.25, 4.0), 32, 128, 2, 1.25)


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: What it reads.
        file: The file that is damaged, in a folder that ``prepare`` fills.
        seeds: Whole files.
        read: Reads the folder's file.
        judge: Of the bytes, what was read, and what was read of each seed; an ``AssertionError`` is a wrong number.
        prepare: Makes what lies beside the file.
        slow: Milliseconds that one input takes, roughly; for the quick tests to choose.
    """

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    judge: Callable[[bytes, Any, list[Any]], None] = lambda data, value, intact: None
    prepare: Callable[[Path], None] = lambda folder: None
    slow: int = 1
    names: tuple[str, ...] = field(default=())
    """What an error may name in place of the file."""


def unchanged(data: bytes, value: Any, intact: list[Any]) -> None:
    """What checksums cover is read as it was written, or refused."""
    assert any(_equal(value, known) for known in intact), f"read {value!r}"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    return bool(left == right)


# ----- factors


def _saved(save: Callable[[Path], None]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
ROPES: list[dict[str, Any]] = [
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "long_factor": [1.0, 1.5, 2.5, 4.0],
     "short_factor": [1.0, 1.0, 1.1, 1.2], "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
]  # fmt: skip


def _own_factors() -> list[bytes]:
    tables = LengthTables((TABLE, RescaleFactors((1.0,) * 4, 32, 64)))
    return [_saved(TABLE.save), _saved(tables.save), json.dumps(TABLE.to_dict()).encode()]


def judge_factors(data: bytes, value: LengthTables, intact: list[Any]) -> None:
    """A file with its checksum is the written one; another holds what libyaml reads in it."""
    if b'"crc32"' in data:
        unchanged(data, value, intact)
        return
    try:
        theirs = yaml.load(data.decode("utf-8-sig"), Loader=yaml.CBaseLoader)
    except yaml.YAMLError:
        return  # YAML is narrower: no tabs before values
    tables = sorted(theirs.get("tables", [theirs]), key=lambda table: int(table["target_length"]))
    assert len(tables) == len(value.tables)
    for table, ours in zip(tables, value.tables, strict=True):
        assert [float(one) for one in table["values"]] == list(ours.values)
        assert int(table["target_length"]) == ours.target_length
        assert float(table.get("attention_factor", 1.0)) == ours.attention_factor


def judge_csv(data: bytes, value: RescaleFactors, intact: list[Any]) -> None:
    """numpy reads the same numbers."""
    text = data.decode("utf-8-sig")
    rows = [np.array([cell for cell in line.split(",") if cell.strip()], np.float64) for line in text.splitlines()]
    rows = [row for row in rows if len(row)]
    flat = np.concatenate(rows) if all(len(row) == 1 for row in rows) else rows[-1]
    assert flat.tolist() == list(value.values)


def judge_config(data: bytes, value: LengthTables, intact: list[Any]) -> None:
    """What is listed in a config is what libyaml reads there; what is computed is finite and at least 1."""
    theirs = yaml.load(data.decode("utf-8-sig"), Loader=yaml.CBaseLoader)
    parameters = theirs.get("rope_parameters") or {}
    if parameters.get("rope_type") == "longrope":
        assert [float(one) for one in parameters["long_factor"]] == list(value.longest.values)
    assert all(math.isfinite(one) and one >= 1 for table in value.tables for one in table.values)


# ----- searches


def _journal_bytes() -> list[bytes]:
    def save(path: Path) -> None:
        journal = Journal(path, RECORDED)
        journal.append([record(number) for number in range(3)])

    return [_saved(save)]


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A finished candidate as a search writes it."""
    fields = {"evaluation": number, "origin": "seed", "values": [1.0, 1.5 + number], "start_tokens": 0}
    return {**fields, "attention_factor": 1.0, "score": 2.5, "status": "ok", "documents": [[1.5, 2.0, 0.0, 0.0], None]}


def judge_journal(data: bytes, value: Any, intact: list[Any]) -> None:
    """Every line that is read carries the CRC-32 of itself, taken here by zlib; the lines cut off are the last."""
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    for line in lines:
        body, crc = re.fullmatch(rb'(.*), "crc": "([0-9a-f]{8})"\}', line, re.DOTALL).groups()  # type: ignore[union-attr]
        assert zlib.crc32(body) == int(crc, 16)
    assert len(value[1]) == len(lines) - 1


def _score_rows(path: Path) -> Any:
    book = ScoreBook(path, RECORDED)
    return book.recall([RescaleFactors((1.0, 1.5 + number), 32, 128) for number in range(3)])


def judge_scores(data: bytes, value: torch.Tensor, intact: list[Any]) -> None:
    """Sums are those of the whole file, or not known any more."""
    known = value[..., 4] != 0
    assert torch.equal(value[known], intact[0][known])


# ----- corpora

TEXTS = ["The grass is green.", 'Ångström \U0001f600 and "quotes"\\', "x" * 300]


def _jsonl() -> bytes:
    return "".join(json.dumps({"text": text, "meta": {"n": 1.5}}) + "\n" for text in TEXTS).encode()


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), file, row_group_size=2, write_page_checksum=True)
    return file.getvalue()


def documents(path: Path) -> list[tuple[str, int]]:
    """Texts and numbers of records, where one bad record is an error."""
    return [(found.text, found.record) for found in read_documents([path]).items()]  # type: ignore[union-attr]


def judge_lines(data: bytes, value: list[tuple[str, int]], intact: list[Any]) -> None:
    """pyarrow's reader of JSON, which shares nothing with Python's, reads the same texts."""
    import pyarrow as pa
    from pyarrow import json as theirs

    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for text, number in value:
        try:
            found = theirs.read_json(io.BytesIO(lines[number - 1].strip() + b"\n"))["text"].to_pylist()
        except (pa.ArrowException, KeyError):
            continue  # it is narrower: no NaN, no duplicate fields of two types, no surrogates
        assert found == [text]


def judge_unpacked(unpack: Callable[[bytes], bytes]) -> Callable[[bytes, Any, list[Any]], None]:
    """The command line tool's library unpacks the same."""

    def judge(data: bytes, value: list[tuple[str, int]], intact: list[Any]) -> None:
        lines = unpack(data).split(b"\n")
        assert value == [(json.loads(line)["text"], number) for number, line in enumerate(lines, 1) if line.strip()]

    return judge


def _gunzip(data: bytes) -> bytes:
    return gzip.decompress(data).removeprefix(b"\xef\xbb\xbf")


def _unzstd(data: bytes) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
        io.BytesIO(data), read_across_frames=True
    )
    return reader.read().removeprefix(b"\xef\xbb\xbf")


def judge_text(data: bytes, value: list[tuple[str, int]], intact: list[Any]) -> None:
    assert [text.encode() for text, _ in value] == [data.removeprefix(b"\xef\xbb\xbf")]


@cache
def _tokenizer() -> Any:
    from chat_templates import CHATML, chat_tokenizer

    return chat_tokenizer(CHATML)


def _conversations() -> list[bytes]:
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The queen."}]
    forms: list[dict[str, Any]] = [{"messages": talk}, {"prompt": "Who?", "completion": "The queen."}]
    forms += [{"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The queen."}]}]
    forms += [{"instruction": "Who?", "input": "", "output": "The queen."}, {"messages": json.dumps(talk)}]
    return [json.dumps(form).encode() + b"\n" for form in forms]


def _learnt(path: Path) -> list[str]:
    found = [
        document.text for document in read_documents([path], RenderedText(_tokenizer(), _tokenizer().chat_template))
    ]
    rows = AnswerTokenizer(_tokenizer())(found)["input_ids"]
    return [_tokenizer().decode(row[row % 2 == 1] >> 1) for row in rows]


def judge_learnt(data: bytes, value: list[str], intact: list[Any]) -> None:
    """What is learnt ends with the marker that ends an answer, and names no role."""
    assert all(text.rstrip().endswith("<|im_end|>") for text in value)


# ----- token stores


@cache
def _store_files() -> dict[str, bytes]:
    from tempfile import TemporaryDirectory

    from small_tokenizers import byte_level

    with TemporaryDirectory() as folder:
        TokenStore.write(Path(folder) / "store", [*TEXTS, "the end"], byte_level())
        return {path.name: path.read_bytes() for path in (Path(folder) / "store").iterdir()}


def write_intact(folder: Path) -> None:
    """A whole store."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _store_files().items():
        (folder / name).write_bytes(data)


def read_store(path: Path) -> list[Any]:
    from small_tokenizers import byte_level

    store = TokenStore.open(path.parent, byte_level())
    return [part.tolist() for part in (store.tokens, store.offsets, store.sources, store.hashes)] + [store.source_names]


IDENTITY = {"format": 4, "tokenizer": "t", "corpus": "c"}


def _progress() -> list[bytes]:
    from lightning_longrope.datamodules.readers import Place
    from lightning_longrope.datamodules.store_writing import StoreWriter

    def save(path: Path) -> None:
        writer = StoreWriter(path.with_name("partial"), IDENTITY)
        writer.place = Place(Path("a.jsonl"), 3)
        writer.commit()
        writer.close()
        path.write_bytes((path.with_name("partial") / "progress.json").read_bytes())
        shutil.rmtree(path.with_name("partial"))

    return [_saved(save)]


def judge_progress(data: bytes, value: Any, intact: list[Any]) -> None:
    assert value is None or _equal(value, intact[0])


# ----- runs, recipes, reports

STAGE = """command: fit
seed_everything: 0
model: &model
  class_path: lightning_longrope.LongRoPEModule
  init_args:
    config: {model_type: llama, hidden_size: 32, rope_theta: 1e4}
    factors: "{out}/1-search/search/factors.json"
trainer:
  max_steps: 10
  callbacks:
  - class_path: PasskeyRetrieval
    init_args: {trials: 8, lengths: [64, 128]}
short:
  trainer.max_steps: 2
"""


def _stage(path: Path) -> Any:
    stage = read_recipe(path.parent, Path("out"), short=True)[0]
    return stage, stage.digest, yaml.safe_dump(stage.config)


def judge_stage(data: bytes, value: Any, intact: list[Any]) -> None:
    """PyYAML's own parser, which is not libyaml, reads the same; and what is passed on is what was read."""
    stage, _, passed = value
    try:
        theirs = yaml.load(data.decode("utf-8-sig"), Loader=_PlainLoader)
    except yaml.YAMLError:
        return  # it is narrower: no tabs within texts
    command, short = theirs.pop("command", "fit"), theirs.pop("short", {})
    assert command == stage.command
    if not short:
        assert json.dumps(theirs).replace("{out}", "out") == json.dumps(stage.config)
    assert json.dumps(yaml.load(passed, Loader=_PlainLoader)) == json.dumps(stage.config, sort_keys=True)


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


RESULTS = b"""method,metric,length,depth,value,low,high,n
none,perplexity,64,,15.21,15.05,15.36,24
searched,perplexity,128,,12.5,12.4,12.61,24
searched,passkey,128,0.5,0.95,0.75,1.0,20
"""
POSITIONS = b"method,length,start,end,nll,low,high\nnone,128,0,64,2.5,2.4,2.6\nnone,128,64,128,2.25,2.2,2.3\n"
METRICS = b"step,val_perplexity,train_loss\n9,,6.9\n19,12.5,\n29,,5.25\n"
DATA = b"source,shortest,documents,tokens,share_of_text,share_of_epoch\na,1,3,1200,0.5,0.25\nb,1024,1,4000,0.5,0.75\n"
RUN = {"recipe": "configs/quickstart", "command": "longrope run x", "seed": 1, "versions": {"python": "3.11"},
       "stages": [{"name": "1-fit", "command": "fit", "seconds": 2.5, "status": "finished"}]}  # fmt: skip


def judge_table(columns: Callable[[Any], list[list[str]]]) -> Callable[[bytes, Any, list[Any]], None]:
    """pyarrow's reader of CSV reads the same cells."""

    def judge(data: bytes, value: Any, intact: list[Any]) -> None:
        import pyarrow as pa
        from pyarrow import csv as theirs

        try:
            rows = theirs.read_csv(
                io.BytesIO(data),
                parse_options=theirs.ParseOptions(newlines_in_values=True),
                convert_options=theirs.ConvertOptions(
                    column_types=dict.fromkeys(
                        data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].decode().split(","), pa.string()
                    )
                ),
            ).to_pylist()
        except pa.ArrowException:
            return
        ours = columns(value)
        if rows and set(rows[0]) >= set(ours[0] if ours else ()):
            names = ours[0]
            found = [[_number(row[name] or "") for name in names] for row in rows]
            assert found == [[_number(cell) for cell in row] for row in ours[1:]]

    return judge


def _number(text: str) -> Any:
    try:
        return repr(float(text))
    except ValueError:
        return text


def _cells(rows: Any) -> list[list[str]]:
    names = ["method", "metric", "length", "depth", "value", "low", "high", "n"]
    return [names, *[["" if (cell := getattr(row, name)) is None else str(cell) for name in names] for row in rows]]


def _data_cells(rows: Any) -> list[list[str]]:
    names = ["source", "shortest", "documents", "tokens", "share_of_text", "share_of_epoch"]
    return [names, *[[str(getattr(row, name)) for name in names] for row in rows]]


def _run_folder(folder: Path) -> None:
    (folder / "1-fit" / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "1-fit" / "search").mkdir(exist_ok=True)
    (folder / "1-fit" / "eval" / "results.csv").write_bytes(RESULTS)
    (folder / "1-fit" / "eval" / "positions.csv").write_bytes(POSITIONS)
    (folder / "1-fit" / "metrics.csv").write_bytes(METRICS)
    (folder / "1-fit" / "config.yaml").write_text(STAGE)
    (folder / "1-fit" / "search" / "state.json").write_text(STATE)
    (folder / "run.json").write_text(json.dumps(RUN))


STATE = '{"base": 10000.0, "best": 2.5, "baselines": {"linear": 7.5, "yarn": null}, "evaluations": 3, "finished": true}'


def _report(levels: int) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        run = read_run(path.parents[levels])
        for stage in run.stages:
            run.rope_base(stage)
        return len(run.results), run.stages[0].positions if run.stages else None

    return read


def _method_results() -> list[bytes]:
    rows = [{"metric": "perplexity", "length": 64, "depth": None, "value": 2.5, "low": 2.0, "high": 3.0, "n": 4}]
    return [json.dumps({"rows": rows, "positions": [], "sums": [["perplexity", 64, [1.5, 2.5], [3.0, 4.0]]]}).encode()]


def _done(path: Path) -> Any:
    return Stage(path.parent.name, "fit", {}, path.parent.parent).finished


READERS = [
    Reader("factors (JSON)", "f.json", _own_factors, lambda path: LengthTables.load(path), judge_factors),
    Reader("factors (Microsoft CSV)", "f.csv", lambda: [b"1.0\n1.5\n2.25\n4.0\n", b"1,1.5,2.25,4\n1,1.5,2.25,4\n"],
           lambda path: RescaleFactors.load(path, 32, 128), judge_csv),
    Reader("factors (Hugging Face config)", "config.json",
           lambda: [json.dumps({**CONFIG, "rope_parameters": rope}).encode() for rope in ROPES],
           lambda path: LengthTables.load(path), judge_config),
    Reader("search journal", "history.jsonl", _journal_bytes, read_journal, judge_journal),
    Reader("search scores", "history.jsonl", _journal_bytes, _score_rows, judge_scores, slow=3),
    Reader("stage of a recipe", "1-fit.yaml", lambda: [STAGE.encode()], _stage, judge_stage, slow=8),
    Reader("JSON lines", "a.jsonl", lambda: [_jsonl()], documents, judge_lines),
    Reader("JSON list", "a.json", lambda: [json.dumps([{"text": text} for text in TEXTS]).encode()], documents),
    Reader("JSON lines, gzip", "a.jsonl.gz", lambda: [gzip.compress(_jsonl())], documents, judge_unpacked(_gunzip)),
    Reader("JSON lines, Zstandard", "a.jsonl.zst",
           lambda: [zstandard.ZstdCompressor(write_checksum=True).compress(_jsonl())], documents,
           judge_unpacked(_unzstd)),
    Reader("Parquet", "a.parquet", lambda: [_parquet()], documents),
    Reader("plain text", "a.txt", lambda: [TEXTS[1].encode()], documents, judge_text),
    Reader("conversations", "chat.jsonl", _conversations, _learnt, judge_learnt, slow=3),
    *(Reader(f"token store ({name})", f"store/{name}", lambda name=name: [_store_files()[name]], read_store, unchanged,
             lambda folder: write_intact(folder / "store"), 2, ("store",))  # type: ignore[misc]
      for name in ("manifest.json", "tokens.bin", "documents.bin", "sources.bin", "hashes.bin")),
    Reader("token store in the making", "progress.json", _progress, lambda path: _read_progress(path, IDENTITY),
           judge_progress),
    Reader("results.csv", "results.csv", lambda: [RESULTS], read_results, judge_table(_cells)),
    Reader("numbers of a data figure", "data_train.csv", lambda: [DATA], read_data_rows, judge_table(_data_cells)),
    *(Reader(f"report: {Path(file).name}", file, lambda seed=seed: [seed], _report(levels), prepare=_run_folder, slow=6)  # type: ignore[misc]
      for file, seed, levels in (
          ("run.json", json.dumps(RUN).encode(), 0), ("1-fit/config.yaml", STAGE.encode(), 1),
          ("1-fit/metrics.csv", METRICS, 1), ("1-fit/eval/positions.csv", POSITIONS, 2),
          ("1-fit/search/state.json", STATE.encode(), 2), ("1-fit/search/history.jsonl", _journal_bytes()[0], 2),
          ("1-fit/search/factors.json", _own_factors()[0], 2),
      )),
    Reader("measurements of a method", "none.json", _method_results, MethodResults.load),
    Reader("done.json", "done.json", lambda: [b'{"config": "0f1e", "seconds": 2.5}'], _done),
    Reader("wandb-id", "wandb-id", lambda: [b"3f2a91bc\n"], lambda path: _kept_id(path, True)),
    Reader("prompt", "prompt.txt", lambda: [TEXTS[1].encode()], _text_of),
]  # fmt: skip
