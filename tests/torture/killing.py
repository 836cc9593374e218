"""Commands that are killed at their moments and started again until they end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
STOPPED = 128 + signal.SIGTERM
LIMIT = 600.0  # seconds of a command
GRACE = 60.0  # seconds until all processes of a killed command are gone


@dataclass(frozen=True)
class Part:
    """A part of a command that is killed by itself.

    Attributes:
        name: A stage, or a command that is no stage.
        words: The command line, ``{out}`` for the output folder.
        prefixes: What the paths of its files begin with, relative to the output folder.
    """

    name: str
    words: tuple[str, ...]
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: at the ``change``-th change of a file of a part, ``delay`` processor seconds later."""

    part: str
    change: int
    delay: float
    signal: str
    group: bool
    """Whether all processes of the command get it, or only the first."""


@dataclass(frozen=True)
class Uncut:
    """What a part does undisturbed: changes of its files, and processor seconds from the first to the last."""

    changes: int
    seconds: float


class TortureError(AssertionError):
    """What must not happen, has."""


def parts_of(root: Path, short: bool = False) -> list[Part]:
    """All parts, in the order in which they run; those of a recipe share a command."""
    recipe = ("run", str(root / "recipe"), "--out", "{out}", *(["--short"] if short else []))
    evaluate = ("eval", "-c", str(root / "eval.yaml"), "--model.name_or_path", "{out}/hf", "--out", "{out}/6-eval")
    return [
        Part("tokenize", ("tokenize", "-c", str(root / "data.yaml"), "--workers", "2", "--out", "{out}"), ("data",)),
        *(Part(name, recipe, (name,)) for name in ("1-pretrain", "2-search", "3-finetune", "4-compare")),
        Part("5-export", recipe, ("5-export", "hf", ".hf")),
        Part("report", recipe, ("figures", "report.html", "results.csv", ".report.html", ".results.csv")),
        Part("eval", (*evaluate, "--data.init_args.cache_dir", "{out}/data"), ("6-eval",)),
    ]


def commands_of(parts: list[Part]) -> dict[tuple[str, ...], list[Part]]:
    """Commands with their parts."""
    return {words: [part for part in parts if part.words == words] for words in dict.fromkeys(p.words for p in parts)}


def measure(command: tuple[str, ...], parts: list[Part], out: Path, log: Path) -> dict[str, Uncut]:
    """Runs a command to its end, undisturbed."""
    record = log.with_suffix(".changes")
    finish(command, out, log, {"record": str(record)})
    changes, found = json.loads(record.read_text()), {}
    for part in parts:
        own = [when for name, when in changes if name.startswith(_prefixes(part, out))]
        found[part.name] = Uncut(len(own), own[-1] - own[0])
    return found


def draw(parts: list[Part], uncut: dict[str, Uncut], count: int, chance: random.Random) -> list[Moment]:
    """Moments spread evenly over the parts, in the order of these."""
    first = chance.randrange(len(parts))
    chosen = sorted((first + number) % len(parts) for number in range(count))
    return [_moment(parts[number].name, uncut[parts[number].name], chance) for number in chosen]


def _moment(part: str, uncut: Uncut, chance: random.Random) -> Moment:
    """Half of the moments are at a change of a file or up to 10 ms after it, half at any time of a part."""
    kind, group = chance.choices(("SIGKILL", "SIGTERM"), (3, 1))[0], chance.random() < 0.7
    if chance.random() < 0.5:
        return Moment(part, 1, round(chance.uniform(0, uncut.seconds), 4), kind, group)
    delay = chance.choice((0.0, round(chance.uniform(0, 0.01), 4)))
    return Moment(part, chance.randint(1, uncut.changes), delay, kind, group)


def strike(
    command: tuple[str, ...], parts: list[Part], moments: list[Moment], out: Path, log: Path
) -> tuple[list[int], bool]:
    """Runs a command that gets the first signal whose moment comes.

    Returns:
        The numbers of the moments that have come, and whether the command has come to its end all the same.

    Raises:
        TortureError: If it has ended in another way than it should, or left processes.
    """
    prefixes = {part.name: _prefixes(part, out) for part in parts}
    fired = log.with_suffix(".fired")
    plan = [{**asdict(moment), "prefixes": prefixes[moment.part]} for moment in moments]
    begin = log.stat().st_size if log.exists() else 0
    process = _start(command, out, log, {"moments": plan, "fired": str(fired)})
    code = process.wait(LIMIT)
    _await_group(process.pid)
    said = log.read_bytes()[begin:].decode()
    come = [int(number) for number in fired.read_text().split()]
    signals = {moments[number].signal for number in come}
    allowed = {0, *([-signal.SIGKILL] if "SIGKILL" in signals else []), *([STOPPED] if "SIGTERM" in signals else [])}
    if code not in allowed:
        raise TortureError(f"{[moments[n] for n in come]}: ended with {code}, expected one of {allowed}: {said}")
    if code == STOPPED and said.count("longrope: stopped") != 1:
        raise TortureError(f"{[moments[n] for n in come]}: no line, or more, on the signal: {said}")
    return come, code == 0


def finish(command: tuple[str, ...], out: Path, log: Path, plan: dict[str, Any] | None = None) -> None:
    """Runs a command to its end."""
    if code := _start(command, out, log, plan).wait(LIMIT):
        raise TortureError(f"{' '.join(command[:2])} ended with {code}: {log.read_text()[-3000:]}")


def _start(command: tuple[str, ...], out: Path, log: Path, plan: dict[str, Any] | None) -> subprocess.Popen[bytes]:
    """Starts the command line, in a process group of its own; what it prints is added to ``log``."""
    words = [sys.executable, "-m", "lightning_longrope", *(word.replace("{out}", str(out)) for word in command)]
    paths = [str(TESTS / "torture" / "inside"), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    given |= {} if plan is None else {"LONGROPE_TORTURE": json.dumps(plan)}
    with log.open("ab") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **given}, start_new_session=True
        )


def _await_group(group: int) -> None:
    """Waits until no process of a group is left; those that stay are killed."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise TortureError(f"Processes of group {group} were left {GRACE:.0f} s after the first had ended.")


def _prefixes(part: Part, out: Path) -> tuple[str, ...]:
    return tuple(str(out / prefix) for prefix in part.prefixes)
