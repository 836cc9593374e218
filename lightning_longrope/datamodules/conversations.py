r"""Conversations to tokens, and which of the tokens the assistant wrote, under any chat template.

What the assistant wrote is found in the rendered text, as spans of characters, and the text is tokenised once, whole.
A template that marks it with ``{% generation %}`` is taken at its word. For any other, a span is what the rendered text
grows by with one answer::

    render(messages before it, with the generation prompt)   <|user|>hi<|end|><|assistant|>
    render(messages up to it)                                <|user|>hi<|end|><|assistant|>hello<|end|>\n
    answer                                                                                hello<|end|>

The white space that ends it belongs to the template: a model has stopped by then. An answer that opens a conversation
answers nothing and is not learnt. Both texts must be the beginning of the whole conversation's, and are compared with
it. Templates exist for which they are not (some leave the thoughts of all answers but the last out): these are refused,
since the mask would be wrong.
"""

import json
import re
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.reading import MALFORMED

Message = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "model": "assistant", "bot": "assistant"}  # fmt: skip
"""Other names of roles, as ShareGPT and others write them."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FORMS = "`messages`, `conversations`, `prompt` with `completion`, or `instruction` with `output`"


class Rendered(NamedTuple):
    """A conversation as the model reads it."""

    text: str
    spans: list[tuple[int, int]]
    """First character and end of every answer."""


def messages_of(record: dict[str, Any]) -> list[Message]:
    """The messages of a record, with roles ``system``, ``user``, ``assistant`` or others that the template knows.

    Reads ``messages`` (``role``, ``content``), ShareGPT's ``conversations`` (``from``, ``value``), ``prompt`` (a text
    or messages) with ``completion`` or ``response`` (the same), and Alpaca's ``instruction``, ``input``, ``output``.

    Raises:
        ValueError: If the record has none of these, or no answer of the assistant.
    """
    if "messages" in record:
        messages = [_message(one, "role", "content") for one in _list(record, "messages")]
    elif "conversations" in record:
        messages = [_message(one, "from", "value") for one in _list(record, "conversations")]
    elif "prompt" in record and ("completion" in record or "response" in record):
        answer = record["completion"] if "completion" in record else record["response"]
        messages = [*_turn(record["prompt"], "user"), *_turn(answer, "assistant")]
    elif "instruction" in record and "output" in record:
        parts = [record["instruction"], record.get("input")]
        asked = "\n\n".join(_text(part) for part in parts if part)
        messages = [*_turn(asked, "user"), *_turn(record["output"], "assistant")]
    else:
        raise ValueError(f"no conversation, only {sorted(record)}: expected {_FORMS}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the role `assistant`, so there is nothing to learn")
    return messages


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if isinstance(value, str):  # as Parquet files of nested data often have it
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is no list of messages")
    return value


def _message(message: Any, role: str, content: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get(role), str) or content not in message:
        raise ValueError(f"a message needs {role!r} and {content!r}, got {message!r:.80}")
    others = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
    return {"role": ROLES.get(message[role], message[role]), "content": _text(message[content]), **others}


def _text(content: Any) -> str:
    """A content, or the texts of its parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise ValueError(f"the content of a message is no text but {type(content).__name__}")


def _turn(value: Any, role: str) -> list[Message]:
    if isinstance(value, list):
        return [_message(one, "role", "content") for one in value]
    return [{"role": role, "content": _text(value)}]


def render_conversation(messages: list[Message], tokenizer: Any, template: str) -> Rendered:
    """Text of a conversation and where the answers are in it.

    Args:
        messages: Messages as ``messages_of`` gives them.
        tokenizer: Hugging Face tokenizer, for the special tokens that the template writes.
        template: Chat template, in Jinja.

    Raises:
        ValueError: If the template refuses the messages or renders no answer, or the answers cannot be told from the
            rest.
    """
    marked = _MARKERS.search(template) is not None
    text, spans = (_marked if marked else _grown)(messages, tokenizer, template)
    if not any(end > start for start, end in spans):
        raise ValueError("the chat template renders no answer of the assistant: there is nothing to learn")
    return Rendered(text, spans)


def tokenise_rendered(rendered: Rendered, tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of a rendered conversation and which of them are answers, [N] int64 and [N] bool.

    A token that holds a letter of an answer is part of it. The special tokens that the text spells out are special
    tokens, and none is added.
    """
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    answer = np.zeros(len(offsets), bool)
    for start, end in rendered.spans:
        answer |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return np.array(encoded["input_ids"], np.int64), answer


def template_of(tokenizer: Any, chat_template: str | None) -> str:
    """The chat template to use.

    Raises:
        ValueError: If the tokenizer has none and none is given, or the tokenizer cannot say which text a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not tell which text its tokens cover: a fast one is needed.")
    if chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template, as those of base models do: give one as `chat_template` (Jinja text or"
            " a file), such as the one of the instruction-tuned model."
        )
    return str(tokenizer.get_chat_template(chat_template))


def _render(messages: list[Message], tokenizer: Any, template: str, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except (TemplateError, *MALFORMED) as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from error


def _marked(messages: list[Message], tokenizer: Any, template: str) -> tuple[str, list[tuple[int, int]]]:
    """Text and spans of a template with ``{% generation %}``."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, *MALFORMED) as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from error
    return texts[0], spans[0]


def _grown(messages: list[Message], tokenizer: Any, template: str) -> tuple[str, list[tuple[int, int]]]:
    """Text, and by what it grows with every answer."""
    whole = _render(messages, tokenizer, template)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:
            continue
        before = _render(messages[:number], tokenizer, template, prompt=True)
        after = _render(messages[: number + 1], tokenizer, template)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"the chat template renders message {number + 1} in another way when the conversation goes on, so that"
                " answers cannot be told from the rest: give a `chat_template` that marks them with {% generation %}"
                " and {% endgeneration %}"
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return whole, spans
