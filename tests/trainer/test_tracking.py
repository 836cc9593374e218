"""What wandb gets, read back from the file that it keeps offline, and what other loggers get instead."""

import base64
import copy
import csv
import hashlib
import json
import pickle
import shutil
import struct
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import yaml
from helpers import LLAMA
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from lightning_longrope.__main__ import main
from lightning_longrope.locks import hold
from lightning_longrope.tracking import finish, hide_words, keep_wandb_id, log_search, log_search_result

wandb = pytest.importorskip("wandb")

PLANTED = {
    "WANDB_API_KEY": "51ab" * 10,
    "HF_TOKEN": "not of the usual shape",
    "AWS_SECRET_ACCESS_KEY": "planted+AWS/secret=2",
    "DB_PASSWORD": 'planted, database "password"',
}
IN_CONFIG, IN_COMMAND = "a-password-of-the-hub", "another-password"
WITH_SPACES, IN_LIST, IN_ADDRESS = "a password: of # words", "one key of several", "planted-in-an-address"
IN_OPTION = "a-key-on-the-command-line"
SECRETS = [*PLANTED.values(), IN_CONFIG, IN_COMMAND, WITH_SPACES, IN_LIST, IN_ADDRESS, IN_OPTION]
MODEL = {**LLAMA, "vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 64}
MEASURING = [
    ("PerplexityByLength", {"lengths": [64, 128], "documents": 2}),
    ("PasskeyRetrieval", {"lengths": [128], "depths": 2, "trials": 2, "filler": "text"}),
]


def part(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def stage(command, callbacks, **extra):
    callbacks = [part(f"lightning_longrope.callbacks.{name}", **arguments) for name, arguments in callbacks]
    loggers = [
        part("lightning.pytorch.loggers.WandbLogger", project="windows"),
        part("lightning.pytorch.loggers.CSVLogger", save_dir="{out}/csv"),
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}
    trainer = {"accelerator": "cpu", "devices": 1, **quiet, "logger": loggers, "callbacks": callbacks}
    trainer |= extra.pop("trainer", {})
    data = part("lightning_longrope.datamodules.SampleTextDataModule",
                seq_len=128, batch_size=2, vocab_size=300, cache_dir="{out}/data")  # fmt: skip
    return {"command": command, "trainer": trainer, "data": data, **extra}


class Uploader(Callback):
    """Has a credential in its configuration."""

    def __init__(self, token: str, password: str, api_keys: list[str], address: str) -> None:
        assert (token, password) == (IN_CONFIG, WITH_SPACES)
        assert api_keys in ([IN_LIST], [IN_OPTION])
        assert IN_ADDRESS in address


SAVING = part("lightning.pytorch.callbacks.ModelCheckpoint",
              dirpath="{out}/1-fit/checkpoints", save_last=True, every_n_train_steps=1)  # fmt: skip
FIT = stage(
    "fit",
    [("FactorSearch", {"target_length": 128, "documents": 1, "max_evaluations": 5}), *MEASURING],
    trainer={"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
    model={"init_args": {"config": MODEL}},
)
FIT["trainer"]["callbacks"] += [SAVING, part(
    "test_tracking.Uploader", token=IN_CONFIG, password=WITH_SPACES, api_keys=[IN_LIST],
    address=f"https://me:{IN_ADDRESS}@host/x?api_key={IN_ADDRESS}",
)]  # fmt: skip
COMPARE = stage("compare", MEASURING, model={"init_args": {"name_or_path": "{out}/1-fit/checkpoints/last.ckpt"}},
                target_length=128, methods=["none", "yarn"])  # fmt: skip


def records(path):
    """The records of a `.wandb` file: LevelDB's log format, 32 KiB blocks of (crc, size, kind) and payload."""
    from wandb.proto import wandb_internal_pb2

    data, place, payload = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        payload += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


class Kept:
    """Everything a stage told wandb."""

    def __init__(self, stage):
        self.files = sorted((stage / "wandb").glob("offline-run-*/run-*.wandb"))
        found = [record for path in self.files for record in records(path)]
        self.ids = [record.run.run_id for record in found if record.HasField("run")]
        self.axes = {record.metric.name: record.metric.step_metric for record in found if record.HasField("metric")}
        self.history = [
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in found
            if record.HasField("history")
        ]
        updates = [item for r in found if r.HasField("config") for item in r.config.update]
        self.config = {item.key: json.loads(item.value_json) for item in updates if item.key}
        self.artifacts = {r.artifact.name: r.artifact for r in found if r.HasField("artifact")}
        self.media = self.files[-1].parent / "files"

    def files_of(self, artifact):
        return {entry.path: entry.digest for entry in self.artifacts[artifact].manifest.contents}

    def curve(self, axis, name):
        return [(row[axis], row[name]) for row in self.history if name in row]

    def table(self, name):
        paths = [row[f"{name}.path"] for row in self.history if f"{name}.path" in row]
        return [json.loads((self.media / path).read_text()) for path in paths]


def hashed(path):
    """A file's digest in an artifact."""
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


def forms(secret):
    """A secret as it is, as JSON and addresses write it, and in base64 wherever it begins among three bytes."""
    yield from {secret.encode(), json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + secret.encode())
        yield encoded[4 if shift else 0 : len(encoded) - 4]  # without the ends, which depend on what is around


def test_a_secret_is_found_wherever_it_begins_in_base64():
    for shift in range(3):
        hidden = base64.b64encode(b"x" * shift + SECRETS[0].encode() + b"tail")
        assert any(form in hidden for form in forms(SECRETS[0]))


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A recipe with both stages, run by the real command, and the fit once more from its checkpoint."""
    root = tmp_path_factory.mktemp("tracked")
    (root / "recipe").mkdir()
    for name, content in (("1-fit", FIT), ("2-compare", COMPARE)):
        (root / "recipe" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    out = root / "out"
    with pytest.MonkeyPatch.context() as patch:
        environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(root / "staging")}
        for name, value in {**environment, **PLANTED}.items():
            patch.setenv(name, value)
        secret = f"--trainer.default_root_dir=s3://me:{IN_COMMAND}@host/"
        words = ["run", str(root / "recipe"), "--out", str(out), secret]
        patch.setattr("sys.argv", ["longrope", *words])  # which wandb keeps
        with (root / "said.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
            assert main(words) == 0
            address = f"https://me:{IN_ADDRESS}@host/x"
            assert main(["report", address]) == 2
            assert main(["data", "-c", str(root / "recipe/1-fit.yaml"), f"--data.tokenizer={address}"]) == 2
        shutil.copytree(out, root / "first")
        words = ["--trainer.max_steps", "6", "--ckpt_path", str(out / "1-fit/checkpoints/last.ckpt")]
        words += [f"--trainer.callbacks.api_keys=['{IN_OPTION}']"]
        words = ["fit", "-c", str(root / "recipe/1-fit.yaml"), "--out", str(out), *words]
        patch.setattr("sys.argv", ["longrope", *words])
        assert main(words) == 0
    return root / "first"


def test_a_search_is_drawn_against_its_generations(out):
    kept = Kept(out / "1-fit")
    journal = [json.loads(line) for line in (out / "1-fit/search/history.jsonl").read_text().splitlines()[1:]]
    scores = [line["score"] for line in journal if not line["origin"].startswith("baseline")]
    last = kept.curve("search/generation", "search/best")[-1]
    assert len(kept.curve("search/generation", "search/best")) == last[0] == 2
    assert last[1] == min(scores)
    baselines = [line["score"] for line in journal if line["origin"] == "baseline:yarn"]
    assert [value for _, value in kept.curve("search/generation", "search/yarn")] == 2 * baselines
    named = {name: axis for name, axis in kept.axes.items() if name.startswith("search/")}
    assert set(named.values()) == {"search/generation"}
    assert {"search/best", "search/evaluations", "search/yarn"} <= named.keys()
    (history,) = kept.table("tables/search_curve")
    assert [row[2] for row in history["data"]] == [line["score"] for line in journal]
    (factors,) = kept.table("tables/factors")
    assert [row[1] for row in factors["data"]] == json.loads((out / "1-fit/search/factors.json").read_text())["values"]
    assert {"figures/search_curve.path", "figures/factors.path"} <= set().union(*kept.history)


def test_evaluations_are_drawn_against_length(out):
    kept = Kept(out / "1-fit")
    assert {kept.axes[f"eval/{metric}"] for metric in ("perplexity", "bits_per_byte", "passkey")} == {"eval/length"}
    curve = kept.curve("eval/length", "eval/perplexity")
    assert [length for length, _ in curve] == [64, 128]  # the last of the two measurements, once
    scalars = [
        [row[f"perplexity/{length}"] for row in kept.history if f"perplexity/{length}" in row] for length, _ in curve
    ]
    assert [len(values) for values in scalars] == [2, 2]
    assert [value for _, value in curve] == pytest.approx([values[-1] for values in scalars], rel=1e-6)
    tables = kept.table("tables/PerplexityByLength")
    assert [{row[0] for row in table["data"]} for table in tables] == [{2}, {4}]
    assert [row[5] for row in tables[-1]["data"] if row[2] == "perplexity"] == [value for _, value in curve]
    assert "figures/passkey_depth.path" in set().union(*kept.history)


def test_a_comparison_is_one_table_and_a_curve_for_each_method(out):
    kept = Kept(out / "2-compare")
    measured = rows(out / "2-compare/eval/results.csv")
    for method in ("none", "yarn"):
        assert kept.axes[f"eval/perplexity/{method}"] == "eval/length"
        expected = [
            (int(r["length"]), float(r["value"]))
            for r in measured
            if (r["method"], r["metric"]) == (method, "perplexity")
        ]
        assert kept.curve("eval/length", f"eval/perplexity/{method}") == expected
        assert len(expected) == 2
    (table,) = kept.table("tables/comparison")
    shown = [[str(cell) if cell is not None else "" for cell in row[1:]] for row in table["data"]]
    assert sorted(shown) == sorted(list(row.values()) for row in measured)
    assert kept.history[-1]["eval/length"] == 128


def test_factors_and_results_are_artifacts(out):
    fit, compared = Kept(out / "1-fit"), Kept(out / "2-compare")
    (name,) = set(fit.ids)
    assert fit.files_of(f"factors-{name}") == {
        file: hashed(out / "1-fit/search" / file) for file in ("factors.json", "history.jsonl", "rescale_factors.csv")
    }
    assert fit.artifacts[f"factors-{name}"].type == "factors"
    assert set(fit.files_of(f"results-PerplexityByLength-{name}")) == {"results.csv"}
    artifact = compared.artifacts[f"results-comparison-{compared.ids[0]}"]
    assert artifact.type == "results"
    staged = Path(artifact.manifest.contents[0].local_path)
    values = [float(row["value"]) for row in rows(out / "2-compare/eval/results.csv")]
    assert sorted(float(row["value"]) for row in rows(staged)) == sorted(values)


def test_a_resumed_run_keeps_its_id_and_stages_have_their_own(out):
    fit, resumed, compared = (Kept(out / place) for place in ("1-fit", "../out/1-fit", "2-compare"))
    assert len(fit.files) == 1
    assert len(resumed.files) == 2
    assert set(resumed.ids) == set(fit.ids) == {(out / "1-fit/wandb-id").read_text().strip()}
    assert set(compared.ids) == {(out / "2-compare/wandb-id").read_text().strip()} != set(fit.ids)
    config = yaml.safe_load((out / "1-fit/config.yaml").read_text())
    assert config["trainer"]["logger"][0]["init_args"]["id"] == fit.ids[0]
    steps = [step for step, _ in resumed.curve("trainer/global_step", "train_loss")]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_other_loggers_get_the_numbers(out):
    logged = rows(next((out / "csv").rglob("metrics.csv")))
    best = [(int(row["step"]), float(row["search/best"])) for row in logged if row["search/best"]]
    assert best == Kept(out / "1-fit").curve("search/generation", "search/best")
    assert len([row for row in logged if row["perplexity/128"]]) == 2


def test_credentials_stay_out_of_what_a_run_writes_about_itself(out):
    said = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file() and "recipe" not in path.parts}
    names = {path.name for path in said}
    assert {"report.html", "run.json", "config.yaml", "results.csv", "said.txt", "last.ckpt"} <= names
    assert Kept(out / "1-fit").files[0].name in names
    assert (out.parent / "said.txt").read_text().count("REDACTED@host") == 3  # in two errors
    for secret in SECRETS:
        assert [path for path, content in said.items() if any(form in content for form in forms(secret))] == []
    assert "default_root_dir=s3://REDACTED@host/" in json.loads((out / "run.json").read_text())["command"]
    config = yaml.safe_load((out / "1-fit/config.yaml").read_text())
    assert config["trainer"]["callbacks"][-1]["init_args"] == {
        "token": "REDACTED", "password": "REDACTED", "api_keys": ["REDACTED"],
        "address": "https://REDACTED@host/x?api_key=REDACTED",
    }  # fmt: skip
    assert config["data"]["init_args"]["vocab_size"] == 300
    assert Kept(out / "1-fit").config["data"] == config["data"]


def test_where_no_folder_is_named_only_resumed_training_takes_up_the_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def given_id(root=None, resumed=False, **settings):
        settings = {"id": None, "version": None, "save_dir": ".", **settings}
        logger = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**settings))
        keep_wandb_id(Namespace(logger=logger), root, resumed)
        return logger.init_args["id"]

    first = given_id()
    assert given_id(resumed=True) == first
    second = given_id()
    assert second != first
    assert given_id(root="run") == given_id(root="run") not in (first, second)
    assert given_id(root="run", id="mine") == "mine"
    assert given_id(root="run", version="mine") is None
    for logger in (True, False, None, []):
        keep_wandb_id(Namespace(logger=logger), "run", False)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_only_measures_leaves_what_a_run_keeps_in_its_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    run.mkdir()
    content = stage(command, [], model={"init_args": {"config": MODEL}}, trainer={"limit_test_batches": 1})
    content = json.loads(json.dumps(content).replace("{out}", str(tmp_path)))
    del content["command"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    words = [command, "-c", str(tmp_path / "c.yaml"), "--trainer.default_root_dir", str(run)]
    assert main(words) == 0
    assert {path.name for path in run.iterdir()} == {"wandb"}  # a run of its own
    kept = {"config.yaml": "of: another", "wandb-id": "another1\n"}
    for name, text in kept.items():
        (run / name).write_text(text)
    with hold(run / ".lock", run):
        assert main(words) == 0
    assert {name: (run / name).read_text() for name in kept} == kept
    names = [path.name for path in run.rglob("run-*.wandb")]
    assert len(set(names)) == 2
    assert "run-another1.wandb" not in names


class Listener(WandbLogger):
    """Notes the words with which a run would begin."""

    @property
    def experiment(self):
        self.__dict__.setdefault("heard", []).append(sys.argv)


def test_loggers_with_hidden_words_reach_other_processes(monkeypatch):
    words = ["longrope", "fit", "--data.token", "secret"]
    monkeypatch.setattr("sys.argv", words)
    logger = Listener(project="mine")
    hide_words(SimpleNamespace(loggers=[logger]))
    for _ in range(2):  # and from there to others
        logger = pickle.loads(pickle.dumps(logger))
    logger = copy.deepcopy(logger)
    assert isinstance(logger, Listener)
    assert logger.name == "mine"
    heard = len(logger.heard)
    assert logger.experiment is None
    assert logger.heard[heard:] == [["longrope", "fit", "--data.token", "REDACTED"]]
    assert sys.argv is words


def test_only_the_first_rank_speaks():
    class Deaf:
        is_global_zero = False
        loggers = property(lambda self: pytest.fail("another rank has looked at the loggers"))

    log_search(Deaf(), 0, {"best": 1.0})
    log_search_result(Deaf(), Path("search"))
    finish(Deaf())
