"""Lightning's DeepSpeed strategy on processors, with weights of any size partitioned."""

import logging
import os

import deepspeed
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy


class DeepSpeedOnCPU(DeepSpeedStrategy):
    def __init__(self, stage):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        zero = {"stage": stage, "overlap_comm": False}
        if stage == 3:  # by default small weights stay whole
            names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
            zero |= {f"stage3_{name}": 0 for name in names}
        super().__init__(
            config={"zero_allow_untested_optimizer": True, "zero_optimization": zero}, logging_level=logging.ERROR
        )

    @property
    def parallel_devices(self):
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices):
        indexed = [torch.device("cpu", index) for index, _ in enumerate(devices or [])]
        self._parallel_devices = indexed if devices is not None else None

    def setup_environment(self):
        DDPStrategy.setup_environment(self)  # without the check for CUDA

    def _init_deepspeed_distributed(self):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled
        super()._init_deepspeed_distributed()

    def model_sharded_context(self):
        return torch.device("cpu")  # the model is made whole, and partitioned when the engine takes it
