"""A callback that command lines of tests name: writes the rows of every step, and kills the run if asked to."""

import json
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class RowRecorder(Callback):
    """Appends a line per training step and rank to ``folder``; ``kill_at`` sends SIGKILL in the middle of that step."""

    def __init__(self, folder: str, kill_at: int | None = None) -> None:
        self.folder, self.kill_at = Path(folder), kill_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"step": trainer.global_step, "rows": batch["input_ids"].tolist(), "short": batch.get("original_rope")}
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def recorded(folder: Path) -> dict[int, tuple[bool | None, list[list[int]]]]:
    """Kind and rows of every step, those of the ranks in turn; a step that was run twice has had the same ones."""
    steps: dict[int, tuple[bool | None, list[list[int]]]] = {}
    ranks = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("rank*.jsonl"))
    ]
    for lines in zip(*ranks, strict=True):
        assert len({(line["step"], line["short"]) for line in lines}) == 1
        rows = [row for turn in zip(*(line["rows"] for line in lines), strict=True) for row in turn]
        found = lines[0]["short"], rows
        assert steps.setdefault(lines[0]["step"], found) == found, f"step {lines[0]['step']} has other rows now"
    return steps
