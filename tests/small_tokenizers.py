"""Tokenizers of three families, trained on the spot on made-up text without digits in it."""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "\n".join(
    f"In the {place} of the {who}, there was {what}; nobody remembered the key to it. Café “Ångström” stood there."
    for place in ("house", "garden", "valley", "back room", "mountains", "old harbour")
    for who in ("miller", "queen", "three brothers", "sky watcher", "pass guard")
    for what in ("a green lamp", "the yellow book", "some grass", "no sun at all", "a quiz about the important info")
)
SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def byte_level(split_digits: bool = True, bos: bool = True) -> Any:
    """Like GPT-2 and Llama 3: bytes, no unknown tokens. Without ``split_digits`` keys have 2 to 6 tokens."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    first = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    tokenizer.decoder = decoders.ByteLevel()
    numbers = " ".join(str(n * n) for n in range(400))
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] if split_digits else [TEXT, numbers], trainer)
    ends = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


@cache
def sentencepiece_like() -> Any:
    """Like Llama 2: a space before every text, spaces as "▁", newlines and rare letters as bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list("▁0123456789"), show_progress=False
    )
    words = ["▁" + word for word in TEXT.split() if word.isascii()]
    trained.train_from_iterator(words, trainer)
    learned = json.loads(trained.to_str())["model"]
    vocabulary = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def decode(tokenizer: Any, tokens: Any) -> str:
    """Text of tokens, special tokens left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
