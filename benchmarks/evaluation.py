"""Times the evaluation against the stock loop: a Hugging Face model with ``labels=``, one window after another.

Each side runs in processes of its own, on the same random documents and weights, in float32 with one thread. Seconds
are of processor time, so that other work on the machine counts less; memory is the peak of anonymous pages above the
loaded model.

    python benchmarks/evaluation.py            writes benchmarks/results/evaluation.json
    python benchmarks/evaluation.py --quick    a smaller model, minutes; writes nothing
    python benchmarks/evaluation.py --check    exit status 1 where a goal is missed
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from _memory import Memory
from _results import Row, finish, lower_is_better, parser

os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class Case:
    """A model and documents.

    Attributes:
        what: ``sliding``, or ``prefixes`` with as many ``lengths``.
        lengths: Tokens of a window or of prefixes.
        documents: Number of documents.
        document_length: Tokens of each.
        stride: Tokens from one window to the next.
        vocabulary: Tokens in the vocabulary.
        hidden: Width of the model.
        layers: Decoder layers.
        batch_tokens: Tokens of a forward pass of ours.
    """

    what: str
    lengths: tuple[int, ...]
    documents: int = 2
    document_length: int = 4096
    stride: int = 256
    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 4
    batch_tokens: int = 2048


FULL = Case("sliding", (2048,))
QUICK = replace(FULL, lengths=(1024,), document_length=1536, stride=128, hidden=128, layers=2, batch_tokens=1024)


def build_model(case: Case) -> Any:
    """A Llama with random weights, large enough to have opinions."""
    import torch

    from lightning_longrope import load_model

    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 8 // 3,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 64,
        "num_key_value_heads": case.hidden // 64,
        "max_position_embeddings": max(case.lengths),
        "initializer_range": 0.05,
    }
    return load_model(config=config).eval()


def documents(case: Case) -> Any:
    """Random tokens, [documents, document_length] int64."""
    import torch

    size = (case.documents, case.document_length)
    return torch.randint(case.vocabulary, size, generator=torch.Generator().manual_seed(1))


def stock(case: Case, model: Any, texts: Any) -> dict[int, float]:
    """Perplexity by length as the documentation of Hugging Face has it."""
    import torch

    found = {}
    for length in case.lengths:
        total, count = 0.0, 0
        for text in texts:
            ends = text[:length] if case.what == "prefixes" else text
            previous = 0
            for begin in range(0, len(ends), case.stride):
                end = min(begin + length, len(ends))
                input_ids = ends[None, begin:end]
                target_ids = input_ids.clone()
                target_ids[:, : previous - end] = -100 if previous else target_ids[:, : previous - end]
                with torch.no_grad():
                    loss = model(input_ids, labels=target_ids).loss
                predicted = end - max(previous, 1)
                total, count, previous = total + loss.item() * predicted, count + predicted, end
                if end == len(ends):
                    break
        found[length] = math.exp(total / count)
    return found


def ours(case: Case, model: Any, texts: Any) -> dict[int, float]:
    """Perplexity by length from the callbacks of this package under a real trainer."""
    import numpy as np
    import torch
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from lightning_longrope.callbacks import PrefixPerplexity, SlidingPerplexity
    from lightning_longrope.packing import Documents

    class Tokenizer:
        bos_token_id = None

    class Data(LightningDataModule):
        tokenizer, seq_len = Tokenizer(), max(case.lengths)

        def documents(self, split: str) -> Documents:
            starts = np.arange(len(texts)) * texts.shape[1]
            return Documents(texts.numpy().reshape(-1), starts, np.full(len(texts), texts.shape[1]))

        def excerpts(self, split: str, count: int, length: int, seed: int) -> torch.Tensor:
            return texts[:count, :length]

        def val_dataloader(self) -> Any:
            return DataLoader([0])

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    shared = {"lengths": case.lengths, "documents": case.documents, "batch_tokens": case.batch_tokens}
    callback = (
        PrefixPerplexity(**shared)
        if case.what == "prefixes"
        else SlidingPerplexity(**shared, stride=case.stride, document_length=case.document_length)
    )
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", callbacks=[callback], **settings)
    trainer.validate(Module(), datamodule=Data(), verbose=False)
    wanted = ("perplexity_sliding", "perplexity_prefix")
    return {found.length: found.value for found in callback.results if found.metric in wanted}


def worker(side: str, case: Case) -> dict[str, Any]:
    """Runs one side in this process: perplexity, processor seconds, peak bytes, and seconds inside the decoder."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, texts = build_model(case), documents(case)
    run = ours if side == "ours" else stock
    small = replace(case, documents=1, document_length=64, lengths=(32,), stride=16)
    run(small, model, documents(small))  # imports and first calls
    inside: list[float] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda *_: inside.append(-time.process_time()))
    decoder.register_forward_hook(lambda *_: inside.append(time.process_time()))
    with Memory() as memory:
        begin = time.process_time()
        found = run(case, model, texts)
        seconds = time.process_time() - begin
    return {
        "perplexity": found,
        "seconds": seconds,
        "decoder": sum(inside),
        "peak": memory.peak - memory.before,
    }


def measured(side: str, case: Case) -> dict[str, Any]:
    """What ``worker`` finds, in a process of its own."""
    words = [sys.executable, __file__, "--worker", side, "--case", json.dumps(asdict(case))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["perplexity"] = {int(length): value for length, value in found["perplexity"].items()}
    return found


def compare(case: Case) -> list[Row]:
    """Every row of the results."""
    found, peer = measured("ours", case), measured("stock", case)
    wide = measured("ours", replace(case, vocabulary=4 * case.vocabulary))
    length, mib = case.lengths[0], 2.0**20
    least = ">= 4" if case == FULL else ">= 1.5"
    name = f"sliding window of {length:,}, stride {case.stride}"
    peaks = [side["peak"] / mib for side in (found, peer, wide)]
    heads = [side["seconds"] - side["decoder"] for side in (found, peer)]
    return [
        lower_is_better(f"{name}: processor time", found["seconds"], peer["seconds"], "s", ">= 2"),
        lower_is_better(f"{name}: peak memory above the model", *peaks[:2], "MiB", least),
        agreement(name, found, peer),
        lower_is_better(f"{name}: time in the decoder", found["decoder"], peer["decoder"], "s"),
        lower_is_better(f"{name}: time in output head and loss", heads[0], heads[1], "s"),
        lower_is_better(f"{name}: peak memory, vocabulary x 4 (peer: ours, x 1)", peaks[2], peaks[0], "MiB", ">= 0.8"),
        *windows(replace(case, lengths=tuple(length // part for part in (4, 2, 1))), least),
        *prefixes(replace(case, what="prefixes", lengths=tuple(length // part for part in (8, 4, 2, 1)), documents=8)),
    ]


def windows(case: Case, least: str) -> list[Row]:
    """Several windows in one run of the callback, beside as many runs of the stock loop."""
    together, separate = measured("ours", case), measured("stock", case)
    name = f"sliding windows of {', '.join(f'{length:,}' for length in case.lengths)} tokens, stride {case.stride}"
    return [
        lower_is_better(f"{name}: processor time", together["seconds"], separate["seconds"], "s", ">= 2"),
        peak(name, together, separate, least),
        agreement(name, together, separate),
    ]


def peak(name: str, one: dict[str, Any], other: dict[str, Any], goal: str | None = None) -> Row:
    """Peak memory of two sides."""
    name = f"{name}: peak memory above the model"
    return lower_is_better(name, one["peak"] / 2**20, other["peak"] / 2**20, "MiB", goal)


def prefixes(case: Case) -> list[Row]:
    """Several lengths from one forward pass."""
    many, alone = measured("ours", case), measured("ours", replace(case, lengths=case.lengths[-1:]))
    separate = measured("stock", replace(case, stride=case.lengths[-1]))
    name = f"{len(case.lengths)} prefix lengths"
    return [
        lower_is_better(f"{name}: processor time", many["seconds"], separate["seconds"], "s", ">= 1.5"),
        lower_is_better(f"{name} (peer: ours, the longest alone)", many["seconds"], alone["seconds"], "s", ">= 0.85"),
        peak(name, many, separate),
        agreement(name, many, separate),
    ]


def agreement(name: str, one: dict[str, Any], other: dict[str, Any]) -> Row:
    """Whether two sides measure the same: the largest relative difference of their perplexities, at all lengths."""
    apart = max(abs(value / other["perplexity"][length] - 1) for length, value in one["perplexity"].items())
    return Row(f"{name}: perplexity, relative difference", apart, None, "", apart, "<= 0.0001")


def main() -> int:
    """Runs the benchmark."""
    words = parser(__doc__)
    words.add_argument("--worker", choices=("ours", "stock"), help=argparse.SUPPRESS)
    words.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        case = Case(**{**given.case, "lengths": tuple(given.case["lengths"])})
        sys.stdout.write(json.dumps(worker(given.worker, case)) + "\n")
        return 0
    return finish("evaluation", compare(QUICK if given.quick else FULL), given, ("torch", "lightning", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
