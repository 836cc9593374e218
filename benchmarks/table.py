"""Writes the table of ``benchmarks/README.md`` from the files in ``benchmarks/results``.

python benchmarks/table.py
"""

import sys
from pathlib import Path

from _results import RESULTS, Row, read

from lightning_longrope.files import write_text

README = Path(__file__).parent / "README.md"
WAITING = {
    "gpu": "Not run yet: no GPU has been at hand so far. The script has run at toy sizes on a CPU"
    " alone (`--dry-run`), so there are no rows here."
}
"""Why there are no results of a script."""
BEGIN, END = "<!-- table.py writes from here -->", "<!-- to here -->"


def page(text: str, folder: Path) -> str:
    """The page with the tables of all results between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"The page needs the lines {BEGIN!r} and {END!r}, in this order.")
    scripts = sorted(path.stem for path in README.parent.glob("[!_]*.py") if path.stem != Path(__file__).stem)
    return "\n\n".join([before + BEGIN, *(section(folder / f"{name}.json") for name in scripts), END + after])


def section(path: Path) -> str:
    """The results of one script: where they are from, then a line for each row."""
    if not path.exists():
        return f"### {path.stem}\n\n{WAITING.get(path.stem, 'Not run yet.')}"
    record = read(path)
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    where = f"{record['machine']}; {versions}" + (f"; commit {record['commit']}" if "commit" in record else "")
    lines = [f"### {path.stem}", "", f"`{record['command']}`  ", where, ""]
    lines += ["| what | ours | peer | ratio | goal | met |", "|---|--:|--:|--:|--:|---|", *map(cells, record["rows"])]
    return "\n".join([*lines, *pictures(path)])


def cells(row: Row) -> str:
    """One line of a table."""
    met = {True: "yes", False: "**no**", None: ""}[row.met]
    ours, peer = number(row.ours, row.unit), "" if row.peer is None else number(row.peer, row.unit)
    return f"| {row.name} | {ours} | {peer} | {row.ratio:.3g} | {row.goal or ''} | {met} |"


def number(value: float, unit: str) -> str:
    """A value in three digits that count, with its unit; millions and up in M and G."""
    size, letter = next((pair for pair in ((1e9, " G"), (1e6, " M")) if abs(value) >= pair[0]), (1, " "))
    scaled = value / size
    digits = f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"
    return f"{digits}{letter}{unit}".strip()


def pictures(path: Path) -> list[str]:
    """The plot beside a file of results, where there is one."""
    return ["", f"![{path.stem}](results/{path.stem}.png)"] if path.with_suffix(".png").exists() else []


def main() -> int:
    """Rewrites the page."""
    write_text(README, page(README.read_text(), RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
