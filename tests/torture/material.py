"""What is tortured: a corpus, a tokenizer, and a recipe whose stages take seconds; less with ``--short``."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from small_tokenizers import TEXT, byte_level

CHECKPOINTS = 5  # steps between two
STEPS = {"1-pretrain": 60, "3-finetune": 30}
WINDOW, LONG = 64, 128
MODEL = {
    "model_type": "llama",
    "vocab_size": 720,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": WINDOW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def write_material(root: Path) -> None:
    """Writes ``corpus/``, ``tokenizer/``, ``recipe/``, ``data.yaml`` and ``eval.yaml``."""
    byte_level().save_pretrained(root / "tokenizer")
    (root / "corpus").mkdir()
    words, moments = TEXT.split(), random.Random(0)
    for number in range(4):
        texts = [" ".join(moments.choices(words, k=moments.randint(40, 400))) for _ in range(400)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "corpus" / f"{number}.jsonl").write_text(lines)
    (root / "recipe").mkdir()
    for name, stage in _stages(root).items():
        (root / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(stage))
    (root / "data.yaml").write_text(yaml.safe_dump({"command": "fit", "data": _data(root, WINDOW)}))
    measured = {"trainer": _trainer(*_measuring()), "data": _data(root, LONG)}
    (root / "eval.yaml").write_text(yaml.safe_dump(measured))


def _stages(root: Path) -> dict[str, dict[str, Any]]:
    pretrained = {"name_or_path": "{out}/1-pretrain/checkpoints/last.ckpt"}
    found = "{out}/2-search/search/factors.json"
    search = {"target_length": LONG, "documents": 3, "held_out": 2, "max_evaluations": 48, "batch_tokens": 2 * LONG}
    return {
        "1-pretrain": {
            "command": "fit",
            "trainer": _fit("1-pretrain", _callback("PerplexityByLength", lengths=[WINDOW], every_n_steps=20)),
            "model": _model({"config": MODEL}),
            "data": _data(root, WINDOW),
            "short": {"trainer.max_steps": 12, "trainer.callbacks.0.init_args.every_n_steps": 10},
        },
        "2-search": {
            "command": "search",
            "trainer": _trainer(_callback("FactorSearch", **search)) | {"limit_val_batches": 1, "logger": False},
            "model": _model(pretrained),
            "data": _data(root, LONG),
            "short": {"trainer.callbacks.0.init_args.max_evaluations": 16},
        },
        "3-finetune": {
            "command": "fit",
            "trainer": _fit("3-finetune", *_measuring())
            | {"val_check_interval": 2 * CHECKPOINTS, "limit_val_batches": 2},
            "model": _model({**pretrained, "factors": found}),
            "data": _data(root, LONG),
            "short": {"trainer.max_steps": 8, "trainer.val_check_interval": CHECKPOINTS},
        },
        "4-compare": {
            "command": "compare",
            "target_length": LONG,
            "methods": ["none", "linear", "yarn"],
            "factors": {"searched": found},
            "tuned": {"tuned": "{out}/3-finetune/checkpoints/last.ckpt"},
            "trainer": _trainer(*_measuring("test")) | {"limit_val_batches": 1, "logger": False},
            "model": _model(pretrained),
            "data": _data(root, LONG),
            "short": {"methods": ["yarn"], "trainer.callbacks.0.init_args.documents": 2},
        },
        "5-export": {"command": "export", "run": "{out}/3-finetune", "out": "{out}/hf"},
    }


def _trainer(*callbacks: dict[str, Any]) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return {"accelerator": "cpu", "devices": 1, **quiet, "callbacks": list(callbacks)}


def _fit(name: str, *callbacks: dict[str, Any], **more: Any) -> dict[str, Any]:
    saving = {"dirpath": f"{{out}}/{name}/checkpoints", "save_last": True, "save_top_k": 0}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    saver["init_args"] = {**saving, "every_n_train_steps": CHECKPOINTS}
    rows = {"class_path": "row_recorder.RowRecorder", "init_args": {"folder": f"{{out}}/{name}/rows"}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": f"{{out}}/{name}"}}
    return {
        **_trainer(*callbacks, saver, rows),
        "max_steps": STEPS[name],
        "max_epochs": -1,
        "limit_val_batches": 0,
        "log_every_n_steps": 3,
        "logger": logger,
        **more,
    }


def _measuring(split: str = "validation") -> list[dict[str, Any]]:
    lengths = {"lengths": [WINDOW, LONG], "split": split}
    keys = _callback("PasskeyRetrieval", **lengths, depths=2, trials=2, filler="text")
    return [_callback("PerplexityByLength", **lengths, documents=4), keys]


def _callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_longrope.callbacks.{name}", "init_args": arguments}


def _model(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "lightning_longrope.LongRoPEModule", "init_args": arguments}


def _data(root: Path, seq_len: int) -> dict[str, Any]:
    arguments = {"files": [str(root / "corpus")], "val_share": 0.1, "test_share": 0.1, "seq_len": seq_len}
    arguments |= {"batch_size": 4, "tokenizer": str(root / "tokenizer"), "cache_dir": "{out}/data"}
    return {"class_path": "lightning_longrope.datamodules.PackedTextDataModule", "init_args": arguments}
