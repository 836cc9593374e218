"""Cut texts have the tokens of whole ones, under tokenizers of five families, and processes change nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXT, byte_level, sentencepiece_like
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_longrope import tokenizing
from lightning_longrope.tokenizing import Encoder, Piece, encode_in_order

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MORE = [
    TEXT,
    "1234567 000 " * 50,
    "==== ---- ==== " * 40,
    "漢字かな交じり文。" * 40,
    "\n\n  \n   x\t" * 40,
    "don't we'll " * 40,
]


def trained(model, trainer, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(MORE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@cache
def llama_3():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), level])
    alphabet = level.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, steps)


@cache
def unigram():
    """Like T5 and XLM-R: a space before every text."""
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC())


@cache
def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


WORDLESS = (3,)  # of MORE: to a tokenizer that knows no words but those between spaces
FAMILIES = [byte_level, llama_3, sentencepiece_like, unigram, word_piece]
ATOMS = ["the garden ", "Nobody remembered", " ", "\n", "\n\n", "  ", "\t", "12", "7", "=====", "--", "漢字", "é",
         "e\u0301", "'s", "don't", "<s>", "</s>", ".", ",”", "\U0001f600", "a", "B", "▁", "\r\n", "!\n"]  # fmt: skip


CUT = defaultdict(list)


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(tokenizing, "PIECE", 700)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_the_tokens_of_the_pieces_are_those_of_the_text_where_no_doubt_is_marked(family, parts, seed):
    tokenizer, encoder = family(), Encoder(family())
    text = "".join(random.Random(seed).choices(parts, k=900))
    pieces = list(encoder.pieces(text))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.goes_on for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert max(len(piece.text) for piece in pieces) <= 1400
    CUT[family.__name__].append(any(piece.cut for piece in pieces))
    if not CUT[family.__name__][-1]:
        assert np.concatenate(encoder.encode(pieces)).tolist() == whole(tokenizer, text)


def test_most_texts_were_cut_without_a_doubt():
    """Runs after the test above, which says nothing of the others."""
    for name, doubts in CUT.items():
        assert sum(doubts) < 0.7 * len(doubts), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("kind", range(len(MORE)))
def test_ordinary_text_is_cut_without_a_doubt(family, kind):
    if family is unigram and kind in WORDLESS:
        pytest.skip("one word from beginning to end")
    tokenizer, encoder = family(), Encoder(family())
    text = MORE[kind] * (1 + 20_000 // len(MORE[kind]))
    pieces = list(encoder.pieces(text))
    assert len(pieces) > 10
    assert not any(piece.cut for piece in pieces)
    assert np.concatenate(encoder.encode(pieces)).tolist() == whole(tokenizer, text)


def test_a_text_that_no_cut_leaves_alone_is_cut_and_marked():
    tokenizer, encoder = llama_3(), Encoder(llama_3())
    text = "".join(random.Random(0).choices("0123456789", k=5000))  # cut into threes from its beginning
    pieces = list(encoder.pieces(text))
    assert "".join(piece.text for piece in pieces) == text
    assert any(piece.cut for piece in pieces)
    digits = [piece for piece in pieces[:-1] if len(piece.text) % 3]
    assert digits
    assert np.concatenate(encoder.encode(pieces)).tolist() != whole(tokenizer, text)
    short = "a b c " * 100
    assert list(encoder.pieces(short)) == [Piece(short)]


def test_a_tokenizer_whose_class_does_more_than_its_backend_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__([line.upper() for line in text], **options)

    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer)
    assert Encoder(tokenizer).encode([Piece("green")])[0].tolist() == whole(byte_level(), "GREEN")
    assert Encoder(byte_level()).encode([Piece("green")])[0].tolist() == whole(byte_level(), "green")


def batches(count=40):
    return [[Piece(f"the garden {number} {word}") for word in TEXT.split()[: number % 7]] for number in range(count)]


@pytest.mark.distributed
def test_processes_give_the_same_tokens_in_the_same_order():
    encoder = Encoder(byte_level())
    alone = [(tokens.tolist(), counts) for tokens, counts in encode_in_order(encoder, batches(), 0)]
    shared = [(tokens.tolist(), counts) for tokens, counts in encode_in_order(encoder, iter(batches()), 2)]
    assert shared == alone
    assert len(alone) == 40


def test_batches_are_not_taken_far_ahead_of_what_is_given():
    taken = []

    def watched():
        for number, batch in enumerate(batches(100)):
            taken.append(number)
            yield batch

    results = encode_in_order(Encoder(byte_level()), watched(), 0)
    next(results)
    assert len(taken) == 1
    results.close()


SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {tests!r})
from small_tokenizers import byte_level
from lightning_longrope.tokenizing import Encoder, Piece, encode_in_order

def endless():
    while True:
        yield [Piece("the garden " * 1000)]

if __name__ == "__main__":
    for number, _ in enumerate(encode_in_order(Encoder(byte_level()), endless(), 2)):
        if number == 5:
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


@pytest.fixture
def endless(tmp_path):
    """A process that tokenises with two workers, and their numbers."""
    script = tmp_path / "endless.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, [int(word) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        process.communicate()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.distributed
def test_workers_end_when_the_process_that_started_them_is_killed(endless):
    process, workers = endless
    assert len(workers) == 2
    assert all(map(alive, workers))
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.distributed
def test_a_worker_that_is_killed_is_one_clear_line(endless):
    process, workers = endless
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert "ChildProcessError: A tokenising process was killed, perhaps for want of memory" in errors
    assert process.returncode == 1


def test_a_worker_imports_neither_torch_nor_transformers():
    code = "import sys, lightning_longrope.tokenizing; print({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
