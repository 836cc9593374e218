"""Whether the folder of a run that was killed is that of an undisturbed one, and whether files are whole meanwhile."""

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from row_recorder import recorded

from lightning_longrope.reporting.run_folder import read_run
from lightning_longrope.search.journal import read_journal
from torture.killing import TortureError
from torture.material import CHECKPOINTS

TIMED = {"seconds", "cached", "config"}  # what differs from run to run, or from folder to folder
ONCE = ("done.json", "manifest.json", "tokens.bin", "documents.bin", "hashes.bin", "sources.bin")
"""Files that are written once: done again after a kill, they would be others."""
LOGS = "lightning_logs"


def written_once(out: Path) -> dict[Path, tuple[int, int]]:
    """Files that must not be written again, with what tells that they were."""
    paths = [path for name in ONCE for path in out.rglob(name) if ".partial" not in str(path)]
    paths += out.glob("*/eval/methods-*/*.json")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if not path.name.startswith(".")}


def journals(out: Path) -> dict[Path, bytes]:
    """Whole lines of every journal."""
    return {path: path.read_bytes().rpartition(b"\n")[0] for path in out.rglob("h*.jsonl") if "rows" not in path.name}


def check_whole(out: Path) -> None:
    """Every file that has its final name is whole."""
    for path in out.rglob("*"):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        try:
            _check_file(path)
        except (ValueError, zipfile.BadZipFile) as error:
            raise TortureError(f"{path} is half-written: {error}") from error


def _check_file(path: Path) -> None:
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".ckpt":
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(damaged)
    elif path.suffix == ".safetensors":
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + size])
        if 8 + size + max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry) != (
            path.stat().st_size
        ):
            raise ValueError("its header names other sizes")
    elif path.suffix in (".csv", ".yaml") and LOGS not in path.parts and not path.read_text().endswith("\n"):
        raise ValueError("its last line has no end")
    elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("its end is missing")


def check_same(out: Path, uncut: Path) -> None:
    """Everything that a run that was killed has left is what an undisturbed one leaves.

    Raises:
        TortureError: Naming the first file that differs.
    """
    ours, theirs = _named(out), _named(uncut)
    if list(ours) != list(theirs):
        raise TortureError(f"Files too many: {ours.keys() - theirs.keys()}; missing: {theirs.keys() - ours.keys()}.")
    for name in ours:
        if (one := _content(ours[name], out)) != (other := _content(theirs[name], uncut)):
            raise TortureError(f"{name} differs: {str(one)[:2000]} instead of {str(other)[:2000]}")
    for stage, other in zip(read_run(out).stages, read_run(uncut).stages, strict=True):
        if stage.losses != other.losses:
            raise TortureError(f"The losses of {stage.name} differ: {stage.losses} instead of {other.losses}")
    for folder in uncut.glob(f"*/{LOGS}"):
        if (one := logged(out / folder.relative_to(uncut))) != (other := logged(folder)):
            raise TortureError(f"{folder.parent.name} has logged other values: {sorted(one.items() ^ other.items())}")
    for folder in uncut.glob("*/rows"):
        if recorded(out / folder.relative_to(uncut)) != recorded(folder):
            raise TortureError(f"{folder.parent.name} was trained on other rows.")


def logged(folder: Path) -> dict[tuple[str, int], str]:
    """Every value that a ``CSVLogger`` was given but for speeds, by its name and step; the last, where it was again."""
    found: dict[tuple[str, int], str] = {}
    for path in sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        for row in csv.DictReader(path.read_text().splitlines()):
            values = {name: value for name, value in row.items() if value and "throughput" not in name}
            found |= {(name, int(row["step"])): value for name, value in values.items()}
    return found


def steps_again(out: Path) -> int:
    """Training steps that were run more than once."""
    lines = [len(path.read_text().splitlines()) for path in out.glob("*/rows/*.jsonl")]
    return sum(lines) - sum(len(recorded(folder)) for folder in out.glob("*/rows"))


def check_steps_again(out: Path, kills: int, stops: int) -> None:
    """A kill costs no more steps than lie between two checkpoints, SIGTERM at most the one under way."""
    if (again := steps_again(out)) > kills * CHECKPOINTS + stops:
        raise TortureError(f"{again} steps were run again after {kills} kills and {stops} stops.")


def _named(out: Path) -> dict[str, Path]:
    """Files of a run, but for those of which a resumed one has more: versions of Lightning's logs.

    The folder of a comparison is named after when its models were written. Who held a lock stays beside it when that
    process is killed, until the next one takes the lock, and nobody needs to where all is finished.
    """
    found: dict[str, Path] = {}
    for path in sorted(out.rglob("*")):
        if path.name.endswith(".lock.json"):
            continue
        if path.is_file() and LOGS not in path.parts and "rows" not in path.parts:
            name = re.sub(r"methods-\w+", "methods", str(path.relative_to(out)))
            if name in found:
                raise TortureError(f"{path} and {found[name]} are the same measurement.")
            found[name] = path
    return dict(sorted(found.items()))


def _content(path: Path, out: Path) -> Any:
    """What must be equal of a file; None where nothing must."""
    if path.suffix in (".html", ".png") or path.name == "run.json":
        return None
    if path.name in ("history.jsonl", "held_out.jsonl"):
        head, rows = read_journal(path)
        return [head, *(_untimed(row) for row in rows)]
    if path.suffix == ".ckpt":
        saved = torch.load(path, weights_only=True)
        # Counts validations, and those behind the last checkpoint come again after a kill, as steps do.
        saved.get("loops", {}).get("fit_loop", {}).pop("epoch_loop.val_loop.batch_progress", None)
        return {key: _plain(value) for key, value in saved.items() if key != "callbacks"}
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text().replace(str(out), "{out}")))
    data = path.read_bytes()
    if path.suffix in (".bin", ".safetensors"):
        return data
    return re.sub(rb"(?m)^ckpt_path: .*", b"", data.replace(str(out).encode(), b"{out}"))  # where it was resumed


def _untimed(value: Any) -> Any:
    return {key: entry for key, entry in value.items() if key not in TIMED} if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    """Tensors as what can be compared bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
