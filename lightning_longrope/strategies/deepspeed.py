"""Lightning's DeepSpeed strategy, made right for long contexts and for processors.

Lightning's own divides the loss twice when gradients are accumulated, rounds the rotary tables in half precision, makes
random weights out of empty tensors and reads no pretrained ones under ZeRO stage 3, cannot validate a checkpoint there,
and takes half an hour to notice that a peer is gone.
"""

import copy
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Muon, Optimizer
from typing_extensions import override

from lightning_longrope.checkpoints import (
    check_safe,
    choose_accelerator,
    convert_to_universal,
    is_deepspeed,
    saved_ranks,
    saved_stages,
    universal_groups,
)
from lightning_longrope.module import LongRoPEModule
from lightning_longrope.optimizers import MuonAdamW
from lightning_longrope.rotary import recompute_rotary
from lightning_longrope.strategies.sequence_parallel import SequenceParallel
from lightning_longrope.strategies.whole_folder import WholeFolders, remove

_SMALLEST_BUCKET = 2**20  # elements; below that, messages cost more than what they carry
# Lightning's defaults, which count as not chosen among its own arguments: LightningCLI gives them all
_UNCHOSEN = {"reduce_bucket_size": 2 * 10**8, "allgather_bucket_size": 2 * 10**8, "sub_group_size": 10**12}


class _OnProcessorsToo(DeepSpeedStrategy):
    """Lightning's strategy where there is no GPU as well: over gloo, and without compiling anything."""

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of this node, each with its number: DeepSpeed asks processors for one too."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices and [
            torch.device("cpu", number) if device.type == "cpu" else device for number, device in enumerate(devices)
        ]

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
        DDPStrategy.setup_environment(self)  # which does not ask for CUDA

    @override
    def _init_deepspeed_distributed(self) -> None:
        if self.root_device.type == "cpu":
            import deepspeed

            # it would be compiled, and a compilation that was killed leaves a lock at which every later run hangs
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        super()._init_deepspeed_distributed()


class LongContextDeepSpeedStrategy(WholeFolders, SequenceParallel, _OnProcessorsToo):
    """ZeRO for long contexts, on GPUs and on processors, as ``strategy`` of a Trainer or by name in a configuration.

    Buckets follow the model's hidden size h: h x h elements are reduced and gathered at once, and under stage 3 weights
    of at most 10 h elements stay whole on every rank. Optimizers of torch are used as they are, offloaded too, so
    nothing is compiled. Under stage 3 a pretrained model is partitioned while it is read: no rank holds all of it.

    It does not offload activations, and does not tune itself to the memory there is.

    Args:
        stage: What is partitioned over the ranks: 1 optimizer states, 2 gradients too, 3 weights too, 0 nothing.
        offload_optimizer: Keep optimizer states in the processor's memory, and step there; stages 1 to 3.
        offload_parameters: Keep partitioned weights in the processor's memory; stage 3.
        nvme_path: Folder on a fast disk that takes what is offloaded, instead of memory; stage 3, Linux with libaio.
        zero: Further entries of DeepSpeed's ``zero_optimization``, such as ``stage3_param_persistence_threshold``;
            they win over everything else.
        sequence_parallel_size: Ranks that share the tokens of a row. ZeRO partitions over all ranks all the same.
        timeout: After so long without an answer of the other ranks a run ends.
        kwargs: Arguments of Lightning's ``DeepSpeedStrategy``. With its ``config``, a DeepSpeed configuration or a path
            to one, that configuration is taken instead of the arguments above, except ``zero`` and ``timeout``.

    Raises:
        ValueError: If arguments contradict each other.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        nvme_path: str | None = None,
        zero: dict[str, Any] | None = None,
        sequence_parallel_size: int = 1,
        timeout: timedelta = timedelta(minutes=10),
        **kwargs: Any,
    ) -> None:
        _check(stage, offload_optimizer, offload_parameters, nvme_path)
        choose_accelerator()
        if isinstance(kwargs.get("config"), dict):
            kwargs["config"] = copy.deepcopy(kwargs["config"])  # DeepSpeed and Lightning write into it
        self._chosen = {*(zero or {}), *(name for name, size in _UNCHOSEN.items() if kwargs.get(name, size) != size)}
        if nvme_path is not None:
            kwargs |= {"nvme_path": nvme_path, "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            sequence_parallel_size=sequence_parallel_size,
            timeout=timeout,
            **kwargs,
        )
        self._own_config = kwargs.get("config") is not None or self.DEEPSPEED_ENV_VAR in os.environ
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_allow_untested_optimizer", True)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.config["zero_optimization"] = {**self.config.get("zero_optimization", {}), **copy.deepcopy(zero or {})}

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        """Lets pretrained Hugging Face models be partitioned under stage 3 while they are read.

        Anything else is made whole, and partitioned when the engine takes it: a ``LongRoPEModule`` with random weights
        has the same ones under every strategy.
        """
        self._init_config_if_needed()
        module = self.lightning_module
        if not self.zero_stage_3 or (isinstance(module, LongRoPEModule) and module.config is not None):
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        partitioning = HfDeepSpeedConfig(self.config)  # transformers keeps a weak reference to it
        try:
            yield
        finally:
            del partitioning
            unset_hf_deepspeed_config()
        assert module is not None
        recompute_rotary(module)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        zero = (self.config or {}).get("zero_optimization", {})
        if "nvme" in {zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")}:
            _check_nvme()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        self._size_buckets(self.model)
        super().setup(trainer)

    def _size_buckets(self, module: torch.nn.Module) -> None:
        """Writes sizes that fit the model into the configuration, where its author has not chosen others."""
        config = getattr(getattr(module, "model", None), "config", None)
        hidden = getattr(config.get_text_config(), "hidden_size", None) if config is not None else None
        if self._own_config or hidden is None:
            return
        bucket = max(hidden**2, _SMALLEST_BUCKET)
        sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.zero_stage_3:
            sizes |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 10 * hidden}
            sizes["sub_group_size"] = 10**9  # elements of which the optimizer steps at once
        assert isinstance(self.config, dict)
        self.config["zero_optimization"] |= {name: size for name, size in sizes.items() if name not in self._chosen}

    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        optimizer, schedule = super()._init_optimizers()
        if self._stage and isinstance(optimizer, (Muon, MuonAdamW)):
            raise ValueError(
                f"{type(optimizer).__name__} needs whole matrices, and ZeRO stage {self._stage} cuts them into flat"
                " pieces: take AdamW, or another strategy."
            )
        return optimizer, schedule

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by accumulate_grad_batches already
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        def write(folder: Path) -> None:
            super(LongContextDeepSpeedStrategy, self).save_checkpoint(checkpoint, folder, storage_options)

        self.save_folder(filepath, write, is_deepspeed)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restores what DeepSpeed has saved; optimizer states are cut anew for another number of ranks."""
        path = Path(self.broadcast(checkpoint_path))
        self.put_back_everywhere(path)
        if self.load_full_weights and self.zero_stage_3:
            return super().load_checkpoint(path, weights_only)
        self._check_resumable(path)
        if weights_only is not False:
            check_safe(path)
        engine_optimizer = getattr(self.model, "optimizer", None)
        if self.zero_stage_3 and not hasattr(engine_optimizer, "_restore_from_bit16_weights"):
            # asked for by DeepSpeed after weights were read without an optimizer, which has nothing to restore then
            engine_optimizer._restore_from_bit16_weights = lambda: None  # type: ignore[union-attr]
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting and saved_ranks(path) not in (0, self.world_size):
            with self._for_any_ranks(path) as folder:
                client_state = super().load_checkpoint(folder, weights_only)
                self._mend_optimizer(folder)
                return client_state
        return super().load_checkpoint(path, weights_only)

    def _check_resumable(self, path: Path) -> None:
        """Refuses checkpoints of other kinds with a remedy."""
        remedy = "give it as `model.name_or_path` to go on from its weights alone"
        if not is_deepspeed(path):
            raise ValueError(f"{path} is no folder that DeepSpeed has written: {remedy}.")
        if self._stage not in saved_stages(path):
            stages = " or ".join(map(str, saved_stages(path)))
            raise ValueError(
                f"{path} was saved under ZeRO stage {stages}, not {self._stage}: set `stage`, or {remedy}."
            )

    @property
    def _stage(self) -> int:
        return int((self.config or {}).get("zero_optimization", {}).get("stage", 0))

    def _mend_optimizer(self, folder: Path) -> None:
        """Gives every group its own settings and step count: DeepSpeed gives all those of the first under stage 3."""
        optimizer = self.deepspeed_engine.optimizer.optimizer
        for group, saved in zip(optimizer.param_groups, universal_groups(folder / "checkpoint"), strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    @contextmanager
    def _for_any_ranks(self, path: Path) -> Iterator[Path]:
        """DeepSpeed's universal form of a checkpoint, beside it for as long as the context lasts."""
        rank_zero_info(f"{path} was saved by {saved_ranks(path)} ranks: converting it for {self.world_size}.")
        folder = path.with_name(f"{path.name}.universal")
        engine = self.deepspeed_engine
        try:
            if failure := self._convert(path, folder):
                raise ValueError(
                    f"{path} was saved by {saved_ranks(path)} ranks and cannot be resumed by {self.world_size}:"
                    f" DeepSpeed, which converts the states of Adam optimizers, failed ({failure}). Resume it with as"
                    " many ranks, or give it as `model.name_or_path` to go on from its weights alone."
                )
            engine._config.load_universal_checkpoint = True
            yield folder
        finally:
            engine._config.load_universal_checkpoint = False
            self.barrier()
            if self.is_global_zero:
                remove(folder)

    def _convert(self, path: Path, folder: Path) -> str:
        """Rank 0 converts, for longer than a collective may take, and tells the others every second how it stands.

        Returns:
            What went wrong, on every rank; empty if nothing did.
        """
        outcome: str | None = None
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(_convert_anew, path, folder) if self.is_global_zero else None
            while outcome is None:
                outcome = self.broadcast(None if work is None else _outcome(work))
        return outcome


def _convert_anew(path: Path, folder: Path) -> str:
    remove(folder)
    folder.mkdir()
    return convert_to_universal(path, folder / "checkpoint")


def _outcome(work: Future[str]) -> str | None:
    """What became of a conversion; None if nothing has within a second."""
    try:
        return work.result(timeout=1)
    except NotYet:
        return None
    except Exception as error:  # the other ranks wait for it
        return f"{type(error).__name__}: {error}"


def _check(stage: int, offload_optimizer: bool, offload_parameters: bool, nvme_path: str | None) -> None:
    """Refuses arguments that contradict each other."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"`stage` must be 0, 1, 2 or 3, got {stage}.")
    if offload_optimizer and stage == 0:
        raise ValueError("`offload_optimizer` needs partitioned optimizer states: stage 1, 2 or 3, got stage=0.")
    if offload_parameters and stage != 3:
        raise ValueError(f"`offload_parameters` needs partitioned weights: stage=3, got stage={stage}.")
    if nvme_path is not None and (stage != 3 or not (offload_optimizer or offload_parameters)):
        raise ValueError("`nvme_path` needs stage=3 and `offload_optimizer` or `offload_parameters`.")


def _check_nvme() -> None:
    """Refuses to offload to a disk where DeepSpeed cannot compile what that needs."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible():
        raise ValueError(
            "`nvme_path` needs libaio with its headers (apt install libaio-dev, or yum install libaio-devel) and a C++"
            " compiler: install them, or leave `nvme_path` out to offload to memory."
        )
