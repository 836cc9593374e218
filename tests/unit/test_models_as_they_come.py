"""Models with sliding windows and models that were extended before, held against transformers' own."""

import copy
import json

import pytest
import torch
from helpers import FAMILY
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_longrope import LongRoPEModule, RescaleFactors, install_factors, load_model
from lightning_longrope.isolation import plain_rows
from lightning_longrope.model import window
from lightning_longrope.search import Candidate
from lightning_longrope.search_task import search_task
from lightning_longrope.sizes import model_size
from lightning_longrope.sliding import lift_sliding_window, sliding_window
from lightning_longrope.tables import tables_in_force

COMMON = {**FAMILY, "max_position_embeddings": 64}
SLIDING = {
    "mistral": ({}, 2),
    "phi3": ({}, 2),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 1}, 1),
    "gemma2": ({"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}, 1),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}


def _model(family="llama", **changes):
    torch.manual_seed(0)
    return load_model(config={"model_type": family, **COMMON, **changes}).eval()


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, ()),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 8}, (8, 8)),
        ("mistral", {"sliding_window": 8, "layer_types": []}, (8, 8)),
        ("qwen2", {"sliding_window": 8}, ()),  # switched off
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (8,)),
        ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "layer_types": ["full_attention"] * 2}, ()),
        ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "layer_types": ["sliding_attention"] * 2}, (8, 8)),
    ],
)
def test_what_slides_is_the_same_for_all_who_ask(family, changes, windows):
    model = _model(family, **{name: value for name, value in changes.items() if value != []})
    if changes.get("layer_types") == []:  # which Mistral's own code does not read
        model.config.layer_types = []
    for config in (model.config, model.config.to_dict()):
        found = sliding_window(config)
        assert ((found.length,) * found.layers if found else ()) == windows
    assert model_size(model.config).windows == windows
    assert (plain_rows(model, torch.ones(1, 9, dtype=torch.long)) is not None) == bool(windows)
    assert plain_rows(model, torch.ones(1, 8, dtype=torch.long)) is None


@torch.no_grad()
def _logits(model, length=40):
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(0))
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", SLIDING)
def test_a_lifted_window_is_the_model_that_never_had_one(tmp_path, family, caplog):
    changes, layers = SLIDING[family]
    model = _model(family, sliding_window=8, **changes)
    assert (sliding_window(model.config).layers, sliding_window(model.config).of) == (layers, 2)
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 2
    else:
        config.sliding_window = None
    never = AutoModelForCausalLM.from_config(config).eval()
    never.load_state_dict(model.state_dict())
    assert (_logits(model) - _logits(never)).abs().max() > 1e-2
    lift_sliding_window(model)
    assert torch.equal(_logits(model), _logits(never))
    read = [  # by FlashAttention, which takes the window from the layers and not from a mask
        {name: vars(part).get(name) for name in ("sliding_window", "attention_type", "layer_type")}
        for part in (*model.modules(), *never.modules())
    ]
    assert read[: len(read) // 2] == read[len(read) // 2 :]
    assert sliding_window(model.config) is None
    prompt = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    cached, plain = (
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=kept, do_sample=False, max_new_tokens=8
        )
        for kept in (True, False)
    )
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(load_model(tmp_path)), _logits(never))


def test_a_window_that_slides_everywhere_is_said_once_and_lifted_by_a_setting(tmp_path, caplog):
    model = _model("mistral", sliding_window=8)
    for target in (32, 32, 64):
        install_factors(model, RescaleFactors((2.0,) * 8, 16, target))
    assert len([line for line in caplog.messages if "factors for" in line and "extend nothing" in line]) == 2
    assert "All 2 layers of MistralForCausalLM see only the last 8 tokens" in caplog.text
    caplog.clear()
    install_factors(_model("mistral", sliding_window=64), RescaleFactors((2.0,) * 8, 16, 64))
    install_factors(_model("llama"), RescaleFactors((2.0,) * 8, 16, 64))
    assert caplog.messages == []
    model.save_pretrained(tmp_path)
    for original, expected in ((None, 8), (16, None)):
        module = LongRoPEModule(str(tmp_path), original_length=original)
        module.configure_model()
        assert module.model.config.sliding_window == expected
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, tmp_path / "a.ckpt")
        assert load_model(tmp_path / "a.ckpt").config.sliding_window == expected


def test_local_layers_with_a_rotary_embedding_of_their_own_are_left_alone(caplog):
    caplog.set_level("INFO", "lightning_longrope")
    kinds = ["sliding_attention", "full_attention"]
    model = _model("gemma3_text", head_dim=16, sliding_window=8, layer_types=kinds)
    assert sliding_window(model.config).own_rope
    with pytest.raises(ValueError, match="own for short distances"):
        lift_sliding_window(model)
    install_factors(model, RescaleFactors((2.0,) * 8, 64, 128))
    assert "1 of 2 layers of Gemma3ForCausalLM see only the last 8 tokens and keep" in caplog.text


@pytest.mark.parametrize(("parameters", "reach"), [(LLAMA3, 64), (YARN, 128), (LONGROPE, 64)])
def test_an_extended_model_is_searched_on_top_of_its_own_table(parameters, reach, caplog):
    caplog.set_level("INFO", "lightning_longrope")
    model = _model(rope_parameters=parameters)
    rotary = model.model.rotary_emb
    if parameters is LONGROPE:
        rotary(torch.zeros(1, 1, 64), torch.tensor([[40]]))  # beyond its own window: the long table
    plain = torch.tensor([10_000.0 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    assert window(model) == reach
    task = search_task(model, 2 * reach)
    assert (task.base.original_length, task.base.target_length) == (16, reach)
    assert f"comes with {parameters['rope_type']} factors: pretrained on 16 tokens, extended to {reach}" in caplog.text
    candidate = Candidate(tuple(1 + 0.1 * i for i in range(8)), 0, 1.0)
    table = task.table(candidate)
    speeds = plain / torch.tensor(table.values, dtype=torch.float64)
    expected = rotary.inv_freq.double() / torch.tensor(candidate.values, dtype=torch.float64)
    torch.testing.assert_close(speeds, expected, rtol=1e-6, atol=0)
    assert task.base.attention_factor == pytest.approx(rotary.attention_scaling)
    assert search_task(model, reach).base is None  # nothing longer: candidates are tables themselves
    install_factors(model, RescaleFactors((2.0,) * 8, 16, 32))
    assert search_task(model, 2 * reach).base.values == (2.0,) * 8


def test_what_a_config_does_not_tell_is_not_made_up():
    assert tables_in_force(_model().config) is None
    assert window(load_model(config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2})) == 1024
    linear = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    assert tables_in_force(_model(rope_parameters=linear).config) is None
    assert [table.target_length for table in tables_in_force(_model(rope_parameters=LONGROPE).config).tables] == [
        16,
        64,
    ]


@pytest.fixture
def saved(tmp_path):
    """Saves a small model's folder with other weights than its config describes."""
    model = _model("qwen2")

    def save(without=(), extra=()):
        weights = {name: value for name, value in model.state_dict().items() if name not in without}
        model.save_pretrained(tmp_path, state_dict=weights | {name: torch.ones(2) for name in extra})
        return tmp_path

    return save


def test_weights_of_other_parts_and_old_buffers_are_left_aside(saved):
    load_model(saved(extra=["visual.blocks.0.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": ["model.layers.1.mlp.up_proj.weight"]}, "lack 1 weights, model.layers.1.mlp.up_proj.weight"),
        ({"extra": ["model.layers.2.mlp.up_proj.weight"]}, "hold, beyond what config.json describes, 1 weights"),
        ({"extra": ["model.layers.0.mlp.up_proj.bias"]}, "hold, beyond what config.json describes, 1 weights"),
    ],
)
def test_a_model_that_would_be_another_than_its_files_is_refused(saved, change, message):
    folder = saved(**change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_config_without_layers_is_none_of_files_that_have_some(saved):
    path = saved() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 0, "layer_types": None}))
    with pytest.raises(ValueError, match="hold, beyond what config.json describes"):
        load_model(path.parent)


def test_the_loss_of_another_process_is_not_blamed_on_the_folder(saved, monkeypatch):
    def lose(*args, **options):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:554] Connection closed by peer")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lose)
    with pytest.raises(RuntimeError, match="Connection closed"):
        load_model(saved())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_beside_no_model_of_their_own_are_loaded_into_theirs(tmp_path):
    peft = pytest.importorskip("peft")
    _model().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(load_model(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    assert any("lora" in name for name, _ in load_model(tmp_path / "adapters").named_parameters())


def test_widths_that_differ_between_layers_are_no_trouble(tmp_path):
    text = {**COMMON, "model_type": "gemma3n_text", "intermediate_size": [32, 64], "num_kv_shared_layers": 0}
    text |= {"vocab_size_per_layer_input": 8, "hidden_size_per_layer_input": 4, "laurel_rank": 4, "head_dim": 16}
    text |= {"activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(text.pop("model_type"), **text)).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.intermediate_size == [32, 64]
