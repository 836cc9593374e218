"""Recipes of papers: their numbers against a table, the files they hand on, and one of them run small to its end."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import tiny_llama
from small_tokenizers import byte_level

from lightning_longrope import load_model
from lightning_longrope.model import installed_tables
from lightning_longrope.recipes import map_texts, read_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
K = 1024
LLAMA2 = {"schedule": "linear", "warmup_steps": 20, "lr": 2e-5, "rows": 32}
MISTRAL = {"schedule": "constant", "warmup_steps": 0, "lr": 1e-6, "rows": 64}
LONGROPE2 = {"schedule": "cosine", "warmup_steps": 20, "lr": 2e-5, "rows": 64}
PI = {"schedule": "constant_with_warmup", "warmup_steps": 20, "lr": 2e-5, "rows": 128}
TUNING = {  # recipe, stage: steps, tokens of a row, window of the factors, weights it starts from, and the optimiser
    ("llama2-7b-2048k", "2-tune-128k"): (400, 128 * K, "1-search-128k", "meta-llama/Llama-2-7b-hf", LLAMA2),
    ("llama2-7b-2048k", "4-tune-256k"): (600, 256 * K, "3-search-256k", "2-tune-128k", LLAMA2),
    ("mistral-7b-2048k", "2-tune-128k"): (400, 16 * K, "1-search-128k", "mistralai/Mistral-7B-v0.1", MISTRAL),
    ("mistral-7b-2048k", "4-tune-256k"): (400, 16 * K, "3-search-256k", "2-tune-128k", MISTRAL),
    ("llama3-8b-128k", "2-tune-128k"): (1192, 128 * K, "1-search-128k", "meta-llama/Meta-Llama-3-8B", LONGROPE2),
    ("phi3-mini-128k", "2-tune-128k"): (1192, 128 * K, "1-search-128k", "microsoft/Phi-3-mini-4k-instruct", LONGROPE2),
    ("pi-32k", "1-tune-32k"): (1000, 32 * K, None, "huggyllama/llama-7b", PI),
    ("ablation-windows", "2-tune-128k"): (400, 128 * K, "1-search-128k", "meta-llama/Llama-2-7b-hf", LLAMA2),
    ("ablation-windows", "4-text-128k"): (600, 128 * K, "3-search-256k", "meta-llama/Llama-2-7b-hf", LLAMA2),
    ("ablation-windows", "5-text-256k"): (600, 256 * K, "3-search-256k", "meta-llama/Llama-2-7b-hf", LLAMA2),
    ("ablation-windows", "6-from-128k"): (600, 128 * K, "3-search-256k", "2-tune-128k", LLAMA2),
}
SEARCHES = {  # recipe, stage: target, documents, population, iterations, books
    ("llama2-7b-2048k", "1-search-128k"): (128 * K, 5, 64, 40, "pg19"),
    ("llama2-7b-2048k", "3-search-256k"): (256 * K, 5, 64, 40, "pg19"),
    ("llama2-7b-2048k", "5-search-2048k"): (2048 * K, 3, 64, 10, "books3"),
    ("llama2-7b-2048k", "6-recover-4k"): (4 * K, 5, 64, 40, "pg19"),
    ("llama2-7b-2048k", "7-recover-8k"): (8 * K, 5, 64, 40, "pg19"),
    ("mistral-7b-2048k", "1-search-128k"): (128 * K, 5, 64, 40, "pg19"),
    ("mistral-7b-2048k", "3-search-256k"): (256 * K, 5, 64, 40, "pg19"),
    ("mistral-7b-2048k", "5-search-2048k"): (2048 * K, 3, 64, 10, "books3"),
    ("mistral-7b-2048k", "6-recover-4k"): (4 * K, 5, 64, 40, "pg19"),
    ("mistral-7b-2048k", "7-recover-8k"): (8 * K, 5, 64, 40, "pg19"),
    ("llama3-8b-128k", "1-search-128k"): (128 * K, 10, 64, 40, "pg19"),
    ("phi3-mini-128k", "1-search-128k"): (128 * K, 10, 64, 40, "pg19"),
    ("ablation-windows", "1-search-128k"): (128 * K, 5, 64, 40, "pg19"),
    ("ablation-windows", "3-search-256k"): (256 * K, 5, 64, 40, "pg19"),
}
PUBLISHED = sorted({recipe for recipe, _ in TUNING})
GLOBAL_BATCH = re.compile(
    r"^# global batch (\d+) = (\d+) GPUs / (\d+) that shares? a row x (\d+) row x (\d+) accumulated", re.MULTILINE
)


def stages(recipe):
    return {stage.name: stage for stage in read_recipe(CONFIGS / recipe, Path("OUT"))}


def callback(stage):
    return stage.config["trainer"]["callbacks"][0]["init_args"]


def test_every_stage_that_tunes_or_searches_is_in_the_tables():
    found = {(recipe, stage.name): stage.command for recipe in PUBLISHED for stage in stages(recipe).values()}
    assert {key for key, command in found.items() if command == "fit"} == set(TUNING)
    assert {key for key, command in found.items() if command == "search"} == set(SEARCHES)


@pytest.mark.parametrize(("recipe", "name"), TUNING)
def test_tuning_has_the_published_numbers(recipe, name):
    steps, seq_len, searched, weights, expected = TUNING[recipe, name]
    config = stages(recipe)[name].config
    trainer, model, rows = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    optimizer = model["optimizer"]["init_args"]
    assert (trainer["max_steps"], trainer["gradient_clip_val"], rows["seq_len"]) == (steps, 1.0, seq_len)
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (expected["lr"], [0.9, 0.95], 0.0)
    schedule = model["schedule"]
    assert (schedule["name"], schedule["warmup_steps"]) == (expected["schedule"], expected["warmup_steps"])
    assert schedule.get("warmup_start", 0) == (0.1 if recipe == "pi-32k" else 0)
    given = str(model["factors"])
    assert f"OUT/{searched}/search/factors.json" in given if searched else "linear" in given and "16.0" in given
    assert model["name_or_path"] == (weights if "/" in weights else f"OUT/{weights}/checkpoints/last.ckpt")
    strategy = trainer["strategy"]["init_args"]
    stated = [int(number) for number in GLOBAL_BATCH.findall((CONFIGS / recipe / f"{name}.yaml").read_text())[0]]
    batch, gpus, sharing, row, accumulated = stated
    assert batch == expected["rows"] == gpus // sharing * row * accumulated
    assert (sharing, row) == (strategy["sequence_parallel_size"], rows["batch_size"])
    assert accumulated == trainer["accumulate_grad_batches"]
    assert strategy["stage"] == 3


@pytest.mark.parametrize(("recipe", "name"), SEARCHES)
def test_searches_have_the_published_numbers(recipe, name):
    target, documents, population, iterations, books = SEARCHES[recipe, name]
    stage = stages(recipe)[name]
    search, algorithm = callback(stage), callback(stage)["algorithm"]
    assert (search["target_length"], search["documents"]) == (target, documents)
    arguments = algorithm["init_args"]
    assert (arguments["population"], arguments["iterations"], arguments["probability"]) == (population, iterations, 0.3)
    assert (arguments["parents"], arguments["mutants"], arguments["crossovers"]) == (32, 16, 16)
    assert books in str(stage.config["data"]["init_args"])
    second = recipe in ("llama3-8b-128k", "phi3-mini-128k")
    assert algorithm["class_path"].endswith(".LongRoPE2Search" if second else ".EvolutionSearch")
    if second:
        needle = search["objective"]["init_args"]
        assert (needle["text"], needle["answer"], needle["needle_depths"]) == (0.0, 1.0, [0.0, 0.0])
    else:
        assert (search["objective"], search["pinned"]) == ("perplexity", 0)
        tokens = [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256]
        assert search.get("start_tokens") == (None if search.get("recovery") else tokens)


def test_mixed_windows_and_pretrained_windows():
    for recipe, window in (("llama3-8b-128k", 8 * K), ("phi3-mini-128k", 2 * K)):
        config = stages(recipe)["2-tune-128k"].config
        assert (config["data"]["init_args"]["packing"], config["data"]["init_args"]["short_seq_len"]) == (
            "mixed",
            window,
        )
        assert config["model"]["init_args"]["factors"][0] == "none"
    for recipe, window in (("mistral-7b-2048k", 4 * K), ("phi3-mini-128k", 2 * K)):
        models = [stage.config["model"]["init_args"] for stage in stages(recipe).values() if "model" in stage.config]
        pretrained = [model for model in models if not model["name_or_path"].startswith("OUT")]
        assert len(pretrained) >= 3
        assert all(model["original_length"] == window for model in pretrained)


def read_paths(value):
    found = []
    map_texts(value, lambda text: found.append(text) or text)
    return [text for text in found if text.startswith("OUT/") and not text.startswith("OUT/data")]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_file_that_a_stage_reads_was_written_by_an_earlier_one(recipe):
    written, read = set(), 0
    for stage in stages(recipe).values():
        config, own = stage.config, f"OUT/{stage.name}"
        if stage.command == "fit":
            saver = config["trainer"]["callbacks"][0]["init_args"]
            assert saver["dirpath"] == f"{own}/checkpoints"
            assert saver["save_last"]
            assert config["trainer"]["logger"]["init_args"]["save_dir"] == own
            made = {own, f"{own}/checkpoints", f"{own}/checkpoints/last.ckpt"}
        elif stage.command == "search":
            made = {f"{own}/search{'_short' if callback(stage).get('recovery') else ''}/factors.json"}
        else:
            made = {config.get("out", own)}
        inputs = set(read_paths(config)) - made
        assert inputs <= written, stage.name
        read, written = read + len(inputs), written | made
    assert read >= 2


# The recipe for LLaMA 2, run for real: its own stage files, with these lengths in place of the published ones.
LENGTHS = {4 * K: 128, 8 * K: 160, 32 * K: 192, 64 * K: 224, 96 * K: 240, 128 * K: 256, 256 * K: 384, 512 * K: 512}
LENGTHS |= {1024 * K: 768, 2048 * K: 1024}
PROCESSES = {"accelerator": "cpu", "devices": 2, "enable_progress_bar": False, "enable_model_summary": False}


def shrunk(value, key=""):
    """A stage file with short lengths for two processes that share rows, and pass keys that fit them."""
    if isinstance(value, dict):
        kept = {name: shrunk(entry, name) for name, entry in value.items()}
        own = PROCESSES if key == "trainer" else {}
        prompts = {"filler": "text"} if "depths" in kept else {}
        return kept | own | prompts | ({"stride": 60} if "stride" in kept else {})
    if isinstance(value, list):
        return [shrunk(entry, key) for entry in value]
    if key in ("sequence_parallel_size", "num_workers"):
        return {"sequence_parallel_size": 2, "num_workers": 0}[key]
    return LENGTHS[value] if isinstance(value, int) and value >= 4 * K else value


def write_texts(folder):
    """A little of everything that the recipe names, each document long enough for the longest window."""
    words = ["the", "miller", "house", "key", "garden", "remembered", "old", "harbour", "brothers", "lamp", "queen"]
    number = 0
    for place, count in {"pg19/validation": 4, "pg19/test": 2, "proof-pile/dev": 1, "proof-pile/test": 4, "books3": 8,
                         "redpajama/book": 8}.items():  # fmt: skip
        (folder / place).mkdir(parents=True)
        texts = []
        for _ in range(count):
            number += 1
            texts.append(" ".join(words[(step * number + step // 7) % len(words)] for step in range(2000)))
        if place == "redpajama/book":
            lines = [json.dumps({"text": text, "meta": {}}) for text in texts]
            (folder / place / "book.jsonl").write_text("\n".join(lines))
        else:
            for index, text in enumerate(texts):
                (folder / place / f"{index}.txt").write_text(text)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe_for_llama2_runs_to_its_end_under_its_own_strategies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "data")
    tiny_llama(max_position_embeddings=128, vocab_size=700).save_pretrained(tmp_path / "base")
    byte_level().save_pretrained(tmp_path / "base")
    recipe = tmp_path / "llama2"
    recipe.mkdir()
    for path in (CONFIGS / "llama2-7b-2048k").glob("*.yaml"):
        (recipe / path.name).write_text(yaml.safe_dump(shrunk(yaml.safe_load(path.read_text())), sort_keys=False))

    words = ["run", str(recipe), "--out", "out", "--short", "--model.name_or_path", str(tmp_path / "base")]
    done = subprocess.run([sys.executable, "-m", "lightning_longrope", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    record = json.loads(Path("out/run.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished"] * 12
    tables = installed_tables(load_model("out/hf"))
    assert tables.lengths == (128, 160, 384, 1024)
    places = ("6-recover-4k/search_short", "7-recover-8k/search_short", "3-search-256k/search", "5-search-2048k/search")
    found = [json.loads(Path(f"out/{place}/factors.json").read_text())["values"] for place in places]
    assert [list(table.values) for table in tables.tables] == found
    assert max(found[0]) <= 1.25 < max(found[2]) < max(found[3])
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    measured = {(row["method"], int(row["length"])) for row in rows if row["metric"] == "perplexity"}
    assert {method for method, length in measured if length == 1024} == {
        "second_linear",
        "second_yarn",
        "second_searched",
    }
    assert {method for method, length in measured if length == 128} == {
        "none", "linear", "ntk", "dynamic_ntk", "yarn", "searched", "tuned_131072", "tuned", "short"}  # fmt: skip
    assert {row["method"] for row in rows if row["metric"] == "perplexity_sliding"} == {"tuned_131072", "tuned"}
