"""``longrope estimate`` on configurations and recipes, and the keys it proposes, which must be those of the CLI."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import LLAMA
from lightning.pytorch import Callback

from lightning_longrope import LongRoPEModule
from lightning_longrope.__main__ import main
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.levers import Levers, advice, keys, unused_levers
from lightning_longrope.run_settings import levers_of, precision_of

ROOT = Path(__file__).parents[2]
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def configuration(tmp_path, **model):
    content = {
        "trainer": {
            "max_steps": 400,
            "precision": "bf16-mixed",
            "strategy": {
                "class_path": "lightning_longrope.strategies.LongContextDeepSpeedStrategy",
                "init_args": {"stage": 3},
            },
            "callbacks": [{
                "class_path": "lightning_longrope.callbacks.FactorSearch",
                "init_args": {"target_length": 131072},
            }],
        },
        "model": {"class_path": "lightning_longrope.LongRoPEModule", "init_args": {"config": LLAMA_8B, **model}},
        "data": {
            "class_path": "lightning_longrope.datamodules.SampleTextDataModule",
            "init_args": {"seq_len": 131072, "batch_size": 1},
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_configuration(tmp_path, capsys):
    words = ["estimate", "-c", configuration(tmp_path), "--gpus", "8", "--nodes", "2", "--gpu-memory", "80"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fit: 8.03 B parameters" in lines
    # 16 documents x (17 candidates + 3 baselines) + 8 held out x 4, of 7.5e15 FLOPs each
    search = next(line for line in lines if "forward passes" in line)
    assert " for 352 forward passes of 131,072 tokens (17 candidates, 3 baselines)" in search
    assert "16 GPUs at 40% of 989 TFLOP/s" in search
    training = next(index for index, line in enumerate(lines) if line.startswith("  training"))
    assert "does not fit 80 GiB" in lines[training]
    assert "`model.init_args.gradient_checkpointing: true`" in lines[training + 2]
    flops = 400 * 16 * 3 * (2 * 131072 * (8.03e9 - 0.525e9) + 2 * 131072**2 * 4096 * 32)
    assert f"400 steps of 16 rows of 131,072 tokens: {flops:.2g} FLOPs" in lines[training + 3]
    found = flops / (16 * 989e12 * 0.4) / 3600
    assert f"{found:.1f} h for 400 steps" in lines[training + 3]


@pytest.mark.parametrize(
    ("devices", "count"), [([0, 1, 2, 3], 4), ("0,1,2,3", 4), ("3,", 1), ("4", 4), (2, 2), ("auto", 1), (-1, 3)]
)
def test_devices_of_the_configuration_are_counted(tmp_path, capsys, monkeypatch, devices, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    path = Path(configuration(tmp_path))
    content = yaml.safe_load(path.read_text())
    content["trainer"]["devices"] = devices
    path.write_text(yaml.safe_dump(content))
    assert main(["estimate", "-c", str(path)]) == 0
    assert f" {count} GPUs at 40%" in capsys.readouterr().out


def test_all_devices_where_there_are_none_ask_for_a_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["estimate", "-c", configuration(tmp_path), "--trainer.devices", "-1"]
    assert main(words) == 2
    assert "`trainer.devices: -1` does not say how many GPUs a node has: give --gpus" in capsys.readouterr().err
    assert main([*words, "--gpus", "2"]) == 0


class Plain(Callback):
    """A callback without arguments."""


class OwnArguments(LongRoPEModule):
    """A module without the arguments of its base."""

    def __init__(self, name_or_path: str):
        super().__init__(name_or_path)


def test_classes_without_the_usual_arguments(tmp_path, capsys):
    torch.save({"longrope": {"config": LLAMA, "factors": None}, "state_dict": {}}, tmp_path / "mine.ckpt")
    content = {
        "trainer": {"max_steps": 4, "callbacks": [{"class_path": f"{__name__}.Plain"}]},
        "model": {"init_args": {"name_or_path": str(tmp_path / "mine.ckpt")}},
        "data": {
            "class_path": "lightning_longrope.datamodules.SampleTextDataModule",
            "init_args": {"seq_len": 64, "batch_size": 1},
        },
    }
    output = []
    for module in ("lightning_longrope.LongRoPEModule", f"{__name__}.OwnArguments"):
        content["model"]["class_path"] = module
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        assert main(["estimate", "-c", str(tmp_path / "config.yaml")]) == 0
        output.append(capsys.readouterr().out)
    assert "4 steps of 1 rows of 64 tokens" in output[0]
    assert output[0] == output[1]


def test_savings_of_the_configuration_count(tmp_path, capsys):
    path = configuration(tmp_path, gradient_checkpointing=True, memory={"offload_activations": True, "mlp_tile": 4096})
    words = ["--trainer.strategy.sequence_parallel_size", "8", "--tflops", "100"]
    assert main(["estimate", "-c", path, "--gpus", "8", "--gpu-memory", "80", *words]) == 0
    output = capsys.readouterr().out
    assert ", fits 80 GiB with 10% headroom" in output
    assert "kept by layers" not in output
    assert "exchange between ranks" in output
    assert "8 GPUs at 40% of 100 TFLOP/s" in output


def test_adapters_are_float32_beside_half_weights(tmp_path, capsys):
    path = configuration(tmp_path, lora={"rank": 8}, dtype="bfloat16")
    assert main(["estimate", "-c", path, "--trainer.strategy", "auto"]) == 0
    output = capsys.readouterr().out
    adapters = 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))  # of q and o, of k and v
    trained = adapters + 128256 * 4096 + (2 * 32 + 1) * 4096  # embeddings and norms
    assert f"{trained / 1e6:.2f} M of them trained" in output
    assert f"gradients and optimizer {12 * trained / 2**30:.1f}, " in output
    assert f"weights {2 * (8_030_261_248 + adapters) / 2**30:.1f}, " in output


def test_every_stage_of_a_recipe_and_one_alone(capsys, tmp_path, monkeypatch):
    assert main(["estimate", "-c", str(ROOT / "configs/quickstart")]) == 0
    recipe = capsys.readouterr().out
    assert [line for line in recipe.splitlines() if not line.startswith("  ")][:4] == [
        f"{stage}: 0.98 M parameters"
        for stage in ("1-pretrain (fit)", "2-search (search)", "3-finetune (fit)", "4-evaluate (compare)")
    ]
    assert main(["estimate", f"--config={ROOT}/configs/quickstart/3-finetune.yaml"]) == 0
    alone = capsys.readouterr().out
    assert alone.splitlines()[1] in recipe
    assert "120 steps of 8 rows of 1,024 tokens" in alone
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "-c", "configs/quickstart"]) == 0
    assert capsys.readouterr().out == recipe


def test_a_model_of_ones_own_in_place_of_the_first_stage(tmp_path, capsys):
    saved = {
        "longrope": {"config": {**LLAMA, "num_hidden_layers": 1}, "factors": None},
        "state_dict": {"model.x": torch.zeros(9)},
    }
    torch.save(saved, tmp_path / "mine.ckpt")
    words = ["estimate", "-c", str(ROOT / "configs/quickstart"), "--model.name_or_path", str(tmp_path / "mine.ckpt")]
    assert main(words) == 0
    assert "2-search (search): 0.04 M parameters" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "none.ckpt")]) == 2
    assert "none.ckpt" in capsys.readouterr().err


DATA = ["--data", "lightning_longrope.datamodules.SampleTextDataModule"]


def set_key(content, name, value):
    *parents, last = name.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value


@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp", 4), ("deepspeed_stage_1", 4), ("fsdp", 4)])
def test_every_key_that_is_proposed_is_taken_by_the_command_line(strategy, devices, tmp_path):
    levers, path = levers_of(strategy, {}, devices, 32), tmp_path / "config.yaml"
    content = {"model": {"init_args": {"config": LLAMA}}, "trainer": {"strategy": strategy}}
    seen = 0
    while (lever := next(unused_levers(levers), None)) is not None:
        after = lever.pulled(levers)
        proposed = keys(levers, after)
        assert len(proposed) == 1
        assert proposed[0] in advice(levers)
        name, value = proposed[0].split(": ", 1)
        set_key(content, name, yaml.safe_load(value))
        path.write_text(yaml.safe_dump(content))
        config = LongRoPECLI(["fit", "-c", str(path), *DATA], check=True).config.fit.as_dict()
        read = levers_of(config["trainer"]["strategy"], config["model"]["init_args"], devices, 32)
        assert read == after
        levers, seen = after, seen + 1
    assert seen >= 4
    assert "every saving in use" in advice(levers)


def test_names_of_strategies():
    assert levers_of("deepspeed_stage_3_offload", {}, 4, 4) == Levers(
        "deepspeed", False, 4, 4, zero_stage=3, offload_optimizer=True, offload_parameters=True
    )
    zero = {"class_path": "DeepSpeedStrategy", "init_args": {"config": {"zero_optimization": {"stage": 1}}}}
    assert levers_of(zero, {}, 4, 4).zero_stage == 1
    with pytest.raises(ValueError, match="must divide the number of GPUs"):
        levers_of({"class_path": "DDP", "init_args": {"sequence_parallel_size": 3}}, {}, 4, 6)


def test_precisions():
    assert precision_of("deepspeed", "bf16-mixed", "float32", None) == ("half", 2, 2, 4)
    assert precision_of("ddp", "bf16-mixed", "float32", None) == ("mixed", 4, 4, 0)
    assert precision_of("ddp", "bf16-true", "float32", None) == ("half", 2, 2, 0)
    assert precision_of("single", None, "float32", None) == ("full", 4, 4, 0)


@pytest.mark.parametrize("flag", ["--gpus", "--nodes", "--gpu-memory", "--tflops"])
@pytest.mark.parametrize("value", ["0", "-4", "nan", "inf"])
def test_numbers_that_stand_for_no_machine_are_refused(flag, value, tmp_path, capsys):
    assert main(["estimate", "-c", str(tmp_path), flag, value]) == 2
    assert f"argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--command", "foo"],
        ["--trainer.strategy", "nope"],
        ["--trainer.accumulate_grad_batches", "-4"],
        ["--model.config.hidden_size", "33"],
        ["--model.config.num_attention_heads", "0"],
    ],
)
def test_settings_of_which_nothing_can_be_estimated_are_refused(words, tmp_path, capsys):
    assert main(["estimate", "-c", configuration(tmp_path, config=LLAMA), *words]) == 2
    assert capsys.readouterr().err.startswith("longrope: error: ")
