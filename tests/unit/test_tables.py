"""Tables by length: every row gets the logits it has in a model with the one table for its length."""

import copy
import json

import pytest
import torch
from helpers import tiny_llama
from transformers import AutoModelForCausalLM

from lightning_longrope import LengthTables, LongRoPEModule, RescaleFactors, install_factors, load_model
from lightning_longrope.model import candidate_rows, installed_factors, installed_tables, original_rope, table_for

L = 32  # of tiny_llama
SHORT = RescaleFactors(tuple(1 + 0.2 * i for i in range(8)), L, L, attention_factor=0.9)
MIDDLE = RescaleFactors(tuple(1 + 0.5 * i for i in range(8)), L, 2 * L, start_tokens=4)
LONG = RescaleFactors(tuple(2 + 1.0 * i for i in range(8)), L, 4 * L, attention_factor=1.3)
TABLES = LengthTables((LONG, SHORT, MIDDLE))
BY_LENGTH = {1: SHORT, L: SHORT, L + 1: MIDDLE, 2 * L: MIDDLE, 2 * L + 1: LONG, 4 * L: LONG, 5 * L: LONG}


def _model():
    return tiny_llama(initializer_range=0.2)


@torch.no_grad()
def _logits(model, length=100, rows=2, **kwargs):
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(length))
    return model(tokens, use_cache=False, **kwargs).logits


def _alone(model, factors, *args, **kwargs):
    single = copy.deepcopy(model)
    install_factors(single, factors)
    return _logits(single, *args, **kwargs)


def test_the_first_table_that_holds_a_length_is_its_table():
    assert TABLES.tables == (SHORT, MIDDLE, LONG)
    assert TABLES.lengths == (32, 64, 128)
    assert TABLES.longest == LONG
    assert {length: TABLES.for_length(length) for length in BY_LENGTH} == BY_LENGTH
    assert LengthTables.of(TABLES) is TABLES
    assert LengthTables.of([LONG, SHORT]) == LengthTables((SHORT, LONG))
    assert LengthTables.of(LONG).for_length(1) == LONG


def test_a_model_reads_each_length_as_with_its_table_alone():
    model = _model()
    install_factors(model, TABLES)
    assert (installed_tables(model), installed_factors(model)) == (TABLES, LONG)
    for length, factors in BY_LENGTH.items():
        assert torch.equal(_logits(model, length), _alone(model, factors, length)), length
    assert (_alone(model, LONG) - _alone(model, MIDDLE)).abs().max() > 0.1  # far enough apart to tell


def test_rows_of_a_batch_choose_for_themselves_and_a_later_part_by_all_that_came_before():
    model = _model()
    install_factors(model, TABLES)
    starts = torch.tensor([0, L, 100])  # as the newest tokens of sequences that differ in length
    positions = starts[:, None] + torch.arange(20)
    mask = torch.ones(3, 20, dtype=torch.int64)  # so that transformers sees no packed documents
    together = _logits(model, 20, rows=3, position_ids=positions, attention_mask=mask)
    for row, factors in enumerate((SHORT, MIDDLE, LONG)):
        alone = _alone(model, factors, 20, rows=3, position_ids=positions, attention_mask=mask)
        assert torch.equal(together[row], alone[row]), row


def test_packed_documents_share_the_table_of_the_longest():
    model = _model()
    install_factors(model, TABLES)
    positions = torch.cat([torch.arange(40), torch.arange(30), torch.arange(30)])[None].expand(2, -1)
    assert torch.equal(_logits(model, position_ids=positions), _alone(model, MIDDLE, position_ids=positions))


def test_below_the_window_an_untuned_model_comes_back_bit_for_bit():
    model = _model()
    before = {length: _logits(model, length) for length in (5, L, L + 1)}
    install_factors(model, TABLES.with_pretrained())
    assert installed_tables(model).lengths == (32, 64, 128)
    for length in (5, L):
        assert torch.equal(_logits(model, length), before[length])
    assert torch.equal(_logits(model, L + 1), _alone(model, MIDDLE, L + 1))
    install_factors(model, LengthTables.of(LONG).with_pretrained().tables[:1])
    assert torch.equal(_logits(model, L + 1), before[L + 1])


def test_both_tables_of_a_hugging_face_config_choose_as_transformers_does(tmp_path):
    model = _model()
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 4 * L
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": list(SHORT.values),
        "long_factor": list(LONG.values),
        "factor": 4.0,
        "original_max_position_embeddings": L,
        "attention_factor": 1.3,
    }
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.load_state_dict(model.state_dict())
    config.save_pretrained(tmp_path)
    install_factors(model, LengthTables.load(tmp_path))
    assert len(installed_tables(model).tables) == 2
    for length in (L, L + 1):
        torch.testing.assert_close(_logits(model, length), _logits(theirs, length), rtol=0, atol=1e-4)
    entries = json.loads((tmp_path / "config.json").read_text())
    entries["rope_parameters"]["short_factor"] = entries["rope_parameters"]["long_factor"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert len(LengthTables.load(tmp_path).tables) == 1


def test_another_install_replaces_all_tables_and_contexts_give_them_back():
    model = _model()
    pretrained = _logits(model)
    install_factors(model, TABLES)
    installed = _logits(model)
    with table_for(model, 2 * L):
        assert torch.equal(_logits(model), _alone(_model(), MIDDLE))
    with original_rope(model):
        assert torch.equal(_logits(model), pretrained)
    with candidate_rows(model, [SHORT, LONG]):
        assert torch.equal(_logits(model)[0], _alone(_model(), SHORT)[0])
    assert torch.equal(_logits(model), installed)
    install_factors(model, MIDDLE)
    assert installed_tables(model) == LengthTables((MIDDLE,))
    assert torch.equal(_logits(model, 5), _alone(_model(), MIDDLE, 5))


def test_files_and_checkpoints_bring_all_tables_back(tmp_path):
    TABLES.save(tmp_path / "tables.json")
    LengthTables.of(LONG).save(tmp_path / "long.json")
    LengthTables.of(MIDDLE).save(tmp_path / "middle.json")
    SHORT.save(tmp_path / "short.json")
    assert LengthTables.load(tmp_path / "tables.json") == TABLES
    assert RescaleFactors.load(tmp_path / "tables.json") == RescaleFactors.load(tmp_path / "long.json") == LONG
    assert LengthTables.load(*(tmp_path / f"{name}.json" for name in ("long", "short", "middle"))) == TABLES
    _model().save_pretrained(tmp_path / "model")
    files = [str(tmp_path / f"{name}.json") for name in ("long", "short", "middle")]
    module = LongRoPEModule(str(tmp_path / "model"), factors=files)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt")
    assert installed_tables(loaded) == TABLES
    assert torch.equal(_logits(loaded, L), _logits(module.model.eval(), L))
    again = LongRoPEModule(str(tmp_path / "model"), factors=files[0])
    again.configure_model()
    again.on_load_checkpoint(checkpoint)
    assert installed_tables(again.model) == TABLES


def test_tables_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        LengthTables(())
    with pytest.raises(ValueError, match=r"\[32, 32\]"):
        LengthTables((SHORT, SHORT))
    with pytest.raises(ValueError, match="different models"):
        LengthTables((SHORT, RescaleFactors((1.0, 1.0), L, 2 * L)))
    with pytest.raises(ValueError, match="8 frequency pairs"):
        install_factors(_model(), LengthTables((RescaleFactors((1.0, 1.0), L, 2 * L),)))
    (tmp_path / "tables.json").write_text('{"tables": []}')
    with pytest.raises(ValueError, match="Cannot read rescale factors"):
        LengthTables.load(tmp_path / "tables.json")


def test_none_among_files_stands_for_the_pretrained_rope_within_its_window(tmp_path):
    MIDDLE.save(tmp_path / "middle.json")
    LONG.save(tmp_path / "long.json")
    tables = LengthTables.load(tmp_path / "long.json", "none", tmp_path / "middle.json")
    assert tables.lengths == (L, 2 * L, 4 * L)
    assert tables.for_length(L).is_identity
    assert tables.tables[1:] == (MIDDLE, LONG)
    assert LengthTables.load(tmp_path / "long.json").lengths == (4 * L,)


def test_no_table_of_a_file_may_decrease_unless_it_is_meant(tmp_path):
    falling = RescaleFactors((1.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0), L, L)
    LengthTables((falling, LONG)).save(tmp_path / "tables.json")
    with pytest.raises(ValueError, match=r"decrease from 3\.0 \(pair 1\) to 2\.0"):
        LengthTables.load(tmp_path / "tables.json")
    assert LengthTables.load(tmp_path / "tables.json", monotone=False).tables == (falling, LONG)
