"""What a module is told of the RoPE its model was pretrained with, or gets by formula, against transformers' own."""

import pytest
import torch
from helpers import LLAMA, tiny_llama
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config

from lightning_longrope import LongRoPEModule, RescaleFactors, install_factors
from lightning_longrope.model import installed_factors, rope_geometry

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


def module_of(folder, **arguments):
    module = LongRoPEModule(str(folder), **arguments)
    module.configure_model()
    return module


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_rope_parameters_give_the_table_of_transformers(tmp_path, rope_type):
    """Of a model with wide initial weights, in which another table shows."""
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path)
    own = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    parameters = {"rope_type": rope_type, "factor": 4.0, **own}
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        max_position_embeddings=128,
        rope_parameters={**LLAMA["rope_parameters"], **parameters, "original_max_position_embeddings": 32},
    )
    module = module_of(tmp_path, factors=parameters)
    torch.testing.assert_close(logits(module.model), logits(theirs), rtol=0, atol=2e-5)
    assert not torch.allclose(logits(module.model), logits(module_of(tmp_path).model), atol=1e-2)
    factors = installed_factors(module.model)
    assert (factors.original_length, factors.target_length) == (32, 128)


@pytest.mark.parametrize("config", [MistralConfig, Phi3Config])
def test_the_pretrained_window_is_that_of_attention_that_slides_no_more(tmp_path, config, caplog):
    """Mistral 7B and Phi-3 mini see fewer tokens than their configs say they can read."""
    extra = {"pad_token_id": 0} if config is Phi3Config else {"num_key_value_heads": 2}
    own = config(**SMALL, **extra, max_position_embeddings=64, sliding_window=16, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(own).save_pretrained(tmp_path)
    sliding, everything = (
        AutoModelForCausalLM.from_pretrained(tmp_path, **changes) for changes in ({}, {"sliding_window": None})
    )
    untouched = module_of(tmp_path)
    assert torch.equal(logits(untouched.model), logits(sliding))
    factors = RescaleFactors((2.0,) * rope_geometry(own).pairs, 16, 64)
    with caplog.at_level("WARNING"):
        install_factors(untouched.model, factors)
    assert "the last 16 tokens" in caplog.text
    caplog.clear()
    lifted = module_of(tmp_path, original_length=16)
    assert torch.equal(logits(lifted.model), logits(everything))
    assert not torch.allclose(logits(sliding), logits(everything), atol=1e-2)
    assert rope_geometry(lifted.model.config).original_length == 16
    install_factors(lifted.model, factors)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_window_of_no_tokens_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`original_length` must be at least 1"):
        module_of(tmp_path, original_length=0)
