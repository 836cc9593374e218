"""Checkpoints of one file that are whole or not there, and run no code."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _load
from typing_extensions import override

from lightning_longrope.checkpoints import check_resumable
from lightning_longrope.files import write_whole


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside an earlier one, which it replaces in one step, and names the file in errors.

    Reads tensors and plain values alone, whichever name (``last``, ``best``, ``hpc``) has led to the file.

    Lightning's own makes it in memory, writes it to the temporary folder and moves it from there: it needs the memory
    and the space there, and a process that is killed while it is moved to another disk leaves half a file under the
    name of the whole one. What is no file here (``s3://``) is left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(path, lambda file: torch.save(checkpoint, file))

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, restricted unless ``weights_only`` is False.

        Raises:
            ValueError: If there is code in it to run, or it is damaged.
            FileNotFoundError: If it is not there.
        """
        restricted = weights_only is not False
        if restricted:
            check_resumable(Path(path))
        checkpoint: dict[str, Any] = _load(path, map_location=map_location, weights_only=restricted)
        return checkpoint
