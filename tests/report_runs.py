"""A run folder whose every number is written here, for tests that read it back from a report."""

import json
import math
import random

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.search.journal import Journal

LENGTHS = (64, 128, 256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 20
PERPLEXITY = {
    "none": (15.21, 12.97, 16.40, 21.90, 28.40),
    "linear": (47.30, 45.10, 46.00, 48.20, 50.80),
    "ntk": (16.30, 14.02, 13.61, 14.25, 16.60),
    "dynamic_ntk": (15.21, 12.97, 13.20, 14.80, 16.60),
    "yarn": (16.02, 13.90, 13.31, 13.02, 13.10),
    "searched": (15.80, 13.60, 12.95, 12.61, 12.44),
    "tuned": (15.60, 13.39, 12.10, 11.02, 10.22),
}
HITS = {  # keys repeated of 20, by length and depth
    "none": [[20] * 5, [20, 20, 20, 20, 20], [0, 2, 9, 18, 20], [0, 0, 0, 4, 15], [0] * 5],
    "linear": [[0] * 5] * 5,
    "ntk": [[20] * 5, [20] * 5, [20, 19, 20, 20, 20], [9, 12, 14, 16, 18], [0, 1, 1, 2, 4]],
    "dynamic_ntk": [[20] * 5, [20] * 5, [20, 18, 20, 20, 20], [7, 10, 12, 14, 19], [0, 1, 1, 2, 4]],
    "yarn": [[20] * 5, [20] * 5, [20] * 5, [18, 17, 18, 19, 20], [5, 7, 8, 11, 16]],
    "searched": [[20] * 5, [20] * 5, [20] * 5, [20, 19, 20, 20, 20], [18, 18, 18, 19, 20]],
    "tuned": [[20] * 5, [20] * 5, [20] * 5, [20, 20, 19, 20, 20], [19, 19, 19, 20, 20]],
}
SHAPE = {"rotary_size": 64, "base": 10_000.0, "original_length": 128, "target_length": 1024}
SEARCHED = RescaleFactors(
    (1.0,) * 4 + tuple(round(8 ** (i / 27), 2) for i in range(28)), 128, 1024, attention_factor=1.195
)


def perplexity_row(method, metric, length, value, spread=0.01, n=24):
    return (method, metric, length, "", value, value * (1 - spread), value * (1 + spread), n)


def measurements(spread=0.01):
    """Rows of eval/results.csv, in the vocabulary and order in which a comparison writes them."""
    rows = []
    for method, values in PERPLEXITY.items():
        for length, value in zip(LENGTHS, values, strict=True):
            rows.append(perplexity_row(method, "perplexity", length, value, spread))
            rows.append(perplexity_row(method, "bits_per_byte", length, math.log2(value) / 2.7, spread))
            if length > 128:
                rows.append(perplexity_row(method, "perplexity_last128", length, value * 0.97, spread))
        for length, hits in zip(LENGTHS, HITS[method], strict=True):
            for depth, hit in zip(DEPTHS, hits, strict=True):
                rows.append((method, "passkey", length, depth, hit / TRIALS, 0.0, 1.0, TRIALS))
    return rows


def write_csv(path, rows, header="method,metric,length,depth,value,low,high,n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")


def write_search(folder, evaluations=100):
    """A search as `search_factors` leaves it: three baselines, then candidates that get better."""
    random_numbers = random.Random(0)
    baselines = {"linear": 7.82, "ntk": 4.91, "yarn": 3.214}
    lines = [("baseline:" + name, score) for name, score in baselines.items()]
    for index in range(evaluations):
        floor = 2.71 + 0.55 * math.exp(-index / 25)
        lines.append(("ramp" if index < 40 else "mutation", round(floor + random_numbers.expovariate(1 / 0.35), 4)))
    lines[20] = ("ramp", None)
    journal = Journal(folder / "history.jsonl", {"seed": 0})
    journal.append(
        {
            "evaluation": index,
            "generation": index // 20 - 1,
            "origin": origin,
            "values": [1.0 + index] * 32,
            "start_tokens": 0,
            "attention_factor": 1.195,
            "score": score,
            "parts": {"text": None if score is None else score * 0.8, "answer": None if score is None else score * 0.2},
            "seconds": 0.15,
        }
        for index, (origin, score) in enumerate(lines)
    )
    best = min(score for _, score in lines if score is not None)
    counts = {"evaluations": evaluations, "forwards": 5 * (evaluations + 3), "documents": 5, "pinned": 4}
    state = {**SHAPE, **counts, "baselines": baselines, "best": best, "objective": "mixed", "finished": True}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    SEARCHED.save(folder / "factors.json")
    return lines


def write_run(folder, rows=None):
    """A whole recipe as the quick start leaves it."""
    stages = [("1-pretrain", "fit", 236.4), ("2-search", "search", 41.7), ("3-finetune", "fit", 101.9)]
    stages += [("4-evaluate", "compare", 88.0), ("5-export", "export", 3.2)]
    for name, _, _ in stages[:4]:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(
            f"# {name}\nmodel:\n  init_args:\n    config:\n      rope_theta: 1e4\n"
        )
    for name, steps, start, end in (("1-pretrain", 1200, 6.9, 2.6), ("3-finetune", 80, 2.9, 2.35)):
        log = [
            (step, "", round(end + (start - end) * math.exp(-6 * step / steps) + 0.05 * math.sin(step), 4))
            for step in range(9, steps, steps // 60)
        ]
        write_csv(folder / name / "lightning_logs/version_0/metrics.csv", log, "step,val_perplexity,train_loss")
    write_search(folder / "2-search" / "search")
    write_csv(folder / "4-evaluate" / "eval" / "results.csv", measurements() if rows is None else rows)
    record = {
        "recipe": "configs/quickstart",
        "command": "longrope run configs/quickstart --seed 1",
        "seed": 1,
        "versions": {"python": "3.11.9", "lightning_longrope": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": "Linux x86_64, 2 threads, x86_64",
        "stages": [{"name": n, "command": c, "seconds": s, "status": "finished"} for n, c, s in stages],
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
