"""Reports of runs: what was searched, trained and measured, as a page, figures and one table."""

from lightning_longrope.reporting.page import write_report
from lightning_longrope.reporting.results import Result, Results, read_results
from lightning_longrope.reporting.run_folder import Run, read_run
from lightning_longrope.reporting.side_by_side import write_comparison
from lightning_longrope.reporting.verdict import Comparison, Verdict, compare, verdict

__all__ = [
    "Comparison",
    "Result",
    "Results",
    "Run",
    "Verdict",
    "compare",
    "read_results",
    "read_run",
    "verdict",
    "write_comparison",
    "write_report",
]
