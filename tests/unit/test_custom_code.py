"""Exported folders with code, read by transformers alone in a process that cannot import this package."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import FAMILIES as COMMON_FAMILIES
from helpers import FAMILY, tiny_llama
from packaging.version import Version
from transformers import AutoModelForCausalLM

from lightning_longrope import LengthTables, RescaleFactors, export_model, install_factors, load_model
from lightning_longrope.export import custom_code
from lightning_longrope.model import installed_tables, rope_geometry

L = 16
COMMON = {**FAMILY, "max_position_embeddings": L}
FAMILIES = {
    **COMMON_FAMILIES,
    "gpt_neox": {"num_key_value_heads": None},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20},
    "cohere": {},  # pairs side by side
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},  # pairs once
}
if Version(transformers.__version__) < Version("5.23"):  # which cannot run a Gemma 3 with longrope twice
    del FAMILIES["gemma3_text"]
LENGTHS = (5, L, L + 1, 2 * L, 2 * L + 1, 4 * L, 5 * L)
READER = """
import sys
sys.modules["lightning_longrope"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
folders, lengths, found = sys.argv[2].split(","), [int(n) for n in sys.argv[3].split(",")], {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    rows = torch.randint(3, 96, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    with torch.no_grad():
        logits = [model(rows[:, :length], use_cache=False).logits for length in lengths]
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}
    answers = [model.generate(rows[:, :12], use_cache=cached, **options) for cached in (True, False)]
    half = model.to(torch.bfloat16)(rows[:, :80], use_cache=False).logits.detach()
    found[folder] = (type(model).__module__, logits, answers, half)
torch.save(found, sys.argv[1])
"""


def _model(family="llama"):
    torch.manual_seed(0)
    entries = {"model_type": family, **COMMON, **FAMILIES[family]}
    return load_model(config={name: value for name, value in entries.items() if value is not None}).eval()


def _tables(model, identity=True):
    steps = ((0.0, L, 0, 1.0) if identity else (0.2, L, 0, 0.9), (0.8, 2 * L, 3, 1.4), (3.0, 4 * L, 0, 0.7))
    pairs = rope_geometry(model.config).pairs
    return LengthTables(
        tuple(
            RescaleFactors(tuple(1 + step * i for i in range(pairs)), L, length, starts, attention)
            for step, length, starts, attention in steps
        )
    )


@pytest.mark.slow
def test_transformers_alone_gives_our_logits_and_answers_in_every_range_of_lengths(tmp_path):
    models = {}
    for number, family in enumerate(FAMILIES):
        model = models[family] = _model(family)
        install_factors(model, _tables(model, identity=number % 2 == 0))
        export_model(model, None, tmp_path / family, custom_code=True)
    folders, lengths = ",".join(map(str, (tmp_path / family for family in FAMILIES))), ",".join(map(str, LENGTHS))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    words = [sys.executable, "-c", READER, str(tmp_path / "found.pt"), folders, lengths]
    subprocess.run(words, check=True, cwd=tmp_path, env=environment, timeout=200)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == len(models) >= 8
    rows = torch.randint(3, 96, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    for family, model in models.items():
        name, logits, answers, half = found[str(tmp_path / family)]
        assert name.endswith(".modeling_longrope")
        for length, theirs in zip(LENGTHS, logits, strict=True):
            with torch.no_grad():
                assert torch.equal(theirs, model(rows[:, :length], use_cache=False).logits), (family, length)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}
        ours = model.generate(rows[:, :12], **options)
        assert all(torch.equal(answer, ours) for answer in answers), family
        with torch.no_grad():
            assert torch.equal(half, model.to(torch.bfloat16)(rows, use_cache=False).logits), family


def test_the_folder_says_what_plain_software_can_have_and_load_model_restores_all(tmp_path, caplog):
    model = _model()
    tables = _tables(model, identity=False)
    install_factors(model, tables)
    export_model(model, None, tmp_path / "hf", custom_code=True)
    said = [message for message in caplog.messages if message.startswith("Lost without trust_remote_code: up to")]
    assert len(said) == 2
    assert "attention factor 0.7 in place of 0.9" in said[0]
    assert "the table for 64 tokens in place of their own, no start tokens (start_tokens=3)" in said[1]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_longrope.LongRopeForCausalLM"}
    assert (config["rope_parameters"]["short_mscale"], config["rope_parameters"]["long_mscale"]) == (0.9, 0.7)
    loaded = load_model(tmp_path / "hf")
    assert installed_tables(loaded) == tables
    export_model(loaded, None, tmp_path / "again", custom_code=True)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    export_model(loaded, None, tmp_path / "plain", lossy=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    rows = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    for length, kept in ((L, (tables.tables[0].values, 0.7)), (2 * L, (tables.longest.values, 0.7))):
        install_factors(model, RescaleFactors(kept[0], L, 4 * L, 0, kept[1]))
        with torch.no_grad():
            theirs, ours = (m(rows[:, :length], use_cache=False).logits for m in (plain, model))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert len(installed_tables(load_model(tmp_path / "plain")).tables) == 2


def _perplexity(model, table, tokens):
    install_factors(model, table)
    with torch.no_grad():
        logits = model(tokens[None], use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tokens[1:]).exp().item()


def test_what_would_be_lost_is_refused_with_its_cost_by_length(tmp_path):
    model = _model()
    tables = _tables(model, identity=False)
    example = torch.randint(3, 96, (50,), generator=torch.Generator().manual_seed(0))
    install_factors(model, tables)
    with pytest.raises(ValueError, match="custom_code=True") as caught:
        export_model(model, None, tmp_path / "hf", example=example)
    said = re.findall(r"up to (\d+) tokens:.*?on (\d+) tokens goes from (\S+) to (\S+)\)", str(caught.value))
    short, middle, long = tables.tables
    replaced = {16: RescaleFactors(short.values, L, 4 * L, 0, 0.7), 32: long}
    assert [row[:2] for row in said] == [("16", "16"), ("32", "32")]  # tokens of the example that are this near
    for (length, _, *stated), own in zip(said, (short, middle), strict=True):
        expected = [_perplexity(model, table, example[: int(length)]) for table in (own, replaced[int(length)])]
        assert [float(value) for value in stated] == pytest.approx(expected, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["layout", "values", "attention_factor", "target_length"])
def test_code_that_is_not_the_model_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, broken):
    model = _model()
    tables = _tables(model, identity=False)
    install_factors(model, tables)
    if broken == "layout":
        monkeypatch.setattr(custom_code, "table_layout", lambda *args: "interleaved")
    wrong = {"values": [2.0] * 8, "attention_factor": 1.1, "target_length": 3 * L}
    real = RescaleFactors.to_dict
    changed = {broken: wrong[broken]} if broken in wrong else {}
    monkeypatch.setattr(
        RescaleFactors,
        "to_dict",
        lambda self: {**real(self), **(changed if self.target_length == 2 * L else {})},
    )
    with pytest.raises(RuntimeError, match="The export is not the model"):
        export_model(model, None, tmp_path / "hf", custom_code=True)
    assert [path.name for path in tmp_path.iterdir()] == [".hf.lock"]


def test_code_needs_a_class_of_transformers(tmp_path):
    model = tiny_llama()
    model.__class__ = type("MyLlama", (type(model),), {})
    install_factors(model, _tables(model))
    with pytest.raises(ValueError, match="has no MyLlama"):
        export_model(model, None, tmp_path / "hf", custom_code=True)
