"""Rows shared by real processes against whole rows on one: hidden states, loss, gradients, training, search."""

import copy
import json
import os
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from full_memory import fill_memory
from helpers import LLAMA
from lightning.pytorch import Trainer
from processes import PARTITIONED, run_ranks
from small_tokenizers import TEXT, byte_level
from torch.utils.data import DataLoader, IterableDataset

from lightning_longrope import LongRoPEModule, sequence_parallel
from lightning_longrope.callbacks import FactorSearch, PasskeyRetrieval, PerplexityByLength
from lightning_longrope.datamodules import PackedTextDataModule
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.isolation import Stretches
from lightning_longrope.loading import load_model
from lightning_longrope.losses import chunked_nll
from lightning_longrope.model import hidden_states, install_factors, output_head
from lightning_longrope.optimizers import Schedule
from lightning_longrope.scoring import continuation_scores, greedy_matches, token_nll
from lightning_longrope.search import RampSearch
from lightning_longrope.sequence_parallel import SequenceGroup, share_rows
from lightning_longrope.strategies import (
    LongContextDDPStrategy,
    LongContextDeepSpeedStrategy,
    LongContextFSDP2Strategy,
)

pytestmark = pytest.mark.distributed
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": {},
    "multi_head": {"num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 192,
        "rope_parameters": LONGROPE,
    },
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 6, "attn_implementation": "eager"},
}
FACTORS = RescaleFactors((1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0), 32, 64, start_tokens=4, attention_factor=1.1)
LENGTH = 43  # no number of ranks divides it; longer than the window of 32, and a share of it is not


def model_of(name, **options):
    config = copy.deepcopy({**LLAMA, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, **FAMILIES[name]})
    attention = config.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    config = {key: value for key, value in config.items() if value is not None}
    return load_model(config=config, attn_implementation=attention, **options).eval()


def rows():
    """Two rows of documents, and labels of which some ranks have none."""
    tokens = torch.randint(1, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, 20:] = -100
    sizes = [3, 20, 1, 19, LENGTH]
    positions = torch.cat([torch.arange(size) for size in sizes]).view(2, LENGTH)
    bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    return tokens, labels, positions, Stretches(bounds, max(sizes))


def loss_and_gradients(model, group, isolated):
    """Mean loss over labels on all ranks, and the mean of the ranks' gradients, as every strategy takes it."""
    tokens, labels, positions, stretches = rows()
    model.zero_grad()
    shifted = group.cut(torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), filling=-100)
    hidden = hidden_states(model, tokens, *((positions, stretches) if isolated else ()))
    nll, count = chunked_nll(hidden.flatten(0, 1), output_head(model), shifted.flatten(), chunk=7)
    sums = torch.stack([nll.detach(), count])
    if group.size > 1:
        dist.all_reduce(sums)
    (nll * group.size / sums[1]).backward()
    for parameter in model.parameters():
        if group.size > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= group.size
    return group.join(hidden, LENGTH), sums[0] / sums[1], [parameter.grad.clone() for parameter in model.parameters()]


def compare(name, group, isolated, attention=None):
    whole = model_of(name)
    if name == "llama":
        install_factors(whole, FACTORS)
    if name == "multi_head":
        install_factors(whole, [RescaleFactors((1.0,) * 8, 32, 32), FACTORS])  # by the length of the whole row
    if attention is not None:
        whole.set_attn_implementation(attention)
    shared = copy.deepcopy(whole)
    share_rows(shared, group)
    one, many = (loss_and_gradients(model, how, isolated) for model, how in ((whole, SequenceGroup()), (shared, group)))
    for ours, theirs in zip((*many[:2], *many[2]), (*one[:2], *one[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert len(one[2]) > 10
    return whole, shared


def share_and_compare(folder):
    dist.init_process_group("gloo")
    group, done = SequenceGroup(dist.group.WORLD), []
    for name in FAMILIES:
        for isolated in (False, True):
            whole, shared = compare(name, group, isolated and name != "phi3")
            done.append(name)
    tokens = rows()[0]
    whole, shared = compare("llama", group, True, "eager")
    shared.gradient_checkpointing_enable()
    for found, expected in (
        (token_nll(shared, tokens), token_nll(whole, tokens)),
        (token_nll(shared, tokens, last=5), token_nll(whole, tokens)[:, -5:]),
        (greedy_matches(shared, tokens, 9), greedy_matches(whole, tokens, 9)),
        *zip(
            *(
                continuation_scores(model, [[5, 6, 7, 8, 9], [7, 8]], [(0, [9, 3, 1]), (1, [4])])
                for model in (shared, whole)
            ),
            strict=True,
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    whole_logits(group)
    halves(group)
    refuse(group)
    (folder / f"done{dist.get_rank()}").write_text(" ".join(done))


def whole_logits(group):
    """A loss of one's own on the logits of whole rows, as every rank computes it."""
    whole = model_of("llama")
    shared = copy.deepcopy(whole)
    share_rows(shared, group)
    tokens = rows()[0]
    for model, how in ((whole, SequenceGroup()), (shared, group)):
        logits = output_head(model)(how.join(hidden_states(model, tokens), LENGTH))
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for ours, theirs in zip(shared.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad / group.size, theirs.grad, rtol=1e-5, atol=1e-7)


def halves(group):
    """Adapters in float32 beside frozen bfloat16 weights, and what is exchanged under autocast."""
    model = model_of("llama", dtype="bfloat16")
    model.model.layers[0].self_attn.q_proj.float()
    share_rows(model, group)  # whose proof runs before any strategy casts
    model, sent = model_of("llama"), []
    share_rows(model, group)
    exchange = sequence_parallel._exchange
    sequence_parallel._exchange = lambda part, group: sent.append(part.dtype) or exchange(part, group)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, rows()[0])
    sequence_parallel._exchange = exchange
    assert set(sent) == {torch.bfloat16}


def refuse(group):
    """Models whose rows cannot be shared, each named by what stands in the way."""
    FAMILIES["five_heads"] = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}
    with pytest.raises(ValueError, match="must divide the 5 attention heads of the model: choose one of .5."):
        share_rows(model_of("five_heads"), group)
    flexible = model_of("llama")
    flexible.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="sdpa, eager or flash_attention_2, got 'flex_attention'"):
        share_rows(flexible, group)
    mixing = model_of("llama")
    mixing.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output.roll(1, dims=1))
    with pytest.raises(RuntimeError, match="it mixes tokens outside of its attention"):
        share_rows(mixing, group)
    tokens = rows()[0]
    assert hidden_states(mixing, tokens).shape[1] == LENGTH  # whole, as before


@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_rows_are_whole_rows(tmp_path, world_size):
    run_ranks(world_size, share_and_compare, tmp_path, logs=tmp_path / "logs")
    for rank in range(world_size):
        assert (tmp_path / f"done{rank}").read_text().split() == [name for name in FAMILIES for _ in range(2)]


STRATEGIES = {
    "ddp": lambda: LongContextDDPStrategy(sequence_parallel_size=2),
    "fsdp2": lambda: LongContextFSDP2Strategy(sequence_parallel_size=2),
    "zero1": lambda: LongContextDeepSpeedStrategy(stage=1, sequence_parallel_size=2),
    "zero2": lambda: LongContextDeepSpeedStrategy(stage=2, sequence_parallel_size=2),
    "zero3": lambda: LongContextDeepSpeedStrategy(stage=3, zero=PARTITIONED, sequence_parallel_size=2),
    "tied": lambda: LongContextFSDP2Strategy(sequence_parallel_size=2),
}
FULL = ["ddp", "zero3"]  # strategies to try with one rank's memory full
STEPS = 20


class Module(LongRoPEModule):
    """Notes the losses, the factors a search has found and how much of a weight lies here."""

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def on_train_start(self):
        self.losses = []
        weight = self.model.model.layers[0].mlp.up_proj.weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        self.share = local.numel() / (LLAMA["hidden_size"] * LLAMA["intermediate_size"])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(self.trainer.callback_metrics["train_loss"]))
        return loss


def data(folder, batch_size):
    return PackedTextDataModule(
        files=[str(folder / "text.jsonl")], val_share=0.2, test_share=0.0, tokenizer=str(folder / "tokenizer"),
        seq_len=63, batch_size=batch_size, packing="best_fit", cache_dir=str(folder / "cache"),
    )  # fmt: skip


def fit(folder, name, out, **trainer):
    """Searches, trains for 20 batches and measures; what came of it."""
    search = FactorSearch(
        documents=3, held_out=2, algorithm=RampSearch(max_evaluations=8), objective="perplexity", batch_tokens=128
    )
    measures = [PerplexityByLength(lengths=[32, 63], documents=5), PasskeyRetrieval(lengths=[140], depths=2, trials=2)]
    tied = {"tie_word_embeddings": True} if name == "tied" else {}
    module = Module(
        config={**LLAMA, "vocab_size": 720, **tied},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.2),
        schedule=Schedule(warmup_steps=0),
        gradient_checkpointing=True,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    runner = Trainer(
        default_root_dir=out, callbacks=[search, *measures], max_steps=STEPS // 2, accumulate_grad_batches=2,
        gradient_clip_val=0.5, enable_checkpointing=False, num_sanity_val_steps=0, **quiet, **trainer,
    )  # fmt: skip
    runner.fit(module, datamodule=data(folder, 4 // (runner.world_size // 2 or 1)))
    runner.validate(module, datamodule=data(folder, 4 // (runner.world_size // 2 or 1)), verbose=False)
    return {
        "losses": module.losses,
        "scores": [row["score"] for row in search.result.history],
        "held_out": search.result.held_out.score,
        "val_perplexity": float(runner.callback_metrics["val_perplexity"]),
        "measured": [found.value for measure in measures for found in measure.results],
        "share": module.share,
        "rows": runner.strategy.distributed_sampler_kwargs if runner.world_size > 1 else None,
    }


def fit_with_every_strategy(folder):
    for name, strategy in STRATEGIES.items():
        found = fit(folder, name, folder / name, devices=4, strategy=strategy())
        (folder / f"{name}{os.environ['RANK']}.json").write_text(json.dumps(found))
    full = fill_memory(rank=1, sizes=(2, 64))
    for name in FULL:
        found = fit(folder, name, folder / f"full-{name}", devices=4, strategy=STRATEGIES[name]())
        found["failures"], full.failures = full.failures, 0
        (folder / f"full-{name}{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    byte_level().save_pretrained(folder / "tokenizer")
    lines = TEXT.split("\n")
    texts = ["\n".join(lines[start : start + 1 + start % 5]) for start in range(len(lines))]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alone = {name: fit(folder, name, folder / f"{name}-alone", devices=1) for name in ("ddp", "tied")}
    with suppress(AssertionError):  # each test says what its strategy came to
        run_ranks(4, fit_with_every_strategy, folder, logs=folder / "logs", timeout=200)
    return folder, {name: alone.get(name, alone["ddp"]) for name in STRATEGIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_by_two_ranks_search_train_and_measure_as_one_process_does(fits, name):
    folder, alone = fits[0], fits[1][name]
    assert len(alone["losses"]) == STEPS
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    for rank in range(4):
        path = folder / f"{name}{rank}.json"
        assert path.exists(), (folder / "logs" / f"rank{rank}.log").read_text()[-4000:]
        found = json.loads(path.read_text())
        assert found["rows"] == {"num_replicas": 2, "rank": rank // 2}
        assert found["share"] == {"fsdp2": 0.25, "tied": 0.25, "zero3": 0.0}.get(name, 1.0)
        for key in ("losses", "scores", "held_out", "val_perplexity", "measured"):
            assert found[key] == pytest.approx(alone[key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_rank_out_of_memory_leaves_none_of_its_group_waiting(fits, name):
    folder, alone = fits[0], fits[1][name]
    for rank in range(4):
        path = folder / f"full-{name}{rank}.json"
        assert path.exists(), (folder / "logs" / f"rank{rank}.log").read_text()[-4000:]
        found = json.loads(path.read_text())
        assert found["scores"] == pytest.approx(alone["scores"], rel=1e-5)
        assert (found["failures"] >= 3) == (rank == 1)


class Streams(IterableDataset):
    """Rows of every rank's own, as a stream that is split over all ranks gives them."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.rank)
        for _ in range(4):
            tokens = torch.randint(96, (24,), generator=generator)
            yield {"input_ids": tokens, "labels": tokens}


def train_on_streams(folder):
    rank = int(os.environ["RANK"])
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    for name, of in (("same", 7), ("other", rank)):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=LongContextDDPStrategy(sequence_parallel_size=2), max_steps=2,
            default_root_dir=folder, **dict.fromkeys(quiet, False),
        )  # fmt: skip
        said = "trained"
        try:
            trainer.fit(Module(config=LLAMA), DataLoader(Streams(of), batch_size=2))
        except ValueError as error:
            said = str(error)
        (folder / f"{name}{rank}").write_text(said)


def test_ranks_of_a_group_that_are_given_other_rows_are_refused(tmp_path):
    run_ranks(2, train_on_streams, tmp_path, logs=tmp_path / "logs")
    for rank in range(2):
        assert (tmp_path / f"same{rank}").read_text() == "trained"
        assert "The 2 ranks that share rows were given different ones" in (tmp_path / f"other{rank}").read_text()
