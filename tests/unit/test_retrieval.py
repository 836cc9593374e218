"""Passkey prompts against the text of the paper, written down here again, and against whole-text tokenisation."""

import random
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXT, byte_level, decode, sentencepiece_like
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_longrope.retrieval import PasskeyPrompts, wilson_interval

# Appendix A.1 of the paper, its line breaks inside a paragraph read as spaces.
OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = r"The pass key is (?P<key>\d{5})\. Remember it\. (?P=key) is the pass key\."
QUESTION = r"What is the pass key\? The pass key is (?P=key)"

TOKENIZERS = {
    "digits apart": byte_level,
    "digits merged": lambda: byte_level(split_digits=False),
    "no BOS": lambda: byte_level(bos=False),
    "SentencePiece": sentencepiece_like,
}
every_tokenizer = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)
every_filler = pytest.mark.parametrize("filler", ["appendix", "text"])


@cache
def prompts_with(tokenizer, filler, seed=0):
    # Llama's decoder shows a newline beside half a letter as no newline at all: keep to whole letters there.
    text = TEXT if tokenizer is not sentencepiece_like() else re.sub("[^ -~\n]", "", TEXT)
    return PasskeyPrompts(tokenizer, filler, torch.tensor(tokenizer.encode(text, add_special_tokens=False)), seed)


def needle_start(tokenizer, prompt):
    """Characters before the needle."""
    return decode(tokenizer, prompt.tokens).index("The pass key is ")


@every_tokenizer
@every_filler
@settings(max_examples=40, deadline=None)
@given(extra=st.integers(0, 300), depth=st.floats(0, 1), trial=st.integers(0, 10**6), seed=st.integers(0, 3))
def test_every_prompt_has_its_length_and_reads_as_the_paper_has_it(tokenizer, filler, extra, depth, trial, seed):
    prompts = prompts_with(tokenizer, filler, seed)
    prompt = prompts.prompt(prompts.shortest + extra, depth, trial)
    assert prompt.tokens.shape == (prompts.shortest + extra,)
    assert prompt.tokens.dtype == torch.int64
    begins = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert prompt.tokens[: len(begins)].tolist() == begins
    opening = re.escape(OPENING) + r"\n" if filler == "appendix" else ""
    text = decode(tokenizer, prompt.tokens)
    match = re.fullmatch(rf"\s?{opening}(?P<before>.*)\n{NEEDLE}\n(?P<after>.*)\n{QUESTION}", text, re.DOTALL)
    assert match, text
    assert text.count(match["key"]) == 3  # twice in the needle, once as the answer
    assert decode(tokenizer, prompt.tokens[-prompt.answer :]).strip() == match["key"]
    if filler == "appendix":
        stream = " ".join([GARBAGE] * 20)
        assert stream.startswith(match["before"])
        assert stream.startswith(match["after"])


@every_tokenizer
def test_a_long_prompt_repeats_the_filler_on_both_sides(tokenizer):
    prompt = prompts_with(tokenizer, "appendix").prompt(2000, depth=0.3, trial=0)
    before, after = re.split(NEEDLE, decode(tokenizer, prompt.tokens))[::2]
    assert before.count(GARBAGE + " " + GARBAGE) > 2
    assert after.count(GARBAGE + " " + GARBAGE) > 5
    assert len(before) == pytest.approx(len(OPENING) + 0.3 * (len(before) + len(after) - len(OPENING)), rel=0.1)


@every_tokenizer
def test_fixed_text_and_answer_are_tokenised_as_in_one_piece(tokenizer):
    """Teacher forcing must score the tokens that the model would write, not a tokenisation no text has."""
    prompts = prompts_with(tokenizer, "appendix")
    counts = set()
    for trial in range(50):
        prompt = prompts.prompt(prompts.shortest, depth=0, trial=trial)
        text = decode(tokenizer, prompt.tokens).removeprefix(" ")
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert whole[-prompt.answer :] == prompt.tokens[-prompt.answer :].tolist()
        assert whole == prompt.tokens[len(prompt.tokens) - len(whole) :].tolist()
        counts.add(prompt.answer)
    assert (len(counts) > 1) == (tokenizer is byte_level(split_digits=False))


@every_filler
def test_depth_moves_the_needle_from_the_opening_to_the_question(filler):
    tokenizer = byte_level()
    prompts = prompts_with(tokenizer, filler)
    places = [needle_start(tokenizer, prompts.prompt(400, depth / 20, trial=0)) for depth in range(21)]
    if filler == "appendix":
        assert places == sorted(places)
        assert len(set(places)) == 21
    assert places[0] == (len(OPENING) + 2 if filler == "appendix" else 1)
    last = decode(tokenizer, prompts.prompt(400, 1.0, trial=0).tokens)
    assert "is the pass key.\n\nWhat is" in last


def test_ordinary_text_goes_on_around_the_needle():
    tokenizer = byte_level()
    prompt = prompts_with(tokenizer, "text").prompt(300, depth=0.37, trial=5)
    match = re.fullmatch(rf"(.*)\n{NEEDLE}\n(.*)\n{QUESTION}", decode(tokenizer, prompt.tokens), re.DOTALL)
    # A cut through a letter of two bytes leaves a replacement character on each side.
    before, after = (part.strip("\N{REPLACEMENT CHARACTER}") for part in match.groups()[::2])
    assert len(before) > 100
    assert before + after in TEXT
    others = [
        decode(tokenizer, prompts_with(tokenizer, "text").prompt(300, 1.0, trial).tokens[1:9]) for trial in range(9)
    ]
    assert len(set(others)) > 6  # not always the same slice


def test_a_trial_is_a_function_of_its_numbers_and_nothing_else():
    tokenizer = byte_level()
    random.seed(123)
    state, torch_state = random.getstate(), torch.get_rng_state()
    first = prompts_with(tokenizer, "text").prompt(200, 0.5, 3)
    other = prompts_with(tokenizer, "text")
    other.prompt(300, 0.25, 0)
    assert torch.equal(other.prompt(200, 0.5, 3).tokens, first.tokens)
    assert torch.equal(other.prompt(200, 1 / 2, 3).tokens, first.tokens)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    keys = {decode(tokenizer, p.tokens[-p.answer :]) for p in (other.prompt(200, 0.5, trial) for trial in range(200))}
    assert len(keys) > 195
    assert all(10_000 <= int(key) <= 99_999 for key in keys)
    for changed in (
        other.prompt(201, 0.5, 3),
        other.prompt(200, 0.6, 3),
        prompts_with(tokenizer, "text", 1).prompt(200, 0.5, 3),
    ):
        assert decode(tokenizer, changed.tokens[-changed.answer :]) != decode(tokenizer, first.tokens[-first.answer :])


def test_the_int_depth_of_a_config_is_the_same_depth():
    prompts = prompts_with(byte_level(), "appendix")
    assert torch.equal(prompts.prompt(200, 1, 0).tokens, prompts.prompt(200, 1.0, 0).tokens)


@every_tokenizer
@every_filler
def test_one_token_below_the_shortest_is_refused_with_the_shortest(tokenizer, filler):
    prompts = prompts_with(tokenizer, filler)
    for trial in range(100):
        prompts.prompt(prompts.shortest, 0.5, trial)
        with pytest.raises(ValueError, match=f"at least {prompts.shortest} tokens.* {prompts.shortest - 1}"):
            prompts.prompt(prompts.shortest - 1, 0.5, trial)


@every_tokenizer
@every_filler
@settings(max_examples=25, deadline=None)
@given(extra=st.integers(0, 200), questions=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_a_training_row_asks_for_every_key_in_its_own_section(tokenizer, filler, extra, questions, seed):
    prompts = prompts_with(tokenizer, filler)
    length = prompts.shortest * questions + 2 + questions + extra
    tokens, answer = prompts.row(length, questions, random.Random(seed))
    assert tokens.shape == answer.shape == (length,)
    assert (tokens.dtype, answer.dtype) == (torch.int64, torch.bool)
    assert tokens[0] == tokenizer.bos_token_id or tokenizer.bos_token_id is None
    assert tokens[-1] == tokenizer.eos_token_id or tokenizer.eos_token_id is None
    text = decode(tokenizer, tokens)
    sections = re.findall(rf"{NEEDLE}\n(?:(?!The pass key is).)*\n{QUESTION}", text, re.DOTALL)
    assert len(sections) == questions
    spans = [list(group) for group in _spans(answer.tolist())]
    assert [decode(tokenizer, tokens[span]).strip() for span in spans] == sections


def _spans(mask):
    """Runs of true positions."""
    span = []
    for i, inside in enumerate([*mask, False]):
        if inside:
            span.append(i)
        elif span:
            yield span
            span = []


def test_sections_and_depths_of_training_rows_differ():
    prompts = prompts_with(byte_level(), "text")
    rng = random.Random(0)
    rows = [prompts.row(400, 2, rng) for _ in range(40)]
    ends = [next(i for i, asked in enumerate(mask) if asked) for _, mask in rows]
    needles = [decode(byte_level(), tokens).index("The pass key is") for tokens, _ in rows]
    assert max(ends) - min(ends) > 200
    assert max(needles) > 400
    assert min(needles) < 40
    shares = [
        needle / len(decode(byte_level(), tokens[:end]))
        for needle, end, (tokens, _) in zip(needles, ends, rows, strict=True)
    ]
    assert len([share for share in shares if share < 0.2]) > 5  # the needle may open its section ...
    assert len([share for share in shares if share > 0.6]) > 2  # ... or close it
    keys = [re.findall(NEEDLE, decode(byte_level(), tokens)) for tokens, _ in rows]
    assert all(first != second for first, second in keys)
    assert len({decode(byte_level(), tokens[1:12]) for tokens, _ in rows}) > 30  # each from another place of the text


@every_filler
def test_a_row_too_short_for_its_questions_is_refused_with_what_it_needs(filler):
    prompts = prompts_with(byte_level(), filler)
    with pytest.raises(ValueError, match="3 question.* at least (\\d+) tokens") as error:
        prompts.row(100, 3, random.Random(0))
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    tokens, answer = prompts.row(needed, 3, random.Random(0))  # exactly what it needs: no filler at all
    assert len(tokens) == needed
    assert answer.sum() == 18
    with pytest.raises(ValueError, match="`questions` >= 1"):
        prompts.row(500, 0, random.Random(0))


def test_users_mistakes_are_named():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match='`filler="text"` needs `text`'):
        PasskeyPrompts(tokenizer, "text")
    with pytest.raises(ValueError, match=r"1-D.*shape \(1, 3\)"):
        PasskeyPrompts(tokenizer, "text", torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match='"appendix" or "text"'):
        PasskeyPrompts(tokenizer, "essay")
    with pytest.raises(ValueError, match="`depth` must be in"):
        PasskeyPrompts(tokenizer).prompt(500, 1.5, 0)
    with pytest.raises(ValueError, match="`text` holds 50 tokens, this length needs"):
        PasskeyPrompts(tokenizer, "text", torch.arange(50)).prompt(500, 0.5, 0)


def test_a_tokenizer_that_loses_digits_is_refused():
    """Every key would be the same unknown tokens, and every model would seem to find it."""
    words = {"<unk>": 0} | {word: i for i, word in enumerate(sorted(set(re.findall(r"\w+|\S", OPENING + GARBAGE))), 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="tokenizer cannot write the passkey prompt"):
        PasskeyPrompts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 7), (8, 10), (10, 10), (500, 1000)])
def test_wilson_ends_are_the_rates_that_the_observation_is_196_sigma_from(successes, trials):
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate <= high <= 1
    for end in (low, high):
        assert abs(rate - end) == pytest.approx(1.959964 * (end * (1 - end) / trials) ** 0.5, rel=1e-5, abs=1e-12)


def test_wilson_agrees_with_a_printed_table():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)


def test_wilson_holds_what_was_observed_at_both_ends():
    assert all(wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1 for n in range(1, 300))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_rate(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)
