"""``longrope report``: figures, one table and one page of a run."""

import sys
from pathlib import Path

from lightning_longrope.commands.parsing import Parser


def report(command: str, arguments: list[str]) -> None:
    """``longrope report RUN``."""
    parser = Parser(prog="longrope report", description="Writes report.html, figures and one results.csv of a run.")
    parser.add_argument("run", type=Path, help="output folder of a recipe or a stage")
    given = parser.parse_args(arguments)
    from lightning_longrope.reporting import write_report

    sys.stdout.write(f"{write_report(given.run)}\n")
