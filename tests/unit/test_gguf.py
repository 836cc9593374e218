"""Tables in a GGUF file, read back with the ``gguf`` package; everything else in the file stays as it was."""

import numpy as np
import pytest
import torch
from helpers import tiny_llama

from lightning_longrope import LengthTables, RescaleFactors, install_factors
from lightning_longrope.__main__ import main
from lightning_longrope.export import write_gguf

gguf = pytest.importorskip("gguf")

L = 32
SHORT = RescaleFactors((1.0,) * 8, L, L, attention_factor=1.2)
LONG = RescaleFactors(tuple(1 + 0.7 * i for i in range(8)), L, 4 * L, attention_factor=1.2)
WORDS = ["<s>", "</s>", "a", "é"]
OLDER = ("llama.rope.scaling.factor", "llama.rope.scaling.type", "llama.rope.scale_linear")


@pytest.fixture
def source(tmp_path):
    """What the converter leaves of a model: a type and a factor, no tables; here with the tensor of another method."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(4 * L)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_float32("llama.rope.scale_linear", 4.0)
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.5, 1.5, 2.5, -1.0])
    writer.add_bool("general.some_flag", True)
    writer.add_tensor("token_embd.weight", rng.standard_normal((96, 64)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight", rng.standard_normal((64, 64)).astype(np.float16))
    quantized = gguf.quants.quantize(rng.standard_normal((64, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def _read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items() if "GGUF." not in name}
    tensors = {t.name: (t.tensor_type, tuple(t.shape), np.array(t.data)) for t in reader.tensors}
    return fields, tensors


def test_the_tables_are_in_the_file_and_the_rest_is_as_it_was(source, tmp_path):
    assert write_gguf(source, tmp_path / "out" / "long.gguf", LengthTables((SHORT, LONG))).is_file()
    before, weights = _read(source)
    after, tensors = _read(tmp_path / "out" / "long.gguf")
    for name, table in (("long", LONG), ("short", SHORT)):
        kind, shape, data = tensors.pop(f"rope_factors_{name}.weight")
        assert (kind, shape) == (gguf.GGMLQuantizationType.F32, (8,))
        assert data.tolist() == pytest.approx(table.values, rel=1e-7)
    assert {name: value for name, (_, value) in after.items() if name not in before or name in OLDER} == {
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": L,
        "llama.rope.scaling.attn_factor": pytest.approx(1.2),
    }
    assert after["llama.context_length"][1] == 4 * L
    same = {name: entry for name, entry in before.items() if name not in OLDER}
    assert len(same) >= 8
    assert {name: after[name] for name in same} == same
    weights.pop("rope_freqs.weight")  # which llama.cpp would refuse or prefer
    assert tensors.keys() == weights.keys()
    for name, (kind, shape, data) in weights.items():
        assert tensors[name][:2] == (kind, shape)
        assert np.array_equal(tensors[name][2], data)
    write_gguf(tmp_path / "out" / "long.gguf", tmp_path / "again.gguf", LengthTables((SHORT, LONG)))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out" / "long.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [16, 64])
def test_a_file_that_aligns_its_weights_in_another_way_keeps_it(tmp_path, alignment):
    values = [np.arange(size, dtype=np.float32) for size in (96, 4, 56)]
    for padding in range(0, 64, 8):  # the weights begin at another place behind the entries each time
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_custom_alignment(alignment)
        writer.add_rope_dimension_count(16)
        writer.add_string("general.note", "x" * padding)
        for number, array in enumerate(values):
            writer.add_tensor(f"blk.{number}.weight", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out = write_gguf(tmp_path / "model.gguf", tmp_path / "out.gguf", LengthTables((SHORT, LONG)))
        reader = gguf.GGUFReader(out)
        assert reader.alignment == alignment
        found = {tensor.name: tensor for tensor in reader.tensors}
        assert {int(tensor.data_offset) % alignment for tensor in found.values()} == {0}
        for number, array in enumerate(values):
            assert np.array_equal(found[f"blk.{number}.weight"].data, array)


def test_the_command_takes_the_tables_of_a_checkpoint_or_of_files(source, tmp_path, capsys):
    model = tiny_llama()
    install_factors(model, LONG)
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "longrope": {"config": model.config.to_dict(), "factors": LONG.to_dict()},
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    LengthTables((SHORT, LONG)).save(tmp_path / "tables.json")
    words = ["export", str(tmp_path / "a.ckpt"), str(tmp_path / "b.gguf"), "--gguf", str(source)]
    for more, short in (([], LONG), (["--tables", str(tmp_path / "tables.json")], SHORT)):
        assert main([*words, *more]) == 0
        data = _read(tmp_path / "b.gguf")[1]["rope_factors_short.weight"][2]
        assert data.tolist() == pytest.approx(short.values, rel=1e-7)
    assert "b.gguf" in capsys.readouterr().out


def test_what_llama_cpp_cannot_have_is_refused(source, tmp_path, caplog):
    start = LengthTables((RescaleFactors(LONG.values, L, 4 * L, start_tokens=4),))
    with pytest.raises(ValueError, match=r"start_tokens=4.*--lossy"):
        write_gguf(source, tmp_path / "b.gguf", start)
    write_gguf(source, tmp_path / "b.gguf", start, lossy=True)
    assert "start_tokens=4" in caplog.text
    with pytest.raises(ValueError, match="rotates 16 channels, but the tables are for 4"):
        write_gguf(source, tmp_path / "c.gguf", LengthTables((RescaleFactors((1.0, 2.0), L, 4 * L),)))
    with pytest.raises(ValueError, match="another path"):
        write_gguf(source, source, LengthTables((LONG,)))
    (tmp_path / "text.gguf").write_text("no such file, but long enough to be read as one")
    with pytest.raises(ValueError, match="is no GGUF file"):
        write_gguf(tmp_path / "text.gguf", tmp_path / "c.gguf", LengthTables((LONG,)))
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_tensor("a", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is a gpt2 model"):
        write_gguf(tmp_path / "gpt2.gguf", tmp_path / "c.gguf", LengthTables((LONG,)))
    assert not (tmp_path / "c.gguf").exists()
    assert not list(tmp_path.glob(".*partial"))
