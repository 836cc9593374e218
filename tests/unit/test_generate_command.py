"""``longrope generate``, held against full forwards of the same model without a cache."""

import io

import pytest
import torch
from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level

from lightning_longrope import LengthTables, RescaleFactors, install_factors
from lightning_longrope.__main__ import main

L = 32
TABLES = [RescaleFactors(tuple(1 + step * i for i in range(8)), L, L * scale) for step, scale in ((0.3, 1), (2.0, 4))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with two tables, its tokenizer beside it, and a prompt of fewer tokens than the first is for."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_level()
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.25)
    install_factors(model, TABLES)
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "longrope": {"config": model.config.to_dict(), "factors": LengthTables.of(TABLES).to_dict()},
    }
    torch.save(checkpoint, folder / "a.ckpt")
    tokenizer.chat_template = "{{ bos_token }}Q: {{ messages[0]['content'] }} A:"
    tokenizer.save_pretrained(folder)
    (folder / "prompt.txt").write_text("In the house of the miller, there was a lamp")
    return folder


def _words(folder, *more, prompt="prompt.txt"):
    source = prompt if prompt == "-" else str(folder / prompt)
    return ["generate", "--model", str(folder / "a.ckpt"), "--prompt-file", source, *more]


@torch.no_grad()
def _by_hand(text, new, **kwargs):
    """Text of a greedy answer without a cache, each step under the one table for its length."""
    tokens = byte_level()(text, **kwargs)["input_ids"]
    prompt = len(tokens)
    assert prompt < L < prompt + new
    for _ in range(new):
        model = tiny_llama(vocab_size=len(byte_level()), initializer_range=0.25)
        install_factors(model, TABLES[len(tokens) > L])
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return byte_level().decode(tokens[prompt:], skip_special_tokens=True)


def test_the_answer_is_streamed_and_that_of_full_forwards(saved, capsys, monkeypatch):
    said = []  # by transformers, beyond what it takes for the window
    monkeypatch.setattr("transformers.generation.stopping_criteria.logger.warning_once", said.append)
    assert main(_words(saved, "--max-new-tokens", "40")) == 0
    shown = capsys.readouterr()
    expected = _by_hand((saved / "prompt.txt").read_text(), 40)
    assert shown.out.strip() == expected.strip()
    assert len(set(expected)) > 10
    assert "window of 128, read with a table for 32" in shown.err
    assert not said
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((saved / "prompt.txt").read_bytes())))
    assert main(_words(saved, "--max-new-tokens", "40", prompt="-")) == 0
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_chat_template_is_put_around_the_prompt(saved, capsys):
    assert main(_words(saved, "--max-new-tokens", "20", "--chat")) == 0
    asked = f"<s>Q: {(saved / 'prompt.txt').read_text()} A:"
    assert capsys.readouterr().out.strip() == _by_hand(asked, 20, add_special_tokens=False).strip()


def test_sampling_repeats_with_its_seed(saved, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        assert main(_words(saved, "--max-new-tokens", "20", "--temperature", "1.5", "--seed", seed)) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_over_the_window_and_other_mistakes_are_one_line(saved, capsys):
    (saved / "long.txt").write_text(TEXT)
    (saved / "nearly.txt").write_text(byte_level().decode(byte_level()(TEXT)["input_ids"][:120]))
    (saved / "empty.txt").write_text("")
    cases = [
        (_words(saved, prompt="long.txt"), "but the model's window is 128 tokens"),
        (_words(saved, prompt="empty.txt"), "The prompt is empty"),
        (_words(saved, prompt="none.txt"), "No prompt at"),
        (_words(saved, "--max-new-tokens", "0"), "--max-new-tokens"),
        (_words(saved)[:3], "--prompt-file"),
        (_words(saved, "--model", str(saved / "none.ckpt"), "--tokenizer", str(saved)), "No checkpoint at"),
    ]
    for words, message in cases:
        assert main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("longrope: error:")
        assert message in error
    assert main(_words(saved, prompt="nearly.txt")) == 0
    assert "The answer ends after 8 tokens" in capsys.readouterr().err


def test_a_standard_input_that_is_no_text_and_a_seed_too_large_are_one_line(saved, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    assert main(_words(saved, prompt="-")) == 2
    assert (
        capsys.readouterr().err == "longrope: error: The standard input is not UTF-8 (invalid start byte at byte 0).\n"
    )
    assert main(_words(saved, "--seed", str(1 << 80))) == 2
    assert "argument --seed: must be from 0 to 4294967295, got " in capsys.readouterr().err
