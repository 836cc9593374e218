"""Readers of recipes, run folders and reports."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzzing.corpora import TEXTS
from fuzzing.reader import Reader
from fuzzing.searches import journal_bytes, own_factors
from lightning_longrope.callbacks.comparison import MethodResults
from lightning_longrope.commands.generate import _text_of
from lightning_longrope.recipes import Stage, read_recipe
from lightning_longrope.reporting.data_figures import read_data_rows
from lightning_longrope.reporting.results import read_results
from lightning_longrope.reporting.run_folder import read_run
from lightning_longrope.tracking import _kept_id

STAGE = """command: fit
seed_everything: 0
model: &model
  class_path: lightning_longrope.LongRoPEModule
  init_args:
    config: {model_type: llama, hidden_size: 32, rope_theta: 1e4}
    factors: "{out}/1-search/search/factors.json"
trainer:
  max_steps: 10
  callbacks:
  - class_path: PasskeyRetrieval
    init_args: {trials: 8, lengths: [64, 128]}
short:
  trainer.max_steps: 2
"""


def _stage(path: Path) -> Any:
    stage = read_recipe(path.parent, Path("out"), short=True)[0]
    return stage, stage.digest, yaml.safe_dump(stage.config)


def judge_stage(data: bytes, value: Any, intact: list[Any]) -> None:
    """PyYAML's own parser, which is not libyaml, reads the same; and what is passed on is what was read."""
    stage, _, passed = value
    try:
        theirs = yaml.load(data.decode("utf-8-sig"), Loader=_PlainLoader)
    except yaml.YAMLError:
        return  # it is narrower: no tabs within texts
    command, short = theirs.pop("command", "fit"), theirs.pop("short", {})
    assert command == stage.command
    if not short:
        assert json.dumps(theirs).replace("{out}", "out") == json.dumps(stage.config)
    assert json.dumps(yaml.load(passed, Loader=_PlainLoader)) == json.dumps(stage.config, sort_keys=True)


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


RESULTS = b"""method,metric,length,depth,value,low,high,n
none,perplexity,64,,15.21,15.05,15.36,24
searched,perplexity,128,,12.5,12.4,12.61,24
searched,passkey,128,0.5,0.95,0.75,1.0,20
"""
POSITIONS = b"method,length,start,end,nll,low,high\nnone,128,0,64,2.5,2.4,2.6\nnone,128,64,128,2.25,2.2,2.3\n"
METRICS = b"step,val_perplexity,train_loss\n9,,6.9\n19,12.5,\n29,,5.25\n"
DATA = b"source,shortest,documents,tokens,share_of_text,share_of_epoch\na,1,3,1200,0.5,0.25\nb,1024,1,4000,0.5,0.75\n"
RUN = {"recipe": "configs/quickstart", "command": "longrope run x", "seed": 1, "versions": {"python": "3.11"},
       "stages": [{"name": "1-fit", "command": "fit", "seconds": 2.5, "status": "finished"}]}  # fmt: skip


def judge_table(columns: Callable[[Any], list[list[str]]]) -> Callable[[bytes, Any, list[Any]], None]:
    """pyarrow's reader of CSV reads the same cells."""

    def judge(data: bytes, value: Any, intact: list[Any]) -> None:
        import pyarrow as pa
        from pyarrow import csv as theirs

        try:
            rows = theirs.read_csv(
                io.BytesIO(data),
                parse_options=theirs.ParseOptions(newlines_in_values=True),
                convert_options=theirs.ConvertOptions(
                    column_types=dict.fromkeys(
                        data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].decode().split(","), pa.string()
                    )
                ),
            ).to_pylist()
        except pa.ArrowException:
            return
        ours = columns(value)
        if rows and set(rows[0]) >= set(ours[0] if ours else ()):
            names = ours[0]
            found = [[_number(row[name] or "") for name in names] for row in rows]
            assert found == [[_number(cell) for cell in row] for row in ours[1:]]

    return judge


def _number(text: str) -> Any:
    try:
        return repr(float(text) + 0.0)  # -0 and 0 are one number
    except ValueError:
        return text


def _cells(rows: Any) -> list[list[str]]:
    names = ["method", "metric", "length", "depth", "value", "low", "high", "n"]
    return [names, *[["" if (cell := getattr(row, name)) is None else str(cell) for name in names] for row in rows]]


def _data_cells(rows: Any) -> list[list[str]]:
    names = ["source", "shortest", "documents", "tokens", "share_of_text", "share_of_epoch"]
    return [names, *[[str(getattr(row, name)) for name in names] for row in rows]]


def _run_folder(folder: Path) -> None:
    (folder / "1-fit" / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "1-fit" / "search").mkdir(exist_ok=True)
    (folder / "1-fit" / "eval" / "results.csv").write_bytes(RESULTS)
    (folder / "1-fit" / "eval" / "positions.csv").write_bytes(POSITIONS)
    (folder / "1-fit" / "metrics.csv").write_bytes(METRICS)
    (folder / "1-fit" / "config.yaml").write_text(STAGE)
    (folder / "1-fit" / "search" / "state.json").write_text(STATE)
    (folder / "run.json").write_text(json.dumps(RUN))


STATE = '{"base": 10000.0, "best": 2.5, "baselines": {"linear": 7.5, "yarn": null}, "evaluations": 3, "finished": true}'


def _report(levels: int) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        run = read_run(path.parents[levels])
        for stage in run.stages:
            run.rope_base(stage)
        return len(run.results), run.stages[0].positions if run.stages else None

    return read


def _method_results() -> list[bytes]:
    rows = [{"metric": "perplexity", "length": 64, "depth": None, "value": 2.5, "low": 2.0, "high": 3.0, "n": 4}]
    return [json.dumps({"rows": rows, "positions": [], "sums": [["perplexity", 64, [1.5, 2.5], [3.0, 4.0]]]}).encode()]


def _done(path: Path) -> Any:
    return Stage(path.parent.name, "fit", {}, path.parent.parent).finished


RUNS = [
    Reader("stage of a recipe", "1-fit.yaml", lambda: [STAGE.encode()], _stage, judge_stage, slow=8),
    Reader("results.csv", "results.csv", lambda: [RESULTS], read_results, judge_table(_cells)),
    Reader("numbers of a data figure", "data_train.csv", lambda: [DATA], read_data_rows, judge_table(_data_cells)),
    *(Reader(f"report: {Path(file).name}", file, lambda seed=seed: [seed], _report(levels), prepare=_run_folder, slow=6)  # type: ignore[misc]
      for file, seed, levels in (
          ("run.json", json.dumps(RUN).encode(), 0), ("1-fit/config.yaml", STAGE.encode(), 1),
          ("1-fit/metrics.csv", METRICS, 1), ("1-fit/eval/positions.csv", POSITIONS, 2),
          ("1-fit/search/state.json", STATE.encode(), 2), ("1-fit/search/history.jsonl", journal_bytes()[0], 2),
          ("1-fit/search/factors.json", own_factors()[0], 2),
      )),
    Reader("measurements of a method", "none.json", _method_results, MethodResults.load),
    Reader("done.json", "done.json", lambda: [b'{"config": "0f1e", "seconds": 2.5}'], _done),
    Reader("wandb-id", "wandb-id", lambda: [b"3f2a91bc\n"], lambda path: _kept_id(path, True)),
    Reader("prompt", "prompt.txt", lambda: [TEXTS[1].encode()], _text_of),
]  # fmt: skip
