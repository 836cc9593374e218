"""Corpora in the shapes they are published in, hub data sets, and files of any content, valid or not."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_longrope.datamodules.readers import (
    BadRecord,
    Document,
    Place,
    expand,
    read_documents,
    read_hub,
    redpajama_source,
)


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def found(paths, **options):
    return [(document.text, document.label) for document in read_documents(expand(paths), **options)]


def test_the_pile(tmp_path):
    names = ["Pile-CC", "PubMed Central", "Books3", "Github"]
    records = [{"text": f"text {number}", "meta": {"pile_set_name": name}} for number, name in enumerate(names)]
    write(tmp_path / "train/00.jsonl.zst", zstd(lines(records[:2])) + zstd(lines(records[2:])))
    expected = [(f"text {number}", name) for number, name in enumerate(names)]
    assert found([tmp_path / "train"], source_field="meta.pile_set_name") == expected
    assert found([tmp_path], source_field="meta.pile_set_name", only=["Books3", "Github"]) == expected[2:]


def test_redpajama_of_the_first_version_tells_its_sources_in_every_way_it_does(tmp_path):
    files = {
        "arxiv/arxiv_023827cd.jsonl": [{"meta": {"timestamp": "2019", "arxiv_id": "1"}}],
        "book/book.jsonl": [{"meta": {"short_book_title": "T"}}],
        "c4/c4-train.00000-of-01024.jsonl": [{"meta": {"source": "c4"}}],
        "common_crawl/2019-30/en_middle_0053.json.gz.dedup.classifier.jsonl.zst": [
            {"source": "cc/2019-30/en_middle_0053.json.gz/line2"}
        ],
        "github/filtered_9e.sampled.jsonl": [{"meta": {"source": "github", "repo_name": "wiki/arxiv"}}],
        "stackexchange/stackexchange.jsonl": [{"meta": {"source": "stackexchange"}}],
        "wikipedia/wiki.jsonl": [{"title": "T", "language": "en"}],
        "sample/arxiv_sample.jsonl": [{"meta": json.dumps({"yymm": "1903"})}],
        "sample/cc_2019-30_sample.jsonl": [{"meta": json.dumps({"source": "cc/2019-30/en_head"})}],
        "sample/wikipedia_sample.jsonl": [{"meta": json.dumps({"title": "T"})}],
    }
    for name, records in files.items():
        data = lines({"text": name, **record} for record in records)
        write(tmp_path / name, zstd(data) if name.endswith(".zst") else data)
    labels = dict(found([tmp_path], source_field=redpajama_source))
    assert labels == {
        name: ("common_crawl" if "cc_" in name else name.split("/")[-1].split("_")[0])
        if "sample/" in name
        else name.split("/")[0]
        for name in files
    }
    table = {"text": ["a"], "meta": [json.dumps({"url": "u"})], "red_pajama_subset": ["stackexchange"]}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "hub.parquet")
    assert found([tmp_path / "hub.parquet"], source_field=redpajama_source) == [("a", "stackexchange")]
    write(tmp_path.parent / "unknown.jsonl", lines([{"text": "a", "source": "bookworm"}]))
    assert redpajama_source({"source": "bookworm"}, Path("unknown.jsonl")) is None


def test_redpajama_of_the_second_version(tmp_path):
    records = [
        {"url": "u", "raw_content": f"page {number}", "source_domain": "d", "language": "en"} for number in (0, 1)
    ]
    write(tmp_path / "documents/2018-43/0000/en_head.json.gz", gzip.compress(lines(records)))
    expected = [("page 0", "en"), ("page 1", "en")]
    assert found([tmp_path], text_field="raw_content", source_field="language") == expected


@pytest.mark.parametrize("packed", PACKED)
def test_pg19_is_a_folder_of_texts(tmp_path, packed):
    for number in (3, 1, 2):
        write(tmp_path / f"train/1000{number}.txt{packed}", PACKED[packed](f"A book, №{number}.\r\n".encode()))
    assert [text for text, _ in found([tmp_path])] == [f"A book, №{number}.\r\n" for number in (1, 2, 3)]


def test_proof_pile(tmp_path):
    records = [
        {"text": "Theorem.", "meta": {"config": "arxiv", "file": "x.tex"}},
        {"text": "Qed.", "meta": {"config": "set"}},
    ]
    write(tmp_path / "train/proofpile_train_0.jsonl.gz", gzip.compress(lines(records)))
    assert found([tmp_path], source_field="meta.config") == [("Theorem.", "arxiv"), ("Qed.", "set")]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_files_hold_lines_or_one_list(tmp_path, packed, indent):
    records = [{"text": "a"}, {"text": "b\n"}, {"body": "c"}]
    write(tmp_path / f"lines.json{packed}", PACKED[packed](b"\n" + lines(records[:2])))
    write(
        tmp_path / f"list.json{packed}",
        PACKED[packed](b"\xef\xbb\xbf \n" + json.dumps(records, indent=indent).encode()),
    )
    assert found([tmp_path / f"lines.json{packed}"]) == [("a", ""), ("b\n", "")]
    assert found([tmp_path / f"list.json{packed}"], on_error="skip") == [("a", ""), ("b\n", "")]
    with pytest.raises(ValueError, match=r"list\.json.*, record 3: no field 'text', only \['body'\]"):
        found([tmp_path / f"list.json{packed}"])
    (tmp_path / "settings.json").write_text("{}")
    assert tmp_path / "settings.json" not in expand([tmp_path / "lines.json.gz", tmp_path] if packed == ".gz" else [])


def test_a_damaged_list_is_one_bad_record(tmp_path):
    write(tmp_path / "a.json", b'[{"text": "a"}, {"text": ')
    with pytest.raises(ValueError, match=r"a\.json, record 1: not JSON"):
        found([tmp_path / "a.json"])
    write(tmp_path / "b.json.gz", gzip.compress(lines([{"text": "a"}]))[:-3])
    with pytest.raises(ValueError, match=r"b\.json\.gz, record 2: the file is cut off or damaged"):
        found([tmp_path / "b.json.gz"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst"])
def test_all_that_is_there_of_a_cut_archive_is_read(tmp_path, name):
    records = [{"text": f"text {number}"} for number in range(50)]
    write(tmp_path / name, PACKED[Path(name).suffix](lines(records))[:-6])
    items = list(read_documents([tmp_path / name], on_error="skip").items())
    assert [item.kind for item in items if isinstance(item, BadRecord)] == ["damaged_file"]
    if "jsonl.gz" in name:
        assert len(items) == 51


def test_a_damaged_row_group_costs_its_own_rows_and_says_how_many(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * 300 for number in range(400)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    data, start = bytearray(path.read_bytes()), column.data_page_offset
    data[start : start + column.total_compressed_size // 2] = bytes(column.total_compressed_size // 2)
    path.write_bytes(data)
    items = list(read_documents([path], on_error="skip").items())
    bad = [item for item in items if isinstance(item, BadRecord)]
    assert [item.kind for item in bad] == ["damaged_file"]
    assert bad[0].record == 201
    assert "100 of 400 rows are lost" in bad[0].why
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.text for item in documents] == texts[:200] + texts[300:]
    assert [item.record for item in documents] == [*range(1, 201), *range(301, 401)]


# Hub data sets, from folders here: the same calls, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set as the hub would give it, of two shards, and its rows."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"row {number}" if number != 4 else "", "meta": {"set": "ab"[number % 2]}} for number in range(9)]
    write(tmp_path / "set/data/train-0.jsonl", lines(rows[:5]))
    write(tmp_path / "set/data/train-1.jsonl", lines(rows[5:]))
    return tmp_path / "set", [(row["text"], row["meta"]["set"]) for row in rows if row["text"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("streaming", [True, False])
def test_hub_data_sets_are_read_and_gone_on_with(hub, streaming):
    folder, expected = hub
    reading = read_hub(str(folder), streaming=streaming, source_field="meta.set", on_error="skip")
    items = list(reading.items())
    assert [(item.text, item.label) for item in items if isinstance(item, Document)] == expected
    assert [(item.kind, item.record) for item in items if isinstance(item, BadRecord)] == [("empty", 5)]
    assert reading.progress() == (9, None if streaming else 9)
    for number in range(10):
        after = Place(reading.name, number)
        assert list(reading.items(after)) == [item for item in items if item.record > number]
    with pytest.raises(ValueError, match=r"set/train, record 5: field 'text' is empty"):
        list(read_hub(str(folder), streaming=streaming))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_set_that_is_not_there_is_one_line(hub):
    with pytest.raises(ValueError, match="Cannot load the data set '.*nowhere/train'") as error:
        list(read_hub(str(hub[0] / "nowhere")))
    assert "\n" not in str(error.value)


# Any content


RECORDS = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=30)}, optional={"meta": st.integers()}),
    st.dictionaries(st.text(max_size=4), st.integers() | st.none(), max_size=2),
    st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2),
)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
)


def witness(line):
    """What a line gives: its text, False for a bad record, None for a blank line."""
    if not line.strip():
        return None
    try:
        record = json.loads(str(line, "utf-8"))
        text = record["text"]
        return text if isinstance(text, str) and len(str(text).encode()) else False
    except (ValueError, KeyError, TypeError):
        return False


@settings(max_examples=150, deadline=None)
@given(content=st.lists(LINES, max_size=12), packed=st.sampled_from(sorted(PACKED)), cut=st.integers(0, 60))
def test_every_line_is_a_document_or_a_bad_record_of_its_number(tmp_path_factory, content, packed, cut):
    if content and content[0].startswith(b"\xef\xbb\xbf"):
        content[0] = b"x"
    path = tmp_path_factory.mktemp("any") / f"a.jsonl{packed}"
    write(path, PACKED[packed](b"\n".join(content)))
    items = list(read_documents([path], on_error="skip").items())
    expected = [(number, witness(line)) for number, line in enumerate(content, start=1)]
    expected = [(number, what) for number, what in expected if what is not None]
    assert [(item.record, item.text if isinstance(item, Document) else False) for item in items] == expected
    for after in range(len(content) + 1):  # going on behind any record gives the others
        rest = list(read_documents([path], on_error="skip").items(Place(path, after)))
        assert rest == [item for item in items if item.record > after]
    if packed and cut:  # cut off anywhere: what is given is the beginning, and the damage is named
        data = path.read_bytes()
        path.write_bytes(data[: max(1, len(data) - cut)])
        short = list(read_documents([path], on_error="skip").items())
        assert isinstance(short[-1], BadRecord)
        assert short[-1].kind == "damaged_file"
        assert short[:-1] == items[: len(short) - 1]


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=200), name=st.sampled_from(["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.txt.gz"])
)
def test_no_content_is_anything_but_documents_and_bad_records(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("noise") / name
    path.write_bytes(data)
    for item in read_documents([path], on_error="skip").items():
        assert isinstance(item, Document | BadRecord)
        assert item.source == path
        assert item.record >= 1
