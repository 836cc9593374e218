"""``longrope eval`` and the lm-evaluation-harness, held against the harness's own Hugging Face model."""

import csv
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import tiny_llama
from small_tokenizers import TEXT, byte_level

from lightning_longrope import RescaleFactors, export_model, install_factors, load_model, scoring
from lightning_longrope.__main__ import main
from lightning_longrope.harness import Ranks, generate, harness_model, log_likelihoods, measurements, run_tasks
from lightning_longrope.scoring import continuation_scores

pytest.importorskip("lm_eval")

SENTENCES = [line for line in TEXT.splitlines() if len(line) > 40]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} It was",
        "doc_to_choice": ["a lamp", "the book", "no sun at all", "a"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "lamp",
        "generation_kwargs": {"until": [";", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one task of each kind the harness has, on local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(1)
    lines = [
        {"text": sentence, "long": " ".join(rng.sample(SENTENCES, 4)), "label": rng.randrange(4)}
        for sentence in rng.sample(SENTENCES, 7)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        local = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**local, **task}))
    return folder


@pytest.fixture(scope="module")
def extended():
    """A small Llama with rescale factors, and a tokenizer."""
    model, tokenizer = tiny_llama(seed=4, vocab_size=720, max_position_embeddings=64), byte_level()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    shape = {"rotary_size": 16, "base": 10_000.0, "original_length": 64, "target_length": 256}
    install_factors(model, RescaleFactors.yarn(**shape))
    return model, tokenizer


@pytest.fixture(scope="module")
def exported(extended, tmp_path_factory):
    return export_model(*extended, tmp_path_factory.mktemp("hf") / "model")


def harness_results(model, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, num_fewshot=2)
    said = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("max_length", [256, 100])  # the second cuts prompts
def test_the_adapter_says_what_the_harness_says_of_the_exported_folder(extended, exported, tasks, max_length):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=3, max_length=max_length)
    expected, their_words = harness_results(theirs, tasks)
    ours, our_words = harness_results(harness_model(*extended, max_length, batch_tokens=300), tasks)
    for name in TASKS:
        numbers = {key: value for key, value in expected[name].items() if isinstance(value, int | float)}
        assert len(numbers) >= 1
        assert {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4, nan_ok=True)
    assert our_words["writing"] == their_words["writing"]
    assert len({str(words) for words in our_words["writing"]}) > 1
    for name in ("choices", "rolling"):
        flat = [torch.tensor(_numbers(words)) for words in (our_words[name], their_words[name])]
        assert len(flat[0]) >= 7
        torch.testing.assert_close(*flat, rtol=1e-4, atol=1e-3)
    assert len(their_words["choices"][0]) == 4


def _numbers(words):
    if isinstance(words, list | tuple):
        return [number for word in words for number in _numbers(word)]
    return [float(words == "True" if words in ("True", "False") else words)]


def test_continuations_of_rows_of_different_lengths_agree_with_the_stock_forward(monkeypatch):
    monkeypatch.setitem(scoring.LOGITS_AT_A_TIME, "cpu", 3 * 96)  # a few positions at a time
    model, generator = tiny_llama(), torch.Generator().manual_seed(3)
    texts = [torch.randint(96, (size,), generator=generator).tolist() for size in (9, 30, 5, 17)]
    with torch.no_grad():
        logits = [model(torch.tensor([text])).logits[0].double() for text in texts]
    likeliest = logits[1][-1].argmax().item()
    asked = [(0, [3]), (1, [likeliest]), (2, [7, 8]), (1, [likeliest + 1]), (3, [1, 2, 3])]
    rows = [
        text + max((tokens[:-1] for row, tokens in asked if row == number), default=[])
        for number, text in enumerate(texts)
    ]
    nll, right = continuation_scores(model, rows, asked)
    for (row, tokens), value, hit in zip(asked, nll.tolist(), right.tolist(), strict=True):
        with torch.no_grad():
            found = model(torch.tensor([texts[row] + tokens])).logits[0].double()[-len(tokens) - 1 : -1]
        chosen = torch.tensor(tokens)
        assert value == pytest.approx(-found.log_softmax(-1).gather(1, chosen[:, None]).sum().item(), abs=1e-4)
        assert hit == bool((found.argmax(-1) == chosen).all())
    assert right[1]
    assert not right.all()


def test_a_continuation_is_scored_whole_or_refused():
    model = tiny_llama(max_position_embeddings=64)
    context, continuation = [5, 6, 7], list(range(20, 32))
    (likelihood, _), *_ = log_likelihoods(model, [(context, continuation)], 12, 1000, Ranks())
    with torch.no_grad():  # the last 12 tokens that predict: one of the context, and all but the last that follow
        found = model(torch.tensor([context[-1:] + continuation[:-1]])).logits[0].double().log_softmax(-1)
    assert likelihood == pytest.approx(found.gather(1, torch.tensor(continuation)[:, None]).sum().item(), abs=1e-4)
    with pytest.raises(ValueError, match="continuation of 12 tokens, more than the longest of `lengths`, 11: give"):
        log_likelihoods(model, [([5], [6]), (context, continuation)], 11, 1000, Ranks())


@pytest.mark.parametrize(
    ("max_length", "options", "kept", "new"),
    [(1024, {}, 768, 256), (256, {}, 128, 128), (256, {"max_gen_toks": 250}, 6, 250), (1, {}, 1, 1)],
)
def test_a_prompt_keeps_at_least_half_of_the_length_where_the_task_sets_no_limit(
    extended, monkeypatch, max_length, options, kept, new
):
    model, tokenizer = extended
    asked = []

    def generated(input_ids, **settings):
        asked.append((input_ids[0].tolist(), settings["max_new_tokens"]))
        return input_ids

    monkeypatch.setattr(model, "generate", generated)
    context = [number % 700 for number in range(2000)]
    generate(model, tokenizer, context, options, max_length)
    assert asked == [(context[-kept:], new)]


@pytest.mark.parametrize("limit", [{"max_gen_toks": 64}, {"max_new_tokens": 1000}])
def test_a_limit_that_leaves_no_room_for_the_prompt_is_refused(extended, limit):
    ((name, tokens),) = limit.items()
    with pytest.raises(ValueError, match=f"sets `{name}` to {tokens}, which leaves no room .* 64: give a length above"):
        generate(*extended, [1, 2, 3], limit, 64)


def test_rows_are_scored_with_the_tables_of_their_own_lengths():
    model, generator = tiny_llama(initializer_range=0.2), torch.Generator().manual_seed(3)
    short, long = (RescaleFactors(tuple(1 + k * i for i in range(8)), 32, n) for k, n in ((0.2, 32), (2.0, 128)))
    texts = [torch.randint(96, (size,), generator=generator).tolist() for size in (100, 9, 34, 32, 60)]
    requests = [(text[:-3], text[-3:]) for text in texts]
    expected = []
    for text in texts:
        install_factors(model, short if len(text) - 1 <= 32 else long)
        expected.append(log_likelihoods(model, [(text[:-3], text[-3:])], 128, 10_000, Ranks())[0][0])
    install_factors(model, [short, long])
    found = [value for value, _ in log_likelihoods(model, requests, 128, 10_000, Ranks())]
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=r"Rows of \[31, 33\] tokens are read with several tables"):
        continuation_scores(model, [[1] * 31, [1] * 33], [(0, [2]), (1, [3])])


def test_numbers_of_ruler_go_to_their_lengths():
    found = {
        "results": {
            "niah": {
                "alias": "niah",
                "4096,none": 0.5,
                "4096_stderr,none": 0.1,
                "8192,none": -1,
                "8192_stderr,none": "N/A",
            },
            "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc,strict": 0.125},
        },
        "n-samples": {"niah": {"original": 9, "effective": 8}},
    }
    rows = measurements(found, 512)
    assert [(row.metric, row.length, row.value, row.n) for row in rows] == [
        ("niah", 4096, 0.5, 8),
        ("arc_acc", 512, 0.25, 0),
        ("arc_acc_strict", 512, 0.125, 0),
    ]
    assert (rows[0].low, rows[0].high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196))
    assert math.isnan(rows[1].low)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_unknown_task_is_named(extended, tasks):
    with pytest.raises(ValueError, match="has no task nonsense: see"):
        run_tasks(*extended, ["choices", "nonsense"], lengths=[64], include_path=str(tasks))


def config(path, **changes):
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    measuring = [
        {"class_path": f"lightning_longrope.callbacks.{name}", "init_args": {"lengths": [60, 120, 60], **arguments}}
        for name, arguments in {
            "PrefixPerplexity": {"documents": 3, "buckets": 4, "split": "test"},
            "SlidingPerplexity": {"documents": 3, "stride": 20, "split": "test"},
            "KeyValueRetrieval": {"lengths": [150], "depths": 2, "trials": 3},
        }.items()
    ]
    (path.parent / "text.txt").write_text(TEXT)
    data = {
        "class_path": "lightning_longrope.datamodules.PackedTextDataModule",
        "init_args": {"test_files": [str(path.parent / "text.txt")], "seq_len": 64, "cache_dir": None},
    }
    path.write_text(yaml.safe_dump({"trainer": {**trainer, "callbacks": measuring}, "data": data, **changes}))
    return path


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_eval_measures_an_exported_folder_on_a_test_split_alone(exported, tmp_path, capfd):
    words = [
        "-c",
        str(config(tmp_path / "eval.yaml")),
        "--model.name_or_path",
        str(exported),
        "--out",
        str(tmp_path / "out"),
    ]
    table = tmp_path / "out" / "eval" / "results.csv"
    table.parent.mkdir(parents=True)
    table.write_text("method,metric,length,depth,value,low,high,n\nyarn,passkey,64,,0.5,,,4\n")
    assert main(["eval", *words, "--generate"]) == 0
    other, *found = rows(table)
    assert (other["method"], other["value"], other["low"]) == ("yarn", "0.5", "")
    assert {row["method"] for row in found} == {"tuned"}
    assert [(row["metric"], row["length"], row["depth"]) for row in found] == [
        ("perplexity_prefix", "60", ""),
        ("perplexity_prefix", "120", ""),
        ("perplexity_sliding", "60", ""),
        ("perplexity_window_mean", "60", ""),
        ("perplexity_sliding", "120", ""),
        ("perplexity_window_mean", "120", ""),
        ("key_value", "150", "0.0"),
        ("key_value", "150", "1.0"),
        ("key_value", "150", ""),
    ]
    assert len(rows(tmp_path / "out" / "eval" / "positions.csv")) == 4
    printed = capfd.readouterr().err
    assert printed.count("key_value, 150 tokens, depth") == 3
    assert "expected \"'" in printed

    # the same number by hand, with transformers alone
    tokenizer, model = byte_level(), load_model(str(exported))
    from lightning_longrope.datamodules import PackedTextDataModule

    data = PackedTextDataModule(
        test_files=[str(tmp_path / "text.txt")], tokenizer=tokenizer, seq_len=64, cache_dir=None
    )
    excerpts = data.excerpts("test", 3, 120, 0)
    with torch.no_grad():
        nll = -model(excerpts).logits[:, 1:-1].double().log_softmax(-1).gather(-1, excerpts[:, 2:, None])
    assert float(found[1]["value"]) == pytest.approx(nll.mean().exp().item(), rel=1e-5)


@pytest.mark.slow
def test_tasks_run_from_the_command_line_without_data(exported, tasks, tmp_path):
    words = ["eval", "--model.name_or_path", str(exported), "--tasks", "choices,rolling", "--include_path", str(tasks)]
    words += [
        "--limit",
        "4",
        "--method",
        "mine",
        "--out",
        str(tmp_path),
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    command = [sys.executable, "-m", "lightning_longrope", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "eval" / "results.csv")
    assert [(row["method"], row["metric"], row["length"], row["n"]) for row in found] == [
        ("mine", "choices_acc", "256", "4"),
        ("mine", "choices_acc_norm", "256", "4"),
        ("mine", "rolling_word_perplexity", "256", "4"),
        ("mine", "rolling_bits_per_byte", "256", "4"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`eval` needs callbacks that measure in `trainer.callbacks`, or `--tasks`"),
        (["--generate"], "`--generate` prints answers of retrieval callbacks"),
        (["--trainer.callbacks+=lightning_longrope.callbacks.KeyValueRetrieval"], "pass `datamodule=`"),
        (["--generat"], "generat"),
    ],
)
def test_mistakes_are_one_line(exported, tmp_path, capfd, words, message):
    base = [
        "--model.name_or_path",
        str(exported),
        "--out",
        str(tmp_path),
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    assert main(["eval", *base, *words]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longrope: error:")
    assert message in error
