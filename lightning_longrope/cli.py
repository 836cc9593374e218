"""LightningCLI around this package: a trainer that searches and compares, and errors of one line."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_longrope import peers
from lightning_longrope.callbacks.comparison import (
    METHODS,
    SECOND,
    MethodComparison,
    MethodResults,
    method_tables,
    settings_digest,
    write_results,
)
from lightning_longrope.callbacks.factor_search import FactorSearch
from lightning_longrope.callbacks.harness_tasks import HarnessTasks
from lightning_longrope.callbacks.measurement import MeasuringCallback, TableAt
from lightning_longrope.callbacks.moved_run import MovedRun
from lightning_longrope.callbacks.peer_watch import PeerWatch
from lightning_longrope.callbacks.retrieval import RetrievalCallback
from lightning_longrope.callbacks.save_on_stop import SaveOnStop
from lightning_longrope.checking import check_devices, check_files, check_numbers, check_places, check_seed
from lightning_longrope.checkpoints import check_resumable, choose_accelerator, put_back_all
from lightning_longrope.files import naming, write_text
from lightning_longrope.locks import hold
from lightning_longrope.model import installed_factors, installed_tables, rope_geometry, window
from lightning_longrope.module import LongRoPEModule
from lightning_longrope.plain_errors import plain
from lightning_longrope.reading import check_yaml, is_plain_name
from lightning_longrope.redaction import redact, redact_all
from lightning_longrope.reporting.results import Results, read_results
from lightning_longrope.strategies.deepspeed import LongContextDeepSpeedStrategy  # noqa: F401 - by name in configs
from lightning_longrope.strategies.whole_file import WholeFileIO
from lightning_longrope.tables import LengthTables
from lightning_longrope.tracking import finish, hide_words, keep_wandb_id, log_config, log_results

log = logging.getLogger("lightning_longrope")

WRITING = ("fit", "search", "compare", "eval")
"""Commands that keep their folder to themselves, where one is given; the others leave what a run keeps there alone."""


_NOTHING = (
    "`{0}` has no {1} text: give `data.{2}_share` or `data.{2}_files` of the datamodule, and no"
    " `trainer.limit_{2}_batches` of 0."
)


class LongRoPETrainer(Trainer):
    """Lightning's Trainer with the commands that measure instead of train."""

    def search(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Searches rescale factors, without an optimizer.

        Args:
            model: Module around the pretrained model.
            datamodule: Gives the documents, from its validation split.
        """
        searches = [callback for callback in self._callbacks if isinstance(callback, FactorSearch)]
        if len(searches) != 1:
            raise ValueError(f"`search` needs one FactorSearch in `trainer.callbacks`, got {len(searches)}.")
        searches[0].alone = True
        self.validate(model, datamodule=datamodule, verbose=False)
        if searches[0].result is None:  # Lightning calls no hook where there is nothing to validate
            raise ValueError(_NOTHING.format("search", "validation", "val"))

    def compare(
        self,
        model: LongRoPEModule,
        datamodule: LightningDataModule,
        target_length: int,
        methods: tuple[str, ...] = METHODS,
        factors: dict[str, str] | None = None,
        tuned: dict[str, str] | None = None,
    ) -> None:
        """Measures methods of extension on the same documents, with the measuring callbacks of the trainer.

        On a model that brings factors for a shorter window than ``target_length`` the methods multiply those factors,
        and are called ``second_none``, ``second_linear`` and so on.

        Args:
            model: Module around the pretrained model; the methods and ``factors`` are installed in it.
            datamodule: Gives the documents.
            target_length: Window to reach in tokens.
            methods: Published methods to measure.
            factors: Further tables by name: files of rescale factors; of tables by length each length gets its own.
            tuned: Further models by name, measured as they are: checkpoints or folders.
        """
        check_names(methods, factors or {}, tuned or {})
        measuring = self._take_measuring()
        if not measuring:
            raise ValueError("`compare` needs callbacks that measure (PerplexityByLength, ...) in `trainer.callbacks`.")
        model.configure_model()
        original = rope_geometry(model.model.config).original_length
        if target_length <= original:
            raise ValueError(f"`target_length` ({target_length}) must be longer than the model's window ({original}).")
        loaded = {name: LengthTables.load(path) for name, path in (factors or {}).items()}
        earlier = installed_factors(model.model)
        if earlier is not None and (earlier.is_identity or earlier.target_length >= target_length):
            earlier = None
        tables: dict[str, TableAt | None] = {
            f"{SECOND}{method}" if earlier else method: method_tables(
                method, model.model.config, target_length, earlier
            )
            for method in methods
        }
        tables |= {name: given.for_length for name, given in loaded.items()}
        folder = Path(self.default_root_dir) / "eval"
        models = {name: _version(path) for name, path in {"": model.name_or_path, **(tuned or {})}.items()}
        numbers = [self.precision, model.dtype_name, model.attn_implementation, original, installed_tables(model.model)]
        settings = settings_digest([*measuring, datamodule], target_length, models, loaded, numbers)
        parts = folder / f"methods-{settings}"
        self._compare(model, datamodule, MethodComparison(tables, measuring, parts))
        for name, path in (tuned or {}).items():
            other = LongRoPEModule(path, attn_implementation=model.attn_implementation, dtype=model.dtype_name)
            self._compare(other, datamodule, MethodComparison({name: None}, measuring, parts))
        if self.is_global_zero:
            names = [*tables, *(tuned or {})]
            write_results(folder, {name: MethodResults.load(parts / f"{name}.json") for name in names})
            log_results(self, "comparison", Results(read_results(folder / "results.csv")))

    def eval(
        self,
        model: LongRoPEModule,
        datamodule: LightningDataModule,
        method: str | None = None,
        tasks: str | None = None,
        task_lengths: tuple[int, ...] | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        include_path: str | None = None,
        generate: int = 0,
    ) -> None:
        """Measures one model as it is, with the measuring callbacks of the trainer and benchmark tasks.

        Args:
            model: Module around a checkpoint, an exported folder or any Hugging Face model.
            datamodule: Gives the text; tasks need none.
            method: Name in ``results.csv``; by default ``searched`` with ``model.factors``, ``tuned`` for a model that
                brings factors, otherwise ``none``.
            tasks: Tasks of the lm-evaluation-harness, with commas between.
            task_lengths: Lengths of RULER's prompts in tokens; the model's window by default.
            num_fewshot: Examples before each question; the task's own number by default.
            limit: Most documents of each task.
            include_path: Folder with further tasks.
            generate: Prompts of each retrieval task and length whose real answers are printed; 3 if no number is given.
        """
        measuring = self._take_measuring()
        retrieving = any(isinstance(callback, RetrievalCallback) for callback in measuring)
        if generate and not retrieving:
            raise ValueError("`--generate` prints answers of retrieval callbacks, and `trainer.callbacks` has none.")
        model.configure_model()
        if tasks:
            names = tuple(name.strip() for name in tasks.split(",") if name.strip())
            lengths = task_lengths or (window(model.model),)
            measuring.append(HarnessTasks(names, lengths, num_fewshot, limit, include_path))
        if not measuring:
            raise ValueError("`eval` needs callbacks that measure in `trainer.callbacks`, or `--tasks`.")
        check_names(() if method is None else (method,))
        name = method or _method_name(model)
        folder = Path(self.default_root_dir) / "eval"
        if self.is_global_zero:
            (folder / f"{name}.json").unlink(missing_ok=True)
        self._compare(model, datamodule, MethodComparison({name: None}, measuring, folder, answers=generate))
        if self.is_global_zero:
            write_results(folder, {name: MethodResults.load(folder / f"{name}.json")}, beside_others=True)
            log_results(self, "evaluation", Results(read_results(folder / "results.csv")))

    def _take_measuring(self) -> list[MeasuringCallback]:
        """The measuring callbacks, taken from the trainer: a comparison calls them itself, once per method."""
        measuring = [callback for callback in self._callbacks if isinstance(callback, MeasuringCallback)]
        self._callbacks[:] = [callback for callback in self._callbacks if callback not in measuring]
        return measuring

    @property
    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        return callbacks

    def _compare(self, model: LightningModule, datamodule: LightningDataModule, comparison: MethodComparison) -> None:
        self._callbacks.append(comparison)
        try:
            with _nothing_to_validate(datamodule):
                self.validate(model, datamodule=datamodule, verbose=False)
        finally:
            self._callbacks.remove(comparison)


def check_names(*groups: Iterable[str]) -> None:
    """Refuses names of methods under which results cannot be told apart, or that name no file in a folder.

    Args:
        groups: Published methods, factors and tuned models of a comparison. A published one is also called
            ``second_<name>``, on a model that was extended before.

    Raises:
        ValueError: Naming the first that will not do.
    """
    seen: set[str] = set()
    for name in (name for group in groups for name in group):
        if not is_plain_name(name):
            raise ValueError(f"Results are kept in a file of the method's name, got {name!r}: give a name without `/`.")
        both = {name, f"{SECOND}{name}"} if name in METHODS else {name}
        if both & seen:
            raise ValueError(
                f"Two methods of a comparison are called {name!r}: give every one of `methods`, `factors` and `tuned`"
                " a name of its own."
            )
        seen |= both


@contextmanager
def _nothing_to_validate(datamodule: LightningDataModule) -> Iterator[None]:
    """One row of two tokens in place of the validation rows: Lightning calls no hook where there is nothing at all."""
    row = {"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64)}
    datamodule.val_dataloader = lambda: DataLoader([row])  # type: ignore[method-assign, arg-type]
    try:
        yield
    finally:
        del datamodule.val_dataloader


def _method_name(module: LongRoPEModule) -> str:
    """What ``results.csv`` calls a model that nobody has named."""
    factors = installed_factors(module.model)
    if factors is None or factors.is_identity:
        return "none"
    return "tuned" if module.factors is None else "searched"


def _version(path: str | None) -> list[Any]:
    """A model's path and, where it is a file or folder here, when it was written."""
    return [path, Path(path).stat().st_mtime if path and Path(path).exists() else None]


_load_any_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """What jsonargparse makes of YAML, if that is no YAML which it does not survive."""
    check_yaml(text)
    return _load_any_yaml(text)


set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError, ValueError))


class LongRoPEParser(LightningArgumentParser):
    """Parser whose errors are one line, and which takes no part of an option's name for the whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        said = " ".join(plain(redact(message)).split())  # lines tell where a value ends
        if "arguments are required" in said:
            said = f"{said.replace(': fit.', ': ')}. Give a configuration: -c CONFIG."
        raise ValueError(said) from ex

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except OverflowError as error:
            raise ValueError(f"A number of the configuration is too large: {error}.") from error


class SaveConfig(SaveConfigCallback):
    """Keeps the configuration of a run, without credentials, in ``config.yaml`` of its root folder and in wandb.

    Args:
        given: As in Lightning.
        writes: Write the file too; else the folder may be that of another run.
        named: As in Lightning.
    """

    def __init__(self, *given: Any, writes: bool = True, **named: Any) -> None:
        super().__init__(*given, **named)
        self.writes = writes

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        entries = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config = yaml.safe_dump(redact_all(entries), sort_keys=False, allow_unicode=True, width=1 << 16)
        if self.writes:
            write_text(Path(trainer.default_root_dir) / "config.yaml", config)
        log_config(trainer, config)


class LongRoPECLI(LightningCLI):
    """LightningCLI with ``LongRoPEModule`` (or a subclass) as the model, and ``search``, ``compare`` and ``eval``.

    Args:
        args: Words of the command line.
        check: Parse and stop: nothing is built, no file is opened but the configuration.
    """

    def __init__(self, args: ArgsType, check: bool = False) -> None:
        self.check = check
        choose_accelerator()  # parsing may import DeepSpeed
        with ExitStack() as self._until_the_end:
            super().__init__(
                LongRoPEModule,
                LightningDataModule,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_class=LongRoPETrainer,
                seed_everything_default=0,
                parser_class=LongRoPEParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=args,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        lightning = LightningCLI.subcommands()
        own = {name: {"model", "datamodule"} for name in ("search", "compare", "eval")}
        return {name: lightning[name] for name in ("fit", "validate", "test")} | own

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "lightning_longrope.LongRoPEModule"}})
        parser.add_lightning_class_args(PeerWatch, "peers")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if isinstance(args, list):
            check_files(args)
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing: the model is what the configuration says, not what a checkpoint to resume from says."""

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        check_numbers(trainer)
        if not self.check:
            check_devices(trainer)
            check_places(config)
        take_launched_processes(trainer)
        check_resumed(config.get("ckpt_path"), config.get("weights_only"))
        if self.subcommand == "compare":
            check_names(config.methods, config.factors or {}, config.tuned or {})
        elif self.subcommand == "eval" and config.method is not None:
            check_names([config.method])
        if not self.check:
            self._enter(trainer.default_root_dir)
            writes = self.save_config_kwargs["writes"] = self.subcommand in WRITING
            keep_wandb_id(trainer, trainer.default_root_dir, bool(config.get("ckpt_path")), measuring=not writes)
        if str(trainer.precision).startswith("bf16") and not bf16_runs():
            log.info("This processor has no bf16: going on in float32 (trainer.precision=32-true).")
            trainer.precision = "32-true"

    def _enter(self, folder: str | None) -> None:
        """Keeps others out of the folder from here on, if one is named and written to."""
        if folder is not None and self.subcommand in WRITING:
            self._until_the_end.enter_context(only_run(folder))

    @override
    def _set_seed(self) -> None:
        check_seed(self.config[self.subcommand].get("seed_everything"))
        if not self.check:
            super()._set_seed()

    @override
    def instantiate_classes(self) -> None:
        if not self.check:
            super().instantiate_classes()
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            for kind in (MovedRun, SaveOnStop):
                if not any(isinstance(callback, kind) for callback in callbacks):
                    callbacks.append(kind())
            if self.trainer.strategy._checkpoint_io is None:
                self.trainer.strategy.checkpoint_io = WholeFileIO()
            hide_words(self.trainer)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if not self.check:
            with naming(self.trainer.default_root_dir):
                for saver in self.trainer.checkpoint_callbacks:
                    if folder := getattr(saver, "dirpath", None):  # else `ckpt_path: last` would not see them
                        put_back_all(Path(folder))
                super()._run_subcommand(subcommand)
                self._check_ran(subcommand)
                finish(self.trainer)

    def _check_ran(self, subcommand: str) -> None:
        """Raises ValueError where there was nothing to validate or to test, which Lightning passes over."""
        if subcommand == "validate" and not sum(self.trainer.num_val_batches):
            raise ValueError(_NOTHING.format(subcommand, "validation", "val"))
        if subcommand == "test" and not sum(self.trainer.num_test_batches):
            raise ValueError(_NOTHING.format(subcommand, "test", "test"))


@contextmanager
def only_run(folder: str | Path) -> Iterator[None]:
    """Keeps other runs out of a folder; of the processes of this run, the first holds the lock for all.

    Where a launcher has started several processes, all must call this.

    Raises:
        ValueError: On every process, naming the folder and who is at work there.
    """

    def enter() -> None:
        if peers.is_first() and "://" not in str(folder):
            lock = hold(Path(folder) / ".lock", folder, remedy="give another folder with --out")
            stack.enter_context(lock)

    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file: --out and trainer.default_root_dir name a folder.")
    with ExitStack() as stack:
        if (launcher := peers.launched()) is not None:
            peers.connect(launcher)
        peers.decide(enter)
        yield


def check_resumed(path: str | None, weights_only: bool | None) -> None:
    """Refuses a checkpoint to resume from that would run code, unless ``weights_only`` is false.

    Raises:
        ValueError: If it would, is damaged, or is to be loaded from the network, which Lightning does without checks.
    """
    if path is None or weights_only is False:
        return
    if "://" in path:
        raise ValueError("`ckpt_path` must be a file or a folder here: download the checkpoint first.")
    check_resumable(Path(path))


def take_launched_processes(trainer: Any) -> None:
    """Fills in how many nodes and processes a launcher (torchrun, srun) has started, where that is left open.

    Args:
        trainer: The ``trainer`` part of a configuration; ``num_nodes`` and ``devices`` are set in place.

    Raises:
        ValueError: If the configuration asks for others than were started.
    """
    environment = peers.launched()
    if environment is None:
        return
    nodes = launched_nodes()
    each = environment.world_size() // nodes
    if trainer.num_nodes == 1:
        trainer.num_nodes = nodes
    if str(trainer.devices) in ("auto", "-1"):
        trainer.devices = each
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else int(trainer.devices)
    if (trainer.num_nodes, devices) != (nodes, each):
        raise ValueError(
            f"{nodes} node(s) with {each} process(es) each were started, but the configuration asks for"
            f" trainer.num_nodes {trainer.num_nodes} and trainer.devices {trainer.devices}: give --trainer.devices auto"
            f" --trainer.num_nodes {nodes}, or start as many as it asks for."
        )


def launched_nodes() -> int:
    """Number of nodes on which a launcher has started processes; torchrun says how many there are on each."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1"))


def bf16_runs() -> bool:
    """Whether bf16 is computed by hardware here, on the accelerator or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
