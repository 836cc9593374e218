"""RescaleFactors: what it accepts, and that every file format gives back the table that transformers would use."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_longrope import RescaleFactors
from lightning_longrope.geometry import RopeGeometry, rope_geometry

VALUES = (1.0, 1.5, 4.0, 8.25)
SHAPE = {"rotary_size": 8, "base": 10_000.0, "original_length": 64, "target_length": 512}


def _speeds(factors, config):
    """Frequencies that the factors mean for a config, in plain Python."""
    geometry = rope_geometry(config)
    size = 2 * factors.pairs
    return torch.tensor([1 / (v * geometry.base ** (2 * i / size)) for i, v in enumerate(factors.values)])


def _llama(**rope_parameters):
    longest = rope_parameters.pop("max_position_embeddings", 512)
    return LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 10_000.0, **rope_parameters},
    )


def _saved(config, tmp_path):
    config.save_pretrained(tmp_path)
    return tmp_path


def test_methods_carry_their_lengths_and_attention_factor():
    none = RescaleFactors.none(**SHAPE)
    assert none.is_identity
    assert (none.pairs, none.scale) == (4, 8.0)
    assert RescaleFactors.linear(**SHAPE).values == (8.0,) * 4
    assert RescaleFactors.ntk(**SHAPE).values == pytest.approx([8 ** (i / 3) for i in range(4)])
    assert RescaleFactors.dynamic_ntk(**SHAPE) == RescaleFactors.ntk(**SHAPE)
    assert RescaleFactors.dynamic_ntk(**SHAPE, factor=2.0).values[-1] == pytest.approx(15)
    assert RescaleFactors.yarn(**SHAPE).attention_factor == pytest.approx(1 + 0.1 * math.log(8))
    assert RescaleFactors.llama3(**SHAPE, factor=3.0).values[-1] == pytest.approx(3)
    for name in ("linear", "ntk", "dynamic_ntk", "yarn", "llama3"):
        factors = getattr(RescaleFactors, name)(**SHAPE)
        assert (factors.original_length, factors.target_length, factors.start_tokens) == (64, 512, 0)
        assert not factors.is_identity
        assert (factors.attention_factor != 1) == (name == "yarn")


@pytest.mark.parametrize("changed", [{"start_tokens": 4}, {"attention_factor": 1.1}, {"values": (1.0, 1.0, 1.0, 1.01)}])
def test_anything_else_than_the_pretrained_table_is_no_identity(changed):
    assert RescaleFactors((1.0,) * 4, 64, 512).is_identity
    assert not RescaleFactors(
        **{"values": (1.0,) * 4, "original_length": 64, "target_length": 512, **changed}
    ).is_identity


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": ()}, "at least one"),
        ({"values": (1.0, 0.99)}, "pair 1"),
        ({"values": (math.nan,)}, "finite"),
        ({"values": (math.inf,)}, "finite"),
        ({"target_length": 32}, "swapped"),
        ({"target_length": 512.5}, "whole"),
        ({"start_tokens": -1}, "start_tokens"),
        ({"attention_factor": 0.0}, "attention_factor"),
        ({"attention_factor": math.nan}, "attention_factor"),
    ],
)
def test_rejects_what_cannot_be_a_table(changed, message):
    with pytest.raises(ValueError, match=message):
        RescaleFactors(**{"values": VALUES, "original_length": 64, "target_length": 512, **changed})


tables = st.builds(
    RescaleFactors,
    values=st.lists(st.floats(1, 1e6), min_size=1, max_size=8).map(sorted).map(tuple),
    original_length=st.integers(2, 100_000),
    target_length=st.integers(100_000, 3_000_000),
    start_tokens=st.integers(0, 256),
    attention_factor=st.floats(0.1, 4),
)


@settings(max_examples=50, deadline=None)
@given(tables)
def test_own_json_gives_back_every_bit(tmp_path_factory, factors):
    path = tmp_path_factory.mktemp("factors") / "deep" / "factors.json"
    factors.save(path)
    assert RescaleFactors.load(path) == factors
    assert RescaleFactors.from_dict(json.loads(json.dumps(factors.to_dict()))) == factors
    assert [entry.name for entry in path.parent.iterdir()] == ["factors.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "factors.json"
    RescaleFactors(VALUES, 64, 512).save(path)
    before = path.read_text()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        RescaleFactors((2.0,) * 4, 64, 512).save(path)
    assert path.read_text() == before


def test_csv_holds_one_value_a_line_and_gives_back_every_bit(tmp_path):
    factors = RescaleFactors((1.0, 1 + 1e-15, math.pi), 64, 512, attention_factor=math.sqrt(1 + 3 / 6))
    factors.save_csv(tmp_path / "t.csv")
    assert [float(line) for line in (tmp_path / "t.csv").read_text().splitlines()] == list(factors.values)
    loaded = RescaleFactors.load(tmp_path / "t.csv", original_length=64, target_length=512)
    assert loaded.values == factors.values
    assert loaded.attention_factor == pytest.approx(factors.attention_factor)  # ln 8 / ln 64 = 1 / 2


@pytest.mark.parametrize(
    "text",
    [
        "1.0,1.5,4.0,8.25\n" * 3,
        "1.0,1.5,4.0,8.25",
        "1.0\n1.5\n4.0\n8.25\n",
        "1.0,\n1.5,\n\n4.0,\n8.25,\n",
        "1,1.5,4, 8.25",
    ],
)
def test_reads_every_form_of_csv(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    factors = RescaleFactors.load(tmp_path / "t.csv", original_length=64, target_length=512)
    assert factors.values == VALUES
    assert (factors.original_length, factors.target_length, factors.start_tokens) == (64, 512, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0,1.5\n1.0,1.6\n", "row 2 differs"),
        ("1.0,1.5\n1.0\n", "row 2 differs"),
        ("pair,factor\n0,1.0\n", "numbers"),
        ("\n", "empty"),
        ("1.0\nnan\n", "finite"),
        ("1.0\n0.5\n", "at least 1"),
        ("2.0\n1.5\n", "monotone=False"),
    ],
)
def test_a_bad_csv_is_told_apart(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        RescaleFactors.load(tmp_path / "t.csv", original_length=64, target_length=512)
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decreasing_factors_are_read_when_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("2.0\n1.5\n")
    assert RescaleFactors.load(tmp_path / "t.csv", 64, 512, monotone=False).values == (2.0, 1.5)


def test_lengths_come_from_the_file_or_from_the_caller_and_never_from_both_at_odds(tmp_path):
    (tmp_path / "t.csv").write_text("1.0\n1.5\n")
    with pytest.raises(ValueError, match="give `original_length` and `target_length`"):
        RescaleFactors.load(tmp_path / "t.csv", original_length=64)
    RescaleFactors(VALUES, 64, 512).save(tmp_path / "f.json")
    assert RescaleFactors.load(tmp_path / "f.json", original_length=64, target_length=512).values == VALUES
    with pytest.raises(ValueError, match="`target_length` is 512 in the file, but 256"):
        RescaleFactors.load(tmp_path / "f.json", target_length=256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"values": [1.0]}', "missing"),
        ('{"values": [1.0], "original_length": 64, "target_length": 128, "s": 2}', "unknown"),
        ('{"values": 3, "original_length": 64, "target_length": 128}', "list of numbers"),
        ('{"values": [1.0', "Cannot read"),
        ("{}", "no rotary embedding"),
    ],
)
def test_a_bad_json_is_told_apart(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RescaleFactors.load(tmp_path / "f.json")


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="No rescale factors at"):
        RescaleFactors.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="No rescale factors at"):
        RescaleFactors.load(tmp_path)


HF_TYPES = {
    "longrope": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "long_factor": list(VALUES),
        "short_factor": [1.0, 1.0, 1.1, 1.2],
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 4.0,
        "truncate": False,
    },
    "linear": {"factor": 8.0, "max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("name", HF_TYPES)
def test_reads_the_table_that_transformers_makes_of_a_folder(tmp_path, name):
    entries = {"rope_type": name, **HF_TYPES[name]}
    config = _llama(**entries)
    theirs, attention = ROPE_INIT_FUNCTIONS[entries["rope_type"]](config, "cpu", seq_len=512)
    for path in (_saved(config, tmp_path), tmp_path / "config.json"):
        factors = RescaleFactors.load(path)
        torch.testing.assert_close(_speeds(factors, config), theirs, rtol=2e-6, atol=0)
        assert factors.attention_factor == pytest.approx(attention)
        assert (factors.original_length, factors.target_length) == (64, 512)


def test_reads_dynamic_ntk_at_the_length_asked_for(tmp_path):
    config = _llama(rope_type="dynamic", factor=2.0, max_position_embeddings=64)
    with pytest.raises(ValueError, match="give `target_length`"):
        RescaleFactors.load(_saved(config, tmp_path))
    factors = RescaleFactors.load(tmp_path, target_length=200)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=200)
    torch.testing.assert_close(_speeds(factors, config), theirs, rtol=2e-6, atol=0)


def test_reads_old_configs_partial_rotation_and_layer_types(tmp_path):
    old = {
        "model_type": "phi3",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "long_factor": list(VALUES), "short_factor": [1.0] * 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    factors = RescaleFactors.load(tmp_path)
    assert factors.values == VALUES
    assert (factors.original_length, factors.target_length) == (64, 512)
    assert factors.attention_factor == pytest.approx(math.sqrt(1.5))
    layered = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {}}
    entries = {"head_dim": 8, "max_position_embeddings": 64, "rope_parameters": layered}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": entries}))
    assert RescaleFactors.load(tmp_path).values == (8.0,) * 4


def test_a_long_table_of_the_wrong_length_is_refused(tmp_path):
    config = _llama(rope_type="longrope", **{**HF_TYPES["longrope"], "long_factor": list(VALUES)[:3]})
    with pytest.raises(ValueError, match="`long_factor` has 3 values, but the model has 4"):
        RescaleFactors.load(_saved(config, tmp_path))


def test_an_unknown_rope_type_is_refused(tmp_path):
    entries = {"head_dim": 8, "max_position_embeddings": 64, "rope_parameters": {"rope_type": "new", "rope_theta": 9.0}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="unknown rope type 'new'"):
        RescaleFactors.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_llama(rope_type="default", max_position_embeddings=64), RopeGeometry(8, 10_000.0, 64)),
        (_llama(rope_type="yarn", **HF_TYPES["yarn"]), RopeGeometry(8, 10_000.0, 64)),
        (Phi3Config(hidden_size=16, num_attention_heads=2, pad_token_id=0), RopeGeometry(8, 10_000.0, 4096)),
        (GPTNeoXConfig(hidden_size=64, num_attention_heads=2), RopeGeometry(8, 10_000.0, 2048)),
        (AutoConfig.for_model("qwen3", head_dim=32, max_position_embeddings=99), RopeGeometry(32, 10_000.0, 99)),
        (AutoConfig.for_model("gemma3_text", head_dim=16), RopeGeometry(16, 1_000_000.0, 131_072)),
        (AutoConfig.for_model("gemma3", text_config={"head_dim": 16}), RopeGeometry(16, 1_000_000.0, 131_072)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_geometry_of_every_kind_of_config(config, expected):
    assert rope_geometry(config) == expected
    assert rope_geometry(config).pairs == expected.rotary_size // 2


def test_geometry_of_a_model_without_rope_is_refused():
    with pytest.raises(ValueError, match="gpt2.* no rotary embedding"):
        rope_geometry(AutoConfig.for_model("gpt2"))


def test_to_hf_makes_transformers_use_both_tables():
    stock = _llama(rope_type="default", max_position_embeddings=64)
    long, short = RescaleFactors(VALUES, 64, 512, attention_factor=1.4), RescaleFactors((1.0, 1.0, 1.1, 1.2), 64, 128)
    config = _llama(**long.to_hf(stock, short=short))
    for seq_len, table in ((64, short), (65, long)):
        theirs, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=seq_len)
        torch.testing.assert_close(_speeds(table, stock), theirs, rtol=1e-6, atol=0)
        assert attention == 1.4
    parameters = long.to_hf(stock)
    assert parameters["short_factor"] == parameters["long_factor"] == list(VALUES)
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (8.0, 64)
    assert parameters["short_mscale"] == parameters["long_mscale"] == 1.4
    assert {type(value) for value in parameters["long_factor"]} == {float}


def test_to_hf_writes_vllm_keys_only_where_the_formula_does_not_hold():
    stock = _llama(rope_type="default", max_position_embeddings=64)
    parameters = RescaleFactors(VALUES, 64, 512, attention_factor=math.sqrt(1.5)).to_hf(stock)
    assert not {"short_mscale", "long_mscale"} & parameters.keys()


def test_to_hf_keeps_partial_rotation_and_other_layer_types():
    neox = GPTNeoXConfig(hidden_size=64, num_attention_heads=2)
    assert RescaleFactors(VALUES, 64, 512).to_hf(neox)["partial_rotary_factor"] == 0.25
    gemma = AutoConfig.for_model("gemma3_text", head_dim=8)
    parameters = RescaleFactors(VALUES, 64, 512).to_hf(gemma)
    assert parameters["full_attention"]["long_factor"] == list(VALUES)
    assert parameters["full_attention"]["rope_theta"] == 1_000_000.0
    assert parameters["sliding_attention"] == gemma.rope_parameters["sliding_attention"]


def test_to_hf_refuses_what_hugging_face_cannot_express():
    stock = _llama(rope_type="default", max_position_embeddings=64)
    with pytest.raises(ValueError, match="start_tokens=4"):
        RescaleFactors(VALUES, 64, 512, start_tokens=4).to_hf(stock)
    with pytest.raises(ValueError, match="short factors have 3"):
        RescaleFactors(VALUES, 64, 512).to_hf(stock, short=RescaleFactors(VALUES[:3], 64, 512))
