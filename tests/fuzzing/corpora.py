"""Readers of text and of token stores."""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import zstandard

from fuzzing.reader import Reader, equal, saved, unchanged
from lightning_longrope.datamodules.chat import AnswerTokenizer, RenderedText
from lightning_longrope.datamodules.readers import read_documents
from lightning_longrope.datamodules.store_writing import _read_progress
from lightning_longrope.datamodules.token_store import TokenStore

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

    return [saved(save)]


def judge_progress(data: bytes, value: Any, intact: list[Any]) -> None:
    if value is not None and value["checksum"] is None:  # as earlier versions wrote it: nothing tells that it changed
        assert equal({**json.loads(data), "checksum": None}, value)
    else:
        assert value is None or equal(value, intact[0])


CORPORA = [
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
]  # fmt: skip
