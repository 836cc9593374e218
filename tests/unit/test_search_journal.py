"""The journal: what a crash leaves is repaired, what was damaged or belongs to another search is refused."""

import json
import math
import os

import pytest

from lightning_longrope.search import Candidate, Journal, read_journal

FINGERPRINT = {"model": "tiny", "space": {"step": 0.01, "start_tokens": (0, 1)}, "seed": 0}


def record(number, score=1.5, **more):
    values = [1.0, 1.07, 8.0 + number / 100]
    return {
        "evaluation": number,
        "values": values,
        "start_tokens": 4,
        "attention_factor": 1.1952286,
        "score": score,
        **more,
    }


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "search" / "history.jsonl", FINGERPRINT)
    journal.append([record(0), record(1)])
    journal.append([record(2)])
    return journal.path


def test_a_reopened_journal_knows_every_record(path):
    journal = Journal(path, FINGERPRINT)
    assert len(journal) == 3
    assert journal.records == [record(0), record(1), record(2)] == read_journal(path)[1]
    journal.append([record(3)])
    assert [entry["evaluation"] for entry in Journal(path, FINGERPRINT).records] == [0, 1, 2, 3]


def test_cached_finds_this_very_candidate_only(path):
    journal = Journal(path, FINGERPRINT)
    assert journal.cached(Candidate((1.0, 1.07, 8.01), 4, 1.1952286, "any")) == record(1)
    assert journal.cached(Candidate((1.0, 1.07, 8.04), 4, 1.1952286)) is None
    assert journal.cached(Candidate((1.0, 1.07, 8.01), 8, 1.1952286)) is None
    assert journal.cached(Candidate((1.0, 1.07, 8.01), 4, 1.0)) is None
    journal.append([record(4), record(1, 9.0, attention_factor=1.0)])
    assert journal.cached(Candidate((1.0, 1.07, 8.01), 4, 1.0))["score"] == 9.0
    assert journal.cached(Candidate((1.0, 1.07, 8.01), 4, 1.1952286)) == record(1)
    assert journal.cached(Candidate((1.0, 1.07, 8.04), 4, 1.1952286)) == record(4)


def test_lines_are_strict_json_and_failed_scores_are_null(path):
    journal = Journal(path, FINGERPRINT)
    journal.append([record(5, math.nan, parts={"text": math.inf, "answer": -math.inf}), record(6, None)])

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert len(lines) == 6
    assert [line["score"] for line in lines[-2:]] == [None, None]
    assert lines[-2]["parts"] == {"text": None, "answer": None}
    assert Journal(path, FINGERPRINT).records == journal.records


def test_floats_come_back_to_the_last_bit(tmp_path):
    journal = Journal(tmp_path / "j", {})
    scores = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    journal.append([record(number, score) for number, score in enumerate(scores)])
    assert [entry["score"] for entry in Journal(tmp_path / "j", {}).records] == scores


def test_a_line_is_on_the_disk_before_the_search_goes_on(path, monkeypatch):
    """The system may hold what was written for half a minute, and a machine that fails then takes it away."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or fsync(number))
    journal = Journal(path, FINGERPRINT)
    for number in (3, 4):
        journal.append([record(number)])
        assert synced[-1:] == [path.stat().st_size]


def test_a_file_cut_at_any_byte_is_repaired(path):
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    near_ends = {end + shift for end in ends for shift in (-1, 0, 1)}
    cuts = {*range(0, len(whole), 7), *(cut for cut in near_ends if cut < len(whole))}
    assert len(cuts) > 80
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        journal = Journal(path, FINGERPRINT)
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        assert len(journal) == kept
        journal.append([record(number) for number in range(kept, 3)])
        assert path.read_bytes() == whole


def test_a_flipped_byte_is_refused_wherever_it_is(path):
    whole = path.read_bytes()
    refused = 0
    for index in range(len(whole) - 1):  # without its last byte, the end of line, a line is a torn one
        flipped = bytearray(whole)
        flipped[index] ^= 1
        path.write_bytes(bytes(flipped))
        line = whole[:index].count(b"\n") + 1
        with pytest.raises(ValueError, match=rf"history\.jsonl` line {line} is damaged"):
            Journal(path, FINGERPRINT)
        assert path.read_bytes() == bytes(flipped)  # looking at it changes nothing
        refused += 1
    assert refused > 400


def test_a_missing_middle_line_does_not_pass_for_the_first(path):
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(ValueError, match="line 1 must hold the fingerprint"):
        Journal(path, FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` differs, expected 0, got 1"),
        ({"space": {"step": 0.02, "start_tokens": (0, 1)}}, r"`space\.step` differs, expected 0\.01, got 0\.02"),
        ({"corpus": "books"}, "`corpus` differs, expected 'nothing', got 'books'"),
    ],
)
def test_another_search_is_refused_by_the_key_that_differs(path, change, message):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Journal(path, {**FINGERPRINT, **change})
    with pytest.raises(ValueError, match="`model` differs, expected 'tiny', got 'nothing'"):
        Journal(path, {key: value for key, value in FINGERPRINT.items() if key != "model"})
    assert path.read_bytes() == before


def test_reading_for_a_report_changes_nothing(path, tmp_path):
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    fingerprint, records = read_journal(path)
    assert fingerprint == {**FINGERPRINT, "space": {"step": 0.01, "start_tokens": [0, 1]}}
    assert records == [record(0), record(1)]
    assert path.read_bytes() == torn
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="holds no search"):
        read_journal(tmp_path / "empty")


def test_a_record_that_is_no_evaluation_is_not_written(path):
    before = path.read_bytes()
    with pytest.raises(KeyError):
        Journal(path, FINGERPRINT).append([record(3), {"score": 1.0}])
    assert path.read_bytes() == before
