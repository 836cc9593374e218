"""Scores against Hugging Face's own loss, one candidate and one document at a time."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama
from live_bytes import LiveBytes
from small_tokenizers import byte_level

from lightning_longrope import scoring
from lightning_longrope.evaluating import score_candidates
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.model import install_factors
from lightning_longrope.objectives import (
    OBJECTIVES,
    Objective,
    SearchDocument,
    named_objective,
    search_documents,
)
from lightning_longrope.scoring import continuation_scores, greedy_matches, token_nll

SHAPE = {"rotary_size": 16, "base": 10_000.0, "original_length": 32, "target_length": 64}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(96, (64,), generator=generator) for _ in range(3)]
    # Two shapes: documents whose answers differ in length cannot share a pass.
    part = torch.arange(64) % 3 > 0
    return [SearchDocument(rows[0], 5), SearchDocument(rows[1], 5, part), SearchDocument(rows[2], 4)]


@pytest.fixture
def candidates():
    odd = RescaleFactors((1.0, 1.1, 1.3, 1.5, 1.7, 1.9, 2.2, 2.4), 32, 64, start_tokens=6, attention_factor=1.1)
    return [RescaleFactors.none(**SHAPE), RescaleFactors.yarn(**SHAPE), RescaleFactors.linear(**SHAPE), odd]


def hugging_face_nll(factors, tokens):
    """nll of each token from the stock forward with one candidate installed alone, in float64."""
    model = tiny_llama()
    install_factors(model, factors)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1].double()
    return (logits.logsumexp(-1) - logits.gather(-1, tokens[1:, None])[:, 0]).tolist()


@pytest.mark.parametrize(
    ("objective", "combine"),
    [("perplexity", lambda t, a: t), ("needle", lambda t, a: a), ("mixed", lambda t, a: t + 0.3 * a)],
)
@pytest.mark.parametrize("batch_tokens", [1, 128, 100_000])
def test_scores_are_those_of_candidates_alone(model, candidates, documents, objective, combine, batch_tokens):
    scores = score_candidates(model, candidates, documents, objective, batch_tokens=batch_tokens)
    assert len({score.value for score in scores}) == len(candidates)  # no two candidates look alike
    for factors, score in zip(candidates, scores, strict=True):
        text, answer = [], []
        for document in documents:
            nll = hugging_face_nll(factors, document.tokens)
            weights = [float(token < 64 - document.answer) for token in range(64)]
            weights = weights if document.text is None else document.text.tolist()
            text += [(weight * value, weight) for weight, value in zip(weights[1:], nll, strict=True)]
            answer += nll[-document.answer :]
        expected = combine(sum(row[0] for row in text) / sum(row[1] for row in text), sum(answer) / len(answer))
        assert score.value == pytest.approx(expected, abs=5e-6)


def test_keys_are_hidden_in_the_first_half_and_only_ordinary_text_counts_as_text():
    tokenizer = byte_level()
    words = tokenizer(" ".join(f"word{number}" for number in range(400)))["input_ids"]
    texts = [torch.tensor(words[start : start + 600]) for start in (0, 100, 200, 300)]
    documents = search_documents(texts, 500, Objective(), tokenizer)
    places = []
    for document, text in zip(documents, texts, strict=True):
        assert len(document.tokens) == 500
        key = tokenizer.decode(document.tokens[-document.answer :]).strip()
        assert re.fullmatch(r"[1-9]\d{4}", key)
        before, inside, after = (tokenizer.decode(part) for part in split_at_gap(document))
        assert f"The pass key is {key}. Remember it. {key} is the pass key." in inside
        assert "pass key" not in before + after
        assert before in tokenizer.decode(text)
        assert after in tokenizer.decode(text)
        places.append(document.text.tolist().index(False, 1))
    assert places == sorted(places)
    assert places[-1] < 250 < 2 * places[-1]


def split_at_gap(document):
    """Tokens of the text before the needle, of the needle, and of the text after it."""
    text = document.text.tolist()
    start = text.index(True)
    gap = text.index(False, start)
    stop = text.index(True, gap)
    end = text.index(False, stop)
    return document.tokens[start:gap], document.tokens[gap:stop], document.tokens[stop:end]


def test_token_nll_at_the_last_rows_of_a_batch(model):
    tokens = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(4))
    nll = token_nll(model, tokens)
    for row, values in zip(tokens, nll.tolist(), strict=True):
        assert values == pytest.approx(hugging_face_nll(RescaleFactors.none(**SHAPE), row), abs=2e-5)


def test_greedy_matches_is_what_generation_would_say(model):
    prompt = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(5))
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy_matches(model, generated, 6).all()
    wrong = generated.clone()
    wrong[0, -3] = (wrong[0, -3] + 1) % 96
    assert greedy_matches(model, wrong, 6)[0, :4].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(size, dtype=torch.int64) for size in (10, 9)], "at least 10 .*got \\[9\\]"),
        ([[1] * 10], "1-D int64 tensors of tokens, got list"),
        ([torch.zeros(2, 10)], "got torch.float32 \\(2, 10\\)"),
    ],
)
def test_documents_that_cannot_be_searched_on_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        search_documents(texts, 10, OBJECTIVES["perplexity"])


def test_an_objective_that_asks_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        named_objective("mixed", None)
    with pytest.raises(ValueError, match="must be mixed, needle, perplexity or an Objective, got 'loss'"):
        named_objective("loss", None)


@pytest.mark.parametrize("depths", [(0.0, 0.0), (0.25, 1.0)])
def test_keys_lie_where_they_are_told_to(depths):
    tokenizer = byte_level()
    words = tokenizer(" ".join(f"word{number}" for number in range(400)))["input_ids"]
    texts = [torch.tensor(words[start : start + 600]) for start in (0, 300)]
    for index, document in enumerate(search_documents(texts, 500, Objective(needle_depths=depths), tokenizer)):
        before, room = document.text.tolist().index(0, 1) - 1, int((document.text > 0).sum())  # after BOS
        assert before == pytest.approx((depths[0] + (index + 0.5) / 2 * (depths[1] - depths[0])) * room, abs=1)
        assert (before == 0) == (depths == (0.0, 0.0))


def test_the_last_eighth_weighs_what_it_is_told_to(model, candidates):
    texts = [torch.randint(96, (64,), generator=torch.Generator().manual_seed(7))]
    documents = search_documents(texts, 64, Objective(answer=0.0, end_weight=3.0))
    score = score_candidates(model, candidates[1:2], documents, "perplexity")[0]
    nll = hugging_face_nll(candidates[1], texts[0])  # of tokens 1 to 63; the last eighth begins at 56
    expected = (sum(nll[:55]) + 3 * sum(nll[55:])) / (55 + 3 * 8)
    assert score.value == pytest.approx(expected, abs=5e-6)


def test_text_before_the_share_does_not_count(model, candidates):
    texts = [torch.randint(96, (64,), generator=torch.Generator().manual_seed(7))]
    documents = search_documents(texts, 64, Objective(answer=0.0, text_from=0.75, end_weight=1.0))
    score = score_candidates(model, candidates[1:2], documents, "perplexity")[0]
    assert score.value == pytest.approx(sum(hugging_face_nll(candidates[1], texts[0])[47:]) / 16, abs=5e-6)


def test_text_before_the_share_does_not_count_around_a_needle_either():
    tokenizer = byte_level()
    texts = [torch.tensor(tokenizer(" ".join(f"word{number}" for number in range(400)))["input_ids"])[:600]]
    whole, late = (
        search_documents(texts, 500, Objective(text_from=share, end_weight=1.0), tokenizer)[0] for share in (0.0, 0.5)
    )
    assert late.answer == whole.answer > 0
    assert not late.text[:250].any()
    assert torch.equal(late.text[250:], whole.text[250:])
    assert whole.text[:250].any()
    assert late.text.any()


@pytest.mark.parametrize(
    "arguments",
    [{"text": 0, "answer": 0}, {"text": -1}, {"text_from": 1}, {"end_weight": 0}, {"needle_depths": (0.6, 0.5)}],
)
def test_objectives_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="`(text|text_from|end_weight|needle_depths)`"):
        Objective(**arguments)


FAULTS = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lightning_longrope import RescaleFactors
from lightning_longrope.objectives import SearchDocument
from lightning_longrope.scoring import row_sums
sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()
table, row = RescaleFactors((1.0,) * 32, 1024, 2048), SearchDocument(torch.ones(2048, dtype=torch.int64))
taken = []
for _ in range(8):
    row_sums(model, [table], [row])
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(taken[-1] - taken[2])
"""


GROWTH = """
import pathlib, re, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lightning_longrope.scoring import token_nll
sizes = {"hidden_size": 256, "intermediate_size": 680, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).eval()
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) >> 10
token_nll(model, torch.ones(1, 32, dtype=torch.int64))
before, most, real = held(), 0, torch.nn.functional.cross_entropy
def watched(*arguments, **options):
    global most
    most = max(most, held())
    return real(*arguments, **options)
torch.nn.functional.cross_entropy = watched
for _ in range(3):
    token_nll(model, torch.ones(1, 2048, dtype=torch.int64))
print(most - before)
"""


def printed(script):
    """The number that a script prints in a process of its own: threads and variables of malloc are a user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_passes_of_a_search_on_a_cpu_do_not_take_their_memory_from_the_system_again_and_again():
    assert printed(FAULTS) < 20_000  # pages in five passes; 60,000 where each is handed back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_logits_of_some_positions_leave_free_takes_those_of_the_next():
    # MiB for 16 times 16 MiB of logits; above 300 where small results lie in between, in four of five processes
    assert max(printed(GROWTH) for _ in range(2)) < 200


@torch.no_grad()
@pytest.mark.parametrize(
    "score",
    [
        token_nll,
        lambda model, rows: token_nll(model, rows, last=250),
        lambda model, rows: greedy_matches(model, rows, 250),
        lambda model, rows: continuation_scores(model, rows[:, :-1].tolist(), [(0, rows[0, 6:].tolist())]),
    ],
    ids=["all", "last", "greedy", "continuations"],
)
def test_no_more_logits_are_alive_than_those_of_a_few_positions(score, monkeypatch):
    vocabulary, positions = 2048, 8
    monkeypatch.setitem(scoring.LOGITS_AT_A_TIME, "cpu", positions * vocabulary)
    model = tiny_llama(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    with LiveBytes(model) as live:
        score(model, torch.arange(256).view(1, -1))
    assert live.most < 6 * 4 * positions * vocabulary  # float32; those of all positions are 2 MiB


def test_positions_at_a_time_follow_the_vocabulary_up_to_a_number():
    assert {scoring._positions_at_a_time(tiny_llama(vocab_size=size)) for size in (8, 1024)} == {1024}
    assert scoring._positions_at_a_time(tiny_llama(vocab_size=2**16)) == 64  # 16 MiB in float32
