"""Text to token ids, fast, over processes, in memory that does not grow with a document.

Knows neither files nor documents, and imports neither torch nor transformers: a worker process starts in a fraction of
a second. Workers are spawned, not forked, because the tokenizer's threads do not survive a fork.

A long text is cut into pieces where a cut changes no token::

    text      ... the grass is green. The sky is blue ...
    piece 0   ... the grass is green. The sky|
    piece 1                                  | is blue ...

Tokenizers cut text into words first and see no further than a word, so a cut between two words is seamless; under one
that knows no words (Llama 2), a cut between two characters that no token joins. Where words end is the tokenizer's own
affair; hence each cut is tried on the text around it: the tokens of both sides must be those of the whole, with the end
of a word between them. Text that has no such place (a million digits in a row) is cut anyway, and counted, as are all
cuts of a tokenizer written in Python, which does not tell where its words end.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

PIECE = 1 << 19  # characters; the longest text that is not cut, and about as much as a process is given at a time
REACH = (257, 263)  # characters before and behind a cut that are tried; prime, so that no repeated text fits by chance
WINDOW = 1 << 14  # characters before the end of a piece in which a cut is looked for
TRIES = 24  # places in a window that are tried
TEXTS = 1024  # most texts given to a process at a time
# From the best place on: before a space between letters, after a line end, before any space, anywhere between kinds.
PLACES = [
    re.compile(pattern)
    for pattern in (
        r"(?<=[^\W\d_])(?= [^\W\d_])",
        r"(?<=\S\n)(?=\S)",
        r"(?<=\S)(?= \S)",
        r"(?<=\w)(?=[^\w\s])",
        r"(?!^)",
    )
]
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
PROBES = ["The  grass\nis green.", " 12345 <s> </s> <|endoftext|>", "naïve 漢字 \U0001f600\t\n\n x"]


class Piece(NamedTuple):
    """Part of a text, or a whole one."""

    text: str
    goes_on: bool = False
    """Whether it is not the first piece: nothing is put in front of it."""
    cut: bool = False
    """Whether it ends where the cut may have changed tokens."""


class Encoder:
    """A tokenizer stripped to what cuts text: no markers, truncation or padding; special tokens spelled out are text.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Attributes:
        vocabulary: Number of token ids, more than the number of tokens where a vocabulary has gaps.
        dtype: The smallest of uint16 and uint32 that holds them.
        fingerprint: Hash of all that decides how text is cut.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary: int = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self._python: Any = tokenizer
        self._whole: bool = getattr(tokenizer, "whole_texts", False)  # one that cannot read a piece of a text
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._rust = None if backend is None else _bare(backend.to_str())
        self._rust_on = None if backend is None else _bare(_without_prefix(backend.to_str()))
        self._joined_pairs = None if backend is None else _joined_pairs(json.loads(backend.to_str()))
        pieces = [Piece(text) for text in PROBES]
        if self._rust is None or not _equal(self.encode(pieces), self._slowly(PROBES)):
            self._rust = None  # the tokenizer's class does more than its backend: leave the work to it

    def encode(self, pieces: list[Piece]) -> list[NDArray[Any]]:
        """Token ids of each piece, a list of [tokens] arrays of ``dtype``."""
        if self._rust is None or self._rust_on is None:
            return self._slowly([piece.text for piece in pieces])
        rows: list[Any] = [None] * len(pieces)
        for model, goes_on in ((self._rust, False), (self._rust_on, True)):
            places = [place for place, piece in enumerate(pieces) if piece.goes_on == goes_on]
            found = model.encode_batch_fast([pieces[place].text for place in places], add_special_tokens=False)
            for place, encoding in zip(places, found, strict=True):
                rows[place] = np.array(encoding.ids, self.dtype)
        return rows

    def pieces(self, text: str) -> Iterator[Piece]:
        """The text whole, or cut into pieces of about ``PIECE`` characters and at most twice that."""
        start = 0
        while not self._whole and len(text) - start > PIECE:
            end = self._seam(text, start + PIECE // 2, start + PIECE) or self._seam(
                text, start + PIECE, min(len(text), start + 2 * PIECE)
            )
            yield Piece(text[start : end or start + PIECE], start > 0, end is None or self._rust is None)
            start = end or start + PIECE
        yield Piece(text[start:], start > 0)

    def seamless(self, text: str, place: int) -> bool:
        """Whether the tokens around a place are those of the text before and after it, and a word ends there."""
        low, high = max(0, place - REACH[0]), place + REACH[1]
        parts = [Piece(text[low:high], True), Piece(text[low:place], True), Piece(text[place:high], True)]
        whole, left, right = self.encode(parts)
        same = _equal([whole], [np.concatenate([left, right])]) and len(left) > 0 and len(right) > 0
        if not same or self._rust is None or self._rust_on is None:
            return same
        found = self._rust_on.encode(parts[0].text, add_special_tokens=False)
        if self._joined_pairs is None:
            return bool(found.word_ids[len(left) - 1] != found.word_ids[len(left)])
        before, behind = found.tokens[len(left) - 1], found.tokens[len(left)]
        return bool(
            BYTE.fullmatch(before) or BYTE.fullmatch(behind) or before[-1] + behind[0] not in self._joined_pairs
        )

    def _seam(self, text: str, low: int, high: int) -> int | None:
        """The last good place to cut in a range of the text, None if none was found near its end."""
        low = max(low, high - WINDOW)
        for pattern in PLACES:
            places = [match.start() for match in pattern.finditer(text, low, high)]
            for place in places[: -TRIES - 1 : -1]:
                if self.seamless(text, place):
                    return place
        return None

    def _slowly(self, texts: list[str]) -> list[NDArray[Any]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        rows = self._python(texts, **options, verbose=False)["input_ids"] if texts else []
        return [np.array(row, self.dtype) for row in rows]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the Python tokenizer behind where it is not needed: it would import transformers."""
        state = dict(self.__dict__)
        if self._rust is not None:
            state["_python"] = None
        return state


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides how a tokenizer cuts text; markers around the text and padding do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        parts = json.loads(backend.to_str())
        for name in ("truncation", "padding", "post_processor"):
            parts.pop(name, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_in_order(
    encoder: Encoder, batches: Iterable[list[Piece]], workers: int
) -> Iterator[tuple[NDArray[Any], list[int]]]:
    """Tokens of each batch, [tokens], and the number of tokens of each of its pieces, in the order of the batches.

    Takes batches from the iterable a few ahead of what it gives, so memory does not depend on their number.

    Args:
        encoder: Makes tokens of text.
        batches: Pieces that are given to one process together.
        workers: Processes; 0 works in this one, with the tokenizer's threads.

    Raises:
        ChildProcessError: If a process dies.
    """
    if not workers:
        for batch in batches:
            yield _joined(encoder.encode(batch), encoder.dtype)
        return
    context, pending = multiprocessing.get_context("spawn"), deque[Future[Any]]()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(pickle.dumps(encoder),))
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            while len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A tokenising process was killed, perhaps for want of memory: start again, with fewer `workers`."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process


def _begin(encoder: bytes) -> None:
    """Makes a worker ready: one thread, no part in Ctrl-C, and an end when the process that started it has ended."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = pickle.loads(encoder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(OSError):
        parent.join()
    os._exit(1)


def _work(batch: list[Piece]) -> tuple[NDArray[Any], list[int]]:
    return _joined(_encoder.encode(batch), _encoder.dtype)


def _joined(rows: list[NDArray[Any]], dtype: np.dtype[Any]) -> tuple[NDArray[Any], list[int]]:
    return np.concatenate([np.empty(0, dtype), *rows]), [len(row) for row in rows]


def _equal(left: list[NDArray[Any]], right: list[NDArray[Any]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _bare(description: str) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` without truncation and padding, special tokens taken as text."""
    model: Tokenizer = Tokenizer.from_str(description)
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return model


def _without_prefix(description: str) -> str:
    """A ``tokenizer.json`` that puts no space before the text, for pieces that are not the first."""
    parts = json.loads(description)
    for step in _steps(parts["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return json.dumps(parts)


def _joined_pairs(parts: dict[str, Any]) -> set[str] | None:
    """Neighbouring characters in any token of a BPE that is given the text as one word; None for other tokenizers."""
    if parts["pre_tokenizer"] is not None or parts["model"]["type"] != "BPE":
        return None
    return {token[place : place + 2] for token in parts["model"]["vocab"] for place in range(len(token) - 1)}


def _steps(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those in sequences too."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for step in part.get(inner, ()):
        yield from _steps(step, inner)
