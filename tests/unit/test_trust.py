"""Files of others run no code, reach no other files, and configurations no class of another kind."""

import ast
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fuzzing.models import SMALL, WEIGHTS
from helpers import tiny_llama
from lightning.fabric.plugins.io import TorchCheckpointIO
from small_tokenizers import byte_level

import lightning_longrope
from lightning_longrope.__main__ import main
from lightning_longrope.checkpoints import check_resumable, read_checkpoint
from lightning_longrope.cli import LongRoPECLI, check_resumed
from lightning_longrope.loading import load_model, load_tokenizer
from lightning_longrope.sizes import read_config
from lightning_longrope.strategies.whole_file import WholeFileIO

PACKAGE = Path(lightning_longrope.__file__).parent
CHECKED = {"universal_groups"}
"""The one function that unpickles without torch's restrictions, a file that it has checked itself."""
CODE = """
import pathlib
pathlib.Path("evil").touch()
from transformers import LlamaConfig, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
class Config(LlamaConfig):
    model_type = "unheard_of"
"""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own, where no code may have left its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "evil").exists() or (tmp_path / "asked for").exists()


def calls(path):
    """Every call in a file: the name called, as it would be written after plain imports, the call, and the function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    known |= {
        alias.asname: alias.name
        for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names if alias.asname
    }  # fmt: skip

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call):
                first, *rest = ast.unparse(child.func).split(".")
                yield ".".join([known.get(first, first), *rest]), child, inner
            yield from walk(child, inner)

    return walk(tree, "")


RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
UNPICKLES = ("pickle.", "cloudpickle.", "dill.", "marshal.", "shelve.", "joblib.", "torch.jit.load", "yaml.unsafe_load")


def allowed(name, given, function):
    """Whether a call neither unpickles nor runs what it reads."""
    if name == "torch.load":
        return given.get("weights_only") == "True" or function in CHECKED
    if name == "yaml.load":
        return given.get("Loader") == "_Loader"
    if name.startswith(UNPICKLES):
        return name == "pickle.dumps" or (name == "pickle.loads" and function == "_begin")  # of the parent process
    told = [given.get(word) in (None, "False") for word in ("shell", "allow_pickle")]
    return name not in RUNS and all(told) and given.get("trust_remote_code") != "True"


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads():
    loads, forbidden = [], []
    for path in PACKAGE.rglob("*.py"):
        for name, node, function in calls(path):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            loads += [name] if name == "torch.load" else []
            forbidden += [] if allowed(name, given, function) else [f"{path.name}:{node.lineno} {name}"]
    assert len(loads) == 2
    assert not forbidden


def model_folder(path, **fields):
    """A model whose configuration and tokenizer name code beside them."""
    tiny_llama(**{**SMALL, **fields}).save_pretrained(path)
    byte_level().save_pretrained(path)
    (path / "code.py").write_text(CODE)
    for name, entries in (
        ("config.json", {"model_type": "unheard_of",
                         "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
                                   "tokenizer_class": "Tokenizer"}),
    ):  # fmt: skip
        found = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**found, **entries}))
    return path


@pytest.fixture
def no_questions(monkeypatch):
    """A person who would say yes, were they asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))


@pytest.mark.usefixtures("no_questions")
def test_code_in_a_model_folder_is_not_run_unless_asked_for(here, capsys):
    folder = str(model_folder(here / "model"))
    for read in (load_model, load_tokenizer, read_config):
        with pytest.raises(ValueError, match="model"):
            read(folder)
    (here / "p.txt").write_text("x")
    assert main(["generate", "--model", folder, "--prompt-file", "p.txt"]) == 2
    assert main(["export", folder, "out"]) == 2
    assert capsys.readouterr().err.count("longrope: error: Cannot load a") == 2
    assert not (here / "evil").exists()
    (here / "asked for").touch()
    read_config(folder, trust_remote_code=True)
    assert (here / "evil").exists()  # else the code could not have run above either


def ckpt(path):
    torch.save({"longrope": {"config": SMALL, "factors": None}, "state_dict": WEIGHTS, "x": Evil()}, path)
    return path


def fsdp2(path, index):
    torch.distributed.checkpoint.save({"state_dict": WEIGHTS}, checkpoint_id=path, no_dist=True)
    torch.save({"longrope": {"config": SMALL, "factors": None}}, path / "meta.pt")
    if index is not None:
        (path / ".metadata").write_bytes(index)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_code_in_a_checkpoint_is_run_neither_to_load_nor_to_resume(here, capsys):
    (here / "fit.yaml").write_text(yaml.safe_dump({
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False},
        "model": {"init_args": {"config": SMALL}},
        "data": {"class_path": "lightning_longrope.datamodules.SampleTextDataModule"},
    }))  # fmt: skip
    for path in (ckpt(here / "a.ckpt"), fsdp2(here / "b.ckpt", pickle.dumps(Evil()))):
        with pytest.raises(ValueError, match=r"mkdir"):
            read_checkpoint(path)
        with pytest.raises(ValueError, match=r"not safe to read: .*mkdir"):
            check_resumable(path)
        assert main(["fit", "-c", "fit.yaml", "--ckpt_path", str(path)]) == 2
        assert "not safe to read" in capsys.readouterr().err
    torch.save({"hyper_parameters": {"_class_path": "subprocess.Popen", "args": ["touch", "evil"]}}, here / "c.ckpt")
    model = LongRoPECLI(["fit", "-c", "fit.yaml", "--ckpt_path", "c.ckpt"], check=True).config.fit.model
    assert model.class_path == "lightning_longrope.LongRoPEModule"
    with pytest.raises(ValueError, match="download the checkpoint first"):
        check_resumed("https://host/a.ckpt", None)
    check_resumed(str(here / "a.ckpt"), False)  # which asks for it


@pytest.mark.parametrize(("word", "file"), [("last", "checkpoints/last.ckpt"), ("hpc", "hpc_ckpt_1.ckpt")])
def test_code_in_a_checkpoint_that_lightning_finds_itself_is_not_run(here, capsys, monkeypatch, word, file):
    (here / "fit.yaml").write_text(yaml.safe_dump({
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "default_root_dir": "run",
                    "enable_progress_bar": False, "enable_model_summary": False},
        "model": {"init_args": {"config": {**SMALL, "vocab_size": 300}}},
        "data": {"class_path": "lightning_longrope.datamodules.SampleTextDataModule",
                 "init_args": {"seq_len": 16, "vocab_size": 300, "cache_dir": "data"}},
    }))  # fmt: skip
    (here / "run" / file).parent.mkdir(parents=True)
    path = ckpt(here / "run" / file)
    before_2_6 = lambda self, path, map_location=None: torch.load(path, weights_only=False)  # noqa: E731
    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", before_2_6)
    assert main(["fit", "-c", "fit.yaml", "--ckpt_path", word]) == 2
    assert f"{file} holds objects that are not safe to read: posix.mkdir" in capsys.readouterr().err
    monkeypatch.setattr("lightning_longrope.strategies.whole_file.check_resumable", lambda path: None)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):  # held twice
        WholeFileIO().load_checkpoint(path)
    assert not (here / "evil").exists()
    (here / "asked for").touch()
    WholeFileIO().load_checkpoint(path, weights_only=False)
    assert (here / "evil").exists()  # else the code could not have run above either


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../other", "..", ".", ""])
def test_no_name_in_a_checkpoint_or_model_folder_leads_out_of_it(here, name):
    (here / "zero" / "checkpoint").mkdir(parents=True)
    (here / "zero" / "latest").write_text(name)
    with pytest.raises(ValueError, match="latest must name a folder beside it"):
        read_checkpoint(here / "zero")
    saved = fsdp2(here / "saved", None)
    index = pickle.loads((saved / ".metadata").read_bytes())
    for part in index.storage_data.values():
        part.relative_path = name
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    tiny_llama(**SMALL).save_pretrained(here / "model", max_shard_size="3KB")
    path = here / "model" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(content))
    for read, folder, file in ((read_checkpoint, saved, ".metadata"), (load_model, path.parent, path.name)):
        with pytest.raises(ValueError, match=rf"{file} must name files beside it, got '{name}'"):
            read(folder)


def test_weights_that_a_folder_lacks_are_not_made_up_and_layers_are_not_left_out(here):
    tiny_llama(**SMALL).save_pretrained(here / "whole")
    assert load_model(here / "whole").config.num_hidden_layers == 1
    for change, message in (({"num_hidden_layers": 2}, "files lack 9 weights, model.layers.1"),
                            ({"vocab_size": 10**12}, "weights or more, but its files hold"),
                            ({"num_hidden_layers": 10**9}, "weights or more, but its files hold")):  # fmt: skip
        shutil.copytree(here / "whole", here / "changed", dirs_exist_ok=True)
        config = json.loads((here / "changed" / "config.json").read_text())
        (here / "changed" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(here / "changed")
    tiny_llama(**{**SMALL, "num_hidden_layers": 2}).save_pretrained(here / "deep")
    shutil.copy(here / "whole" / "config.json", here / "deep")
    with pytest.raises(ValueError, match=r"hold, beyond what config.json describes, 9 weights, model.layers.1"):
        load_model(here / "deep")


@pytest.mark.parametrize(
    "where", ["trainer.callbacks", "trainer.logger", "trainer.strategy", "model", "data", "model.init_args.optimizer"]
)
def test_a_class_of_another_kind_is_refused_before_it_is_called(here, capsys, where):
    *outer, last = where.split(".")
    config = {"trainer": {"accelerator": "cpu"}, "model": {"class_path": "lightning_longrope.LongRoPEModule"}}
    config["model"]["init_args"] = {"config": SMALL}
    config["data"] = {"class_path": "lightning_longrope.datamodules.SampleTextDataModule"}
    (here / "fit.yaml").write_text(yaml.safe_dump(config))
    LongRoPECLI(["fit", "-c", "fit.yaml"], check=True)  # all that is wrong with it is planted now
    inner = config
    for name in outer:
        inner = inner[name]
    planted = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "evil"]}}
    inner[last] = [planted] if last == "callbacks" else planted
    (here / "fit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "fit.yaml"]) == 2
    assert "subprocess.Popen" in capsys.readouterr().err
