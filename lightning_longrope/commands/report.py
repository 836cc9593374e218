"""``longrope report``: figures, one table and one page of a run; one page of several."""

import sys
from pathlib import Path

from lightning_longrope.commands.parsing import Parser


def report(command: str, arguments: list[str]) -> None:
    """``longrope report RUN [RUN ...]``."""
    parser = Parser(
        prog="longrope report",
        description="Writes report.html, figures and one results.csv of a run into its folder;"
        " of several runs one page that holds them side by side.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a recipe or a stage")
    parser.add_argument("--out", type=Path, help="the page of several runs; comparison.html by default")
    given = parser.parse_args(arguments)
    from lightning_longrope.reporting import write_comparison, write_report

    if len(given.runs) > 1:
        page = write_comparison(given.runs, given.out or Path("comparison.html"))
    elif given.out is not None:
        raise ValueError("`--out` is for the page of several runs; the report of one run is written into its folder.")
    else:
        page = write_report(given.runs[0])
    sys.stdout.write(f"{page}\n")
