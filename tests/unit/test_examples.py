"""The examples run."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level

from lightning_longrope import LengthTables, RescaleFactors, export_model, install_factors, load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_there_is_a_test_for_every_example():
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert sorted(names) == ["custom_objective.py", "pipeline.py", "stays_close.py"]


def test_a_custom_objective(tmp_path, capsys):
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join([TEXT] * 3))
    example = runpy.run_path(str(EXAMPLES / "custom_objective.py"))
    example["main"](str(tmp_path / "model"), 300, str(tmp_path / "text.txt"), max_evaluations=4)
    shown = capsys.readouterr().out
    assert "RescaleFactors(values=(1.0, " in shown
    assert "HeldOut(score=" in shown
    assert example["Worst"]().value(2.0, 3.0) == 3.0


def _saved(folder, **changes):
    """A random model and its tokenizer in a folder."""
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.25, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_pipeline_answers_as_full_forwards_do(tmp_path, capsys):
    model, tokenizer = _saved(tmp_path / "model")
    tables = [RescaleFactors(tuple(1 + k * i for i in range(8)), 32, 32 * s) for k, s in ((0.3, 1), (2.0, 4))]
    install_factors(model, tables)
    export_model(model, tokenizer, tmp_path / "hf", custom_code=True)
    prompt = "In the house of the miller, there was a lamp"
    answer = runpy.run_path(str(EXAMPLES / "pipeline.py"))["main"](str(tmp_path / "hf"), prompt, 40)
    tokens = tokenizer(prompt)["input_ids"]
    read, count = load_model(tmp_path / "model"), len(tokens)
    assert count < 32 < count + 40
    for _ in range(40):
        install_factors(read, LengthTables.of(tables).for_length(len(tokens)))
        with torch.no_grad():
            tokens.append(int(read(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert answer == tokenizer.decode(tokens[count:], skip_special_tokens=True)
    assert "window: 128 tokens" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
def test_a_module_of_ones_own_stays_close_to_its_start(tmp_path, capsys):
    _saved(tmp_path / "model")
    RescaleFactors((1.0, 1.5) + (2.0,) * 6, 32, 64).save(tmp_path / "factors.json")
    (tmp_path / "text.txt").write_text(TEXT)
    example = runpy.run_path(str(EXAMPLES / "stays_close.py"))
    arguments = str(tmp_path / "model"), str(tmp_path / "factors.json"), str(tmp_path / "text.txt")
    free, held = (example["main"](*arguments, anchor, steps=8) for anchor in (0.0, 10.0))
    assert 0 < held.distance() < free.distance() / 2
    start = dict(load_model(tmp_path / "model").named_parameters())
    far = sum((p - start[name]).square().sum() for name, p in free.model.named_parameters())
    assert free.distance().item() == pytest.approx(far.item(), rel=1e-4)
    assert f"{free.distance():.6f}" in capsys.readouterr().out
