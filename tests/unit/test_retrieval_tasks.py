"""Key/value, needle and document prompts, read back as text by every kind of tokenizer."""

import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXT, byte_level, decode, sentencepiece_like

from lightning_longrope.retrieval import (
    DocumentQuestionPrompts,
    KeyValuePrompts,
    Needle,
    NeedlePrompts,
    PasskeyPrompts,
    TitledText,
)

TOKENIZERS = {
    "digits apart": byte_level,
    "digits merged": lambda: byte_level(split_digits=False),
    "no BOS": lambda: byte_level(bos=False),
    "SentencePiece": sentencepiece_like,
}
every_tokenizer = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)
LAMP = Needle("The green lamp stood in house 27.", "Where did the green lamp stand? In house", "27")
BOOK = Needle("The queen of the garden is Vilma.", "Who is the queen of the garden? She is", "Vilma")
PLAIN = re.sub("[^ -~]", " ", TEXT)
TITLED = TitledText("On Lamps and Old Harbours", PLAIN)


def text_of(tokenizer):
    return torch.tensor(tokenizer.encode(PLAIN, add_special_tokens=False))


@cache
def prompts_of(kind, tokenizer, seed=0):
    return {
        "passkey": lambda: PasskeyPrompts(tokenizer, "text", text_of(tokenizer), seed),
        "key_value": lambda: KeyValuePrompts(tokenizer, seed),
        "needle": lambda: NeedlePrompts(tokenizer, [LAMP, BOOK], text_of(tokenizer), seed),
        "document": lambda: DocumentQuestionPrompts(tokenizer, text=text_of(tokenizer), seed=seed),
        "file": lambda: DocumentQuestionPrompts(tokenizer, [TITLED], seed=seed),
    }[kind]()


KINDS = ("passkey", "key_value", "needle", "document", "file")
trials = given(length=st.integers(230, 700), depth=st.floats(0, 1), trial=st.integers(0, 10**6))


def check(tokenizer, prompt, length):
    assert prompt.tokens.shape == (length,)
    assert prompt.tokens.dtype == torch.int64
    bos = tokenizer.bos_token_id
    assert bos is None or (prompt.tokens == bos).nonzero().flatten().tolist() == [0]
    return decode(tokenizer, prompt.tokens), decode(tokenizer, prompt.tokens[-prompt.answer :])


@every_tokenizer
@settings(max_examples=25, deadline=None)
@trials
def test_a_list_of_pairs_holds_the_key_once_and_the_answer_is_its_quoted_value(tokenizer, length, depth, trial):
    text, answer = check(tokenizer, prompts_of("key_value", tokenizer).prompt(length, depth, trial), length)
    head, question = text.split("What is the value of the key")
    key = re.match(r" '([0-9a-f]{8})'\? The value of the key '\1' is '([0-9a-f]{4})'$", question)
    assert key is not None
    assert answer.strip() == f"'{key[2]}'"
    assert head.startswith("Key/value pairs to remember:")
    lines = re.findall(r"^'([0-9a-f]{8})' = '([0-9a-f]{4})'$", head, re.MULTILINE)
    assert [value for name, value in lines if name == key[1]] == [key[2]]
    assert len({name for name, _ in lines}) == len(lines) >= 2
    cut = [line for line in head.splitlines()[1:] if line and not re.fullmatch(r"'[0-9a-f]{8}' = '[0-9a-f]{4}'", line)]
    assert len(cut) <= 1  # the first line alone may be cut
    place = [name for name, _ in lines].index(key[1])
    assert place == pytest.approx(depth * (len(lines) - 1), abs=2)


@every_tokenizer
@settings(max_examples=25, deadline=None)
@trials
def test_every_needle_is_hidden_and_they_are_asked_for_in_turn(tokenizer, length, depth, trial):
    prompt = prompts_of("needle", tokenizer).prompt(length, depth, trial)
    text, answer = check(tokenizer, prompt, length)
    asked, other = (LAMP, BOOK) if trial % 2 == 0 else (BOOK, LAMP)
    assert text.endswith(f"{asked.question} {asked.answer}")
    assert answer.strip() == asked.answer
    assert [text.count(needle.text) for needle in (asked, other)] == [1, 1]
    assert other.question not in text
    found = decode(tokenizer, prompt.tokens[length - prompt.answer - prompt.distance :]).lstrip()
    assert found.startswith(asked.text)
    hidden = length - sum(len(tokenizer.encode(n.text, add_special_tokens=False)) for n in (LAMP, BOOK))
    begins = length - prompt.answer - prompt.distance
    assert begins == pytest.approx(depth * hidden, abs=0.5 * hidden if length < 300 else 0.25 * hidden)


@every_tokenizer
@pytest.mark.parametrize("kind", ["document", "file"])
@settings(max_examples=15, deadline=None)
@trials
def test_a_document_begins_with_the_title_that_is_asked_for(tokenizer, kind, length, depth, trial):
    text, answer = check(tokenizer, prompts_of(kind, tokenizer).prompt(length, depth, trial), length)
    title = text.strip().splitlines()[0]
    assert answer.strip() == title
    assert text.endswith(f"Question: What is the title of this document?\nAnswer: The title is {title}")
    if kind == "file":
        assert title == TITLED.title
        body = text.strip().removeprefix(title).split("(End of the document.)")[0].strip()
        assert len(body) > 200
        assert PLAIN.startswith(body[:-3])  # a word may be cut in two
    else:
        assert re.fullmatch(r"[A-Z][\w ]+ of the [A-Z][\w ]+ of [\w ]+", title)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_a_function_of_its_numbers_and_nothing_else(kind):
    tokenizer = byte_level()
    first = prompts_of(kind, tokenizer).prompt(400, 0.5, 7)
    torch.manual_seed(9)
    prompts_of.cache_clear()
    again = prompts_of(kind, tokenizer).prompt(400, 0.5, 7)
    assert torch.equal(first.tokens, again.tokens)
    assert (first.answer, first.distance) == (again.answer, again.distance)
    if kind != "file":
        others = [prompts_of(kind, tokenizer, seed).prompt(400, 0.5, trial) for seed, trial in ((1, 7), (0, 9))]
        assert not any(torch.equal(first.tokens, other.tokens) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_where_the_needle_begins(kind):
    tokenizer = byte_level()
    for depth in (0.0, 0.3, 1.0):
        prompt = prompts_of(kind, tokenizer).prompt(400, depth, 3)
        tail = decode(tokenizer, prompt.tokens[400 - prompt.answer - prompt.distance :])
        answer = decode(tokenizer, prompt.tokens[-prompt.answer :]).strip()
        assert answer in tail.removesuffix(answer)


def test_values_and_depths_of_many_trials_differ():
    prompts = prompts_of("key_value", byte_level())
    answers = [tuple(p.tokens[-p.answer :].tolist()) for p in (prompts.prompt(300, 0.5, trial) for trial in range(20))]
    assert len(set(answers)) == 20
    distances = [prompts.prompt(600, depth, 0).distance for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 500 > 100 > distances[-1]


def test_users_mistakes_are_named():
    tokenizer = byte_level()
    for mistake, match in [
        (lambda: Needle("a", " ", "c"), "A needle needs a `text`, a `question` and an `answer`"),
        (lambda: NeedlePrompts(tokenizer, [], text_of(tokenizer)), "at least one needle"),
        (lambda: NeedlePrompts(tokenizer, [LAMP], torch.empty(0)), "needs `text`"),
        (lambda: DocumentQuestionPrompts(tokenizer), "A document question without documents needs `text`"),
        (lambda: DocumentQuestionPrompts(tokenizer, [TitledText(" ", "text")]), "needs a title"),
        (lambda: prompts_of("file", tokenizer).prompt(10**5, 0, 0), r"The document 'On Lamps.*' has \d+ tokens"),
        (lambda: prompts_of("needle", tokenizer).prompt(20, 0, 0), r"needs at least \d+ tokens, got length 20"),
        (lambda: prompts_of("needle", tokenizer).prompt(10**5, 0, 0), "give more text"),
        (lambda: prompts_of("key_value", tokenizer).prompt(400, 1.5, 0), "`depth` must be in"),
        (lambda: prompts_of("key_value", tokenizer).prompt(40, 1, 0), r"needs at least \d+ tokens, got length 40"),
    ]:
        with pytest.raises(ValueError, match=match):
            mistake()
