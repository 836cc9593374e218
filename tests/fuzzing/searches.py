"""Readers of factors and searches."""

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fuzzing.reader import Reader, saved, unchanged
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.score_book import ScoreBook
from lightning_longrope.search.journal import Journal, read_journal
from lightning_longrope.tables import LengthTables

RECORDED = {"seed": 0, "model": "m", "document_digests": ["a", "b"]}
TABLE = RescaleFactors((1.0, 1.5, 2.25, 4.0), 32, 128, 2, 1.25)


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


def own_factors() -> list[bytes]:
    tables = LengthTables((TABLE, RescaleFactors((1.0,) * 4, 32, 64)))
    return [saved(TABLE.save), saved(tables.save), json.dumps(TABLE.to_dict()).encode()]


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
    rows = [np.array([cell for cell in line.split(",") if cell.strip()], np.float64) for line in text.split("\n")]
    rows = [row for row in rows if len(row)]
    flat = np.concatenate(rows) if all(len(row) == 1 for row in rows) else rows[-1]
    assert flat.tolist() == list(value.values)


def judge_config(data: bytes, value: LengthTables, intact: list[Any]) -> None:
    """What is listed in a config is what libyaml reads there; what is computed is finite and at least 1."""
    try:
        theirs = yaml.load(data.decode("utf-8-sig"), Loader=yaml.CBaseLoader)
    except yaml.YAMLError:
        return  # YAML is narrower: no tabs before values, no control characters
    parameters = theirs.get("rope_parameters") or {}
    if parameters.get("rope_type") == "longrope":
        assert [float(one) for one in parameters["long_factor"]] == list(value.longest.values)
    assert all(math.isfinite(one) and one >= 1 for table in value.tables for one in table.values)


def journal_bytes() -> list[bytes]:
    def save(path: Path) -> None:
        journal = Journal(path, RECORDED)
        journal.append([record(number) for number in range(3)])

    return [saved(save)]


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


SEARCHES = [
    Reader("factors (JSON)", "f.json", own_factors, lambda path: LengthTables.load(path), judge_factors),
    Reader("factors (Microsoft CSV)", "f.csv", lambda: [b"1.0\n1.5\n2.25\n4.0\n", b"1,1.5,2.25,4\n1,1.5,2.25,4\n"],
           lambda path: RescaleFactors.load(path, 32, 128), judge_csv),
    Reader("factors (Hugging Face config)", "config.json",
           lambda: [json.dumps({**CONFIG, "rope_parameters": rope}).encode() for rope in ROPES],
           lambda path: LengthTables.load(path), judge_config),
    Reader("search journal", "history.jsonl", journal_bytes, read_journal, judge_journal),
    Reader("search scores", "history.jsonl", journal_bytes, _score_rows, judge_scores, slow=3),
]  # fmt: skip
