"""Recipes: order, placeholders, seeds, a given model, and what cannot be read."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_longrope.commands.export import export_arguments
from lightning_longrope.recipes import from_model, read_recipe, read_stage, recipe_folder, with_seed

PRETRAIN = {
    "command": "fit",
    "trainer": {"max_steps": 100},
    "model": {"init_args": {"config": {"model_type": "llama"}}},
    "data": {"init_args": {"seed": 0}},
    "short": {"trainer.max_steps": 2},
}
SEARCH = {
    "command": "search",
    "trainer": {"callbacks": [{"init_args": {"seed": 0, "documents": 5}}]},
    "model": {"init_args": {"name_or_path": "{out}/1-pretrain/checkpoints/last.ckpt"}},
    "data": {"init_args": {"seed": 0}},
    "short": {"trainer.callbacks.0.init_args.documents": 1},
}
EXPORT = {"command": "export", "run": "{out}/2-search", "out": "{out}/hf"}


@pytest.fixture
def recipe(tmp_path):
    for name, content in (("10-export", EXPORT), ("1-pretrain", PRETRAIN), ("2-search", SEARCH)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "notes.yaml").write_text("not: a stage")
    return tmp_path


def test_stages_come_in_the_order_of_their_numbers_with_their_folder_filled_in(recipe, tmp_path):
    stages = read_recipe(recipe, tmp_path / "out")
    assert [(stage.name, stage.command) for stage in stages] == [
        ("1-pretrain", "fit"), ("2-search", "search"), ("10-export", "export")]  # fmt: skip
    assert stages[1].config["model"]["init_args"]["name_or_path"] == f"{tmp_path}/out/1-pretrain/checkpoints/last.ckpt"
    assert stages[0].config["trainer"]["max_steps"] == 100
    assert "short" not in stages[0].config


def test_short_replaces_values_in_lists_too(recipe, tmp_path):
    stages = read_recipe(recipe, tmp_path, short=True)
    assert stages[0].config["trainer"]["max_steps"] == 2
    assert stages[1].config["trainer"]["callbacks"][0]["init_args"]["documents"] == 1


def test_the_seed_reaches_every_seed(recipe, tmp_path):
    stages = [with_seed(stage, 7) for stage in read_recipe(recipe, tmp_path)]
    assert stages[0].config["seed_everything"] == 7
    assert stages[0].config["data"]["init_args"]["seed"] == 7
    assert stages[1].config["trainer"]["callbacks"][0]["init_args"] == {"seed": 7, "documents": 5}
    assert "seed_everything" not in stages[2].config


def test_a_given_model_takes_the_place_of_what_the_first_stage_would_have_made(recipe, tmp_path):
    stages = from_model(read_recipe(recipe, tmp_path / "out"), "my/model")
    assert [stage.name for stage in stages] == ["2-search", "10-export"]
    assert stages[0].config["model"]["init_args"]["name_or_path"] == "my/model"
    assert stages[0].config["data"]["init_args"]["tokenizer"] == "my/model"
    assert stages[1].config["tokenizer"] == "my/model"
    assert stages[1].config["run"] == f"{tmp_path}/out/2-search"


@pytest.mark.parametrize("name", ["quickstart", "configs/quickstart"])
def test_recipes_that_come_with_the_package_are_found_by_name_unless_there_is_such_a_folder(
    name, recipe, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert [stage.command for stage in read_recipe(Path(name), tmp_path / "out")] == [
        "fit", "search", "fit", "compare", "export"]  # fmt: skip
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to(recipe, target_is_directory=True)
    assert len(read_recipe(Path(name), tmp_path / "out")) == 3
    with pytest.raises(ValueError, match=r"found none\. Recipes that come with the package: .*quickstart, tiny-prog"):
        read_recipe(Path("quickly"), tmp_path / "out")


def test_a_mistyped_path_is_no_recipe_of_the_package(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for path in ("/nowhere/mine/configs/quickstart", "mine/configs/quickstart", "../quickstart", "/quickstart"):
        with pytest.raises(ValueError, match=f"The recipe {path} must be a folder .* that come with the package"):
            read_recipe(Path(path), tmp_path / "out")
    with caplog.at_level("INFO", "lightning_longrope"):
        folder = recipe_folder(Path("configs/quickstart"))
    assert (folder / "1-pretrain.yaml").is_file()
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [str(folder)]


def test_a_changed_configuration_has_another_digest(recipe, tmp_path):
    first, changed = (read_recipe(recipe, tmp_path, short=short)[0].digest for short in (False, True))
    assert first != changed
    assert first == read_recipe(recipe, tmp_path)[0].digest


def test_the_digest_is_of_what_decides_the_numbers(recipe, tmp_path):
    stage = read_recipe(recipe, tmp_path / "out")[1]
    elsewhere = read_recipe(recipe, tmp_path / "moved")[1]
    assert stage.config != elsewhere.config
    assert stage.digest == elsewhere.digest

    def given(*overrides):
        return replace(stage, overrides=overrides)

    where = given("--trainer.devices", "-1", "--trainer.num_nodes=2", "--peers.timeout", "30")
    assert where.digest == stage.digest
    spelt, changed = given("--trainer.devices=2", "-c", "a.yaml", "--a.b", "c=d"), given("-c", "a.yaml", "--a.b=c=d")
    assert spelt.digest == changed.digest != stage.digest
    earlier = {"config": hashlib.sha256(json.dumps(["search", stage.config], sort_keys=True).encode()).hexdigest()[:16]}
    assert earlier["config"] != stage.digest
    assert [one.is_of(earlier) for one in (stage, where, changed, elsewhere)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [("1_pre.yaml", "1_pre.yaml begins with a number"), ("3-a.yml", "3-a.yml begins with a number"),
     ("02-a.yaml", "02-a.yaml and 2-search.yaml have the same number")],
)  # fmt: skip
def test_files_that_would_silently_be_no_stage_or_in_any_order_are_refused(recipe, tmp_path, name, message):
    for other in ("README.md", "notes.yml", "2024.jsonl"):
        (recipe / other).write_text("a: b")
    assert len(read_recipe(recipe, tmp_path / "out")) == 3
    (recipe / name).write_text("command: fit")
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe, tmp_path / "out")


def test_short_of_an_export_may_be_its_table_for_short_texts(tmp_path):
    (tmp_path / "1-export.yaml").write_text(yaml.safe_dump({**EXPORT, "short": "{out}/short.json"}))
    for short in (False, True):
        stage = read_stage(tmp_path / "1-export.yaml", tmp_path / "out", short=short)
        assert export_arguments(stage)["short"] == f"{tmp_path}/out/short.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "Cannot read"), ("a: [1", "not valid YAML"), ("- 1", "must hold a mapping"),
     ("command: fit\nshort: {trainer.max_step: 3}\ntrainer: {max_steps: 1}", "names `trainer.max_step`")],
)  # fmt: skip
def test_a_stage_that_cannot_be_read_is_named(tmp_path, text, message):
    path = tmp_path / "1-a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_stage(path, tmp_path, short=True)
    assert "1-a.yaml" in str(error.value)


def test_a_folder_without_stages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        read_recipe(tmp_path / "nothing", tmp_path)


def test_a_given_model_takes_the_place_of_one_that_the_recipe_names(tmp_path):
    tune = {"command": "fit", "model": {"init_args": {"name_or_path": "their/model", "factors": "{out}/a.json"}},
            "data": {"init_args": {"tokenizer": "their/model", "files": ["their/books"]}}}  # fmt: skip
    (tmp_path / "1-tune.yaml").write_text(yaml.safe_dump(tune))
    (tmp_path / "2-search.yaml").write_text(yaml.safe_dump(SEARCH))
    first, second = from_model(read_recipe(tmp_path, tmp_path / "out"), "my/model")
    assert first.config["model"]["init_args"] == {"name_or_path": "my/model", "factors": f"{tmp_path}/out/a.json"}
    assert first.config["data"]["init_args"] == {"tokenizer": "my/model", "files": ["their/books"]}
    assert second.config["model"]["init_args"]["name_or_path"].startswith(f"{tmp_path}/out/1-pretrain")


@pytest.mark.parametrize("trainer", [[1], "trainer.yaml", {"default_root_dir": "here"}, None])
def test_what_a_stage_says_of_its_root_may_be_anything(tmp_path, trainer):
    (tmp_path / "1-fit.yaml").write_text(yaml.safe_dump({"command": "fit", "trainer": trainer}))
    stage = read_stage(tmp_path / "1-fit.yaml", tmp_path / "out")
    assert stage.root == ("here" if isinstance(trainer, dict) else None)
