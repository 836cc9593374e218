"""Lets a fit whose folder was moved or copied go on with the checkpoints that lie in it."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class MovedRun(Callback):
    """Tells every ``ModelCheckpoint`` where its checkpoints are now, if the fit goes on from one of its folder.

    A ``ModelCheckpoint`` remembers absolute paths, and forgets all of them where its folder has another one now:
    ``last.ckpt`` would stay as it is, and what the fit saves from then on be called ``last-v1.ckpt``. The same happens
    with checkpoints from before the first ``last.ckpt``. A fit that goes on from a checkpoint of another folder is
    left as it is.
    """

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for saver in _resumed(trainer):
            state = checkpoint["callbacks"].get(saver.state_key, {})
            if state.get("dirpath") not in (None, saver.dirpath):
                checkpoint["callbacks"][saver.state_key] = moved(state, Path(str(saver.dirpath)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {saver.last_model_path for saver in _resumed(trainer)}
        for saver in _resumed(trainer):
            last = Path(str(saver.dirpath)) / f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}"
            if saver.save_last and not saver.last_model_path and str(last) not in known:
                saver.last_model_path = str(last)
                known.add(str(last))


def moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a ``ModelCheckpoint`` with the paths of its folder put into another one."""
    earlier = Path(state["dirpath"])

    def follow(path: str) -> str:
        inside = path and Path(path).is_relative_to(earlier)
        return str(folder / Path(path).relative_to(earlier)) if inside else path

    paths = {name: follow(state[name]) for name in state if name.endswith("_model_path")}
    best = {follow(path): score for path, score in state.get("best_k_models", {}).items()}
    return {**state, **paths, "best_k_models": best, "dirpath": str(folder)}


def _resumed(trainer: Trainer) -> list[ModelCheckpoint]:
    """The savers in whose folder the checkpoint lies from which the fit goes on."""
    if trainer.ckpt_path is None:
        return []
    folder = Path(trainer.ckpt_path).resolve().parent
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    return [saver for saver in savers if saver.dirpath is not None and Path(saver.dirpath).resolve() == folder]
