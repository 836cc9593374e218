"""Estimates against published runs, published parameter counts, and the storages of a real training step."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_longrope.estimate import (
    FUSED,
    GIB,
    ModelSize,
    Run,
    attention_flops,
    fits,
    forward_flops,
    hours,
    kept_bytes,
    layer_bytes,
    levers_that_fit,
    memory_parts,
    peak,
    step_flops,
    utilisation,
)
from lightning_longrope.layers import decoder_layers
from lightning_longrope.levers import Levers
from lightning_longrope.lora import LoRA
from lightning_longrope.losses import chunked_nll
from lightning_longrope.memory import Memory, save_memory
from lightning_longrope.model import hidden_states, output_head
from lightning_longrope.sizes import model_size

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def size_of(fields):
    return model_size(AutoConfig.for_model(**fields))


def published(tokens, devices, sp=1, *, offload=False, tile=None, chunked=True, states=("optimizer",)):
    """A run of the published kind: ZeRO-3 in bf16, checkpointed layers, single kernels for norms and MLPs."""
    levers = Levers(
        "deepspeed", devices=devices, zero_stage=3, sequence_parallel_size=sp, gradient_checkpointing=True,
        offload_activations=offload, mlp_tile=tile, offload_optimizer="optimizer" in states,
        offload_parameters="parameters" in states, chunked_loss=chunked,
    )  # fmt: skip
    return Run(tokens, levers=levers, kernels=FUSED)


ALONE = {"states": ("optimizer", "parameters")}
ROWS = {  # published GiB; what the same formula gave when it was fitted; the run as we read its flags
    "H200, stock loss and MLP": (137.4, 137.1, published(65_000, 1, chunked=False, **ALONE)),
    "H200, fused loss": (135.0, 134.9, published(300_000, 1, **ALONE)),
    "H200, checkpoints offloaded": (126.8, 126.7, published(650_000, 1, offload=True, **ALONE)),
    "H200, tiled MLP": (136.2, 135.9, published(1_200_000, 1, offload=True, tile=4096, **ALONE)),
    "H100, stock": (71.9, 70.5, published(32_000, 1, chunked=False, **ALONE)),
    "8 x H100, no sequence parallel": (80, 76.6, published(160_000, 8)),
    "8 x H100, sequence parallel": (80, 72.8, published(1_100_000, 8, 8)),
    "8 x H100, and tiled MLP": (80, 67.1, published(1_200_000, 8, 8, tile=4096)),
    "8 x H100, and checkpoints offloaded": (80, 76.4, published(2_400_000, 8, 8, offload=True)),
    "8 x H100, all": (80, 79.6, published(3_700_000, 8, 8, offload=True, tile=4096)),
}


@pytest.mark.parametrize("row", ROWS)
def test_published_peaks(row):
    gib, fitted, run = ROWS[row]
    found = peak(size_of(LLAMA_8B), run) / GIB
    if gib == 80:  # the longest rows that fitted the card: no peak was published
        assert 0.83 * gib < found <= gib
    else:
        assert found == pytest.approx(gib, rel=0.02)
    # the row with everything does not come out as it did in the fit, whose flags are not published: 78.0, not 79.6
    assert found == pytest.approx(fitted, rel=0.025 if row.endswith("all") else 0.005)


def test_published_peak_of_another_framework():
    """TRL, Qwen3-8B on 8 H100 with FSDP2, a million tokens (2^20) shared by all, states on the GPUs."""
    found = peak(size_of(QWEN_8B), published(2**20, 8, 8, offload=True, states=())) / GIB
    assert found == pytest.approx(49.7, rel=0.002)
    assert found == pytest.approx(52.3, rel=0.15)


COUNTS = {  # of the published weights
    8_030_261_248: LLAMA_8B,
    8_190_735_360: QWEN_8B,
    6_738_415_616: {"model_type": "llama"},  # Llama 2
    3_821_079_552: {"model_type": "phi3"},
    7_241_732_096: {"model_type": "mistral"},
    46_702_792_704: {"model_type": "mixtral"},
    6_857_302_016: {
        "model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 50432,
    },
    2_614_341_888: {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    },
}  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_parameters_are_those_of_the_published_weights(count):
    found = size_of(COUNTS[count])
    assert found.parameters == found.trainable == count


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma", "gemma3_text", "qwen3_moe", "olmo2"]
)
def test_parameters_are_those_that_transformers_makes(kind):
    config = AutoConfig.for_model(kind, **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    found = model_size(config)
    assert found.parameters == model.num_parameters()
    layers = sum(p.numel() for p in decoder_layers(model).parameters())
    assert found.per_token == layers if kind != "qwen3_moe" else found.per_token < layers / 2
    assert found.layers == len(decoder_layers(model))
    if kind == "llama":
        adapted = model_size(config, LoRA(rank=4, train_norms=False, train_embeddings=False))
        assert adapted.trainable == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32))  # B and A of q, o and of k, v


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {"num_local_experts": 6}),
        ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 24}),
        ("qwen2_moe", {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
        ("deepseek_v3", {"n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 2}),
        ("glm4_moe", {"n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 2}),
    ],
)
def test_the_mlp_of_a_token_is_that_of_its_experts(kind, fields):
    fields |= {"num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    config = AutoConfig.for_model(kind, **SMALL, **fields)
    mlp = AutoModelForCausalLM.from_config(config).model.layers[1].mlp
    shared = getattr(mlp, "shared_expert", getattr(mlp, "shared_experts", None))
    count, hidden, width = mlp.experts.down_proj.shape
    assert (count, hidden) == (6, 64)
    assert model_size(config).mlp == 3 * width + (shared.down_proj.in_features if shared is not None else 0)


def test_sliding_windows_are_read():
    assert model_size(AutoConfig.for_model("gemma3_text", **{**SMALL, "num_hidden_layers": 6})).windows == (4096,) * 5
    assert model_size(AutoConfig.for_model("mistral", **SMALL, sliding_window=7)).windows == (7, 7)
    assert model_size(AutoConfig.for_model("qwen2", **SMALL, sliding_window=7)).windows == ()  # switched off


@pytest.mark.parametrize(
    ("tokens", "flops", "share"),
    [(2**12, 5.9e13, 0.08), (2**17, 6.2e15, 0.72), (2**18, 2.15e16, 0.84), (2**21, 1.18e18, 0.98)],
)
def test_operations_of_a_forward_pass(tokens, flops, share):
    size = size_of({"model_type": "llama"})
    assert forward_flops(size, tokens) == pytest.approx(flops, rel=0.01)
    assert attention_flops(size, tokens) / forward_flops(size, tokens) == pytest.approx(share, abs=0.006)


def test_operations_of_a_step_and_hours():
    size = size_of({"model_type": "llama"})
    plain, again = Run(2**17), Run(2**17, levers=Levers(gradient_checkpointing=True))
    assert step_flops(size, plain) == pytest.approx(3 * 6.2e15, rel=0.01)
    assert step_flops(size, again) == pytest.approx(4 * 6.2e15, rel=0.01)
    frozen = replace(size, trainable=0)
    linear = forward_flops(size, 2**17) - attention_flops(size, 2**17)
    assert step_flops(size, plain) - step_flops(frozen, plain) == pytest.approx(linear)
    assert [utilisation(tokens) for tokens in (4096, 2**17, 2**20, 2**21)] == pytest.approx([0.4, 0.4, 0.35, 0.35])
    # LongRoPE on 8 A100: 50 minutes for three documents of 2048k tokens, published
    assert hours(3 * forward_flops(size, 2**21), 8, 312, 2**21) * 60 == pytest.approx(50, rel=0.4)


def test_a_window_of_the_whole_row_changes_nothing_and_a_short_one_is_linear():
    size = size_of({"model_type": "llama"})
    seen = replace(size, windows=(2**17,) * 32)
    assert attention_flops(seen, 2**17) == attention_flops(size, 2**17)
    short = replace(size, windows=(1024,) * 32)
    assert attention_flops(short, 2**20) == pytest.approx(2 * attention_flops(short, 2**19), rel=0.001)
    pairs = sum(min(token + 1, 16) for token in range(100))
    assert attention_flops(replace(size, windows=(16,) * 32), 100) == pytest.approx(32 * 4 * 4096 * pairs, rel=0.01)


SHAPES = [(2048, 8192, 32, 8, 64), (1024, 3072, 16, 8, 128)]  # h, f, heads, key heads, d
KINDS = {"half": (torch.bfloat16, False), "mixed": (torch.float32, True), "full": (torch.float32, False)}


def live_per_token(shape, kind, layers=2, checkpointing=False, tile=None, training=True):
    """Bytes per token that a step of a real Llama takes at its peak; its tensors have sizes but no content.

    Tiles are of 65,536 tokens, so that shorter rows have as many.
    """
    hidden, mlp, heads, key_heads, head_size = shape
    dtype, autocast = KINDS[kind]
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, head_dim=head_size,
        num_key_value_heads=key_heads, num_hidden_layers=layers, vocab_size=512,
    )  # fmt: skip
    few, many = (
        live_bytes(config, dtype, autocast, tokens, checkpointing, tile and tile * tokens // 65536, training)[0]
        for tokens in (32768, 65536)
    )
    return (many - few) / 32768


def live_bytes(config, dtype, autocast, tokens, checkpointing=False, tile=None, training=True):
    """Most bytes of a step beyond its weights, and the number of these."""
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    AttentionMaskInterface.register("unmasked", lambda *arguments, **options: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="unmasked").train()
        save_memory(model, decoder_layers(model), checkpointing, Memory(mlp_tile=tile))
        with LiveBytes(model) as live, torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                states = hidden_states(model, torch.zeros(1, tokens, dtype=torch.int64))[0]
                if training:
                    loss = chunked_nll(states, output_head(model), torch.zeros(tokens, dtype=torch.int64))[0]
            if training:
                loss.backward()
    return live.most, model.num_parameters()


@pytest.mark.parametrize(("shape", "kind"), [(SHAPES[0], "half"), (SHAPES[1], "mixed"), (SHAPES[1], "full")])
def test_the_work_of_a_layer_is_what_a_real_step_takes(shape, kind):
    hidden, mlp, heads, key_heads, head_size = shape
    size = ModelSize(0, 0, 0, 2, hidden, mlp, heads * head_size, key_heads * head_size, 512, heads)
    for tile in (None, 4096, 16384):
        run = Run(65536, levers=Levers(gradient_checkpointing=True, mlp_tile=tile), precision=kind)
        expected = kept_bytes(size, run) + layer_bytes(size, run)
        assert live_per_token(shape, kind, 2, True, tile) == pytest.approx(expected, rel=0.09), tile
        forward = replace(run, training=False)
        expected = layer_bytes(size, forward)
        assert live_per_token(shape, kind, tile=tile, training=False) == pytest.approx(expected, rel=0.09), tile


@pytest.mark.parametrize("kind", ["half", "mixed"])
def test_what_layers_keep_is_what_a_real_step_keeps(kind):
    hidden, mlp, heads, key_heads, head_size = SHAPES[0]
    size = ModelSize(0, 0, 0, 2, hidden, mlp, heads * head_size, key_heads * head_size, 512, heads)
    grown = live_per_token(SHAPES[0], kind, 3) - live_per_token(SHAPES[0], kind, 1)
    assert grown == pytest.approx(kept_bytes(size, Run(65536, precision=kind)), rel=0.05)


@pytest.mark.parametrize(("kind", "training"), [("mixed", True), ("mixed", False), ("half", True), ("full", True)])
def test_states_of_short_rows_are_those_of_a_real_step(kind, training):
    """Gradients, or the half copies that autocast keeps of the weights; both never at once."""
    config = AutoConfig.for_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=6, vocab_size=96)
    dtype, autocast = KINDS[kind]
    most, parameters = live_bytes(config, dtype, autocast, 16, training=training)
    size, element = model_size(config), 2 if kind == "half" else 4
    run = Run(16, precision=kind, weight_bytes=element, state_bytes=element, gradient_bytes=element, training=training)
    parts = memory_parts(size, run)
    expected = parts["weights"] - element * parameters + parts.get("gradients and optimizer", 0)
    assert expected > 0
    assert most == pytest.approx(expected, rel=0.06)


def test_the_first_saving_that_makes_a_run_fit_is_named():
    size = size_of(LLAMA_8B)
    run = Run(32768, levers=Levers("deepspeed", devices=8, heads=32, zero_stage=3))
    assert not fits(size, run, 80 * GIB)
    assert [lever.name for lever in levers_that_fit(size, run, 80 * GIB)] == ["activation checkpointing"]
    longer = replace(run, seq_len=200_000)
    names = [lever.name for lever in levers_that_fit(size, longer, 80 * GIB)]
    assert names[:2] == ["activation checkpointing", "offload of layer inputs"]
    used = replace(longer, levers=replace(run.levers, gradient_checkpointing=True, offload_activations=True))
    after = used.levers
    for lever in levers_that_fit(size, used, 80 * GIB):
        after = lever.pulled(after)
    assert fits(size, replace(used, levers=after), 80 * GIB)
    assert levers_that_fit(size, replace(run, seq_len=2**24), 80 * GIB) is None


def test_states_follow_the_stage():
    """Llama 2 in bf16 on 4 GPUs: 2 + 2 + 12 bytes a weight, of which each stage shares more."""
    size = size_of({"model_type": "llama"})
    expected = {0: 16, 1: 4 + 12 / 4, 2: 2 + 14 / 4, 3: 16 / 4}
    for stage, each in expected.items():
        parts = memory_parts(size, Run(4096, levers=Levers("deepspeed", devices=4, zero_stage=stage)))
        assert parts["weights"] + parts["gradients and optimizer"] == pytest.approx(each * size.parameters)
    parts = memory_parts(size, Run(4096, levers=Levers("ddp", devices=4)))
    assert parts["gradients and optimizer"] == 16 * size.parameters  # 14, and the gradients again
