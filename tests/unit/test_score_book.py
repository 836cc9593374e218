"""What a search keeps of single pairs, and when it is over with them."""

import pytest

from lightning_longrope import score_book
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.score_book import ScoreBook
from lightning_longrope.search import read_journal

FINGERPRINT = {"model": "tiny", "document_digests": ["a", "b"]}
FIRST, SECOND = (RescaleFactors((1.0, last), 32, 64, attention_factor=1.1) for last in (1.5, 2.0))
SUMS = [5.0, 2.0, 0.0, 0.0]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tests set."""
    now = [100.0]
    monkeypatch.setattr(score_book.time, "monotonic", lambda: now[0])
    return now


def evaluation(table, documents):
    return {
        "values": list(table.values), "start_tokens": 0, "attention_factor": 1.1, "score": 2.5, "status": "ok",
        "documents": documents,
    }  # fmt: skip


def rows(folder):
    path = folder / "history.rows.jsonl"
    return [(row["values"], row["document"]) for row in read_journal(path)[1]] if path.exists() else []


def test_pairs_are_written_every_second_but_for_those_of_candidates_that_are_finished(tmp_path, clock):
    book = ScoreBook(tmp_path / "history.jsonl", FINGERPRINT)
    book.keep_rows([(FIRST, 0, SUMS), (FIRST, 1, SUMS), (SECOND, 0, SUMS)])
    assert rows(tmp_path) == []
    book.keep_evaluation(evaluation(FIRST, [SUMS, SUMS]))
    clock[0] += 1
    book.keep_rows([])
    assert rows(tmp_path) == [([1.0, 2.0], 0)]


def test_pairs_of_a_generation_that_is_over_are_written_no_more(tmp_path, clock):
    book = ScoreBook(tmp_path / "history.jsonl", FINGERPRINT)
    book.keep_rows([(FIRST, 0, SUMS)])
    book.end_generation([FIRST], 1)
    clock[0] += 1
    book.keep_rows([(SECOND, 1, SUMS)])
    assert rows(tmp_path) == [([1.0, 2.0], 1)]
