"""Retrieval tasks: prompts with a hidden answer and the question for it at the end, of an exact token length.

Everything is cut by tokens, so a prompt has exactly the length that was asked for, and everything is a pure function of
``(seed, length, depth, trial)``, so every rank and every run sees the same prompts. Nothing here knows a model.
"""

from lightning_longrope.retrieval.document import DocumentQuestionPrompts, TitledText
from lightning_longrope.retrieval.key_value import KeyValuePrompts
from lightning_longrope.retrieval.needle import Needle, NeedlePrompts
from lightning_longrope.retrieval.passkey import PasskeyPrompts
from lightning_longrope.retrieval.prompt import Prompt
from lightning_longrope.retrieval.wilson import wilson_interval

__all__ = [
    "DocumentQuestionPrompts",
    "KeyValuePrompts",
    "Needle",
    "NeedlePrompts",
    "PasskeyPrompts",
    "Prompt",
    "TitledText",
    "wilson_interval",
]
