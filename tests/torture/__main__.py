"""``python -m torture``: kills at so many moments, and appends what came of it to a file."""

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from torture.killing import TESTS
from torture.rounds import Torture

sys.path.append(str(TESTS.parent / "benchmarks"))
from _results import RESULTS, commit


def main() -> int:
    """Runs rounds until so many moments have come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100, help="signals to send")
    parser.add_argument("--round", type=int, default=16, help="moments of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", action="append", default=[], help="kill only this one: 2-search, eval, ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after so many")
    parser.add_argument("--results", type=Path, default=RESULTS / "torture.jsonl")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has left out the first
        signal.signal(number, signal.default_int_handler)
    begin, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture-"))
    torture, number = Torture(root, tuple(given.part)), 0
    tally = torture.tally
    with suppress(KeyboardInterrupt):  # what has come so far counts
        while len(tally.fired) < given.moments and time.monotonic() - begin < 60 * given.minutes:
            torture.round(number, min(given.round, given.moments - len(tally.fired)), given.seed)
            number += 1
            seconds = time.monotonic() - begin
            sys.stdout.write(f"{len(tally.fired)} moments, {len(tally.failures)} failures, {seconds:.0f} s\n")
            sys.stdout.flush()
    found = {
        "commit": commit(),
        "seed": given.seed,
        "moments": len(tally.fired),
        "rounds": number,
        "failures": tally.failures,
        "missed": tally.missed,
        "steps_again": tally.steps_again,
        "parts": tally.by("part"),
        "signals": tally.by("signal"),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "threads": 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "transformers")},
    }
    with given.results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
