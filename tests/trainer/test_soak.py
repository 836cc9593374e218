"""The soak: its verdict on samples whose growth is known, and three rounds of it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import soak

TESTS = Path(__file__).parents[1]


def samples(run, rounds=40, slope=0.0, start=500.0, seed=0, **more):
    """Ends of rounds of 45 seconds, whose memory grows by ``slope`` MiB an hour and jumps by some MiB besides."""
    noise = random.Random(seed)
    return [
        {"run": run, "moment": "end", "round": number, "seconds": 45.0 * number, "handles": 6, "threads": 5}
        | {"children": 0, "temporary": 1, "resident": 700.0}
        | {"anonymous": start + slope * number / 80 + noise.uniform(-3, 3)}
        | {name: values(number) for name, values in more.items()}
        for number in range(1, rounds + 1)
    ]


def test_what_grows_is_found_and_what_does_not_is_not():
    assert soak.complaints(samples("a")) == []
    assert soak.complaints(samples("a") + samples("b", start=600.0, seed=1)) == []  # another process, another level
    (complaint,) = soak.complaints(samples("a", slope=60.0))
    assert complaint.startswith("anonymous memory grows by ")
    assert float(complaint.split()[4]) == pytest.approx(60, abs=6)
    assert soak.complaints(samples("a", anonymous=lambda number: 500 + 100 * (number <= 4))) == []  # the warm-up
    (complaint,) = soak.complaints(samples("a", handles=lambda number: 6 + number // 20))
    assert complaint == "handles: 6 at the start of run a, 8 at its end"
    assert "too short" in soak.complaints(samples("a", rounds=5))[0]


def test_runs_add_up(tmp_path):
    both = samples("a", slope=20.0) + samples("b", slope=60.0, seed=1)
    assert soak.growth(soak.judged(both), "anonymous") == pytest.approx(40, abs=6)
    assert soak.summary(both).startswith("60 minutes, 80 rounds: ")
    soak.draw(both, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


SCRIPT = """
import json, sys
from pathlib import Path
import soak
found = soak.soak(Path(sys.argv[1]) / "soak.jsonl", 10, most_rounds=3, commit="test")
print(json.dumps([sample for sample in found if sample["moment"] == "end"]))
"""


@pytest.mark.slow
def test_rounds_leave_nothing_behind(tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=TESTS, timeout=280)
    assert done.returncode == 0, done.stderr
    _, second, third = json.loads(done.stdout.splitlines()[-1])
    assert all(third[name] <= second[name] for name in soak.COUNTS)
    assert third["anonymous"] < second["anonymous"] + 16
    assert soak.read(tmp_path / "soak.jsonl")[-1] == third


@pytest.mark.slow
def test_a_run_too_short_to_judge_says_so(tmp_path):
    words = [sys.executable, "soak.py", "--minutes", "0.01", "--results", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=TESTS, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("0 minutes, 1 rounds\ntoo short to judge")
    assert (tmp_path / "soak.png").exists()
