"""The reader of configurations: what ``longrope fit -c`` parses before it builds anything."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fuzzing.reader import Reader
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.train import staged_words

FIT = """seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  precision: bf16-mixed
  max_steps: 2000
  gradient_clip_val: 1.0
  limit_val_batches: 8
  logger: false
  callbacks:
  - class_path: lightning_longrope.callbacks.PasskeyRetrieval
    init_args: {trials: 8, lengths: [64, 128], depths: 2}
  - class_path: lightning_longrope.callbacks.FactorSearch
    init_args: {target_length: 128, documents: 4, max_evaluations: 5}
model:
  class_path: lightning_longrope.LongRoPEModule
  init_args:
    config: {model_type: llama, hidden_size: 32, rope_parameters: {rope_type: default, rope_theta: 10000.0}}
    optimizer: {class_path: lightning_longrope.optimizers.MuonAdamW, init_args: {lr: 0.006}}
    schedule: {name: cosine_with_min_lr, warmup_steps: 40, options: {min_lr_rate: 0.05}}
data:
  class_path: lightning_longrope.datamodules.SampleTextDataModule
  init_args: {seq_len: 128, batch_size: 2, vocab_size: 300, passkey_share: 0.45}
peers: {timeout: 30}
"""


@cache
def _parser(path: Path) -> Any:
    path.write_text(FIT)
    return LongRoPECLI(["fit", "-c", str(path)], check=True).parser


def _parsed(path: Path) -> dict[str, Any]:
    parser = _parser(path.with_name("none.yaml"))
    words, _, _ = staged_words(["-c", str(path), "--out", "out"])
    return dict(parser.parse_args(["fit", *words]).fit.as_dict())


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that holds no others, and where it stands."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*place, key))
    else:
        yield place, value


def judge_numbers(data: bytes, value: dict[str, Any], intact: list[Any]) -> None:
    """Every number that PyYAML's own parser reads at some place is the number there."""
    try:
        theirs = yaml.safe_load(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError):
        return  # it is narrower: no tabs within texts; dates
    ours = dict(leaves(value))
    for place, number in leaves(theirs):
        if isinstance(number, int | float) and place in ours:
            found = ours[place]
            same = found == number or number != number or str(found) == str(number)
            assert same, f"{place}: {found!r}, but {number!r} is written there"


CONFIGURATIONS = [
    Reader("configuration (fit)", "fit.yaml", lambda: [FIT.encode()], _parsed, judge_numbers, slow=60,
           names=("key", "config", "option", "Subcommand", "arguments are required: fit.")),
]  # fmt: skip
