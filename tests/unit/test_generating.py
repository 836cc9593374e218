"""Generation across tables with a cache, against full forwards of every row alone with the one table for its length."""

import copy
import pickle
from inspect import signature

import pytest
import torch
from helpers import FAMILIES as COMMON_FAMILIES
from helpers import FAMILY
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from lightning_longrope import LengthTables, RescaleFactors, install_factors, load_model
from lightning_longrope.model import rope_geometry, table_for

L = 16
COMMON = {**FAMILY, "max_position_embeddings": L}
FAMILIES = {
    **COMMON_FAMILIES,
    "gemma3_text": {
        "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 20,
        "tie_word_embeddings": False,
    },
}
PROMPT = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(PROMPT)
MASK[1, :5] = 0  # a row of 7 tokens, padded on the left: it crosses 5 steps later
NEW = 30  # to 42 and 37 tokens, over 16 and 32
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"  # before 5.24


def _model(family="llama"):
    torch.manual_seed(0)
    return load_model(config={"model_type": family, **COMMON, **FAMILIES[family]}).eval()


def _tables(model):
    pairs = rope_geometry(model.config).pairs
    return LengthTables(
        tuple(
            RescaleFactors(tuple(1 + step * i for i in range(pairs)), L, length, starts, attention)
            for step, length, starts, attention in ((0.0, L, 0, 1.0), (0.8, 2 * L, 3, 1.4), (3.0, 4 * L, 0, 0.7))
        )
    )


@torch.no_grad()
def _by_hand(model, prompt, tables, new=NEW):
    """Greedy decoding of one row without a cache: every step a full forward under the table for its length."""
    models = []
    for table in tables.tables:
        models.append(copy.deepcopy(model))
        install_factors(models[-1], table)
    tokens = prompt.tolist()
    for _ in range(new):
        reader = next(m for m, limit in zip(models, (L, 2 * L, 10**9), strict=True) if len(tokens) <= limit)
        logits = reader(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.index_fill(0, torch.tensor([2]), -torch.inf).argmax()))  # no end of text
    return tokens[len(prompt) :]


def _generate(model, prompt=PROMPT, mask=MASK, **kwargs):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    output = model.generate(prompt, attention_mask=mask, **{**settings, **kwargs})
    return output[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_gives_the_tokens_of_full_forwards_across_two_tables(family):
    model = _model(family)
    tables = _tables(model)
    expected = [_by_hand(model, row[mask == 1], tables) for row, mask in zip(PROMPT, MASK, strict=True)]
    assert min(len(set(row)) for row in expected) > 4  # no repetition that any table would give
    install_factors(model, tables)
    assert _generate(model) == expected
    assert _generate(model, use_cache=False) == expected
    assert [_generate(model, PROMPT[:1], MASK[:1])[0], _generate(model, PROMPT[1:, 5:], MASK[1:, 5:])[0]] == expected
    del model.prepare_inputs_for_generation
    stale = _generate(model)
    assert stale != expected  # what a kept cache would give
    assert stale[0][: L - 12] == expected[0][: L - 12]


def test_the_cache_is_computed_again_once_at_each_border():
    model = _model()
    install_factors(model, _tables(model))
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[1][0].shape[1]))
    _generate(model, PROMPT[:1], MASK[:1])
    assert [(step + 12, count) for step, count in enumerate(seen) if count > 1] == [(12, 12), (17, 17), (33, 33)]
    seen.clear()
    _generate(model)
    assert [step + 12 for step, count in enumerate(seen) if count > 1] == [12, 17, 22, 33, 38]  # 5 steps later


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2}])
def test_beams_and_static_caches_cross_too(how):
    model = _model()
    install_factors(model, _tables(model))
    sampled = {"do_sample": "num_return_sequences" in how}
    torch.manual_seed(3)
    cached = _generate(model, **how, **sampled)
    torch.manual_seed(3)
    how.pop("cache_implementation", None)
    assert cached == _generate(model, use_cache=False, **how, **sampled)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_conversation_goes_on_with_the_cache_of_its_last_turn(kind):
    model = _model()
    tables = _tables(model)
    expected = _by_hand(model, PROMPT[0], tables)
    install_factors(model, tables)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    first = _generate(model, PROMPT[:1], MASK[:1], max_new_tokens=10, min_new_tokens=10, **{CACHE: cache})
    so_far = torch.cat([PROMPT[:1], torch.tensor(first)], dim=1)
    more = NEW - 10
    rest = _generate(model, so_far, torch.ones_like(so_far), max_new_tokens=more, min_new_tokens=more, **{CACHE: cache})
    assert first[0] + rest[0] == expected


def test_a_turn_that_is_taken_back_takes_its_table_with_it():
    model = _model()
    tables = _tables(model)
    install_factors(model, tables)
    cache = DynamicCache(config=model.config)
    said = _generate(model, PROMPT[:1], MASK[:1], max_new_tokens=8, min_new_tokens=8, **{CACHE: cache})
    so_far = torch.cat([PROMPT[:1], torch.tensor(said)], dim=1)  # 20 tokens, the first 19 of them cached
    _generate(model, so_far, torch.ones_like(so_far), max_new_tokens=1, min_new_tokens=1, **{CACHE: cache})
    cache.crop(-6)
    again = so_far[:, :15]
    found = _generate(model, again, torch.ones_like(again), max_new_tokens=8, min_new_tokens=8, **{CACHE: cache})
    assert found == [_by_hand(_model(), again[0], tables, 8)]


def test_a_cache_that_a_plain_forward_has_filled_is_known_by_its_length():
    model = _model()
    tables = _tables(model)
    prompt = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(2))
    expected = _by_hand(model, prompt[0], tables, 5)
    install_factors(model, tables)
    for held in (14, 18):  # with the first table, and with the one that goes on
        with torch.no_grad():
            cache = model(prompt[:, :held], **{CACHE: DynamicCache(config=model.config)})[CACHE]
        found = _generate(model, prompt, torch.ones_like(prompt), **{CACHE: cache}, max_new_tokens=5, min_new_tokens=5)
        assert found == [expected], held


def test_tokens_that_are_not_known_any_more_are_asked_for():
    model = _model()
    tables = _tables(model)
    install_factors(model, tables)
    prompt = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    with pytest.raises(ValueError, match="only the last 8 tokens are known"):
        _generate(model, prompt, mask, prefill_chunk_size=8, max_new_tokens=2, min_new_tokens=2)
    with table_for(model, 32):
        parts = _generate(model, prompt, mask, prefill_chunk_size=8, max_new_tokens=5, min_new_tokens=5)
    assert parts == [_by_hand(_model(), prompt[0], tables, 5)]


def test_copies_follow_their_own_tables_and_other_installs_take_the_hook_away():
    model = _model()
    tables = _tables(model)
    install_factors(model, tables)
    expected = _generate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        install_factors(model, tables.longest)
        assert "prepare_inputs_for_generation" not in vars(model)
        assert _generate(other) == expected
    install_factors(model, LengthTables((tables.tables[0],)))
    assert "prepare_inputs_for_generation" not in vars(model)
