"""Looks at what a wheel and an sdist hold: nothing is missing, and nothing is in them that does not belong there."""

import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHOLE = ("lightning_longrope", "configs")
"""Folders of which every file must be in both."""


def kept(folder: str) -> set[str]:
    """Files of a folder of the checkout, those that Python has compiled left out."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def wrong_in_wheel(path: Path) -> list[str]:
    """What is missing in a wheel, or should not be there."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        facts = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(facts).decode())
    info = facts.removesuffix("METADATA")
    code = {name for name in names if not name.startswith(info)}
    wanted = kept("lightning_longrope") | {f"lightning_longrope/{name}" for name in kept("configs")}
    found = [f"{name} is missing" for name in sorted(wanted - code)]
    found += [f"{name} does not belong there" for name in sorted(code - wanted)]
    found += [f"{name} is missing" for name in ("licenses/LICENSE", "entry_points.txt") if info + name not in names]
    fields = ("License-Expression", "Classifier", "Keywords", "Project-URL", "Requires-Python")
    found += [f"its metadata has no {field}" for field in fields if not metadata[field]]
    found += [] if metadata.get_payload() else ["its metadata has no description"]
    return found


def wrong_in_sdist(path: Path) -> list[str]:
    """What is missing in an sdist."""
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = kept("lightning_longrope") | kept("configs") | kept("tests") | {"LICENSE", "README.md", "pyproject.toml"}
    return [f"{name} is missing" for name in sorted(wanted - names)]


def main(paths: list[Path]) -> int:
    """Prints what is wrong; returns 1 if anything is, or if there are not one wheel and one sdist."""
    kinds = {".whl": wrong_in_wheel, ".gz": wrong_in_sdist}
    found = [f"{path.name}: {line}" for path in paths for line in kinds[path.suffix](path)]
    if sorted(path.suffix for path in paths) != [".gz", ".whl"]:
        found.append(f"expected a wheel and an sdist, got {[path.name for path in paths]}")
    sys.stdout.write("\n".join(found or ["The wheel and the sdist hold what they should."]) + "\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main([Path(word) for word in sys.argv[1:]]))
