"""What `longrope data` prints and draws, against counts made one by one."""

import re
from collections import Counter

import numpy as np
import pytest

from lightning_longrope.__main__ import main
from lightning_longrope.mixing import Mixture
from lightning_longrope.packing import Documents, Row, make_rows
from lightning_longrope.reporting.data_figures import data_figure, data_rows, read_data_rows
from lightning_longrope.reporting.data_tables import amount_text, class_names, row_text, summary_text
from lightning_longrope.summary import length_bounds, summarise

LENGTHS = [5, 40, 70, 300, 1100, 9000, 600, 64]
SOURCES = [0, 0, 1, 1, 1, 2, 2, 0]


@pytest.fixture
def summary():
    lengths = np.array(LENGTHS, np.int64)
    tokens = np.zeros(int(lengths.sum()), np.uint16)
    documents = Documents(tokens, np.cumsum(lengths) - lengths, lengths, np.array(SOURCES, np.uint16), ("a", "b", "c"))
    mixture = Mixture(lengths, documents.sources, documents.source_names, {"a": 1, "b": 1, "c": 2}, 1024, 3.0)
    return summarise(
        "train", documents, make_rows("concat", documents, seq_len=128, bos=0, eos=1, order=mixture), mixture
    )


def test_every_document_is_counted_in_its_source_and_class(summary):
    assert summary.bounds == length_bounds(np.array(LENGTHS)) == (64, 128, 256, 512, 1024, 2048, 4096, 8192)[-7:]
    counted = Counter()
    for length, source in zip(LENGTHS, SOURCES, strict=True):
        counted["abc"[source], max([1, *(bound for bound in summary.bounds if bound <= length)])] += 1
    rows = data_rows(summary)
    assert {(row.source, row.shortest): row.documents for row in rows if row.documents} == counted
    assert sum(row.tokens for row in rows) == sum(LENGTHS) == summary.tokens
    assert {row.source: row.share_of_epoch for row in rows} == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert {row.source: row.share_of_text for row in rows}["c"] == 9600 / sum(LENGTHS)


def test_the_text_says_what_an_epoch_reads(summary):
    text = summary_text(summary)
    assert "train: 8 documents, 11.2 k tokens" in text
    assert "cuts in documents" not in text  # which nobody counts under `concat`
    assert re.search(r"an epoch: \d+ rows of 128 tokens by `packing: concat`", text)
    table = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  c ")}
    cells = re.search(r"^  c +2 +9,600 +85.9 % +50.0 % +([\d.]+) +([\d.]+) +9,000$", text, re.MULTILINE)
    assert cells, table
    assert float(cells[2]) / float(cells[1]) == pytest.approx(3, rel=0.01)
    assert re.search(r"^  a +3 +109 +1.0 % +25.0 % +[\d.]+ +- +64$", text, re.MULTILINE)  # nothing long to repeat


def test_the_figure_is_saved_with_its_numbers_and_drawn_again_from_them(summary, tmp_path):
    rows = data_rows(summary)
    data_figure("train", rows).save(tmp_path)
    assert read_data_rows(tmp_path / "data_train.csv") == rows
    assert (tmp_path / "data_train.png").read_bytes()[:4] == b"\x89PNG"
    again = data_figure("train", read_data_rows(tmp_path / "data_train.csv"))
    assert again.svg(narrow=True) == data_figure("train", rows).svg(narrow=True)
    alone = data_figure("test", [row for row in rows if row.source == "c"])
    assert "<svg" in alone.svg(narrow=False)
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="needs the columns source"):
        read_data_rows(tmp_path / "other.csv")


def test_a_row_shows_where_documents_begin_and_what_is_learnt():
    def decode(tokens):
        return "".join(map(chr, tokens))

    tokens = np.array([ord(letter) for letter in "ask:yes|talk\n" + "." * 3])
    labels = np.where([letter in "yes" for letter in "____yes_" + "_" * 8], tokens, -100)
    row = Row(tokens, labels, np.array([0, 8]), padding=3, isolated=True)
    shown = row_text(row, "row 7", decode, width=100).splitlines()
    assert shown[0] == "row 7: 16 tokens, 3 learnt, 2 documents, isolated"
    assert shown[1:3] == ["├─ 0: 8 tokens", "│ ask:⟦yes⟧|"]
    assert shown[3:5] == ["├─ 8: 5 tokens", "│ talk↵"]
    assert shown[5] == "└─ 16, the last 3 padding"
    long = row_text(Row(np.full(500, ord("x")), np.full(500, ord("x")), np.zeros(1, int)), "r", decode, width=40)
    assert "[… 460 characters …]" in long
    letters = Row(np.arange(97, 107), np.arange(97, 107), np.zeros(1, int))
    shown = row_text(letters, "r", decode, width=1)
    assert "│ a [… 9 characters …] \n" in shown


def test_cuts_in_documents_are_shown_where_they_are_counted():
    lengths = np.array([40, 9, 5])
    documents = Documents(
        np.zeros(54, np.uint16), np.cumsum(lengths) - lengths, lengths, np.zeros(3, np.uint16), ("a",)
    )
    shown = {
        policy: summary_text(summarise("test", documents, make_rows(policy, documents, seq_len=16, bos=0, eos=1)))
        for policy in ("best_fit", "concat", "document")
    }
    found = {
        policy: re.search(r"padding [\d.]+ %(; \d+ cuts in documents)?$", text, re.M)[1]
        for policy, text in shown.items()
    }
    assert found == {"best_fit": "; 2 cuts in documents", "concat": None, "document": "; 1 cuts in documents"}


@pytest.mark.parametrize(("option", "least"), [("rows", 0), ("epoch", 0), ("width", 1)])
def test_numbers_that_make_no_sense_are_refused_before_anything_is_built(option, least, capsys):
    assert main(["data", f"--{option}={least - 1}", "--data=none"]) == 2
    assert capsys.readouterr().err.strip().endswith(f"`--{option}` must be at least {least}, got {least - 1}.")


def test_numbers_are_short():
    assert [amount_text(n) for n in (7, 9_999, 12_345, 1.5e6, 123e6, 2.345e9, 1.2e12)] == [
        "7", "9,999", "12.3 k", "1.50 M", "123 M", "2.35 B", "1.20 T"]  # fmt: skip
    assert class_names([1024, 2048, 131072]) == ["<1k", "1k", "2k", "128k+"]
    assert class_names([]) == ["all"]
