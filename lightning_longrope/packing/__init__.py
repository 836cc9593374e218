"""Documents to training rows of exactly one window: pure numpy, no models, no files.

Each policy has a module that opens with a drawing of its rows: ``concat``, ``document`` (``long_documents``),
``best_fit`` and ``mixed``.
"""

from typing import Any, Literal

from lightning_longrope.packing.best_fit import BestFitRows
from lightning_longrope.packing.concat import ConcatRows
from lightning_longrope.packing.documents import Documents, epoch_permutation, longest_text
from lightning_longrope.packing.excerpts import excerpts
from lightning_longrope.packing.long_documents import LongDocumentRows
from lightning_longrope.packing.mixed import MixedRows
from lightning_longrope.packing.rows import IGNORED, Order, Row, Rows, bookended_labels

__all__ = [
    "IGNORED",
    "BestFitRows",
    "ConcatRows",
    "Documents",
    "LongDocumentRows",
    "MixedRows",
    "Order",
    "Policy",
    "Row",
    "Rows",
    "bookended_labels",
    "epoch_permutation",
    "excerpts",
    "longest_text",
    "make_rows",
]

Policy = Literal["concat", "document", "best_fit", "mixed"]

_POLICIES: dict[str, Any] = {rows.policy: rows for rows in (ConcatRows, LongDocumentRows, BestFitRows, MixedRows)}


def make_rows(policy: Policy, documents: Documents, **options: Any) -> Rows[Any]:
    """The rows a policy makes of documents; for the options see ``Rows`` and the class of the policy."""
    rows: Rows[Any] = _POLICIES[policy](documents, **options)
    return rows
