"""A search with an objective of one's own: the worse of text and retrieval decides, so that neither is given up.

Run it with the folder of a model and the target length: ``python examples/custom_objective.py my/model 4096 text.txt``.
"""

import sys
from pathlib import Path

import torch

from lightning_longrope import load_model, search_factors
from lightning_longrope.loading import load_tokenizer
from lightning_longrope.objectives import Objective


class Worst(Objective):
    """The larger of the mean nll of text and the mean nll of answers, in nats."""

    def value(self, text: float, answer: float) -> float:
        """The score, lower is better."""
        return max(text, answer)


def main(name: str, length: int, file: str, max_evaluations: int = 100) -> None:
    """Searches, and prints the factors and how they do on held-out text."""
    model, tokenizer = load_model(name), load_tokenizer(name)
    tokens = torch.tensor(tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"])
    documents = list(tokens[: len(tokens) // length * length].view(-1, length))
    objective = Worst(needle_depths=(0.0, 0.5), text_from=0.5)
    result = search_factors(
        model,
        documents,
        length,
        tokenizer=tokenizer,
        objective=objective,
        held_out=len(documents) // 2,
        max_evaluations=max_evaluations,
    )
    sys.stdout.write(f"{result.factors}\n{result.held_out}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
