"""The command line as people use it: a whole small recipe, its resume, and one clear line for every mistake."""

import csv
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from helpers import LLAMA
from small_tokenizers import byte_level
from transformers import AutoModelForCausalLM

from lightning_longrope import load_model
from lightning_longrope.__main__ import main
from lightning_longrope.callbacks.moved_run import MovedRun
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.export import find_checkpoint
from lightning_longrope.commands.train import staged_words
from lightning_longrope.module import LongRoPEModule
from lightning_longrope.recipes import read_stage

MODEL = {**LLAMA, "vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 64}
DATA = {"class_path": "lightning_longrope.datamodules.SampleTextDataModule"}
TRAINER = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
CHECKPOINT = "{out}/1-pretrain/checkpoints/last.ckpt"


def callback(name, **arguments):
    return {"class_path": f"lightning_longrope.callbacks.{name}", "init_args": arguments}


def data(seq_len):
    return {**DATA, "init_args": {"seq_len": seq_len, "batch_size": 2, "vocab_size": 300, "cache_dir": "{out}/data"}}


def fit(stage, **model):
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": f"{{out}}/{stage}/checkpoints", "save_last": True, "every_n_train_steps": 1},
    }
    trainer = {**TRAINER, "max_steps": 3, "limit_val_batches": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return {"command": "fit", "trainer": {**trainer, "logger": False, "callbacks": [saver]},
            "model": {"init_args": model}, "data": data(64)}  # fmt: skip


def measured(**extra):
    measuring = [
        callback("PerplexityByLength", lengths=[64, 128], documents=2, split="test"),
        callback("PasskeyRetrieval", lengths=[128], depths=2, trials=2, filler="text", split="test"),
    ]
    trainer = {**TRAINER, "logger": False, "limit_val_batches": 1, "callbacks": measuring}
    return {"command": "compare", "target_length": 128, "methods": ["none", "yarn"], "trainer": trainer,
            "model": {"init_args": {"name_or_path": CHECKPOINT}}, "data": data(128), **extra}  # fmt: skip


STAGES = {
    "1-pretrain": fit("1-pretrain", config=MODEL),
    "2-search": {
        "command": "search",
        "trainer": {**TRAINER, "logger": False, "limit_val_batches": 1,
                    "callbacks": [callback("FactorSearch", target_length=128, documents=1, max_evaluations=5)]},
        "model": {"init_args": {"name_or_path": CHECKPOINT}},
        "data": data(128),
    },
    "3-finetune": fit("3-finetune", name_or_path=CHECKPOINT, factors="{out}/2-search/search/factors.json"),
    "4-evaluate": measured(factors={"searched": "{out}/2-search/search/factors.json"},
                           tuned={"tuned": "{out}/3-finetune/checkpoints/last.ckpt"}),
    "5-export": {"command": "export", "run": "{out}/3-finetune", "out": "{out}/hf"},
}  # fmt: skip


def write(folder, stages=STAGES):
    folder.mkdir(parents=True)
    for name, content in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small recipe, run from start to end by the real command."""
    root = tmp_path_factory.mktemp("recipe")
    assert main(["run", str(write(root / "small")), "--out", str(root / "out"), "--seed", "3"]) == 0
    return root


def test_a_recipe_leaves_everything_a_run_folder_holds(finished):
    out = finished / "out"
    for name in ("1-pretrain", "2-search", "3-finetune", "4-evaluate"):
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert config["seed_everything"] == 3
    assert config["trainer"]["callbacks"][0]["init_args"]["lengths"] == [64, 128]
    for name in ("history.jsonl", "state.json", "factors.json", "rescale_factors.csv"):
        assert (out / "2-search" / "search" / name).stat().st_size
    record = json.loads((out / "run.json").read_text())
    assert [(s["name"], s["status"]) for s in record["stages"]] == [(name, "finished") for name in STAGES]
    assert record["seed"] == 3
    assert record["recipe"] == record["folder"] == str(finished / "small")
    assert (out / "report.html").stat().st_size > 10_000


def test_the_comparison_is_tidy_and_complete(finished):
    rows = list(csv.DictReader((finished / "out" / "results.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"none", "yarn", "searched", "tuned"}
    lengths = {(row["method"], row["length"]) for row in rows if row["metric"] == "perplexity"}
    assert len(lengths) == 4 * 2
    passkeys = [row for row in rows if row["metric"] == "passkey"]
    assert len(passkeys) == 4 * 3
    assert {row["depth"] for row in passkeys} == {"", "0.0", "1.0"}
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)


def test_the_exported_folder_is_the_tuned_model(finished):
    theirs = AutoModelForCausalLM.from_pretrained(finished / "out" / "hf").eval()
    ours = load_model(str(finished / "out" / "3-finetune" / "checkpoints" / "last.ckpt")).eval()
    for length in (50, 120):
        tokens = torch.arange(length)[None] % 300
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-3)
    assert (finished / "out" / "hf" / "tokenizer.json").exists()
    card = (finished / "out" / "hf" / "README.md").read_text()
    assert "longrope run" in card
    assert "| tuned | " in card


def test_start_tokens_are_refused_with_what_dropping_them_costs(finished, tmp_path, capfd):
    source = finished / "out" / "3-finetune" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(source, weights_only=True)
    checkpoint["longrope"]["factors"]["start_tokens"] = 4
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, tmp_path / "out" / "checkpoints" / "last.ckpt")
    tokenizer = str(next((finished / "out" / "data").glob("tokenizer-*")))
    words = ["export", str(tmp_path / "out"), str(tmp_path / "hf"), "--tokenizer", tokenizer]
    assert main(words) == 2
    assert re.search(r"perplexity on 128 tokens goes from \d+", one_line(capfd))
    assert not (tmp_path / "hf").exists()
    assert main([*words, "--lossy"]) == 0
    assert (tmp_path / "hf" / "config.json").exists()


def test_without_bf16_the_run_goes_on_in_float32_and_says_so(finished, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_longrope.cli.log.info", said.append)
    monkeypatch.setattr("lightning_longrope.cli.bf16_runs", lambda: False)
    stage = read_stage(finished / "small" / "2-search.yaml", finished / "out")
    cli = LongRoPECLI(
        ["search", "--config", yaml.safe_dump(stage.config), "--trainer.precision", "bf16-mixed"], check=True
    )
    assert cli.config["search"].trainer.precision == "32-true"
    assert len(said) == 1
    assert "going on in float32" in said[0]


def test_a_second_run_skips_what_is_finished(finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*.ckpt")}
    assert main(["run", str(finished / "small"), "--out", str(finished / "out"), "--seed", "3"]) == 0
    assert capfd.readouterr().err.count("is finished, skipped") == 5
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("changed", [["--seed", "4"], ["--seed", "3", "--trainer.max_steps=4"]])
def test_a_changed_configuration_is_noticed_and_nothing_is_lost(finished, capfd, changed):
    assert main(["run", str(finished / "small"), "--out", str(finished / "out"), *changed]) == 2
    assert "was finished in" in one_line(capfd)
    assert (finished / "out" / "report.html").exists()


def test_what_is_finished_stays_so_where_the_folder_is_spelt_otherwise_or_moved(finished, tmp_path, monkeypatch, capfd):
    (tmp_path / "moved").symlink_to(finished / "out", target_is_directory=True)
    monkeypatch.chdir(finished)
    for out in ("out", str(tmp_path / "moved")):
        assert main(["run", "small", "--out", out, "--seed", "3", "--trainer.devices=1"]) == 0
        assert capfd.readouterr().err.count("is finished, skipped") == 5


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A recipe of one stage whose run has died after its second step: the words of the command, and its folder."""
    real = LongRoPEModule.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("power cut")
        return real(self, batch, batch_idx)

    recipe = write(tmp_path / "cut", {"1-pretrain": STAGES["1-pretrain"]})
    words, out = ["run", str(recipe), "--seed", "3", "--out"], tmp_path / "out"
    monkeypatch.setattr(LongRoPEModule, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        main([*words, str(out)])
    monkeypatch.setattr(LongRoPEModule, "training_step", real)
    return words, out


@pytest.mark.parametrize("moved", [False, True])
def test_a_cut_stage_is_resumed_and_ends_as_if_it_had_not_been_cut(finished, cut, moved):
    words, out = cut
    if moved:
        out = out.rename(out.with_name("moved"))
    assert main([*words, str(out)]) == 0
    names = [path.name for path in (out / "1-pretrain" / "checkpoints").iterdir()]
    assert sorted(names) == ["epoch=0-step=3.ckpt", "last.ckpt"]
    ended, whole = (load_model(str(folder / CHECKPOINT.removeprefix("{out}/"))) for folder in (out, finished / "out"))
    for one, other in zip(ended.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_cut_stage_is_not_resumed_with_another_configuration(cut, capfd):
    words, out = cut
    assert main([*words, str(out), "--trainer.gradient_clip_val", "0.5"]) == 2
    assert "1-pretrain was begun in" in one_line(capfd)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_stage_whose_last_checkpoint_was_left_behind_is_not_finished(cut, capfd, monkeypatch):
    words, out = cut
    for hook in ("on_load_checkpoint", "on_train_start"):
        monkeypatch.delattr(MovedRun, hook)
    assert main([*words, str(out.rename(out.with_name("moved")))]) == 2
    assert re.search(r"has left \S+last.ckpt of step 2 as it was, and saved \S+last-v1.ckpt", one_line(capfd))
    assert not list(out.with_name("moved").rglob("done.json"))


def test_the_newest_last_checkpoint_is_exported_and_named(tmp_path, caplog):
    folder = tmp_path / "1-a" / "checkpoints"
    (folder / "last-v1.ckpt").mkdir(parents=True)  # shards, of a second fit
    for age, name in enumerate(("last-v1.ckpt/shard", "last.ckpt", "last-v2.ckpt", "lasting.ckpt")):
        (folder / name).touch()
        os.utime(folder / name, (100 - age, 100 - age))
    os.utime(folder / "last-v1.ckpt", (1, 1))
    with caplog.at_level("INFO", "lightning_longrope"):
        assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "1-a") == folder / "last-v1.ckpt"
    assert "last-v1.ckpt, which is newer than last-v2.ckpt, last.ckpt beside it" in caplog.text


def test_a_given_model_leaves_the_first_stage_out(finished, tmp_path):
    stages = {"1-pretrain": STAGES["1-pretrain"], "4-evaluate": measured(), "5-export": {
        "command": "export", "run": CHECKPOINT, "out": "{out}/hf"}}  # fmt: skip
    base = tmp_path / "base"
    shutil.copytree(finished / "out" / "hf", base)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    config["max_position_embeddings"] = 64
    (base / "config.json").write_text(json.dumps(config))
    (base / "rescale_factors.json").unlink()
    words = [
        "run",
        str(write(tmp_path / "r", stages)),
        "--out",
        str(tmp_path / "out"),
        "--model.name_or_path",
        str(base),
    ]
    assert main(words) == 0
    assert not (tmp_path / "out" / "1-pretrain").exists()
    assert (tmp_path / "out" / "hf" / "model.safetensors").exists()


def test_a_stage_file_runs_alone_too(finished, tmp_path, capfd):
    shutil.copytree(finished / "out" / "1-pretrain", tmp_path / "out" / "1-pretrain")
    words = ["search", "-c", str(finished / "small" / "2-search.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert (tmp_path / "out" / "2-search" / "search" / "factors.json").exists()


def test_a_configuration_is_read_alike_in_both_spellings_of_its_option(tmp_path, capfd):
    recipe = write(tmp_path / "r", {"1-pretrain": STAGES["1-pretrain"], "pretrain": {"data": data(64)}})
    for words in (["--config", f"{recipe}/1-pretrain.yaml"], [f"--config={recipe}/1-pretrain.yaml"]):
        assert main(["search", *words]) == 2
        assert "1-pretrain.yaml is a configuration of `longrope fit`" in one_line(capfd)
    for words in (["-c", f"{recipe}/pretrain.yaml"], [f"--config={recipe}/pretrain.yaml"]):
        assert main(["fit", *words]) == 2
        assert "stands for the folder that --out names: give --out FOLDER" in one_line(capfd)
        filled = yaml.safe_load(staged_words([*words, "--out", "mine"])[0][1])
        assert filled["data"]["init_args"]["cache_dir"] == "mine/data"


def one_line(capfd):
    """The one line of an error; nothing else may look like one."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longrope: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve"], "no command 'serve'"),
        (["fit", "--trainer.max_stepss", "3"], "max_stepss"),
        (["fit", "-c", "missing.yaml"], "missing.yaml"),
        (["run", "missing"], "found none"),
        (["run", "missing", "--nonsense"], "found none"),
        (["run", "quickstart", "--out", __file__], f"{__file__} is a file: --out"),
        (["report", "missing"], "missing"),
        (["export", "missing", "hf"], "No checkpoint in missing"),
        (["export", "missing"], "out"),
        (["search", "--model.config", "{model_type: llama}", "--data", DATA["class_path"]], "needs one FactorSearch"),
        (["fit", "--model.name_or_path", "missing/model", "--data", DATA["class_path"]], "missing/model"),
        (["compare", "--methods", "[yarn, none, yarn]"], "Two methods of a comparison are called 'yarn'"),
        (["compare", "--factors", "{second_yarn: a.json}"], "are called 'second_yarn'"),
        (["compare", "--factors", "{ours: a.json}", "--tuned", "{ours: a}"], "are called 'ours'"),
        (["compare", "--tuned", "{a/b: a}"], "a file of the method's name, got 'a/b'"),
        (["eval", "--method", ""], "a file of the method's name, got ''"),
        (["run", "missing", "--out", ""], "--out: expected a folder, got an empty text"),
    ],
)
def test_mistakes_get_one_clear_line_and_leave_nothing(words, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[0] in ("fit", "search"):
        words = [*words, "--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    if words[0] == "compare":
        words = [*words, "--target_length=128", "--data", DATA["class_path"]]
    assert main(words) == 2
    assert message in one_line(capfd)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.seq_len", "0"], "`seq_len` must be at least 4, got 0."),
        (["--data.vocab_size", ""], "Parser key \"data.vocab_size\": Expected int. Got value: ''"),
        (["--data.seq_len", "abc"], 'Parser key "data.seq_len": Expected int. Got value: abc'),
        (["--model.loss", "nope"], 'Parser key "model.loss": '),
        (["--model.lora.rank", "0"], "`lora` needs a rank of at least 1"),
        (["--trainer.callbacks.0.init_args.dirpath", "a"], "`--trainer.callbacks.0.init_args.dirpath`: an entry of a"),
    ],
)
def test_a_bad_value_is_one_sentence_whichever_command_reads_it(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = write(tmp_path / "r", {"1-fit": fit("1-fit", config=MODEL)}) / "1-fit.yaml"
    for command in ("fit", "data", "tokenize") if words[0].startswith("--data") else ("fit",):
        assert main([command, "-c", str(stage), *words]) == 2
        line = one_line(capfd)
        assert line.startswith(f"longrope: error: {said}")
        assert len(line) < 240


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """One stage that trains a small model for a step."""
    content = fit("1-fit", config=MODEL)
    content["trainer"]["max_steps"] = 1
    root = tmp_path_factory.mktemp("stage")
    content["data"]["init_args"]["cache_dir"] = str(root / "data")  # made once
    return write(root / "r", {"1-fit": content}) / "1-fit.yaml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.config.hidden_size", "33"], "`config` describes no llama model that can be built: The hidden size"),
        (["--model.config.hidden_size", "0"], "`config.hidden_size` must be a whole number of at least 1, got 0."),
        (["--model.config.hidden_size", "abc"], "`config.hidden_size` must be"),
        (["--model.config.num_attention_heads", "0"], "`config.num_attention_heads` must be"),
        (["--model.config.rms_norm_eps", "abc"], "`config` describes no llama model that can be built: "),
        (["--model.config.num_hidden_layers", "-1"], "`config.num_hidden_layers` must be"),
        (["--model.config.vocab_size", "-5"], "`config.vocab_size` must be"),
        (["--trainer.devices", "-1"], "`trainer.devices` must be a number of processes on a CPU"),
        (["--trainer.devices", "1,2"], "`trainer.devices` must be"),
        (["--trainer.devices", "abc"], "`trainer.devices` must be"),
        (["--trainer.accelerator", "tpu"], "Requirement 'torch_xla"),
        (["--trainer.strategy", "deepspeed"], "The DeepSpeed strategy is only supported on CUDA GPUs"),
        (["--trainer.strategy", "nope"], "`trainer.strategy` must be a class or a name such as auto, ddp, "),
        (["--trainer.accumulate_grad_batches", "0"], "`trainer.accumulate_grad_batches` must be at least 1, got 0."),
        (["--seed_everything", "-1"], "The seed (`seed_everything`, --seed) must be from 0 to 4294967295, got -1."),
        (["--ckpt_path", "nothere.ckpt"], "`--ckpt_path`: there is no nothere.ckpt."),
        (["--ckpt_path", "."], "`--ckpt_path` must be a checkpoint of a run (checkpoints/last.ckpt); . is none."),
        (["--model.config=null", "--model.name_or_path=./gone/a"], "`--model.name_or_path`: there is no ./gone/a."),
        (["--model.config=null", "--model.name_or_path="], "Cannot load a model from '': give a folder"),
        (
            ["--model.config=null", f"--model.name_or_path={__file__}"],
            f"Cannot load a model from {__file__!r}: it is a",
        ),
        (
            ["--data", f"{DATA['class_path']}", f"--data.tokenizer={__file__}"],
            f"Cannot load a tokenizer from {__file__!r}",
        ),
        (["--trainer.callbacks+=FactorSearch", "--trainer.callbacks.seed=-1"], "`seed` of FactorSearch must be from 0"),
    ],
)
def test_values_that_no_run_survives_are_one_line(stage, words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", str(stage), "--out", str(tmp_path / "out"), *words]) == 2
    assert one_line(capfd).startswith(f"longrope: error: {said}")


def test_a_changed_model_is_not_resumed_and_the_first_weight_that_differs_is_named(stage, capfd, tmp_path):
    words = ["fit", "-c", str(stage), "--out", str(tmp_path)]
    assert main(words) == 0
    checkpoint = tmp_path / "1-fit" / "checkpoints" / "last.ckpt"
    for change, said in (
        ({"hidden_size": "64"}, "model.model.embed_tokens.weight is [300, 32] there and [300, 64] in"),
        ({"num_hidden_layers": "3"}, "model.model.layers.2.self_attn.q_proj.weight is missing there and [32, 32] in"),
        ({"num_hidden_layers": "1"}, "model.model.layers.1.self_attn.q_proj.weight is [32, 32] there and missing in"),
    ):
        ((key, value),) = change.items()
        capfd.readouterr()
        assert main([*words, "--ckpt_path", str(checkpoint), f"--model.config.{key}", value]) == 2
        assert one_line(capfd).startswith(f"longrope: error: {checkpoint} is of another model: {said}")


@pytest.mark.parametrize(("text", "kind"), [("", "nothing"), ("null", "nothing"), ("[1, 2]", "list"), ("42", "int")])
def test_a_configuration_without_options_is_named(text, kind, capfd, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for command in ("fit", "data", "estimate"):
        assert main([command, "-c", str(path)]) == 2
        assert one_line(capfd) == (
            f"longrope: error: {path} must hold a mapping of options (`trainer:`, `model:`, `data:`), got {kind}."
        )


@pytest.mark.parametrize("command", ["fit", "data", "estimate"])
def test_without_words_a_command_asks_for_a_configuration(command, capfd):
    assert main([command]) == 2
    assert one_line(capfd).endswith("arguments are required: data. Give a configuration: -c CONFIG.")


@pytest.mark.parametrize(
    ("package", "words"), [("liger_kernel", ["--model.loss=liger"]), ("peft", ["--model.lora.rank=2"])]
)
def test_a_package_that_is_not_there_is_one_line_with_what_to_install(
    package, words, stage, capfd, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == package else find_spec(name))
    assert main(["fit", "-c", str(stage), "--out", str(tmp_path), *words]) == 2
    assert 'pip install "lightning-longrope[' in one_line(capfd)


@pytest.mark.parametrize(
    ("given", "said"), [("100000", "from 0 to "), ("-1", "from 0 to "), ("a", "processes value: 'a'")]
)
def test_processes_that_no_machine_carries_are_refused(given, said, stage, capfd):
    assert main(["tokenize", "-c", str(stage), "--workers", given]) == 2
    assert said in one_line(capfd)


def test_a_target_within_the_window_is_refused_before_anything_runs(finished, tmp_path, capfd):
    for name in ("1-pretrain", "3-finetune"):
        shutil.copytree(finished / "out" / name, tmp_path / "out" / name)
    words = ["compare", "-c", str(finished / "small" / "4-evaluate.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--target_length", "64"]) == 2
    assert "`target_length` (64) must be longer" in one_line(capfd)


def test_methods_are_measured_again_where_what_decides_their_numbers_has_changed(finished, tmp_path):
    shutil.copytree(finished / "out" / "1-pretrain", tmp_path / "out" / "1-pretrain")
    stage = yaml.safe_load((finished / "small" / "4-evaluate.yaml").read_text())
    del stage["tuned"], stage["factors"]
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(stage))

    def perplexity(*words):
        assert main(["compare", "-c", str(tmp_path / "compare.yaml"), "--out", str(tmp_path / "out"), *words]) == 0
        (path,) = (tmp_path / "out").rglob("results.csv")
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "perplexity" and row["length"] == "128"]
        return {row["method"]: row["value"] for row in rows}

    first = perplexity()
    shorter = perplexity("--model.original_length", "32")
    assert shorter["none"] == first["none"]
    assert shorter["yarn"] != first["yarn"]
    assert perplexity("--model.dtype", "bfloat16")["none"] != first["none"]
    assert perplexity() == first
    assert len(list((tmp_path / "out").rglob("methods-*"))) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [("search", "`search` has no validation text"), ("test", "`test` has no test text"),
     ("validate", "`validate` has no validation text")],
)  # fmt: skip
def test_a_command_with_nothing_to_measure_on_has_not_succeeded(tmp_path, capfd, command, message):
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n\n" for number in range(99)))
    arguments = {"files": [str(tmp_path / "text.txt")], "val_share": 0, "test_share": 0, "cache_dir": None}
    text = {"class_path": "PackedTextDataModule", "init_args": {**arguments, "seq_len": 64}}
    text["init_args"]["tokenizer"] = str(tmp_path / "tokenizer")
    byte_level().save_pretrained(tmp_path / "tokenizer")
    callbacks = [callback("FactorSearch", target_length=128)] if command == "search" else []
    content = {"model": {"init_args": {"config": MODEL}}, "data": text}
    content["trainer"] = {**TRAINER, "logger": False, "callbacks": callbacks}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main([command, "-c", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in one_line(capfd)


def test_a_misspelt_key_in_the_last_stage_stops_the_recipe_before_the_first(tmp_path, capfd):
    stages = {"1-pretrain": STAGES["1-pretrain"], "5-export": {**STAGES["5-export"], "tokeniser": "x"}}
    assert main(["run", str(write(tmp_path / "r", stages)), "--out", str(tmp_path / "out")]) == 2
    assert "stage 5-export" in one_line(capfd)
    assert not (tmp_path / "out").exists()


def test_options_of_run_are_not_abbreviated(tmp_path, capfd):
    recipe = write(tmp_path / "r", {"1-pretrain": STAGES["1-pretrain"]})
    assert main(["run", str(recipe), "--out", str(tmp_path / "out"), "--sho"]) == 2
    assert "--sho" in one_line(capfd)


def test_help_of_a_command_lists_its_options(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    assert "--target_length" in capfd.readouterr().out


def test_last_is_found_where_a_run_was_killed_while_its_checkpoint_was_replaced(tmp_path):
    """As a DeepSpeed folder may be; a run that did not see it would begin anew, from other weights."""
    stage = fit("1-pretrain", config=MODEL)
    stage["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(tmp_path / "kept")
    stage["data"]["init_args"]["cache_dir"] = str(tmp_path / "data")
    folder = write(tmp_path / "small", {"1-pretrain": stage})
    words = ["fit", "-c", str(folder / "1-pretrain.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    saved = (tmp_path / "kept" / "last.ckpt").rename(tmp_path / "kept" / ".last.ckpt.replaced")
    before = saved.read_bytes()
    assert main([*words, "--trainer.max_steps", "1", "--ckpt_path", "last", "--seed_everything", "7"]) == 0
    assert (tmp_path / "kept" / "last.ckpt").read_bytes() == before
    assert not saved.exists()
