"""Installing factors, against transformers' own rope types on the same weights, over every family we name."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_longrope import RescaleFactors, install_factors, load_model
from lightning_longrope.loading import load_tokenizer
from lightning_longrope.model import candidate_rows, hidden_states, installed_factors, output_head, rope_geometry

L = 64
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": L,
    "initializer_range": 0.2,  # large enough for logits to depend on positions visibly
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "phi3": {**GROUPED, "partial_rotary_factor": 0.5},
    "gemma2": {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {},
    # layouts and scales of their own
    "cohere": GROUPED,
    "granite": {**GROUPED, "logits_scaling": 3.0},
    "gpt_oss": {**GROUPED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "hyperclovax": {**GROUPED, "logits_scaling": 3.0},
}


def _model(family="llama", **changed):
    torch.manual_seed(0)
    return load_model(config={"model_type": family, **COMMON, **FAMILIES[family], **changed}).eval()


def _tokens(rows=2, length=48):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model, tokens=None, **kwargs):
    return model(_tokens() if tokens is None else tokens, use_cache=False, **kwargs).logits


def _shape(model, scale=8):
    geometry = rope_geometry(model.config)
    return {
        "rotary_size": geometry.rotary_size,
        "base": geometry.base,
        "original_length": geometry.original_length,
        "target_length": scale * geometry.original_length,
    }


def _factors(model, **changed):
    pairs = rope_geometry(model.config).pairs
    values = tuple(1 + 0.7 * i for i in range(1, pairs + 1))
    return RescaleFactors(**{"values": values, "original_length": L, "target_length": 8 * L, **changed})


@pytest.mark.parametrize("family", FAMILIES)
def test_install_changes_logits_once_and_identity_takes_everything_back(family):
    model = _model(family)
    keys, before = list(model.state_dict()), _logits(model)
    assert installed_factors(model) is None
    factors = _factors(model)
    install_factors(model, factors)
    once = _logits(model)
    assert (once - before).abs().max() > 1e-4
    assert installed_factors(model) == factors
    install_factors(model, factors)
    assert torch.equal(_logits(model), once)
    other = RescaleFactors.linear(**_shape(model))
    install_factors(model, other)
    install_factors(model, factors)
    assert torch.equal(_logits(model), once)
    assert list(model.state_dict()) == keys
    install_factors(model, RescaleFactors.none(**_shape(model)))
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("method", ["linear", "yarn", "longrope", "llama3", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_install_agrees_with_the_same_weights_under_transformers_own_rope_type(family, method):
    model = _model(family)
    shape, pairs = _shape(model), rope_geometry(model.config).pairs
    parameters = {"rope_type": method, "rope_theta": shape["base"], "factor": 8.0}
    if method in ("yarn", "longrope", "llama3"):
        parameters["original_max_position_embeddings"] = L
    if method == "longrope":
        factors = _factors(model, attention_factor=math.sqrt(1 + math.log(8) / math.log(L)))
        parameters |= {"long_factor": list(factors.values), "short_factor": [1.0] * pairs}
    elif method == "dynamic":
        factors = RescaleFactors.dynamic_ntk(**{**shape, "target_length": 150}, factor=8.0)
    else:
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if method == "llama3" else {}
        factors = getattr(RescaleFactors, method)(**shape)
    config = copy.deepcopy(model.config)
    if "partial_rotary_factor" in config.rope_parameters:
        parameters["partial_rotary_factor"] = config.rope_parameters["partial_rotary_factor"]
    nested = "full_attention" in config.rope_parameters
    config.rope_parameters = {**config.rope_parameters, "full_attention": parameters} if nested else parameters
    config.max_position_embeddings = L if method == "dynamic" else 8 * L
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = L
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.load_state_dict(model.state_dict())
    install_factors(model, factors)
    tokens = _tokens(length=150)
    torch.testing.assert_close(_logits(model, tokens), _logits(theirs, tokens), rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_head_of_hidden_states_is_the_model(family):
    model, tokens = _model(family), _tokens()
    for factors in (None, _factors(model)):
        if factors:
            install_factors(model, factors)
        with torch.no_grad():
            ours = output_head(model)(hidden_states(model, tokens))
        torch.testing.assert_close(ours, _logits(model), rtol=0, atol=1e-6)


def test_hidden_states_take_positions():
    model, tokens = _model(), _tokens()
    positions = torch.arange(100, 148)[None].expand(2, -1)
    install_factors(model, _factors(model, start_tokens=8))
    with torch.no_grad():
        shifted = output_head(model)(hidden_states(model, tokens, positions))
        plain = output_head(model)(hidden_states(model, tokens))
    torch.testing.assert_close(shifted, _logits(model, position_ids=positions), rtol=0, atol=1e-6)
    assert (shifted - plain).abs().max() > 1e-3  # rotary scores see distances only, were it not for the start tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_in_one_forward_have_the_logits_each_has_alone(family):
    model = _model(family)
    candidates = [
        _factors(model),
        RescaleFactors.none(**_shape(model)),
        _factors(model, start_tokens=5),
        RescaleFactors.yarn(**_shape(model)),
        _factors(model, attention_factor=1.3),
    ]
    tokens = _tokens(rows=1).expand(5, -1)
    install_factors(model, RescaleFactors.linear(**_shape(model)))
    installed = _logits(model, tokens)
    with candidate_rows(model, candidates):
        together = _logits(model, tokens)
    assert torch.equal(_logits(model, tokens), installed)
    for row, factors in enumerate(candidates):
        install_factors(model, factors)
        # the same batch shape takes the same kernels, so nothing but the tables can make a difference
        assert torch.equal(_logits(model, tokens)[row], together[row]), row
        torch.testing.assert_close(_logits(model, tokens[:1])[0], together[row], rtol=0, atol=1e-5)
    assert len({row.sum().item() for row in together}) == 5


def test_candidates_leave_no_trace_when_a_forward_fails():
    model = _model()
    rotary, before = model.model.rotary_emb, _logits(model)
    three = [_factors(model)] * 3
    with pytest.raises(ValueError, match="given 3 factors, but the batch has 2 rows"), candidate_rows(model, three):
        _logits(model)
    assert model.model.rotary_emb is rotary
    assert torch.equal(_logits(model), before)
    with pytest.raises(ValueError, match="at least one"), candidate_rows(model, []):
        pass
    wrong = RescaleFactors((1.0,) * 3, L, 8 * L)
    with pytest.raises(ValueError, match="8 frequency pairs"), candidate_rows(model, [wrong]):
        pass
    assert model.model.rotary_emb is rotary


def test_install_disturbs_neither_training_mode_nor_randomness_nor_gradients():
    model = _model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    install_factors(model, _factors(model))
    assert torch.equal(torch.rand(3), expected)
    install_factors(model, RescaleFactors.none(**_shape(model)))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "rescale_factors")


def test_factors_that_come_and_go_leave_a_dynamic_rope_as_it_was():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model, fresh = (_model(rope_parameters=dynamic) for _ in range(2))
    pairs = rope_geometry(model.config).pairs
    install_factors(model, RescaleFactors(tuple(1 + i for i in range(pairs)), L, 8 * L))
    install_factors(model, RescaleFactors((1.0,) * pairs, L, L))
    tokens = _tokens(1, L + 40)
    assert torch.equal(_logits(model, tokens), _logits(fresh, tokens))


def test_casting_the_model_does_not_round_the_tables():
    model, exact = _model(), _model()
    install_factors(exact, _factors(exact))
    install_factors(model, _factors(model))
    model.to(torch.bfloat16).to(torch.float32)
    positions = torch.tensor([[0, 1, 1_000_003]])
    ours = model.model.rotary_emb(torch.zeros(1, 3, 64), positions)
    assert torch.equal(ours[0], exact.model.rotary_emb(torch.zeros(1, 3, 64), positions)[0])
    speed = 1 / (1.7 * 10_000.0 ** (0 / 16))
    assert ours[0][0, 2, 0].item() == pytest.approx(math.cos(1_000_003 * speed), abs=1e-6)
    assert model.model.rotary_emb(torch.zeros(1, 3, 64, dtype=torch.bfloat16), positions)[0].dtype == torch.bfloat16


def test_a_model_for_flash_attention_takes_factors_before_it_goes_to_its_device():
    model = _model("llama").bfloat16().train()
    model.config._attn_implementation_internal = "flash_attention_2"  # which has no kernel for the CPU
    factors = _factors(model)
    install_factors(model, factors)
    assert installed_factors(model) == factors
    assert model.config._attn_implementation == "flash_attention_2"
    assert model.training


def test_a_model_built_on_the_meta_device_gets_its_tables_at_once():
    reference = _model()
    install_factors(reference, _factors(reference))
    with torch.device("meta"):
        model = load_model(config={"model_type": "llama", **COMMON, **GROUPED}).eval()
        install_factors(model, _factors(reference))
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    assert torch.equal(_logits(model), _logits(reference))


def test_factors_of_another_size_or_a_model_without_rope_are_refused():
    model = _model()
    with pytest.raises(ValueError, match="8 frequency pairs .*factors have 4 values"):
        install_factors(model, RescaleFactors((1.0,) * 4, L, 8 * L))
    gpt2 = load_model(config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97})
    with pytest.raises(ValueError, match="no rotary embedding"):
        install_factors(gpt2, RescaleFactors((2.0,) * 4, L, 8 * L))


def test_a_rotary_module_of_unknown_layout_is_refused():
    model = _model()
    stock = model.model.rotary_emb
    stock.forward = lambda x, position_ids: (torch.rand(1, 2, 16), torch.rand(1, 2, 16))
    with pytest.raises(ValueError, match="LlamaRotaryEmbedding is not a rotary module"):
        install_factors(model, _factors(model))
    assert model.model.rotary_emb is stock
    assert installed_factors(model) is None


def test_an_install_that_nobody_reads_is_an_error_and_is_taken_back():
    model = _model()
    stock = model.model.rotary_emb
    for layer in model.model.layers:
        own = copy.deepcopy(stock)  # as models had before rotary modules moved out of the layers

        def forward(*args, position_embeddings, plain=layer.forward, own=own, **kwargs):
            return plain(*args, position_embeddings=own(args[0], kwargs["position_ids"]), **kwargs)

        layer.forward = forward
    with pytest.raises(RuntimeError, match="do not change with its rotary table"):
        install_factors(model, _factors(model))
    assert model.model.rotary_emb is stock
    assert installed_factors(model) is None


def test_a_change_too_small_for_the_weights_precision_is_no_error():
    model = _model().to(torch.bfloat16)
    install_factors(model, RescaleFactors((2.0,) * 8, L, 8 * L))
    before = _logits(model)
    install_factors(model, RescaleFactors((2.0,) * 7 + (2.0 + 1e-9,), L, 8 * L))
    assert torch.equal(_logits(model), before)
    assert installed_factors(model).values[-1] > 2


def test_a_checkpoint_brings_back_weights_config_and_factors(tmp_path):
    model = _model("gpt_neox")
    factors = _factors(model, start_tokens=2)
    for given in (None, factors):
        if given is not None:
            install_factors(model, given)
        checkpoint = {
            "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
            "longrope": {"config": model.config.to_dict(), "factors": given and given.to_dict()},
        }
        torch.save(checkpoint, tmp_path / "a.ckpt")
        loaded = load_model(tmp_path / "a.ckpt")
        assert installed_factors(loaded) == given
        assert not loaded.training
        assert torch.equal(_logits(loaded), _logits(model))


def test_a_folder_brings_back_the_model(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(load_model(tmp_path)), _logits(model))
    assert load_model(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path):
    cases = [
        ({"name_or_path": tmp_path / "none.ckpt"}, "No checkpoint at"),
        ({"name_or_path": tmp_path}, "it is a folder, but"),
        ({"name_or_path": None}, "Give either"),
        ({"name_or_path": "x", "config": {"model_type": "llama"}}, "Give either"),
        ({"config": {"hidden_size": 8}}, "needs a `model_type`"),
        ({"config": {"model_type": "llamax"}}, "llamax"),
        ({"config": {"model_type": "llama", "hiden_size": 8, "layers": 2}}, "hiden_size, layers"),
        ({"config": {"model_type": "llama"}, "dtype": "float33"}, "`dtype`"),
    ]
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    cases.append(({"name_or_path": tmp_path / "other.ckpt"}, "not written by LongRoPEModule"))
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_model(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Cannot load a tokenizer"):
        load_tokenizer(tmp_path)
