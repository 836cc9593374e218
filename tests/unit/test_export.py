"""Exported folders, read back by transformers alone, against the model in memory."""

import json
import math
import re

import pytest
import torch
import transformers
from helpers import tiny_llama
from packaging.version import Version
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_longrope import RescaleFactors, export, export_model, install_factors, load_model
from lightning_longrope.model import installed_factors, rope_geometry

L = 32  # of tiny_llama
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": L,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": None},
}


def _model(family):
    torch.manual_seed(0)
    entries = {"model_type": family, **SIZES, "num_key_value_heads": 2, **FAMILIES[family]}
    return load_model(config={name: value for name, value in entries.items() if value is not None}).eval()


def _factors(model, **changed):
    values = tuple(1 + 0.7 * i for i in range(1, rope_geometry(model.config).pairs + 1))
    return RescaleFactors(**{"values": values, "original_length": L, "target_length": 8 * L, **changed})


@torch.no_grad()
def _logits(model, length=100):
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("attention", [math.sqrt(1 + 3 / 5), 1.0, 1.3])  # the first is the default: ln 8 / ln 32
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_gives_our_logits_on_both_sides_of_the_window(tmp_path, family, attention):
    if family == "gemma3_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("older transformers raise UnboundLocalError in the second long forward of a Gemma 3 with longrope")
    model = _model(family)
    long = _factors(model, attention_factor=attention)
    short = RescaleFactors(tuple(1 + 0.1 * v for v in long.values), L, 2 * L, attention_factor=attention)
    install_factors(model, long)
    export_model(model, None, tmp_path / "hf", short=short)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = {100: _logits(model), L + 1: _logits(model, L + 1)}
    install_factors(model, short)
    ours |= {20: _logits(model, 20), L: _logits(model, L)}
    for length, expected in ours.items():
        torch.testing.assert_close(_logits(theirs, length), expected, rtol=0, atol=1e-3)
    assert (_logits(model, 100) - ours[100]).abs().max() > 1e-2  # the tables are far enough apart to tell


def test_the_config_says_what_other_software_reads(tmp_path):
    model = _model("phi3")
    install_factors(model, _factors(model, attention_factor=1.3))
    export_model(model.to(torch.bfloat16), None, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    parameters = config["rope_parameters"]
    assert (config["max_position_embeddings"], type(config["max_position_embeddings"])) == (8 * L, int)
    assert config["original_max_position_embeddings"] == parameters["original_max_position_embeddings"] == L
    assert parameters["rope_type"] == "longrope"
    assert parameters["long_factor"] == parameters["short_factor"] == list(_factors(model).values)
    assert parameters["partial_rotary_factor"] == 0.5
    assert parameters["attention_factor"] == parameters["short_mscale"] == parameters["long_mscale"] == 1.3
    assert config["dtype"] == "bfloat16"
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_load_model_restores_the_exact_table_and_the_pretrained_model_under_it(tmp_path):
    model = _model("llama")
    pretrained = _logits(model)
    factors = _factors(model)
    install_factors(model, factors)
    export_model(model, None, tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert installed_factors(loaded) == factors
    assert torch.equal(_logits(loaded), _logits(model))
    assert rope_geometry(loaded.config) == rope_geometry(model.config)
    export_model(loaded, None, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()
    install_factors(loaded, RescaleFactors((1.0,) * factors.pairs, L, 8 * L))
    assert torch.equal(_logits(loaded), pretrained)


def test_the_model_passed_in_stays_as_it_is(tmp_path):
    model = _model("llama").train()
    install_factors(model, _factors(model))
    config, rotary = model.config.to_dict(), model.model.rotary_emb
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identity = id(model.config)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    export_model(model, None, tmp_path / "hf")
    assert torch.equal(torch.rand(2), expected)
    assert (id(model.config), model.config.to_dict()) == (identity, config)
    assert model.model.rotary_emb is rotary
    assert installed_factors(model) == _factors(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("installed", [None, (1.0,) * 8])
def test_identity_factors_export_the_stock_config(tmp_path, installed):
    model = _model("llama")
    if installed:
        install_factors(model, RescaleFactors(installed, L, 8 * L))
    export_model(model, None, tmp_path / "hf")
    model.save_pretrained(tmp_path / "stock")
    for folder in ("hf", "stock"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(
            path.name for path in (tmp_path / "stock").iterdir()
        )
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "stock" / "config.json").read_text()
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), _logits(model))


def _perplexity(model, tokens):
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1].double(), tokens[1:])
    return losses.exp().item()


def test_start_tokens_are_refused_with_what_dropping_them_costs(tmp_path):
    model = _model("llama")
    example = torch.randint(3, 96, (90,), generator=torch.Generator().manual_seed(0))
    dropped = _factors(model)
    install_factors(model, dropped)
    after = _perplexity(model, example)
    install_factors(model, _factors(model, start_tokens=16))
    before = _perplexity(model, example)
    assert f"{before:.4g}" != f"{after:.4g}"
    with pytest.raises(ValueError, match="start_tokens=16") as caught:
        export_model(model, None, tmp_path / "hf", example=example)
    stated = [float(number) for number in re.search(r"from (\S+) to (\S+)\)\. Pass", str(caught.value)).groups()]
    assert stated == pytest.approx([before, after], rel=1e-3)
    assert list(tmp_path.iterdir()) == []
    export_model(model, None, tmp_path / "hf", lossy=True)
    assert installed_factors(model).start_tokens == 16
    assert installed_factors(load_model(tmp_path / "hf")) == dropped
    with pytest.raises(ValueError, match="`example`"):
        export_model(model, None, tmp_path / "hf2", example=example[None])


def test_a_tokenizer_goes_along_with_the_longer_window(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), model_max_length=L
    )
    model = tiny_llama()
    install_factors(model, _factors(model))
    export_model(model, tokenizer, tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 8 * L
    assert tokenizer.model_max_length == L


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
    model = tiny_llama()
    install_factors(model, _factors(model))
    folder = tmp_path / "hf"
    folder.mkdir()
    export_model(model, None, folder)
    install_factors(model, RescaleFactors.yarn(rotary_size=16, base=1e4, original_length=L, target_length=2 * L))
    export_model(model, None, folder)
    assert installed_factors(load_model(folder)) == installed_factors(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf.lock", "hf"]
    model.save_pretrained(tmp_path / "precious")
    with pytest.raises(ValueError, match="not empty"):
        export_model(model, None, tmp_path / "precious")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_model(model, None, tmp_path / "file")


def test_an_export_goes_where_a_link_leads_and_never_over_the_folder_one_is_in(tmp_path, monkeypatch):
    model = tiny_llama()
    install_factors(model, _factors(model))
    (tmp_path / "big").mkdir()
    (tmp_path / "hf").symlink_to("big/real")
    for _ in range(2):
        assert export_model(model, None, tmp_path / "hf") == tmp_path / "hf"
        assert (tmp_path / "hf").is_symlink()
        assert sorted(path.name for path in (tmp_path / "big").iterdir()) == [".real.lock", "real"]
        assert "# hf" in (tmp_path / "big/real/README.md").read_text()
    assert installed_factors(load_model(tmp_path / "hf")) == installed_factors(model)
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for folder in (".", "..", here, tmp_path, "/"):
        with pytest.raises(ValueError, match="is the current folder or one above it: give another folder"):
            export_model(model, None, folder)
    assert list(here.iterdir()) == []
    export_model(model, None, "../next")


@pytest.mark.parametrize("broken", ["short", "long", "attention", "theta", "weights", "epsilon"])
def test_an_export_that_is_not_the_model_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, broken):
    # a base that is a little off shows in the angles only, where the logits are those of bfloat16
    model = tiny_llama(initializer_range=0.2).to(torch.bfloat16 if broken == "theta" else torch.float32)
    install_factors(model, _factors(model))
    to_hf, save = RescaleFactors.to_hf, type(model).save_pretrained

    def wrong_table(self, config, short=None):
        parameters = to_hf(self, config, short=short)
        if broken in ("short", "long"):
            parameters[f"{broken}_factor"] = [value + 0.5 for value in self.values]
        if broken == "attention":
            parameters["attention_factor"] = 1.1
        if broken == "theta":
            parameters["rope_theta"] = 10_500.0
        return parameters

    def wrong_rest(self, folder):
        weight = self.model.embed_tokens.weight
        kept = weight[5, 5].item()
        with torch.no_grad():
            weight[5, 5] += 1e-3 if broken == "weights" else 0
            if broken == "epsilon":
                self.config.rms_norm_eps = 0.1
            save(self, folder)
            weight[5, 5] = kept

    monkeypatch.setattr(RescaleFactors, "to_hf", wrong_table)
    monkeypatch.setattr(type(model), "save_pretrained", wrong_rest)
    with pytest.raises(RuntimeError, match="The export is not the model"):
        export_model(model, None, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == [".hf.lock"]


def test_a_window_of_128k_from_a_long_model_passes_its_own_check(tmp_path):
    model = tiny_llama(max_position_embeddings=65_536, initializer_range=0.2)
    install_factors(model, _factors(model, original_length=65_536, target_length=2_097_152))
    assert export.export_model(model, None, tmp_path / "hf") == tmp_path / "hf"
