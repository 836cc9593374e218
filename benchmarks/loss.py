"""Peak memory and time of a loss, forward and backward, against Hugging Face's on the logits of the whole row.

Every measurement has a process of its own: a linear output layer, hidden states that need gradients, random labels.
Hugging Face's is ``loss_function`` of its Llama (logits in float32, shifted, one cross entropy), fed and dropped as its
Trainer does. Bytes are the peak of anonymous memory above what is there before; the gradient of the output layer,
which every loss must leave, is among them. Seconds are of processor time with one thread, after a small first call.

    python benchmarks/loss.py            about 13 GiB of free memory, for Hugging Face's loss at 128k tokens' vocabulary
    python benchmarks/loss.py --quick    4,096 tokens
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from _memory import Memory
from _results import Row, finish, lower_is_better, parser

SIDES = ("huggingface", "fused", "checkpointed")
AGREEMENT = 0.005  # allowed relative difference of losses and gradients; bfloat16 has 8 bits


@dataclass(frozen=True)
class Case:
    """One size of the loss.

    Attributes:
        vocabulary: V.
        goal: What the share of Hugging Face's memory is held to; None for information.
        tokens: N.
        hidden: H.
        dtype: Of weights and hidden states; losses compute in float32.
        repeats: Processes of each side.
    """

    vocabulary: int
    goal: str | None
    tokens: int = 8192
    hidden: int = 1024
    dtype: str = "bfloat16"
    repeats: int = 3


FULL = (Case(32_000, "<= 0.25"), Case(131_072, "<= 0.125", repeats=1))
QUICK = (Case(32_000, "<= 0.3", tokens=4096, hidden=256, repeats=1),)


def loss_of(side: str, layer: Any) -> Callable[[Any, Any], Any]:
    """The mean loss of hidden states [N, H] and the token at each place [N]; each predicts the next."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_longrope.losses import LOSSES
    from lightning_longrope.model import output_head

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=layer.out_features, **sizes))
    model.set_output_embeddings(layer)

    def huggingface(hidden: Any, tokens: Any) -> Any:
        logits = model.lm_head(hidden[None])
        return model.loss_function(logits=logits, labels=tokens[None], vocab_size=layer.out_features)

    def ours(hidden: Any, tokens: Any) -> Any:
        head = output_head(model)
        nll, count = LOSSES[side](hidden[:-1], head, tokens[1:], None, head.tokens_at_a_time)
        return nll / count

    return huggingface if side == "huggingface" else ours


def worker(side: str, case: Case) -> dict[str, float]:
    """What one side takes in this process, and what came out."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(case.hidden, case.vocabulary, bias=False, dtype=getattr(torch, case.dtype))
    hidden = torch.randn(case.tokens, case.hidden, dtype=layer.weight.dtype).requires_grad_()
    tokens = torch.randint(case.vocabulary, (case.tokens,))
    compute = loss_of(side, layer)
    compute(hidden[:16], tokens[:16]).backward()
    layer.zero_grad()
    hidden.grad = None
    with Memory() as memory:
        begin = time.process_time()
        loss = compute(hidden, tokens)
        loss.backward()
        seconds = time.process_time() - begin
    gradients = (layer.weight.grad.float().norm(), hidden.grad.float().norm())
    outcome = {"loss": loss.item(), **dict(zip(("weight", "hidden"), map(float, gradients), strict=True))}
    return {"seconds": seconds, "bytes": memory.peak - memory.before, **outcome}


def measured(side: str, case: Case) -> dict[str, float]:
    """What ``worker`` finds, in a process of its own."""
    words = [sys.executable, __file__, "--worker", side, "--case", json.dumps(asdict(case))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(case: Case) -> list[Row]:
    """The rows of one size: every side in turn, as often as it says."""
    runs = [{side: measured(side, case) for side in SIDES} for _ in range(case.repeats)]
    for found in runs:
        for quantity in ("loss", "weight", "hidden"):
            values = [found[side][quantity] for side in SIDES]
            if max(values) - min(values) > AGREEMENT * max(values):
                raise SystemExit(f"{quantity} differs: {dict(zip(SIDES, values, strict=True))}")

    def median(side: str, quantity: str) -> float:
        return statistics.median(found[side][quantity] for found in runs)

    rows, mib, what = [], 2.0**20, f"{case.tokens} tokens x {case.vocabulary}, width {case.hidden}, {case.dtype}"
    for side in SIDES[1:]:
        size, peer = median(side, "bytes") / mib, median("huggingface", "bytes") / mib
        rows.append(Row(f"{what}: peak memory, {side} (share)", size, peer, "MiB", size / peer, case.goal))
        rows.append(
            lower_is_better(f"{what}: time, {side}", median(side, "seconds"), median("huggingface", "seconds"), "s")
        )
    return rows


def main() -> int:
    """Runs the benchmark."""
    options = parser(__doc__)
    options.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        sys.stdout.write(json.dumps(worker(given.worker, Case(**given.case))) + "\n")
        return 0
    rows = [row for case in (QUICK if given.quick else FULL) for row in compare(case)]
    return finish("loss", rows, given, ("torch", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
