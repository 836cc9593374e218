"""The LightningModule around a rescaled model: loss, optimizer, and factors that travel in the checkpoint."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_longrope.advising import MemoryAdvice
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.finite import StopAtNan, read_numbers
from lightning_longrope.geometry import set_pretrained_window
from lightning_longrope.isolation import Stretches
from lightning_longrope.layers import compile_decoder_layers, decoder_layers, scale_initial_weights, shard_weights
from lightning_longrope.loading import load_model
from lightning_longrope.lora import LoRA, add_adapters
from lightning_longrope.losses import LOSSES, Loss, check_liger, token_nll
from lightning_longrope.memory import Memory, check_memory, save_memory
from lightning_longrope.metrics import Perplexity
from lightning_longrope.model import hidden_states, install_factors, installed_tables, original_rope, output_head
from lightning_longrope.optimizers import Schedule
from lightning_longrope.rotary import float32_rotary
from lightning_longrope.sequence_parallel import sequence_group
from lightning_longrope.sliding import lift_sliding_window, slides_everywhere
from lightning_longrope.tables import LengthTables

log = logging.getLogger(__name__)


class LongRoPEModule(LightningModule):
    """Trains and evaluates a causal language model whose rotary embedding is rescaled.

    Subclass it to change the loss or the optimizer; ``self.model`` is a plain Hugging Face model. The factors are
    saved in every checkpoint and installed again when one is loaded.

    Args:
        name_or_path: Hugging Face name or folder, or a ``.ckpt`` this class has written.
        config: Instead of ``name_or_path``: the Hugging Face config of a new model with random weights,
            ``model_type`` included.
        factors: File of rescale factors to install (JSON, Microsoft CSV, Hugging Face folder); of several, each is for
            sequences up to its own target length, and ``none`` is the pretrained RoPE within its window. Or the
            ``rope_parameters`` of a published method, such as ``{rope_type: linear, factor: 8}``.
        original_length: Window the model was pretrained at, in tokens, where its config says another. An attention that
            slides over fewer tokens than its window sees all of them from then on.
        optimizer: Optimizer, called with ``parameter_groups()``.
        schedule: Learning rate over the steps of the run.
        attn_implementation: Attention of the model; ``auto`` takes FlashAttention where it runs, else sdpa.
        dtype: Type of the weights as they are loaded.
        gradient_checkpointing: Keep only layer inputs for the backward pass.
        memory: Further savings of memory: layer inputs on the CPU, MLP in tiles.
        compile_layers: Compile each decoder layer for training steps; goes on without if no compiler is found.
        trust_remote_code: Let a hub model run its own code.
        lora: Train low-rank adapters (and norms and embeddings) instead of all weights.
        loss: How training steps compute the loss without the logits of whole rows: ``fused`` makes the gradients of
            a chunk of tokens at once, ``checkpointed`` computes its logits again in the backward pass, ``liger`` is a
            kernel of Liger's for plain output layers on one GPU or more that hold whole weights.

    Raises:
        ValueError: If not exactly one of ``name_or_path`` and ``config`` is given, a saving of memory has no effect, or
            there is no such loss.
    """

    chunked_loss = True
    """Whether the logits of a whole row never exist at once; a subclass with another loss may say no."""

    def __init__(
        self,
        name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        factors: str | list[str] | dict[str, Any] | None = None,
        original_length: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        attn_implementation: str = "auto",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        memory: Memory = Memory(),  # noqa: B008 - frozen
        compile_layers: bool = False,
        trust_remote_code: bool = False,
        lora: LoRA | None = None,
        loss: Loss = "fused",
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be {', '.join(LOSSES)}, got {loss!r}.")
        if (name_or_path is None) == (config is None):
            raise ValueError(
                "`model` needs either `name_or_path` (a pretrained model) or `config` (a new one),"
                f" got name_or_path={name_or_path!r} and config={'a dict' if config else config!r}."
            )
        self.name_or_path = name_or_path
        self.config = config
        self.factors = factors
        self.original_length = original_length
        self.optimizer = optimizer
        self.schedule = schedule
        self.attn_implementation = attn_implementation
        self.dtype_name = dtype
        check_memory(memory, gradient_checkpointing, compile_layers)
        self.gradient_checkpointing = gradient_checkpointing
        self.memory = memory
        self.compile_layers = compile_layers
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.loss_name = loss
        self.model: Any = None
        self.perplexity = Perplexity()

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        self._check_strategy()
        self.model = load_model(
            self.name_or_path,
            config=self.config,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        self.model.train()  # Hugging Face loads in eval mode, and Lightning keeps the mode it finds
        if self.config is not None:
            scale_initial_weights(self.model)
        if self.original_length is not None:
            set_pretrained_window(self.model.config, self.original_length)
            if slides_everywhere(self.model.config):
                lift_sliding_window(self.model)
        if self.factors is not None:
            self._install(self.factors)
        if self.lora is not None:
            self._add_adapters(self.lora)
        save_memory(self.model, decoder_layers(self.model), self.gradient_checkpointing, self.memory)
        if self.device_mesh is not None:
            shard_weights(self.model, self.device_mesh["data_parallel"])

    def _check_strategy(self) -> None:
        """Refuses the strategy under which all that follows goes wrong without a word."""
        if self._trainer is not None and type(self.trainer.strategy) is DeepSpeedStrategy:
            raise ValueError(
                "Lightning's DeepSpeedStrategy divides accumulated gradients twice, rounds rotary tables and empties"
                " random weights under stage 3: use LongContextDeepSpeedStrategy (lightning_longrope.strategies)."
            )
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "`tensor_parallel_size` above 1 (by default all devices of a node) would repeat the same rows on them,"
                " since LongRoPEModule has no plan for tensors: use LongContextFSDP2Strategy, or set it to 1."
            )

    def _install(self, factors: str | list[str] | dict[str, Any]) -> None:
        if isinstance(factors, dict):
            install_factors(self.model, RescaleFactors.of_rope_type(factors, self.model.config))
        else:
            install_factors(self.model, LengthTables.load(*([factors] if isinstance(factors, str) else factors)))

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with float32_rotary(self):  # `.to(bfloat16)` and the like come by here
            return super()._apply(fn, recurse)

    def _add_adapters(self, lora: LoRA) -> None:
        if self._trainer is not None and self.trainer.precision == "32-true" and self.model.dtype != torch.float32:
            raise ValueError(
                f"`lora` trains float32 weights beside those of dtype={self.dtype_name!r}, and `trainer.precision` is"
                " 32-true: set it to bf16-mixed, or `dtype` to float32."
            )
        add_adapters(self.model, lora)

    @override
    def configure_callbacks(self) -> list[Callback]:
        from lightning_longrope.callbacks.throughput import Throughput

        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds: tuple[type[Callback], ...] = (MemoryAdvice, StopAtNan, Throughput)
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]

    @override
    def on_fit_start(self) -> None:
        self._warn_of_half_weights()
        if self.loss_name == "liger":
            check_liger(output_head(self.model), self.device)
        if self.compile_layers:
            compile_decoder_layers(self.model)

    def _warn_of_half_weights(self) -> None:
        """Says that small updates are lost where the weights that are trained have no float32 copy."""
        types = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if types and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            log.warning(
                "Weights are trained in %s, which rounds updates below a 256th of a weight away: at a learning rate of"
                " 2e-5 most of them. Set `model.dtype: float32` and `trainer.precision: bf16-mixed`.",
                " and ".join(sorted(str(one).removeprefix("torch.") for one in types)),
            )

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position, [B, S, V], on every rank, for losses of one's own on rows that are not too long."""
        hidden = hidden_states(self.model, input_ids)
        return output_head(self.model)(sequence_group(self.model).join(hidden, input_ids.shape[1]))

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean nll over the labels of a batch on all ranks, in nats.

        Labels weigh alike within a batch, whichever rank holds them. Batches that ``accumulate_grad_batches`` adds up
        weigh the same each, however many labels they have; where these differ much (answers of conversations), take a
        larger ``batch_size`` instead.
        """
        hidden, head = self.hidden_states(batch), output_head(self.model)
        weights = self.predicted(batch["weights"], 0).flatten() if "weights" in batch else None
        labels = self.predicted(batch["labels"], -100).flatten()
        chunk = head.tokens_at_a_time
        nll, count = LOSSES[self.loss_name](hidden.flatten(0, 1), head, labels, weights, chunk)
        total_nll, total = self._over_ranks(torch.stack([nll.detach(), count]))
        total = torch.where(total > 0, total, 1)  # no label anywhere: no loss
        self.log("train_loss", total_nll / total, prog_bar=True, batch_size=len(batch["input_ids"]))
        return nll * self._ranks / total  # of which the strategy takes the mean over ranks

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """Final hidden states of a batch, [B, S, H]: documents isolated and the original RoPE where it asks for them.

        Where P ranks share the rows, those of this rank's tokens, [B, ceil(S / P), H]; ``predicted`` cuts labels alike.

        Args:
            batch: ``input_ids`` [B, S] int64; ``position_ids``, ``cu_seq_lens`` and ``max_length`` where documents must
                not see each other; ``original_rope``, true for rows that are read with the pretrained RoPE.
        """
        stretches = Stretches(batch["cu_seq_lens"], batch["max_length"]) if "cu_seq_lens" in batch else None
        with original_rope(self.model) if batch.get("original_rope") else nullcontext():
            return hidden_states(self.model, batch["input_ids"], batch.get("position_ids"), stretches)

    def predicted(self, rows: Tensor, end: int) -> Tensor:
        """What belongs to the token that each of ``hidden_states`` predicts, the next one.

        Args:
            rows: One value for each token of whole rows, [B, S].
            end: Value where there is no next token.

        Returns:
            [B, S]; [B, ceil(S / P)] where P ranks share the rows.
        """
        return sequence_group(self.model).cut(pad(rows[:, 1:], (0, 1), value=end), filling=end)

    @property
    def _ranks(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of a small tensor over all ranks: ranks that hold more labels weigh more."""
        if self._ranks == 1:
            return sums
        return cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum"))

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        labels = self.predicted(batch["labels"], -100).flatten()
        with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for these shapes
            hidden = self.hidden_states(batch)
        head = output_head(self.model)
        nll = token_nll(hidden.flatten(0, 1), head, labels, head.tokens_at_a_time)
        self.perplexity.update(nll.double().sum(), (labels != -100).sum())
        self.log("val_perplexity", self.perplexity, prog_bar=True, batch_size=len(batch["labels"]))

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters: the matrices of the layers, adapters too, marked ``matrices``, and all others."""
        layers = decoder_layers(self.model)
        # ZeRO stage 3 leaves empty tensors that know the shape they came from
        inside = {id(p) for p in layers.parameters() if len(getattr(p, "ds_shape", p.shape)) == 2}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if (id(p) in inside) == matrices], "matrices": matrices}
            for matrices in (True, False)
        ]
        return [group for group in groups if group["params"]]

    @override
    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = self.optimizer(self.parameter_groups())
        scheduler = self.schedule.build(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:
            read_numbers(self.trainer)
        tables = installed_tables(self.model)
        checkpoint["longrope"] = {
            "config": self.model.config.to_dict(),
            "factors": tables.to_dict() if tables else None,
            "lora": asdict(self.lora) if self.lora else None,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("longrope", {})
        self._check_same_adapters(saved.get("lora"))
        if saved.get("factors") is not None:
            install_factors(self.model, LengthTables.from_dict(saved["factors"]))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            difference = _difference(state_dict, self.state_dict())
            if difference is None:
                raise
            path = getattr(self._trainer, "ckpt_path", None) or "The checkpoint"
            raise ValueError(
                f"{path} is of another model: {difference}. Resume it with the `model` it was trained with, or give it"
                " as `name_or_path`."
            ) from error

    def _check_same_adapters(self, saved: dict[str, Any] | None) -> None:
        earlier = LoRA(**saved) if saved else None
        if not (self.lora == earlier or (self.lora and self.lora.same_model(earlier))):
            raise ValueError(
                f"The checkpoint was trained with lora={earlier}, but the model has lora={self.lora}. Resume it with"
                " the same, or give it as `name_or_path` to start from its merged weights."
            )


def _difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first weight in which two state dicts differ, in words; None if there is none."""
    for name in dict.fromkeys((*own, *saved)):
        theirs, ours = (list(weights[name].shape) if name in weights else None for weights in (saved, own))
        if theirs != ours:
            return f"{name} is {theirs or 'missing'} there and {ours or 'missing'} in the configuration's model"
    return None
