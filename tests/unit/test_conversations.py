"""Which tokens of a conversation are answers: against the words themselves and against transformers' own mask."""

import copy

import numpy as np
import pytest
from chat_templates import CHATML, FORGETFUL, LLAMA2, LLAMA3, MARKED, SPECIAL, chat_tokenizer
from small_tokenizers import byte_level, sentencepiece_like

from lightning_longrope.datamodules.conversations import (
    messages_of,
    render_conversation,
    template_of,
    tokenise_rendered,
)

TALK = [
    {"role": "system", "content": "Be brief about the harbour."},
    {"role": "user", "content": "Who stood there?"},
    {"role": "assistant", "content": "The queen of Ångström; 90417 times.\nNobody else"},
    {"role": "user", "content": "And then?  assistant\n"},
    {"role": "assistant", "content": "  The miller  "},
]


def tokenise_conversation(messages, tokenizer, template):
    return tokenise_rendered(render_conversation(messages, tokenizer, template), tokenizer)


def learnt(tokenizer, template, messages=None):
    """The stretches of text that are learnt."""
    tokens, answer = tokenise_conversation(messages or TALK, tokenizer, template)
    assert tokens.dtype == np.int64
    assert answer.shape == tokens.shape
    whole = tokenizer.apply_chat_template(messages or TALK, chat_template=template)["input_ids"]
    assert tokens.tolist() == whole
    edges = np.flatnonzero(np.diff(answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False) for start, end in edges]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [TALK[2]["content"] + "<|im_end|>", TALK[4]["content"] + "<|im_end|>"]),
        (MARKED, [TALK[2]["content"] + "<|im_end|>", TALK[4]["content"] + "<|im_end|>"]),
        (LLAMA3, [TALK[2]["content"] + "<|eot_id|>", "The miller<|eot_id|>"]),
    ],
    ids=["chatml", "marked", "llama3"],
)
def test_answers_and_the_token_that_ends_them_are_learnt_and_nothing_else(template, expected):
    assert learnt(chat_tokenizer(), template) == expected


def test_a_tokenizer_that_writes_spaces_as_letters_and_a_template_without_a_generation_prompt():
    found = learnt(sentencepiece_like(), LLAMA2, TALK[1:])
    assert [text.strip() for text in found] == [f"{TALK[2]['content']} </s>", "The miller </s>"]


def test_marks_are_those_of_transformers():
    tokenizer = chat_tokenizer()
    theirs = tokenizer.apply_chat_template(TALK, chat_template=MARKED, return_assistant_tokens_mask=True)
    tokens, answer = tokenise_conversation(TALK, tokenizer, MARKED)
    assert answer.astype(int).tolist() == theirs["assistant_masks"]
    assert tokens.tolist() == theirs["input_ids"]
    assert 10 < answer.sum() < len(answer) - 20


def test_a_template_that_forgets_is_refused_where_it_does_and_taken_where_it_does_not():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match=r"renders message 3 in another way when the conversation goes on"):
        tokenise_conversation(TALK, tokenizer, FORGETFUL)
    assert learnt(tokenizer, FORGETFUL, TALK[:3]) == ["<think></think>" + TALK[2]["content"] + "<|im_end|>"]


def test_an_answer_that_opens_the_conversation_is_not_learnt():
    assert learnt(chat_tokenizer(), CHATML, TALK[2:]) == ["  The miller  <|im_end|>"]
    with pytest.raises(ValueError, match="renders no answer"):
        tokenise_conversation(TALK[2:3], chat_tokenizer(), CHATML)


def test_templates_that_refuse_or_are_missing_say_so():
    raising = "{{ raise_exception('roles must alternate') }}"
    for template in (raising, "{% generation %}{% endgeneration %}" + raising):
        with pytest.raises(ValueError, match="chat template refuses the conversation .*roles must alternate"):
            tokenise_conversation(TALK, chat_tokenizer(), template)
    with pytest.raises(ValueError, match="has no chat template.*give one as `chat_template`"):
        template_of(byte_level(), None)
    own = copy.copy(byte_level())
    own.chat_template = "own"
    assert template_of(own, None) == "own"
    assert template_of(own, CHATML) == CHATML
    slow = type("Slow", (), {"is_fast": False, "chat_template": "x"})()
    with pytest.raises(ValueError, match="Slow does not tell which text its tokens cover"):
        template_of(slow, None)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 3},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)  # fmt: skip
def test_every_form_of_a_record_gives_the_same_messages(record):
    assert messages_of(record) == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_an_alpaca_input_follows_the_instruction_and_tool_calls_stay():
    assert messages_of({"instruction": "q", "input": "text", "output": "a"})[0]["content"] == "q\n\ntext"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    assert messages_of({"messages": [call]}) == [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"no conversation, only \['text'\]: expected `messages`"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no message of the role `assistant`"),
        ({"messages": [{"from": "user", "value": "q"}]}, "a message needs 'role' and 'content'"),
        ({"prompt": "q", "completion": 3}, "content of a message is no text but int"),
        ({"messages": "not json"}, "'messages' is no list of messages"),
    ],
)
def test_records_that_hold_no_conversation_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        messages_of(record)


def test_the_templates_have_tokens_of_their_own():
    tokenizer = chat_tokenizer()
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1 for text in SPECIAL)
