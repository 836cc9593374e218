"""A run that ends out of memory says what to try next, on the error itself."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_longrope.levers import Levers, Moment, advice
from lightning_longrope.out_of_memory import is_out_of_memory
from lightning_longrope.run_settings import levers_of


class MemoryAdvice(Callback):
    """Adds to an error that memory did not suffice for the next saving that the run does not use yet.

    The error stays what it is; the line is a note on it (``__notes__``), which Python prints below it, and so it is the
    last line of a traceback. ``LongRoPEModule`` brings this callback with it.
    """

    def __init__(self) -> None:
        self._begun = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begun = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if is_out_of_memory(exception):
            exception.add_note(advice(levers_at_work(trainer, pl_module), self._moment(trainer)))

    def _moment(self, trainer: Trainer) -> Moment:
        if trainer.training and not self._begun:
            return "setup"
        return "training" if trainer.training else "forward"


def levers_at_work(trainer: Trainer, module: Any) -> Levers:
    """The savings of a run, from its strategy and its module as they are."""
    strategy, kind = trainer.strategy, type(trainer.strategy)
    arguments = {
        "config": getattr(strategy, "config", None),
        "sequence_parallel_size": getattr(strategy, "sequence_parallel_size", 1),
    }
    named = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": arguments}
    memory, config = getattr(module, "memory", None), getattr(getattr(module, "model", None), "config", None)
    settings = {
        "gradient_checkpointing": getattr(module, "gradient_checkpointing", False),
        "memory": {name: getattr(memory, name, None) for name in ("offload_activations", "mlp_tile")},
    }
    heads = 1 if config is None else getattr(config.get_text_config(), "num_attention_heads", 1)
    levers = levers_of(named, settings, trainer.world_size, heads)
    return replace(levers, chunked_loss=getattr(module, "chunked_loss", False))
