"""Weights, gradients and optimizer states sharded over all ranks by FSDP2, with sequence parallelism."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from lightning_longrope.checkpoints import check_resumable, is_distributed
from lightning_longrope.strategies.sequence_parallel import SequenceParallel
from lightning_longrope.strategies.whole_folder import WholeFolders


class LongContextFSDP2Strategy(WholeFolders, SequenceParallel, ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` over all ranks: FSDP2 without DeepSpeed, with sequence parallelism.

    ``LongRoPEModule`` shards itself; another module does so in its ``configure_model``, for which
    ``layers.shard_weights`` is there.

    Args:
        sequence_parallel_size: Ranks that share the tokens of a row. Weights are sharded over all ranks all the same.
        timeout: After so long without an answer of the other ranks a run ends.
        save_distributed_checkpoint: Whether every rank writes its own shard, into a folder, or rank 0 one file.
        process_group_backend: As in Lightning.
    """

    def __init__(
        self,
        sequence_parallel_size: int = 1,
        timeout: timedelta = timedelta(minutes=10),
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            sequence_parallel_size=sequence_parallel_size,
        )

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Saves a folder that takes the place of an earlier one only when it is whole, on the disk of every node."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return

        def write(folder: Path) -> None:
            super(LongContextFSDP2Strategy, self).save_checkpoint(checkpoint, folder, storage_options)

        self.save_folder(filepath, write, is_distributed)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restores what was saved, unless there is code in it to run; see ``check_resumable``."""
        path = Path(self.broadcast(checkpoint_path))
        self.put_back_everywhere(path)
        if weights_only is not False:
            check_resumable(path)
        return super().load_checkpoint(path, weights_only)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
