"""Runs a recipe on a disk that is full again and again; started in a mount namespace of its own by ``test_full_disk``.

Every run is forked from a process that has imported all it needs. What it says is printed, one JSON list a run: how
many bytes were free, the exit status, and the lines that begin with ``longrope: error``.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from lightning_longrope.__main__ import main
from torture.comparing import check_same, check_whole
from torture.killing import parts_of
from torture.material import write_material

DISK = 32 << 20


def forked(words: list[str], log: Path) -> tuple[int, list[str]]:
    """Exit status of a command in a process of its own, and its errors."""
    if not (child := os.fork()):
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(main(words))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text()
    return code, [line for line in text.splitlines() if line.startswith(("longrope: error", "Traceback"))]


def leave(disk: Path, size: int) -> None:
    """Fills a disk but for so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - size)))


def work(root: Path, step: int) -> None:
    """An undisturbed run, and one with ever a little more space."""
    disk, chance = root / "disk", random.Random(1)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)], check=True)
    write_material(root)
    _shorten(root / "recipe")
    tokenize, recipe = (part.words for part in parts_of(root, short=True)[:2])
    for out in (root / "uncut", disk / "cut"):
        most = 0
        for words in ((*tokenize, "--workers", "0"), recipe):
            code = 2
            while code == 2:
                space, most = chance.randint(most // 2, most), most + step
                leave(disk, space)
                given = [word.replace("{out}", str(out)) for word in words]
                code, said = forked(given, root / "log")
                sys.stdout.write(json.dumps([space, code, said]) + "\n")
                if out.exists():
                    check_whole(out)
        assert code == 0, (root / "log").read_text()
    check_same(disk / "cut", root / "uncut")


def _shorten(recipe: Path) -> None:
    """Leaves what writes files of another kind than the others: a search, a checkpoint, a table, an export."""
    (recipe / "3-finetune.yaml").unlink()
    for name, changes in {"4-compare": {"factors": {}, "tuned": {}}, "5-export": {"run": "{out}/1-pretrain"}}.items():
        path = recipe / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
