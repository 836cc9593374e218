"""``longrope generate``: a model's answer to a prompt from a file, written as it comes."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from lightning_longrope.commands.parsing import Parser, seed
from lightning_longrope.isolation import fit_for_long_rows
from lightning_longrope.loading import load_model, load_tokenizer
from lightning_longrope.model import installed_tables, window
from lightning_longrope.reading import read_text

log = logging.getLogger("lightning_longrope")


def generate(command: str, arguments: list[str]) -> None:
    """``longrope generate --model FOLDER --prompt-file F``."""
    parser = Parser(prog="longrope generate", description="Writes a model's answer to a prompt as it comes.")
    parser.add_argument("--model", required=True, help="model folder, Hugging Face name or .ckpt")
    parser.add_argument("--prompt-file", required=True, metavar="F", help="text file with the prompt; - reads stdin")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer; that of the model by default")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of the answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=seed, default=0, help="of the random choices (0)")
    parser.add_argument("--dtype", help="type of the weights; bfloat16 on a GPU, else float32")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a hub model run its own code")
    answer(**vars(parser.parse_args(arguments)))


def answer(
    model: str,
    prompt_file: str,
    tokenizer: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Tensor:
    """Writes the answer to the standard output, word by word.

    Args:
        model: Model folder, Hugging Face name or ``.ckpt``.
        prompt_file: Text file with the prompt; ``-`` reads the standard input.
        tokenizer: Name or folder of the tokenizer; that of the model by default.
        chat: Put the prompt in the tokenizer's chat template, as the words of the user.
        max_new_tokens: Most tokens of the answer; it also ends with the model's window.
        temperature: 0 takes the likeliest token, higher values choose more freely.
        seed: Of the random choices.
        dtype: Type of the weights; bfloat16 on a GPU, float32 elsewhere by default.
        trust_remote_code: Let a hub model run its own code.

    Returns:
        Tokens of the answer, [N] int64.

    Raises:
        ValueError: If the prompt is empty or does not leave room for a token in the model's window.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            "`--max-new-tokens` must be at least 1 and `--temperature` not negative,"
            f" got {max_new_tokens} and {temperature}."
        )
    text = _standard_input() if prompt_file == "-" else _text_of(Path(prompt_file))
    tokens = load_tokenizer(tokenizer or model, trust_remote_code)
    input_ids = _prompt(tokens, text, chat)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype or ("bfloat16" if device == "cuda" else "float32")
    reader: Any = load_model(model, dtype=kind, trust_remote_code=trust_remote_code).to(device).eval()
    room = _room(reader, input_ids.shape[1])
    reader.config.get_text_config().max_position_embeddings = window(reader)  # beyond which transformers warns
    if room < max_new_tokens:
        log.info("The answer ends after %d tokens, with the model's window.", room)
    torch.manual_seed(seed)
    free = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    fit_for_long_rows(reader, input_ids.shape[1])
    output = reader.generate(
        input_ids.to(device),
        attention_mask=torch.ones_like(input_ids, device=device),
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id,
        streamer=TextStreamer(tokens, skip_prompt=True, skip_special_tokens=True),
        **free,
    )
    return output[0, input_ids.shape[1] :].cpu()


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"No prompt at {path}: `--prompt-file` takes a text file, or - for the standard input.")
    return read_text(path)


def _prompt(tokenizer: Any, text: str, chat: bool) -> Tensor:
    """Tokens of the prompt, [1, S] int64."""
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template: leave `--chat` out.")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    if not tokens.numel():
        raise ValueError("The prompt is empty.")
    return tokens.long()


def _room(model: Any, prompt: int) -> int:
    """Tokens that an answer can have; says what the prompt is read with.

    Raises:
        ValueError: If there is no room.
    """
    longest, tables = window(model), installed_tables(model)
    if prompt >= longest:
        raise ValueError(
            f"The prompt has {prompt} tokens, but the model's window is {longest} tokens: shorten the prompt, or extend"
            " the model further."
        )
    table = "its own rotary embedding" if tables is None else f"a table for {tables.for_length(prompt).target_length}"
    log.info("Prompt of %d tokens, window of %d, read with %s.", prompt, longest, table)
    return longest - prompt
