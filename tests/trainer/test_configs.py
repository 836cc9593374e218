"""Every configuration that is shipped: each stage and each fragment is parsed and built, and none hides an argument."""

import inspect
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_longrope import callbacks, datamodules, strategies
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.commands.export import export_arguments
from lightning_longrope.commands.recipe import stage_words
from lightning_longrope.recipes import read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.parent for path in (ROOT / "configs").glob("*/1-*.yaml"))
FRAGMENTS = sorted([*(ROOT / "callbacks").glob("*.yaml"), *(ROOT / "datamodules").glob("*.yaml")])
STRATEGIES = sorted((ROOT / "configs" / "strategies").glob("*.yaml"))
LINKED = {"tokenizer"}  # a fragment must not set these: Lightning drops a linked argument that a file sets


class Built(LongRoPECLI):
    """Builds everything and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_stage_instantiates(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_longrope.module.load_model", None)  # building must not load a model
    monkeypatch.setattr("lightning_longrope.cli.check_places", lambda config: None)  # no stage has run before
    stages = read_recipe(recipe, tmp_path)
    assert len(stages) >= 3
    for stage in stages:
        if stage.command == "export":
            assert export_arguments(stage)
            continue
        cli = Built(stage_words(stage))
        assert cli.trainer.default_root_dir == str(stage.folder)
        assert cli.datamodule.seq_len > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_short_names_values_that_are_there(recipe, tmp_path):
    pairs = zip(read_recipe(recipe, tmp_path), read_recipe(recipe, tmp_path, short=True), strict=True)
    assert all(full.digest != short.digest for full, short in pairs if full.command != "export")


def test_all_recipes_were_seen():
    assert {path.name for path in RECIPES} >= {
        "quickstart", "llama2-7b-2048k", "mistral-7b-2048k", "llama3-8b-128k", "phi3-mini-128k", "pi-32k",
        "ablation-windows", "tiny-progressive"}  # fmt: skip


def classes():
    return [getattr(room, name) for room in (callbacks, datamodules) for name in room.__all__
            if name not in ("Measurement", "MeasuringCallback")]  # fmt: skip


def test_every_class_has_a_fragment_and_every_fragment_a_class():
    named = {yaml.safe_load(path.read_text())["class_path"] for path in FRAGMENTS}
    assert len(named) == len(FRAGMENTS) >= 5
    assert named == {f"{cls.__module__.rsplit('.', 1)[0]}.{cls.__name__}" for cls in classes()}


def arguments(cls):
    """Arguments of a class and their defaults, those that it passes on to its base too."""
    own = {name: value for name, value in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    if all(value.kind is not inspect.Parameter.VAR_KEYWORD for value in own.values()):
        return {name: value.default for name, value in own.items()}
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "own")
    return dict(vars(parser.get_defaults().own))


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_a_fragment_shows_every_argument_with_its_default_and_builds(path, tmp_path):
    fragment = yaml.safe_load(path.read_text())
    cls = next(cls for cls in classes() if fragment["class_path"].endswith(f".{cls.__name__}"))
    defaults = arguments(cls)
    assert list(fragment["init_args"]) == [name for name in defaults if name not in LINKED]
    for name, value in fragment["init_args"].items():
        if defaults[name] is not inspect.Parameter.empty and not isinstance(defaults[name], tuple):
            assert value == defaults[name], name
    lines = [line for line in path.read_text().splitlines() if ":" in line and "_args" not in line]
    assert all("#" in line for line in lines if line.startswith("  ") and not line.strip().startswith(("-", "#")))

    kind = "--trainer.callbacks+=" if path.parent.name == "callbacks" else "--data="
    words = ["validate", f"{kind}{path}", "--model.config", "{model_type: llama}"]
    words += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    if path.parent.name == "callbacks":
        words += ["--data", "lightning_longrope.datamodules.SampleTextDataModule"]
    if path.parent.name == "datamodules" and path.stem != "sample_text":  # whose fragments leave this to their users
        words += ["--data.train_files", "[text.txt]"]
    cli = Built(words)
    built = cli.trainer.callbacks if path.parent.name == "callbacks" else [cli.datamodule]
    assert any(type(part) is cls for part in built)


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_builds_by_its_short_name(path, tmp_path):
    words = ["fit", "--trainer.strategy", str(path), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    words += ["--data", "lightning_longrope.datamodules.SampleTextDataModule", "--model.config", "{model_type: llama}"]
    strategy = Built([*words, f"--trainer.default_root_dir={tmp_path}"]).trainer.strategy
    fragment = yaml.safe_load(path.read_text())
    assert type(strategy).__name__ == fragment["class_path"]
    if "deepspeed" in path.stem:
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == fragment["init_args"]["stage"]
        assert ("offload_optimizer" in zero) == ("offload" in path.stem)


def test_a_strategy_shows_every_argument_with_its_default():
    for name, cls in (("deepspeed_zero3", "LongContextDeepSpeedStrategy"), ("fsdp2", "LongContextFSDP2Strategy")):
        shown = yaml.safe_load((ROOT / "configs" / "strategies" / f"{name}.yaml").read_text())["init_args"]
        named = inspect.signature(getattr(strategies, cls).__init__).parameters.values()
        defaults = {p.name: p.default for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}
        assert len(STRATEGIES) == 5
        assert set(shown) == set(defaults) - {"process_group_backend"}
        for argument, value in shown.items():
            assert argument == "stage" or value in (defaults[argument], str(defaults[argument])), argument
