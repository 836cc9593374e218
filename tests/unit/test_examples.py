"""The examples run."""

import runpy
from pathlib import Path

from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_there_is_a_test_for_every_example():
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["custom_objective.py"]


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
