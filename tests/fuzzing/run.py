"""Feeds every reader of the package damaged files by the ten thousand: ``make fuzz INPUTS=10000``.

Where atheris is installed it looks for files that reach new code, on top of the accidents in ``damage.py``; else those
alone are tried. An input that ends in a traceback, in an error without the name of the file, in no answer for 20
seconds of the processor, in more than 4 GiB, or in another value than an independent parser reads, is kept and fails
the run. A reader runs in a process of its own, so that one that ends it is found too.

Runs add up: each reader's counts are appended to ``benchmarks/results/fuzz.jsonl`` with the commit.

    python tests/fuzzing/run.py -n 10000 --seed 0 --out benchmarks/results/fuzz.jsonl
    python tests/fuzzing/run.py -n 500 --only csv
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "benchmarks")]

SECONDS, GIB, MOST_FINDS = 20, 4, 20
LONGEST = 1 << 17  # bytes of an input


def main() -> int:
    """Runs all readers and writes the counts; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000, help="inputs of every reader (10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of readers")
    parser.add_argument("--plain", action="store_true", help="without atheris, although it is installed")
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder for inputs that failed")
    parser.add_argument("--out", type=Path, help="file that a line for each reader is appended to")
    given = parser.parse_args()
    guided = not given.plain and _has_atheris()
    readers = [reader for reader in _readers(guided) if any(part in reader.name for part in given.only or [""])]
    rows = {}
    for reader in readers:
        rows[reader.name] = _run_apart(reader, given, guided)
        if given.out is not None:
            _append(given.out, {"reader": reader.name, **rows[reader.name], "seed": given.seed, "guided": guided})
    finds = sum(row["finds"] for row in rows.values())
    inputs = sum(row["inputs"] for row in rows.values())
    sys.stdout.write(
        f"{len(rows)} readers, {inputs:,} inputs, {finds} finds{f', kept in {given.finds}' * bool(finds)}\n"
    )
    return int(finds > 0)


def _has_atheris() -> bool:
    try:
        version("atheris")
    except PackageNotFoundError:
        return False
    return True


def _readers(guided: bool) -> list[Any]:
    """All readers, with code that tells which of its lines have run if there is somebody to hear it."""
    if guided:
        import atheris

        logging.disable(logging.INFO)
        with atheris.instrument_imports(include=["lightning_longrope"], enable_loader_override=False):
            from fuzzing.readers import READERS
        logging.disable(logging.NOTSET)
    else:
        from fuzzing.readers import READERS
    return READERS


def _run_apart(reader: Any, given: Any, guided: bool) -> dict[str, Any]:
    """Runs one reader in a process; one that ends it is started again, with another seed, for what is left."""
    name = reader.name
    row: dict[str, Any] = {"inputs": 0, "read": 0, "refused": 0, "finds": 0, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(10):
            if row["inputs"] >= given.n:
                break
            told = Path(folder) / f"row-{turn}.json"
            arguments = (reader, given.n - row["inputs"], given.seed + 1000 * turn, guided, given.finds, told)
            process = multiprocessing.get_context("fork").Process(target=_fuzz, args=arguments)
            process.start()
            process.join()
            done = json.loads(told.read_text()) if told.exists() else {}
            for key in row:
                row[key] = round(row[key] + done.get(key, 0), 1)
            if process.exitcode != 0 or not done:
                row["finds"] += 1
                sys.stdout.write(f"  {name}: the process ended with {process.exitcode}\n")
    sys.stdout.write(f"{name}: {row['inputs']:,} inputs, {row['read']:,} read, {row['refused']:,} refused,"
                     f" {row['finds']} finds, {row['seconds']} s\n")  # fmt: skip
    sys.stdout.flush()
    return row


def _fuzz(reader: Any, inputs: int, seed: int, guided: bool, finds: Path, told: Path) -> None:
    """The process of one reader."""
    from fuzzing.attempt import Attempts
    from fuzzing.damage import damaged

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libFuzzer talks, and so do libraries about what they refuse
    resource.setrlimit(resource.RLIMIT_AS, (_virtual() + (GIB << 30), resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _too_long)
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Attempts(reader, Path(folder)), inputs, finds, told)
        if guided:
            import atheris

            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            for number, data in enumerate(work.attempts.seeds):
                (corpus / str(number)).write_bytes(data)

            def mutate(data: bytes, most: int, number: int) -> bytes:
                rng = random.Random(number)
                if rng.random() < 0.3:
                    return bytes(atheris.Mutate(data, most))
                return damaged(rng, data if rng.random() < 0.5 else rng.choice(work.attempts.seeds))[:most]

            options = [
                f"-runs={10 * inputs}",
                f"-seed={seed + 1}",
                f"-max_len={LONGEST}",
                "-verbosity=0",
                "-len_control=0",
            ]
            options += ["-rss_limit_mb=0", "-malloc_limit_mb=0", f"-timeout={3 * SECONDS}", "-print_final_stats=0"]
            atheris.Setup([sys.argv[0], *options, str(corpus)], work.try_one, custom_mutator=mutate)
            atheris.Fuzz()
        rng = random.Random(f"{reader.name}/{seed}")
        while True:
            work.try_one(damaged(rng, rng.choice(work.attempts.seeds))[:LONGEST])


def _virtual() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"no answer in {SECONDS} s of the processor")


class _Work:
    """Counts what becomes of inputs, and ends the process after the last."""

    def __init__(self, attempts: Any, inputs: int, finds: Path, told: Path) -> None:
        self.attempts, self.inputs, self.finds, self.told = attempts, inputs, finds, told
        self.counts = {"inputs": 0, "read": 0, "refused": 0, "finds": 0}
        self.known: set[str] = set()
        self.began = time.monotonic()

    def try_one(self, data: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            refused, problem = self.attempts.problem(bytes(data))
        except BaseException as error:  # a time-out is raised wherever the program is
            refused, problem = True, repr(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.counts["inputs"] += 1
        self.counts["refused" if refused else "read"] += 1
        if problem is not None:
            self._keep(bytes(data), problem)
        if self.counts["inputs"] % 200 == 0 or self.counts["inputs"] == self.inputs:
            self.told.write_text(json.dumps({**self.counts, "seconds": time.monotonic() - self.began}))
        if self.counts["inputs"] == self.inputs:
            sys.stdout.flush()
            os._exit(0)  # libFuzzer would go on

    def _keep(self, data: bytes, problem: str) -> None:
        self.counts["finds"] += 1
        kind = problem.rsplit("(", 1)[-1] if "(" in problem else problem[:60]
        if kind in self.known or len(self.known) >= MOST_FINDS:
            return
        self.known.add(kind)
        self.finds.mkdir(parents=True, exist_ok=True)
        stem = f"{self.attempts.path.name}.{len(self.known)}.{abs(hash(problem)) % 10**6}"
        (self.finds / stem).write_bytes(data)
        (self.finds / f"{stem}.why").write_text(f"{self.attempts.reader.name}: {problem}\n")
        sys.stdout.write(f"  {self.attempts.reader.name}: {problem[:400]}\n")
        sys.stdout.flush()


def _append(out: Path, row: dict[str, Any]) -> None:
    """Adds a line to a file of results."""
    from _results import commit  # only now: what it imports of the package is instrumented

    versions = {name: version(name) for name in ("torch", "transformers", "pyarrow", "PyYAML", "safetensors")}
    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**about, **row, "versions": {"python": platform.python_version(), **versions}}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
