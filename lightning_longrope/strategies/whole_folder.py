"""Checkpoints that are folders of many ranks: whole or not there, as ``whole_file`` has it for those of one file."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_longrope.checkpoints import put_back, replaced_by


class WholeFolders(ParallelStrategy):
    """Mixin for a strategy whose ranks write their shards into one folder, on one disk or on one of each node."""

    num_nodes: int

    def save_folder(
        self, filepath: str | Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool]
    ) -> None:
        """Writes a folder that takes the place of an earlier one only when every rank has written its part.

        A kill at any time leaves the earlier one or the new one, under ``filepath`` or where ``put_back`` finds it.

        Args:
            filepath: Where the checkpoint belongs; that of rank 0 counts.
            write: Writes this rank's part into the folder it is given; every rank is in it at the same time.
            is_whole: Whether a folder, as this node sees it, holds what the first rank alone writes.
        """
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f".{path.name}.partial")
        for _ in self.one_node_after_another():
            put_back(path)
            remove(partial)
        write(partial)
        self.barrier()
        if not self.reduce_boolean_decision(is_whole(partial)):
            rank_zero_warn(
                f"{path} is not on a file system that all nodes share: every node keeps the shards of its own ranks"
                " there, which must be brought together in one folder to be resumed, exported or evaluated."
            )
        for _ in self.one_node_after_another():
            if partial.exists():  # else the node shares the disk of one before it
                _take_place(partial, path)

    def put_back_everywhere(self, path: Path) -> None:
        """``put_back`` on the disk of every node."""
        for _ in self.one_node_after_another():
            put_back(path)

    def one_node_after_another(self) -> Iterator[None]:
        """Gives the first process of each node its turn; all leave when the last has had it."""
        for node in range(self.num_nodes):
            if self.local_rank == 0 and self.node_rank == node:
                yield
            self.barrier()


def _take_place(partial: Path, path: Path) -> None:
    """Puts a whole checkpoint where an earlier one may be; shards of more ranks would stay in that."""
    replaced = replaced_by(path)
    remove(replaced)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    remove(replaced)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
