"""Rounds: all commands on one folder, each killed at its moments, and at the end the folder compared."""

import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torture import comparing
from torture.killing import Moment, Part, TortureError, Uncut, commands_of, draw, finish, measure, parts_of, strike
from torture.material import write_material


@dataclass
class Tally:
    """What has come of the moments so far."""

    fired: list[Moment] = field(default_factory=list)
    missed: int = 0
    steps_again: int = 0
    failures: list[str] = field(default_factory=list)

    def by(self, name: str) -> dict[str, int]:
        """Numbers of moments by one of their fields."""
        return dict(Counter(str(getattr(moment, name)) for moment in self.fired))


class Torture:
    """Undisturbed runs of all commands, and rounds that are compared with them.

    Args:
        root: Folder for all files; a round that fails is left there.
        only: Names of the parts that are killed; all by default.
        short: Run the recipe with few steps.
    """

    def __init__(self, root: Path, only: tuple[str, ...] = (), short: bool = False) -> None:
        self.root, self.tally = root, Tally()
        write_material(root)
        self.parts = parts_of(root, short)
        self.victims = [part for part in self.parts if not only or part.name in only]
        last = max(self.parts.index(part) for part in self.victims)
        self.commands = commands_of(self.parts[: last + 1])
        self.uncut: dict[str, Uncut] = {}
        for command, parts in self.commands.items():
            self.uncut |= measure(command, parts, root / "uncut", root / "uncut.log")

    def round(self, number: int, count: int, seed: int) -> None:
        """Draws ``count`` moments, kills at those that come, and compares at the end."""
        out, log = self.root / f"cut{number}", self.root / f"cut{number}.log"
        moments = draw(self.victims, self.uncut, count, random.Random(f"{seed}/{number}"))
        before = len(self.tally.fired)
        try:
            for command, parts in self.commands.items():
                self._command(command, parts, [m for m in moments if m.part in {part.name for part in parts}], out, log)
            fired = self.tally.fired[before:]
            comparing.check_same(out, self.root / "uncut")
            kills = sum(moment.signal == "SIGKILL" for moment in fired)
            comparing.check_steps_again(out, kills, len(fired) - kills)
            self.tally.steps_again += comparing.steps_again(out)
        except TortureError as error:
            self.tally.failures.append(f"round {number}, moments {self.tally.fired[before:]}: {error}"[:5000])
            sys.stderr.write(f"{self.tally.failures[-1]}\n")
        except KeyboardInterrupt:
            del self.tally.fired[before:]  # nothing was compared
            raise
        else:
            shutil.rmtree(out)

    def _command(
        self, command: tuple[str, ...], parts: list[Part], moments: list[Moment], out: Path, log: Path
    ) -> None:
        """Runs a command as often as it is killed, and once more; looks at what is there after each kill."""
        ended = False
        while moments and not ended:
            once, lines = comparing.written_once(out), comparing.journals(out)
            come, ended = strike(command, parts, moments, out, log)
            self.tally.fired += [moments[number] for number in come]
            moments = moments[max(come) + 1 :] if come else []
            self._check(out, once, lines)
        self.tally.missed += len(moments)
        once, lines = comparing.written_once(out), comparing.journals(out)
        finish(command, out, log)
        self._check(out, once, lines)

    @staticmethod
    def _check(out: Path, once: dict[Path, tuple[int, int]], lines: dict[Path, bytes]) -> None:
        comparing.check_whole(out)
        now = comparing.written_once(out)
        if again := [str(path) for path in once if now.get(path) != once[path]]:
            raise TortureError(f"Made again, although they were finished: {again}.")
        if lost := [str(path) for path, text in lines.items() if not path.read_bytes().startswith(text)]:
            raise TortureError(f"Lines of journals were lost or made again: {lost}.")
