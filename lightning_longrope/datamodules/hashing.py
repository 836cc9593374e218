"""Hashes that tell documents of the same tokens."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Hasher:
    """Hashes of documents while their tokens go by; it does not matter in which parts."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self._begun = 0  # tokens of the document that has not ended

    def add(self, tokens: NDArray[Any], lengths: list[int]) -> NDArray[np.uint64]:
        """Hash of each document that ends in a part of the tokens, [documents] uint64.

        Args:
            tokens: The next tokens, [N].
            lengths: Tokens of each document that ends in them, those in earlier parts included.
        """
        data, size = memoryview(tokens.tobytes()), tokens.itemsize
        ends, start, found = np.cumsum(lengths, dtype=np.int64) - self._begun, 0, []
        for end in ends.tolist():
            self._hash.update(data[start * size : end * size])
            found.append(int.from_bytes(self._hash.digest(), "little"))
            self._hash, start = hashlib.blake2b(digest_size=8), end
        self._hash.update(data[start * size :])
        self._begun = len(tokens) - start + (0 if found else self._begun)
        return np.array(found, np.uint64)
