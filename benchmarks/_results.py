"""What the benchmarks share: rows held to goals, the two options every script has, and the file of results.

given = parser(__doc__).parse_args()
rows = [lower_is_better("training step", 0.18, 0.21, "s", ">= 1")]
sys.exit(finish("training", rows, given, ("torch", "transformers")))
"""

import argparse
import json
import operator
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_longrope.files import write_json

RESULTS = Path(__file__).parent / "results"
SIGNS = {">=": operator.ge, "<=": operator.le}
FAILED = "failed"
"""Unit of a row for what did not work; its figures mean nothing."""


@dataclass(frozen=True)
class Row:
    """One measurement beside the one it is held against.

    Attributes:
        name: What was measured.
        ours: This project's figure.
        peer: The other's, from the same run; None where nothing stands beside it, and then ``ratio`` is ``ours``.
        unit: Of both, such as ``s``, ``MiB`` or ``tokens/s``.
        ratio: ``ours`` over ``peer`` or the other way about, whichever ``goal`` speaks of.
        goal: What the ratio is held to, such as ``>= 2`` or ``<= 0.25``; None for information.

    Raises:
        ValueError: If ``goal`` is not a sign and a number.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float
    goal: str | None = None

    def __post_init__(self) -> None:
        if self.goal is not None and not re.fullmatch(r"(>=|<=) -?[0-9.]+", self.goal):
            raise ValueError(f"`goal` is a sign and a number such as '>= 2' or '<= 0.25', got {self.goal!r}.")

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the goal; False where the work failed, else None without a goal."""
        if self.unit == FAILED:
            return False
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return bool(SIGNS[sign](self.ratio, float(bound)))


def higher_is_better(name: str, ours: float, peer: float, unit: str, goal: str | None = None) -> Row:
    """A row whose ratio says how many times more ours is, for rates."""
    return Row(name, ours, peer, unit, ours / peer, goal)


def lower_is_better(name: str, ours: float, peer: float, unit: str, goal: str | None = None) -> Row:
    """A row whose ratio says how many times less ours is, for seconds and bytes."""
    return Row(name, ours, peer, unit, peer / ours, goal)


def failed(name: str, reason: str, goal: str | None = None) -> Row:
    """A row for what did not work, which misses whatever it was held to."""
    return Row(f"{name}: {reason}", 0.0, None, FAILED, 0.0, goal)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark: ``--quick``, ``--check`` and what the script adds.

    Args:
        doc: The script's ``__doc__``.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smaller cases, under ten minutes; writes no results")
    made.add_argument("--check", action="store_true", help="exit status 1 where a goal is missed or a row failed")
    commit()  # as it is now, whatever is committed while the script runs
    return made


def finish(
    name: str,
    rows: Sequence[Row],
    given: argparse.Namespace,
    packages: Sequence[str],
    extra: Mapping[str, Any] | None = None,
    path: Path | None = None,
) -> int:
    """Prints the rows and, unless ``--quick``, writes ``results/<name>.json``.

    Args:
        name: The script without its ending.
        rows: What was measured.
        given: Parsed options, with ``quick`` and ``check``.
        packages: Distributions whose versions matter to the figures.
        extra: Further keys of the file; its ``machine`` stands in place of the one this process sees.
        path: Another file to write.

    Returns:
        The exit status: 1 where a goal is missed or a row failed under ``--check``, else 0.
    """
    for row in rows:
        sys.stdout.write(line_of(row) + "\n")
    if not given.quick:
        keys = dict(extra or {})
        record = record_of(name, rows, packages, keys.pop("machine", None) or machine()) | keys
        write_json(path or RESULTS / f"{name}.json", record)
    return int(given.check and any(row.met is False for row in rows))


def record_of(name: str, rows: Sequence[Row], packages: Sequence[str], where: str) -> dict[str, Any]:
    """What a file of results holds.

    Args:
        name: The script without its ending.
        rows: What was measured.
        packages: Distributions whose versions matter to the figures.
        where: The machine.
    """
    return {
        "command": command(name),
        "commit": commit(),
        "machine": where,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "rows": [asdict(row) for row in rows],
    }


def line_of(row: Row) -> str:
    """A row as it is printed."""
    mark = {True: "ok  ", False: "MISS", None: "    "}[row.met]
    peer = "" if row.peer is None else f", peer {row.peer:,.4g}"
    goal = "" if row.goal is None else f" (goal {row.goal})"
    return f"{mark} {row.name}: {row.ours:,.4g} {row.unit}{peer}, ratio {row.ratio:.4g}{goal}"


def command(name: str) -> str:
    """The command that runs now; of absolute paths only the last part."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{name}.py", *words])


@cache
def commit() -> str:
    """The commit that is checked out, with ``+`` where files differ from it, but for results and their page."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    results = (":!benchmarks/results", ":!benchmarks/README.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def machine() -> str:
    """System, processor, cores and, where torch is at work on some, accelerators; no names of hosts or folders."""
    parts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores of {processor()}"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def processor() -> str:
    """The model name of the processor, or what Python calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown make")


def read(path: Path) -> dict[str, Any]:
    """A file of results, its ``rows`` as ``Row``s."""
    record = json.loads(path.read_text())
    return record | {"rows": [Row(**row) for row in record["rows"]]}
