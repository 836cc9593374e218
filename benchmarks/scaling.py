"""Cost against the length of rows, the size of the corpus and the number of ranks, as exponents of a power law.

    python benchmarks/scaling.py [--quick] [--check]

- Length: a forward pass and a training step of a small Llama on one row, with the loss that is the default (fused),
  attention apart from the rest (the profiler's time of its kernels). The rest is to be linear, attention may be
  quadratic.
- Corpus: documents of about 100 bytes, many of them, since an index grows with their number. JSON lines are tokenised
  (bytes are tokens: a real tokenizer would hide what we do), the datamodule is opened, excerpts for a search are cut,
  the first row of an epoch is read, then rows at random. All may grow as the corpus does, but for the row at random,
  which may not grow.
- Ranks: a generation of a search and training steps of the same global batch, on one process and on two by turns.

An exponent is the slope of log seconds over log size; small sizes, where a constant rules, make it lower, so that of
the last two sizes has a line of its own. Seconds are of processor time, the least of several, with one thread; of ranks
the wall as well. Plots are in ``results/scaling.png``.

The C library keeps freed memory here (``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_``), as in
``training.py``. ``longrope fit`` does not set that: there pages of large tensors are asked for again and again, which
takes time too.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import keep_freed_memory
from _results import RESULTS, Row, finish, higher_is_better, parser

from lightning_longrope import LongRoPEModule, search_factors
from lightning_longrope.datamodules import PackedTextDataModule
from lightning_longrope.losses import LOSSES
from lightning_longrope.model import output_head
from lightning_longrope.search import EvolutionSearch

LENGTHS = {"quick": (256, 512, 1024, 2048), "full": (512, 1024, 2048, 4096, 8192)}
DOCUMENTS = {"quick": (5_000, 20_000, 80_000), "full": (40_000, 160_000, 640_000, 2_560_000)}
POLICIES = ("concat", "best_fit", "mixed")
Curves = dict[str, list[tuple[float, float]]]
"""Points of size and seconds by what was measured."""


class Bytes:
    """A tokenizer whose tokens are bytes, of two more kinds for BOS and EOS."""

    bos_token_id, eos_token_id, name_or_path = 256, 257, ""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[Any]]:
        """``input_ids`` of every text."""
        return {"input_ids": [np.frombuffer(text.encode(), np.uint8) for text in texts]}

    def __len__(self) -> int:
        return 258

    def get_vocab(self) -> dict[str, int]:
        """Names of the tokens."""
        return {str(token): token for token in range(258)}


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log seconds over log size."""
    sizes, seconds = np.log(np.array(points)).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def least(repeats: int, work: Callable[..., Any], *arguments: Any) -> float:
    """Processor seconds of the fastest of several calls."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        work(*arguments)
        found.append(time.process_time() - begun)
    return min(found)


def small_model(vocabulary: int = 2048, hidden: int = 128, layers: int = 2, window: int = 8192) -> Any:
    """A module around a Llama with random weights."""
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": window,
    }
    torch.manual_seed(0)
    module = LongRoPEModule(config=config)
    module.configure_model()
    return module


def attention_share(work: Callable[..., Any], *arguments: Any) -> float:
    """Share of the profiler's time that attention kernels take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work(*arguments)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(time for key, time in spent.items() if "scaled_dot_product" in key) / sum(spent.values())


def length_curves(lengths: tuple[int, ...]) -> Curves:
    """Seconds of a forward pass and of a training step, attention and the rest."""
    module, curves = small_model(window=max(lengths)), Curves()

    def step(tokens: torch.Tensor) -> None:
        hidden, head = module.hidden_states({"input_ids": tokens}).flatten(0, 1), output_head(module.model)
        labels = module.predicted(tokens, -100).flatten()
        nll, count = LOSSES[module.loss_name](hidden, head, labels, chunk=head.tokens_at_a_time)
        (nll / count).backward()
        module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(tokens: torch.Tensor) -> None:
        module.hidden_states({"input_ids": tokens})

    for length in lengths:
        tokens = torch.randint(2048, (1, length))
        for name, work in (("forward", forward), ("training step", step)):
            work(tokens)
            share, seconds = attention_share(work, tokens), least(3, work, tokens)
            curves.setdefault(f"{name}: attention", []).append((length, share * seconds))
            curves.setdefault(f"{name}: the rest", []).append((length, (1 - share) * seconds))
    return curves


def write_text(path: Path, documents: int) -> None:
    """JSON lines of documents of 40 to 160 letters."""
    rng = random.Random(0)
    text = "".join(rng.choices("etaoinshrdlu ", k=1 << 16))
    with path.open("w") as file:
        for number in range(documents):
            begin = rng.randrange(len(text) - 160)
            file.write(f'{{"text": "{number} {text[begin : begin + rng.randrange(40, 160)]}"}}\n')


def datamodule(folder: Path, documents: int, packing: str) -> PackedTextDataModule:
    """The datamodule over such a corpus."""
    return PackedTextDataModule(
        files=[str(folder / f"{documents}.jsonl")],
        val_share=0.01,
        tokenizer=Bytes(),  # type: ignore[arg-type] - scripts may give a loaded one
        seq_len=4096,
        cache_dir=str(folder / "cache"),
        packing=packing,  # type: ignore[arg-type]
        short_seq_len=512,
    )


def corpus_curves(folder: Path, counts: tuple[int, ...]) -> Curves:
    """Seconds to tokenise, to open the datamodule, of excerpts, of the first row of an epoch and of rows at random."""
    curves = Curves()
    for count in counts:
        write_text(folder / f"{count}.jsonl", count)
        data = [datamodule(folder, count, policy) for policy in POLICIES for _ in range(3)]
        found = {"tokenise": least(1, data[0].prepare_data), "open": min(least(1, one.setup) for one in data)}
        found["excerpts"] = least(3, data[0].excerpts, "train", 16, 64)
        for policy, one in zip(POLICIES, data[::3], strict=True):
            found[f"first row, {policy}"] = least(3, first_row, one)
            rows = one.train_dataloader().dataset
            places = np.random.default_rng(0).integers(0, len(rows), 200).tolist()
            found[f"random row, {policy}"] = least(5, read_rows, rows, places) / len(places)
        for name, seconds in found.items():
            curves.setdefault(name, []).append((count, seconds))
        (folder / f"{count}.jsonl").unlink()
    return curves


def first_row(data: PackedTextDataModule) -> None:
    """Lays out an epoch and reads its first row."""
    next(iter(data.train_dataloader()))


def read_rows(rows: Any, places: list[int]) -> None:
    """Reads rows of epoch 0."""
    for place in places:
        rows[0, place]


def rank_seconds(quick: bool) -> dict[str, dict[str, float]]:
    """Wall and, over all ranks, processor seconds of a search and of training steps, on the ranks there are."""
    from lightning.pytorch import Callback, Trainer

    from lightning_longrope.evaluating import ProcessWorkers
    from lightning_longrope.strategies import LongContextDDPStrategy

    world, length = int(os.environ.get("WORLD_SIZE", "1")), 512
    if world > 1:
        torch.distributed.init_process_group("gloo")
    module, documents = small_model(hidden=256, window=128), list(torch.randint(2048, (5, length)))
    clocks: dict[str, list[float]] = {}

    def mark(name: str) -> None:
        if world > 1:
            torch.distributed.barrier()
        clocks.setdefault(name, []).extend((time.perf_counter(), time.process_time()))

    def search(population: int) -> None:
        algorithm = EvolutionSearch(population, parents=2, mutants=1, crossovers=1)
        workers = ProcessWorkers() if world > 1 else None
        options: dict[str, Any] = {"algorithm": algorithm, "max_evaluations": population, "workers": workers}
        search_factors(module.model.eval(), documents, length, **options)

    search(4)  # first calls
    mark("search")
    search(8 if quick else 16)
    mark("search")

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (2, trainer.max_steps - 1):
                mark("training")

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2048, (256, length))]
    trainer = Trainer(
        max_steps=5 if quick else 9,
        accelerator="cpu",
        devices=world,
        strategy=LongContextDDPStrategy() if world > 1 else "auto",
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(small_model(hidden=256), torch.utils.data.DataLoader(rows, batch_size=8 // world))
    found = {}
    for name, (wall, used, wall_after, used_after) in clocks.items():
        processor = torch.tensor(used_after - used, dtype=torch.float64)
        if world > 1:
            torch.distributed.all_reduce(processor)
        found[name] = {"wall": wall_after - wall, "processor": float(processor)}
    return found


def ranks_measured(quick: bool, folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """The least of each over turns of this process alone and of two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result, found = folder / "ranks.json", dict[str, dict[int, dict[str, float]]]()
    for _ in range(1 if quick else 2):
        alone = rank_seconds(quick)
        words = [*launcher, __file__, "--part", str(result), *["--quick"] * quick]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for world, clocks in ((1, alone), (2, json.loads(result.read_text()))):
            for name, seconds in clocks.items():
                best = found.setdefault(name, {}).setdefault(world, seconds)
                best.update({clock: min(best[clock], value) for clock, value in seconds.items()})
    return found


def exponent_rows(curves: Curves) -> list[Row]:
    """A row for each curve: what must be linear, attention, and what must not grow."""
    rows = []
    for name, points in curves.items():
        goal = "<= 2.1" if name.endswith("attention") else "<= 0.2" if name.startswith("random") else "<= 1.1"
        slope, last = exponent(points), exponent(points[-2:])
        unit = "of length" if ":" in name else "of documents"
        rows.append(Row(f"{name}, exponent {unit}", slope, None, "", slope, goal))
        rows.append(Row(f"{name}, exponent {unit}, last two sizes", last, None, "", last))
    return rows


def rank_rows(found: dict[str, dict[int, dict[str, float]]]) -> list[Row]:
    """How much faster two ranks are, and what they cost together."""
    rows = []
    for name, by_world in found.items():
        ours, peer = by_world[2], by_world[1]
        kind = {"search": "search generation", "training": "training steps"}[name]
        ratio = peer["wall"] / ours["wall"]
        rows.append(
            Row(f"{kind}, 2 ranks against 1: wall, times faster", ours["wall"], peer["wall"], "s", ratio, ">= 1.5")
        )
        cost = f"{kind}, 2 ranks against 1: processor seconds of all, times more"
        rows.append(higher_is_better(cost, ours["processor"], peer["processor"], "s", "<= 1.2"))
    return rows


def plot(lengths: Curves, corpus: Curves, ranks: list[Row], path: Path) -> None:
    """Three panels: length, corpus, ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13.5, 5.4), layout="constrained", width_ratios=(1, 1.15, 0.75))
    for axes, curves, name in zip(
        panels, (lengths, corpus), ("tokens of a row", "documents of the corpus"), strict=False
    ):
        for label, points in curves.items():
            dashed = "--" if label.startswith(("forward", "random")) else "-"
            text = f"{label} ({exponent(points):.2f})"
            axes.plot(*zip(*points, strict=True), dashed, marker="o", markersize=3, linewidth=1.3, label=text)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="processor seconds")
        axes.set_xticks(sizes := [size for size, _ in points], [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    wall = [row for row in ranks if row.unit == "s" and "wall" in row.name]
    names = [row.name.split(",")[0] for row in wall]
    panels[2].bar(names, [row.ratio for row in wall], width=0.5, color="#1768ac")
    panels[2].axhline(2, color="#444", linewidth=0.8, linestyle=":")
    panels[2].set(ylabel="times faster on 2 ranks than on 1", ylim=(0, 2.2))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Cost by size; in brackets the exponent", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Measures, writes ``results/scaling.json`` and the plot; 1 if a goal is missed under ``--check``."""
    options = parser(__doc__)
    options.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    keep_freed_memory()  # page faults come and go with the size of tensors
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_longrope"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if given.part:
        found = rank_seconds(given.quick)
        if os.environ["RANK"] == "0":
            given.part.write_text(json.dumps(found))
        return 0
    kind = "quick" if given.quick else "full"
    lengths = length_curves(LENGTHS[kind])
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_curves(Path(folder), DOCUMENTS[kind])
        ranks = rank_rows(ranks_measured(given.quick, Path(folder)))
    if not given.quick:
        plot(lengths, corpus, ranks, RESULTS / "scaling.png")
    rows = [*exponent_rows(lengths), *exponent_rows(corpus), *ranks]
    return finish("scaling", rows, given, ("torch", "lightning", "transformers", "numpy"), {"curves": lengths | corpus})


if __name__ == "__main__":
    sys.exit(main())
