"""Files of every kind, whole and broken, written here by the formats' own libraries."""

import gzip
import json
import logging
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from lightning_longrope.datamodules.readers import expand, read_documents
from lightning_longrope.datamodules.readers.files import PACKED

TEXTS = ["first\nline", "zweiter Text: äöü 漢字", " ", "line\u2028separator stays", "x" * 3_000_000]


def jsonl(records, field="text"):
    return "".join(json.dumps({field: text, "meta": 1}, ensure_ascii=False) + "\n" for text in records).encode()


def zstd(data, frames=1):
    size = -(-len(data) // frames)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces)


def write_parquet(path, texts, field="text"):
    pyarrow.parquet.write_table(pa.table({"other": range(len(texts)), field: texts}), path, row_group_size=2)


def read(*paths, **options):
    return list(read_documents(expand(paths), **options))


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd), ("b.jsonl.zst", lambda d: zstd(d, 7))],
)
def test_json_lines_give_every_text_its_file_and_its_line(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS)))
    documents = read(tmp_path / name)
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {tmp_path / name}
    assert [document.record for document in documents] == [1, 2, 3, 4, 5]


def test_parquet_and_text_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS[:4] * 125, field="content")
    documents = read(tmp_path / "a.parquet", text_field="content")
    assert [document.text for document in documents] == TEXTS[:4] * 125
    assert [document.record for document in documents] == list(range(1, 501))
    (tmp_path / "b.txt").write_bytes("\ufeffone document\r\nof two lines".encode())
    assert [document[0] for document in read(tmp_path / "b.txt")] == ["one document\r\nof two lines"]


def test_byte_order_mark_blank_lines_and_a_missing_last_line_end_are_no_errors(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(document.text, document.record) for document in read(tmp_path / "a.jsonl")] == [("a", 1), ("b", 4)]


def test_folders_and_globs_are_sorted_and_no_file_is_read_twice(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("c.jsonl", "a.txt", "sub/b.jsonl.zst", "README.md", "sub/d.bin"):
        (tmp_path / name).write_bytes(b"")
    names = [path.relative_to(tmp_path).as_posix() for path in expand([tmp_path / "c.jsonl", tmp_path])]
    assert names == ["c.jsonl", "a.txt", "sub/b.jsonl.zst"]
    assert [path.name for path in expand([f"{tmp_path}/**/*.jsonl*"])] == ["c.jsonl", "b.jsonl.zst"]


@pytest.mark.parametrize("entry", ["missing.jsonl", "*.parquet", "empty"])
def test_an_entry_that_stands_for_no_file_is_one_clear_line(tmp_path, entry):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"No file to read at '{tmp_path / entry}'")) as error:
        expand([tmp_path / entry])
    assert "\n" not in str(error.value)


def test_a_file_of_an_unknown_kind_is_named(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.docx is of no known kind: expected a name that ends in \.jsonl"):
        expand([tmp_path / "a.docx"])


BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b'{"body": "b"}': r"no field 'text', only \['body'\]",
    b'{"text": "\xff\xfe"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not UTF-8",
    b'{"text": null}': "no text but NoneType",
    b'{"text": ""}': "'text' is empty",
    b'["text"]': "expected a JSON object, got list",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize(("line", "why"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_with_its_file_and_number_or_is_skipped(tmp_path, line, why, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "b"]) + line + b"\n" + jsonl(["c"]))
    with pytest.raises(ValueError, match=rf"a\.jsonl, record 3: .*{why}"):
        read(path)
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read(path, path, on_error="skip")] == ["a", "b", "c"]
    assert len(caplog.records) == 1
    assert re.search(rf"Skipped 1 records .* record 3: .*{why}", caplog.text)


def test_skipped_records_are_counted_over_all_files_and_logged_once(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"no\n" + jsonl([name]) + b"no\n")
    assert [document.text for document in read(tmp_path, on_error="skip")] == ["a", "b"]
    assert "Skipped 4 records" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_an_archive_that_is_cut_off_is_an_error_even_where_a_line_ends(tmp_path, name, pack, caplog):
    whole = jsonl(os.urandom(90).hex() for _ in range(3000))
    path = tmp_path / name
    path.write_bytes(pack(whole)[:-4])
    with pytest.raises(ValueError, match=rf"{name}, record \d+: .*(cut off or damaged|not JSON)"):
        read(path)
    after = tmp_path / "b.jsonl"
    after.write_bytes(jsonl(["later"]))
    assert read(path, after, on_error="skip")[-1].text == "later"
    assert "Skipped" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_an_archive_of_no_bytes_is_damaged_and_one_of_nothing_is_not(tmp_path, kind, packed):
    path = tmp_path / f"a.{kind}.{packed}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="record 1: the file is cut off or damaged \\(it is empty\\)"):
        read(path)
    path.write_bytes(gzip.compress(b"") if packed == "gz" else zstandard.ZstdCompressor().compress(b""))
    assert [item.kind for item in read_documents([path], on_error="skip").items()] == ["empty"] * (kind == "txt")


@pytest.mark.parametrize("padding", [1, PACKED[".gz"], 3 * PACKED[".gz"] + 1])
def test_zeros_behind_a_gzip_file_are_padding_however_many(tmp_path, padding):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(["a"])) + bytes(padding))
    assert [document.text for document in read(path)] == ["a"]
    path.write_bytes(gzip.compress(jsonl(["a"])) + bytes(padding) + gzip.compress(jsonl(["b"])))
    assert [document.text for document in read(path)] == ["a", "b"]
    path.write_bytes(bytes(padding))
    with pytest.raises(ValueError, match="record 1: the file is cut off or damaged"):
        read(path)


def test_a_zstandard_file_without_its_last_frame_end_is_noticed(tmp_path):
    stream = zstandard.ZstdCompressor().compressobj()
    data = stream.compress(jsonl(["a", "b"])) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(data)  # every line is there, the end mark is not
    with pytest.raises(ValueError, match="record 3: the file is cut off or damaged"):
        read(tmp_path / "a.jsonl.zst")


def test_broken_parquet_and_text_files_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(ValueError, match=r"a\.parquet, record 1: no column 'body', only \['other', 'text'\]"):
        read(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(ValueError, match=r"a\.parquet, record 2: .* no text but NoneType"):
        read(tmp_path / "a.parquet")
    assert [document.record for document in read(tmp_path / "a.parquet", on_error="skip")] == [1, 3]
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    os.truncate(tmp_path / "b.parquet", 100)
    with pytest.raises(ValueError, match=r"b\.parquet, record 1: the file is cut off or damaged"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.txt, record 1: not UTF-8"):
        read(tmp_path / "c.txt")


def test_on_error_is_checked():
    with pytest.raises(ValueError, match='"raise" or "skip", got \'ignore\''):
        read(on_error="ignore")


def by_folder(record, file):
    return record.get("source", file.parent.name)


@pytest.mark.parametrize(
    ("field", "records", "labels"),
    [
        (None, [{"meta": {"source": "c4"}}], [""]),
        ("meta.pile_set_name", [{"meta": {"pile_set_name": name}} for name in ("Books3", "CC")], ["Books3", "CC"]),
        ("meta.source", [{"meta": {"source": "c4"}}, {"meta": '{"source": "github"}'}], ["c4", "github"]),
        ("year", [{"year": 1998}], ["1998"]),
        (by_folder, [{"source": "cc"}, {}], ["cc", "sub"]),
    ],
)  # fmt: skip
def test_every_document_carries_the_name_of_its_source(tmp_path, field, records, labels):
    (tmp_path / "sub").mkdir()
    records = [{"text": f"text {number}", **record} for number, record in enumerate(records)]
    (tmp_path / "sub/a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = {
        name: [json.dumps(value) if isinstance(value := record.get(name), dict) else value for record in records]
        for name in records[0]
    }
    pyarrow.parquet.write_table(pa.table({**columns, "other": [1] * len(records)}), tmp_path / "sub/b.parquet")
    kinds = ["a.jsonl", "b.parquet"] if not callable(field) else ["a.jsonl"]
    for name in kinds:
        documents = read(tmp_path / "sub" / name, source_field=field)
        assert [document.label for document in documents] == labels
        assert [document.text for document in documents] == [record["text"] for record in records]


@pytest.mark.parametrize("meta", [None, "no JSON", "[1]", {"source": None}, {"source": ["c4"]}, {"other": "c4"}, 3])
def test_a_record_that_does_not_tell_its_source_is_a_bad_one(tmp_path, meta):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "meta": meta}))
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1: no source at 'meta\.source' in \['meta', 'text'\]"):
        read(tmp_path / "a.jsonl", source_field="meta.source")
