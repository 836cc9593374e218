"""Excerpts of documents for evaluation and search: each in one document, none overlapping."""

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.packing.documents import Documents

SHUFFLED = 1 << 17
"""Most documents that are shuffled to draw some: of more, whose shuffle leaves the caches, a few are drawn alone."""


def excerpts(documents: Documents, count: int, length: int, *, bos: int | None, seed: int = 0) -> NDArray[np.int64]:
    """Cuts ``count`` excerpts of ``length`` tokens that do not overlap, [count, length] int64.

    One from each document as far as the documents reach, which documents and where drawn from ``seed``; if there are
    fewer documents than excerpts, the longest give further ones. An excerpt lies in one document and begins with BOS if
    there is one.

    Raises:
        ValueError: If the documents do not hold that many.
    """
    body = length - (bos is not None)
    if count < 1 or body < 1:
        raise ValueError(f"Excerpts need a count of at least 1 and a length of at least 2, got {count} and {length}.")
    rng = np.random.default_rng([seed, length])
    places = documents.lengths // body  # how many fit in each
    if places.sum() < count:
        raise ValueError(
            f"{count} excerpts of {length} tokens were asked for, but the {len(documents)} documents hold only"
            f" {int(places.sum())}: the longest has {int(documents.lengths.max(initial=0))} tokens."
            " Ask for fewer or shorter excerpts, or give longer documents."
        )
    rows = []
    shares = _shares(documents.lengths, places, body, count, rng)
    for document in np.flatnonzero(shares):
        share = int(shares[document])
        slack = int(documents.lengths[document]) - share * body
        gaps = np.sort(rng.integers(0, slack + 1, share))
        starts = documents.starts[document] + gaps + body * np.arange(share)
        rows += [documents.tokens[start : start + body].astype(np.int64) for start in starts]
    table = np.stack(rows)
    return table if bos is None else np.insert(table, 0, bos, axis=1)


def _shares(
    lengths: NDArray[np.int64], places: NDArray[np.int64], body: int, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """How many excerpts each document gives, [documents] int64."""
    shares = np.zeros(len(lengths), np.int64)
    long_enough = np.flatnonzero(places)
    if len(long_enough) <= max(SHUFFLED, count):
        shares[rng.permutation(long_enough)[:count]] = 1
    else:
        shares[rng.choice(long_enough, count, replace=False, shuffle=False)] = 1
    for _ in range(count - int(shares.sum())):
        left = np.where(shares < places, lengths - shares * body, -1)
        shares[left.argmax()] += 1
    return shares
