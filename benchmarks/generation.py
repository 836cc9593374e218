"""Times one generation of a search, 32 candidates on 5 documents each, against the loop that a user would write.

The stock loop sets a candidate's factors as transformers' own ``longrope`` and calls the model with ``labels=``, one
document after another, collecting garbage in between as released search scripts do. Ours is the ``Evaluator`` of a
search with its journal. Each side has a process of its own with all cores; they take turns, slice by slice of the
candidates, and must find the same losses. Figures are of one (candidate, document) pair, and its row says of how many
it is the mean: all 160 of a generation for the tiny model at 256 and 2,048 tokens, 40 of it at 512 and 1,024, and no
more than 15, 10, 5 and 10 of the 100M model at 256, 512, 1,024 and 2,048 tokens, where a pair takes the loop up to 3
seconds. Memory is the peak of anonymous pages above the loaded model.

    python benchmarks/generation.py            writes benchmarks/results/generation.json
    python benchmarks/generation.py --quick    fewer candidates and lengths, minutes; writes nothing
    python benchmarks/generation.py --check    exit status 1 where a goal is missed
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from _memory import Memory
from _results import Row, finish, lower_is_better, parser

DOCUMENTS, WINDOW = 5, 128  # documents of a search; tokens of the pretrained window
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}  # allowed difference of mean losses in nats
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart" / "1-pretrain.yaml"
MIB = 2.0**20


@dataclass(frozen=True)
class Case:
    """A model in one precision at one length.

    Attributes:
        model: ``tiny`` or ``100M``.
        precision: ``float32``, or ``bfloat16`` by autocast.
        length: Tokens of a document.
        candidates: How many there are in a slice.
        slices: How often the sides take turns.
        goal: What the wall time is held to.
        memory_goal: What the memory is held to.
    """

    model: str
    precision: str
    length: int
    candidates: int
    slices: int
    goal: str | None = None
    memory_goal: str | None = None

    @property
    def name(self) -> str:
        """What the rows are called."""
        return f"{self.model}, {self.precision}, {self.length:,} tokens"


FULL = [
    Case("tiny", "float32", 256, 8, 4, ">= 6"),
    Case("tiny", "float32", 512, 8, 1),
    Case("tiny", "float32", 1024, 8, 1),
    Case("tiny", "float32", 2048, 8, 4, ">= 2"),
    Case("tiny", "bfloat16", 256, 8, 4, ">= 6"),
    Case("tiny", "bfloat16", 2048, 8, 4, ">= 2"),
    Case("100M", "float32", 256, 3, 1),
    Case("100M", "float32", 512, 2, 1),
    Case("100M", "float32", 1024, 1, 1),
    Case("100M", "float32", 2048, 1, 2, ">= 1.2", ">= 2"),
    Case("100M", "bfloat16", 2048, 1, 2, ">= 1.2", ">= 2"),
]
QUICK = [Case("tiny", "float32", 256, 4, 2, ">= 3"), Case("tiny", "float32", 1024, 2, 2, ">= 1.2")]


def config(model: str) -> dict[str, Any]:
    """The quick start's base, or a Llama of 102 million parameters."""
    tiny: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["config"]
    if model == "tiny":
        return tiny
    size = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10}
    return {**tiny, **size, "num_key_value_heads": 10, "vocab_size": 32_000, "tie_word_embeddings": False}


def random_model(model: str) -> Any:
    """A model with random weights, the same in every process; large enough to have opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config(model), initializer_range=0.1)).eval()


def tables(count: int, pairs: int, length: int) -> list[list[float]]:
    """Rescale factors of candidates, which rise from 1 to the extension ratio on curves of different bend."""
    ratio = length / WINDOW
    bends = [0.5 + 2 * number / count for number in range(count)]
    return [[ratio ** ((pair / (pairs - 1)) ** bend) for pair in range(pairs)] for bend in bends]


class Stock:
    """The stock loop; only what a user of transformers has imported is loaded."""

    def __init__(self, model: str) -> None:
        self.model = random_model(model)

    def losses(self, case: Case, tables: list[list[float]], documents: Any, clean: bool) -> list[float]:
        """Mean loss of each candidate.

        Args:
            case: For its precision.
            tables: Factors of the candidates.
            documents: Tokens, [documents, length] int64.
            clean: Whether garbage is collected and the cache emptied after each document.
        """
        import torch

        found = []
        for values in tables:
            self.set_factors(values, case.length)
            total = 0.0
            for document in documents:
                with torch.no_grad(), autocast(case):
                    total += self.model(document[None], labels=document[None], use_cache=False).loss.item()
                if clean:
                    gc.collect()
                    torch.cuda.empty_cache()
            found.append(total / len(documents))
        return found

    def set_factors(self, values: list[float], length: int) -> None:
        """Makes the rotary module again with a candidate's factors."""
        longrope = {
            "rope_type": "longrope",
            "rope_theta": config("tiny")["rope_parameters"]["rope_theta"],
            "long_factor": values,
            "short_factor": values,
            "factor": length / WINDOW,
            "original_max_position_embeddings": WINDOW,
        }
        self.model.config.rope_parameters = longrope
        self.model.config.max_position_embeddings = length
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)


class Ours:
    """Scoring as a search does it."""

    def __init__(self, model: str) -> None:
        self.model = random_model(model)

    def losses(self, case: Case, tables: list[list[float]], documents: Any, clean: bool) -> list[float]:
        """Mean loss of each candidate; there is nothing to clean."""
        from lightning_longrope import RescaleFactors
        from lightning_longrope.evaluating import Evaluator
        from lightning_longrope.fingerprints import document_digests
        from lightning_longrope.objectives import OBJECTIVES, search_documents
        from lightning_longrope.rope import longrope_attention_factor
        from lightning_longrope.score_book import ScoreBook

        objective = OBJECTIVES["perplexity"]
        rows = search_documents(list(documents), case.length, objective)
        scale = longrope_attention_factor(original_length=WINDOW, target_length=case.length)
        factors = [RescaleFactors(tuple(values), WINDOW, case.length, attention_factor=scale) for values in tables]
        with TemporaryDirectory() as folder, autocast(case):
            book = ScoreBook(Path(folder) / "history.jsonl", {"model": "", "document_digests": document_digests(rows)})
            evaluator = Evaluator(self.model, rows, objective, book=book)
            return [score.value for score in evaluator.scores(factors, [""] * len(factors))]


def autocast(case: Case) -> AbstractContextManager[Any]:
    """The precision context of a forward pass."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bfloat16")


def worker(side: str, model: str) -> None:
    """Answers orders from standard input, each a case, a slice and whether to clean, until it ends."""
    import torch

    runner = {"ours": Ours, "stock": Stock}[side](model)
    small = Case(model, "float32", 2 * WINDOW, 1, 1)
    vocabulary, pairs = config(model)["vocab_size"], config(model)["head_dim"] // 2
    warm = torch.ones(1, small.length, dtype=torch.int64)
    runner.losses(small, tables(1, pairs, small.length), warm, clean=True)  # imports and first calls
    with Memory() as memory:
        for order in map(json.loads, sys.stdin):
            case = Case(**order["case"])
            generator = torch.Generator().manual_seed(case.length)
            documents = torch.randint(vocabulary, (DOCUMENTS, case.length), generator=generator)
            begin = order["slice"] * case.candidates
            candidates = tables(case.candidates * case.slices, pairs, case.length)[begin : begin + case.candidates]
            memory.begin()
            wall, processor = time.perf_counter(), time.process_time()
            losses = runner.losses(case, candidates, documents, order["clean"])
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            answer = {"losses": losses, "wall": wall, "processor": processor, "memory": memory.peak - memory.before}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


class Side:
    """A worker in a process of its own."""

    def __init__(self, side: str, model: str) -> None:
        words = [sys.executable, __file__, "--worker", side, "--model", model]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, case: Case, number: int, clean: bool) -> dict[str, Any]:
        """What it takes for a slice of the candidates."""
        assert self.process.stdin is not None, "a pipe"
        assert self.process.stdout is not None, "a pipe"
        self.process.stdin.write(json.dumps({"case": vars(case), "slice": number, "clean": clean}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A worker ended early, see its message above.")
        return dict(json.loads(line))

    def end(self) -> None:
        """Lets the process end."""
        self.process.communicate()


def compare(case: Case, ours: Side, stock: Side) -> list[Row]:
    """The rows of one case; the sides take turns."""
    turns: dict[str, Callable[[int], dict[str, Any]]] = {
        "ours": lambda number: ours.measure(case, number, clean=False),
        "stock": lambda number: stock.measure(case, number, clean=True),
        "bare": lambda number: stock.measure(case, number, clean=False),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for number in range(case.slices):
        for name, turn in turns.items():
            found[name].append(turn(number))
    check_agreement(case, found)
    pairs = case.candidates * case.slices * DOCUMENTS

    def each(name: str, what: str) -> float:
        return 1000 * sum(slice_[what] for slice_ in found[name]) / pairs

    def most(name: str) -> float:
        return max(slice_["memory"] for slice_ in found[name]) / MIB

    rows = [
        lower_is_better(
            f"{case.name}: a pair, mean of {pairs}", each("ours", "wall"), each("stock", "wall"), "ms", case.goal
        ),
        lower_is_better(f"{case.name}: peer without collecting", each("ours", "wall"), each("bare", "wall"), "ms"),
        lower_is_better(
            f"{case.name}: the same, processor time", each("ours", "processor"), each("bare", "processor"), "ms"
        ),
    ]
    if case.length == 2048:
        name = f"{case.name}: peak memory above the model"
        rows.append(lower_is_better(name, most("ours"), most("stock"), "MiB", case.memory_goal))
    return rows


def check_agreement(case: Case, found: dict[str, list[dict[str, Any]]]) -> None:
    """Stops where the sides do not find the same losses."""
    ours, stock = ([loss for slice_ in found[name] for loss in slice_["losses"]] for name in ("ours", "stock"))
    apart = max(abs(one - other) for one, other in zip(ours, stock, strict=True))
    if not apart <= AGREEMENT[case.precision]:
        raise SystemExit(f"{case.name}: the losses differ by {apart} nats: {ours} and {stock}.")


def main() -> int:
    """Runs the benchmark."""
    words = parser(__doc__)
    words.add_argument("--worker", choices=("ours", "stock"), help=argparse.SUPPRESS)
    words.add_argument("--model", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        worker(given.worker, given.model)
        return 0
    cases, rows = QUICK if given.quick else FULL, []
    for model in dict.fromkeys(case.model for case in cases):
        sides = Side("ours", model), Side("stock", model)
        for case in cases:
            if case.model == model:
                sys.stderr.write(f"{case.name}\n")
                rows += compare(case, *sides)
        for side in sides:
            side.end()
    return finish("generation", rows, given, ("torch", "transformers", "lightning_longrope"))


if __name__ == "__main__":
    sys.exit(main())
