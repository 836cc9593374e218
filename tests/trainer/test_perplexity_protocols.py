"""Sliding windows and prefixes against a brute force in plain Python, token by token."""

import logging
import math
import statistics

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from known_models import Data, Module, Positional, trainer_with
from small_tokenizers import byte_level

from lightning_longrope.callbacks import PrefixPerplexity, SlidingPerplexity
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.packing import Documents


def plain_nll(model, row):
    """Nll of tokens 1.. of a row in plain Python, float64."""
    losses = []
    for logits, target in zip(model.logits(row).tolist(), row[1:], strict=False):
        top = max(logits)
        losses.append(top + math.log(math.fsum(math.exp(value - top) for value in logits)) - logits[target])
    return losses


def sliding_by_hand(model, texts, bos, length, stride):
    """The nll of every window, by the loop of the published scripts: a list of (document, losses)."""
    found = []
    for number, text in enumerate(texts):
        previous = 0
        for begin in range(0, len(text), stride):
            end = min(begin + length - len(bos), len(text))
            labelled = end - max(previous, 1)  # the first token has nothing to be predicted from
            if labelled:
                found.append((number, plain_nll(model, bos + text[begin:end])[-labelled:]))
            previous = end
            if end == len(text):
                break
    return found


def measured(tmp_path, callback, data, model=None):
    trainer_with(tmp_path, callback).validate(Module(model or Positional()), datamodule=data, verbose=False)
    return {(m.metric, m.length): m for m in callback.results}


def chosen(data, callback, longest, shortest):
    """The documents that the callback is about to draw, in its order."""
    documents = data.documents("validation")
    enough = [number for number, size in enumerate(documents.lengths) if size >= shortest]
    numbers = np.random.default_rng(callback.seed).permutation(enough)[: callback.documents]
    ends = documents.starts + np.minimum(documents.lengths, longest)
    return [documents.tokens[documents.starts[n] : ends[n]].tolist() for n in numbers]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("document_length", "shortest"), [(None, None), (50, 10)])
def test_both_conventions_agree_with_the_published_loop(tmp_path, bos, document_length, shortest):
    model, data = Positional(), Data(byte_level(bos=bos))
    callback = SlidingPerplexity((16, 40), 5, 6, document_length, shortest, seed=3, batch_tokens=64)
    found = measured(tmp_path, callback, data, model)
    first = [data.tokenizer.bos_token_id] if bos else []
    texts = chosen(data, callback, document_length or 40 - bos, shortest or 40 - bos)
    assert len(texts) == 6
    assert shortest is None or min(map(len, texts)) < 40 - bos  # a document shorter than the window
    for length in (16, 40):
        windows = [losses for _, losses in sliding_by_hand(model, texts, first, length, 5)]
        flat = [loss for window in windows for loss in window]
        assert len(flat) == sum(len(text) - 1 for text in texts)
        assert len({len(window) for window in windows}) > 1 or length == 40
        sliding, mean = found["perplexity_sliding", length], found["perplexity_window_mean", length]
        assert sliding.value == pytest.approx(math.exp(statistics.fmean(flat)), rel=2e-6)
        assert mean.value == pytest.approx(math.exp(statistics.fmean(map(statistics.fmean, windows))), rel=2e-6)
        assert sliding.value != pytest.approx(mean.value, rel=1e-4) or length == 40
        assert sliding.low < sliding.value < sliding.high
        assert sliding.n == mean.n == 6


def test_short_documents_are_measured_and_counted(tmp_path, caplog):
    callback = SlidingPerplexity((16, 36, 64), 5, documents=100, min_document_length=2)
    with caplog.at_level(logging.INFO, "lightning_longrope"):
        found = measured(tmp_path, callback, Data())
    sizes = Data().documents("validation").lengths.tolist()
    assert callback.short_documents == {length: sum(size < length - 1 for size in sizes) for length in (16, 36, 64)}
    assert callback.short_documents[64] == len(sizes) == 30
    assert "5 of 30 documents are shorter than a window of 36 tokens" in caplog.text
    assert "Only 30 documents of at least 2 tokens" in caplog.text
    assert found["perplexity_sliding", 64].n == 30


@pytest.mark.parametrize("empty", [True, False])
def test_no_document_that_is_long_enough_is_an_error_that_says_so(tmp_path, empty):
    data = Data()
    if empty:
        none = np.empty(0, np.int64)
        data.documents = lambda split: Documents(none.astype(np.uint16), none, none)
    longest = 0 if empty else 59
    with pytest.raises(ValueError, match=rf"no document of at least 99 tokens \(its longest has {longest}\)"):
        measured(tmp_path, SlidingPerplexity((100,), 10), data)


def test_only_positions_that_predict_go_through_the_output_head(tmp_path):
    model, positions = Positional(), []

    class Head(torch.nn.Module):
        def forward(self, hidden):
            positions.append(len(hidden))
            return hidden

    model.get_output_embeddings = Head
    callback = SlidingPerplexity((40,), 5, documents=4, document_length=50, min_document_length=50, batch_tokens=80)
    measured(tmp_path, callback, Data(), model)
    assert sum(positions) == 4 * 49
    assert [seen.shape for seen in model.seen] == [(2, 40)] * 6 + [(2, 36)] * 2


@pytest.mark.parametrize("bos", [True, False])
def test_every_prefix_comes_from_one_forward(tmp_path, bos):
    model, data = Positional(), Data(byte_level(bos=bos))
    callback = PrefixPerplexity((9, 40, 16), documents=5, buckets=4, seed=2, batch_tokens=100)
    found = measured(tmp_path, callback, data, model)
    assert [seen.shape for seen in model.seen] == [(2, 40), (2, 40), (1, 40)]
    rows = data.excerpts("validation", 5, 40, seed=2).tolist()
    for length in (9, 16, 40):
        losses = [plain_nll(model, row[:length])[bos:] for row in rows]
        expected = math.exp(statistics.fmean(loss for row in losses for loss in row))
        m = found["perplexity_prefix", length]
        assert m.value == pytest.approx(expected, rel=2e-6)
        assert m.low < m.value < m.high
    assert callback.positions[0].start == 1 + bos
    assert callback.positions[-1].end == 40
    assert len(callback.positions) == 4
    for part in callback.positions:
        losses = [plain_nll(model, row)[part.start - 1 : part.end - 1] for row in rows]
        assert part.nll == pytest.approx(statistics.fmean(loss for row in losses for loss in row), rel=2e-6)
        assert part.low <= part.nll <= part.high


def test_parts_of_a_window_are_the_same_in_every_precision(tmp_path):
    def parts(precision):
        callback = PrefixPerplexity((259,), documents=2, buckets=7)
        trainer_with(tmp_path, callback, precision=precision).validate(
            Module(tiny_llama(vocab_size=720)), datamodule=Data(), verbose=False
        )
        return [(part.start, part.end) for part in callback.positions]

    assert (
        parts("bf16-true")
        == parts("32-true")
        == [(round(2 + i * 257 / 7), round(2 + (i + 1) * 257 / 7)) for i in range(7)]
    )


def test_lengths_with_factors_of_their_own_have_forwards_of_their_own(tmp_path):
    shape = {"rotary_size": 16, "base": 10_000.0, "original_length": 32}
    short, long = (RescaleFactors.ntk(**shape, target_length=length) for length in (64, 128))
    callback, module = PrefixPerplexity((24, 32, 48), documents=3), Module(tiny_llama(vocab_size=720))
    trainer = trainer_with(tmp_path, callback)
    trainer.validate(module, datamodule=Data(), verbose=False)
    seen = []
    module.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    measure = {
        name: callback.measure(trainer, module, at)
        for name, at in {
            "both": lambda length: short if length < 40 else long,
            "short": lambda length: short,
            "long": lambda length: long,
        }.items()
    }
    assert [size for size in seen if size > 8] == [32, 48, 48, 48]
    expected = [*measure["short"][:2], measure["long"][2]]
    assert [m.value for m in measure["both"]] == pytest.approx([m.value for m in expected], rel=1e-6)
    assert measure["short"][2].value != pytest.approx(measure["long"][2].value, rel=1e-6)


def test_users_mistakes_are_named(tmp_path):
    for mistake, match in [
        (lambda: SlidingPerplexity(stride=0), "`documents` and `stride`"),
        (lambda: SlidingPerplexity(documents=0), "`documents` and `stride`"),
        (lambda: SlidingPerplexity(min_document_length=1), "`min_document_length`"),
        (lambda: PrefixPerplexity(buckets=0), "`documents` and `buckets`"),
        (lambda: PrefixPerplexity(every_n_steps=0), "`every_n_steps` and `every_n_epochs` must be at least 1"),
        (lambda: PrefixPerplexity(every_n_steps=2, every_n_epochs=1), "not both"),
        (lambda: measured(tmp_path, SlidingPerplexity((40,), stride=39), Data()), r"`stride` \(39\) must be smaller"),
        (lambda: measured(tmp_path, PrefixPerplexity((40, 2)), Data()), "must be above 2 tokens, got 2"),
    ]:
        with pytest.raises(ValueError, match=match):
            mistake()
