"""The card of an exported folder says what its files say, and what the run around the checkpoint has measured."""

import json
import re

import pytest
import yaml
from helpers import tiny_llama

from lightning_longrope import LengthTables, RescaleFactors, export_model, install_factors
from lightning_longrope.commands.export import find_checkpoint
from lightning_longrope.export import Origin, origin_of
from lightning_longrope.export.card import license_of

L = 32
SHORT = RescaleFactors((1.0,) * 8, L, L)
LONG = RescaleFactors(tuple(1 + 0.5 * i for i in range(8)), L, 4 * L, start_tokens=2, attention_factor=1.25)
RESULTS = """method,metric,length,depth,value,low,high,n
none,perplexity,32,,12.5,12,13,4
tuned,perplexity,128,,7.25,7,8,4
tuned,passkey,128,0.0,1.0,0.5,1.0,4
tuned,passkey,128,1.0,0.5,0.2,0.8,4
"""


def _card(tmp_path, **kwargs):
    model = tiny_llama(initializer_range=0.2)
    install_factors(model, [SHORT, LONG])
    export_model(model, None, tmp_path / "my-model", **kwargs)
    return (tmp_path / "my-model" / "README.md").read_text()


def _front(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)[1])


@pytest.fixture
def run(tmp_path):
    """A recipe's folder of two stages, the first on a base model beside it that has a licence."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlanguage: en\nlicense: llama2\n---\n# Base\nlicense: mit\n")
    models = {
        "1-search": str(tmp_path / "base"),
        "2-tune": str(tmp_path / "run" / "1-search" / "checkpoints" / "a.ckpt"),
    }
    for stage, name in models.items():
        (tmp_path / "run" / stage / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / stage / "config.yaml").write_text(yaml.safe_dump({"model": {"name_or_path": name}}))
    (tmp_path / "run" / "2-tune" / "eval").mkdir()
    (tmp_path / "run" / "2-tune" / "eval" / "results.csv").write_text(RESULTS)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"command": "longrope run mine", "stages": []}))
    return tmp_path / "run"


def test_a_card_tells_lengths_tables_losses_and_how_to_load_what(tmp_path):
    card = _card(tmp_path, custom_code=True, origin=Origin("org/base", "mit", commands=("longrope export a b",)))
    front = _front(card)
    assert (front["base_model"], front["license"], front["library_name"]) == ("org/base", "mit", "transformers")
    assert "from 32 to 128 tokens" in card
    assert "| 32 | 0 | 1 | none: the pretrained embedding |" in card
    assert "| 128 | 2 | 1.25 | 1, 2, 3, 3.5, 4.5 |" in card
    assert 'from_pretrained("my-model", trust_remote_code=True)' in card
    assert "--max-model-len 128" in card
    assert "- up to 32 tokens: attention factor 1.25 in place of 1" in card
    assert "- up to 128 tokens: no start tokens (start_tokens=2)" in card
    assert "longrope export a b" in card
    plain = _card(tmp_path, lossy=True)
    assert "trust_remote_code=True)" not in plain
    assert "keeps what it has cached with the short table" in plain
    assert "| 128 | 0 | 1.25 |" in plain  # what the folder has, not what the model had
    assert "None were found" in plain
    assert "license" not in _front(plain)


def test_a_card_has_the_results_base_and_commands_of_the_run(tmp_path, run):
    origin = origin_of(run / "2-tune" / "checkpoints" / "last.ckpt", "longrope export --key hf_" + "x" * 34)
    assert (origin.base, origin.license) == (str(tmp_path / "base"), "llama2")
    assert origin.commands[0] == "longrope run mine"
    assert "REDACTED" in origin.commands[1]
    card = _card(tmp_path, lossy=True, origin=origin)
    assert "| no change | 12.50 | - |\n| tuned | - | 7.25 |" in card
    assert "| tuned | 75\u00a0% |" in card  # 4 of 4 and 2 of 4
    assert _front(card)["license"] == "llama2"
    assert "base_model" not in _front(card)  # which takes names on the hub


def test_a_checkpoint_without_a_run_and_a_base_without_a_licence_are_no_errors(tmp_path, run):
    assert origin_of(tmp_path / "a.ckpt", "x").commands == ("x",)
    assert license_of(str(run)) is license_of("not a name") is license_of("org/never-downloaded") is None
    (run / "2-tune" / "eval" / "results.csv").write_text("broken")
    assert len(origin_of(run / "2-tune" / "checkpoints" / "last.ckpt").results) == 0


@pytest.mark.parametrize(
    ("base", "shown"),
    [("org/base", "org/base"), ("models/llama", None), ("./llama", None), ("../llama", None), ("/models/llama", None)],
)
def test_only_a_model_of_the_hub_is_a_base_that_others_can_find(tmp_path, monkeypatch, base, shown):
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = _card(tmp_path, lossy=True, origin=Origin(base))
    assert _front(card).get("base_model") == shown


@pytest.mark.parametrize(("stages", "newest"), [(("2-tune", "10-tune", "old", "x-1"), "10-tune"), (("old",), None)])
def test_the_checkpoint_is_that_of_the_last_numbered_stage(tmp_path, stages, newest):
    for stage in stages:
        (tmp_path / stage / "checkpoints").mkdir(parents=True)
        (tmp_path / stage / "checkpoints/last.ckpt").write_text("")
    if newest:
        assert find_checkpoint(tmp_path) == tmp_path / newest / "checkpoints/last.ckpt"
        return
    with pytest.raises(ValueError, match="No checkpoint in"):
        find_checkpoint(tmp_path)


def test_generation_and_csv_follow_the_tables(tmp_path):
    model = tiny_llama(initializer_range=0.2)
    model.generation_config.max_length = L
    install_factors(model, LengthTables((SHORT, LONG)))
    export_model(model, None, tmp_path / "hf", custom_code=True)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["max_length"] == 4 * L
    assert model.generation_config.max_length == L
    read = RescaleFactors.load(tmp_path / "hf" / "rescale_factors_128.csv", L, 4 * L)
    assert read.values == LONG.values
    assert (tmp_path / "hf" / "rescale_factors_32.csv").is_file()
