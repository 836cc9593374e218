"""Folders of shards: nothing in them is run, nothing more is read than is asked for, and a kill loses none."""

import os
import pickle
import zipfile

import pytest
import torch
from helpers import LLAMA

from lightning_longrope import load_model
from lightning_longrope.checkpoints import (
    check_resumable,
    convert_to_universal,
    put_back_all,
    read_checkpoint,
    universal_groups,
)
from lightning_longrope.sizes import read_config

UNSAFE = "not safe to read: posix.mkdir"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def entry():
    return {"config": LLAMA, "factors": None}


def deepspeed(path, **content):
    """A folder as DeepSpeed writes it without partitions."""
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save({"longrope": entry(), **content}, path / "checkpoint" / "mp_rank_00_model_states.pt")
    return path


def distributed(path, **weights):
    """A folder as FSDP2 writes it."""
    state = {"state_dict": {f"model.{name}": weight for name, weight in weights.items()}}
    torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"longrope": entry()}, path / "meta.pt")
    return path


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),  # which protocol 4 follows
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.state_dict_loader", "load"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_an_index_reaches_nothing_through_the_modules_of_torch(tmp_path, monkeypatch, module, name):
    monkeypatch.chdir(tmp_path)
    folder = distributed(tmp_path / "saved", a=torch.ones(2))
    assert torch.equal(read_checkpoint(folder)[1]["a"], torch.ones(2))
    (folder / ".metadata").write_bytes(b"\x80\x04" + short(module) + short(name) + b"\x93" + short("evil") + b"\x85R.")
    with pytest.raises(ValueError, match=f"not safe to read: {module}.{name}"):
        read_checkpoint(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_weights_that_are_no_tensors_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = distributed(tmp_path / "saved", a=torch.ones(2), b=Evil())
    with pytest.raises(ValueError, match=r"not safe to read, being no tensors: model.b"):
        read_checkpoint(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected pickle protocol")
def test_no_bit_of_a_weight_that_a_disk_has_changed_is_read(tmp_path):
    """Of every byte one bit: torch itself reads the weights of such shards, and compares no checksum."""
    weight = torch.arange(12.0).reshape(3, 4)
    shard = next(distributed(tmp_path / "saved", a=weight).glob("*.distcp"))
    whole, refused = shard.read_bytes(), 0
    for place in range(len(whole)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert torch.equal(read_checkpoint(tmp_path / "saved")[1]["a"], weight)
        except ValueError:
            refused += 1
    assert weight.nbytes < refused < len(whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_weight_larger_than_its_parts_is_not_filled_with_what_was_in_memory(tmp_path):
    folder = distributed(tmp_path / "saved", a=torch.ones(3, 4))
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["state_dict.model.a"].size = torch.Size((11, 4))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"the parts of state_dict.model.a are not the whole of \(11, 4\)"):
        read_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_part_that_lies_outside_its_weight_does_not_pass_for_the_whole(tmp_path):
    """Its size is that of the weight, so a sum of sizes alone would not show it."""
    folder = distributed(tmp_path / "saved", a=torch.ones(3, 4))
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["state_dict.model.a"].chunks[0].offsets = torch.Size((1, 0))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"the parts of state_dict.model.a are not the whole of \(3, 4\)"):
        read_checkpoint(folder)


def flip_a_bit(file, name):
    """Of the middle of a record, as a disk may."""
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(name)
        with archive.open(name) as record:
            begin = record._orig_compress_start
    content = bytearray(file.read_bytes())
    content[begin + entry.file_size // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", ["one file", "DeepSpeed without partitions", "ZeRO", "settings beside FSDP2"])
def test_a_bit_that_a_disk_has_changed_in_any_tensor_is_named(tmp_path, kind):
    tensors = {f"model.{name}": torch.arange(24.0) + place for place, name in enumerate("abc")}
    path = tmp_path / "saved.ckpt"
    if kind == "one file":
        torch.save({"longrope": entry(), "state_dict": tensors}, path)
        files = [path]
    elif kind == "settings beside FSDP2":
        files = [distributed(path, a=torch.ones(2)) / "meta.pt"]
        torch.save({"longrope": entry(), "loops": tensors}, files[0])
    else:
        folder = deepspeed(path, module=tensors) / "checkpoint"
        if kind == "ZeRO":
            torch.save(tensors, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        files = sorted(folder.glob("*.pt"))
    storages = [(file, name) for file in files for name in zipfile.ZipFile(file).namelist() if "/data/" in name]
    assert len(storages) == (6 if kind == "ZeRO" else 3)
    for file, name in storages:
        whole = file.read_bytes()
        flip_a_bit(file, name)
        with pytest.raises(ValueError, match=f"{file} is damaged: the checksum of {name} is another"):
            read_checkpoint(path)
        file.write_bytes(whole)


def test_a_zero_folder_is_checked_before_its_weights_are_read(tmp_path, monkeypatch):
    """DeepSpeed unpickles without restrictions."""
    monkeypatch.chdir(tmp_path)
    folder = deepspeed(tmp_path / "saved.ckpt")
    torch.save({"optimizer_state_dict": Evil()}, folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=UNSAFE):
        read_checkpoint(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_settings_beside_an_fsdp2_checkpoint_are_checked_before_it_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = distributed(tmp_path / "saved.ckpt", a=torch.ones(2))
    check_resumable(folder)
    torch.save({"longrope": entry(), "callbacks": Evil()}, folder / "meta.pt")
    with pytest.raises(ValueError, match=rf"meta.pt holds .*{UNSAFE}"):
        check_resumable(folder)
    assert not (tmp_path / "evil").exists()


def test_a_deepspeed_folder_is_checked_before_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = deepspeed(tmp_path / "saved.ckpt")
    torch.save({"optimizer_state_dict": Evil()}, folder / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "universal" / "zero").mkdir(parents=True)
    torch.save({"param_groups": Evil()}, tmp_path / "universal" / "zero" / "optimizer_state.pt")
    with pytest.raises(ValueError, match=UNSAFE):
        convert_to_universal(folder, tmp_path / "converted")
    with pytest.raises(ValueError, match=UNSAFE):
        universal_groups(tmp_path / "universal")
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_config_is_read_without_a_weight(tmp_path):
    zero = deepspeed(tmp_path / "zero.ckpt")
    (zero / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    fsdp = distributed(tmp_path / "fsdp.ckpt", a=torch.ones(3, 2, dtype=torch.bfloat16))
    for shard in fsdp.glob("*.distcp"):
        shard.unlink()
    for folder in (zero, fsdp):
        assert read_config(folder).hidden_size == LLAMA["hidden_size"]
    shapes = {name: (weight.shape, weight.dtype) for name, weight in read_checkpoint(fsdp, values=False)[1].items()}
    assert shapes == {"a": ((3, 2), torch.bfloat16)}


def test_the_earlier_checkpoint_is_back_after_a_kill_between_the_renames(tmp_path):
    model = load_model(config=LLAMA)
    deepspeed(tmp_path / ".last.ckpt.replaced", module={f"model.{k}": w for k, w in model.state_dict().items()})
    deepspeed(tmp_path / ".last.ckpt.partial", module={})
    found = load_model(tmp_path / "last.ckpt").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".last.ckpt.partial"}


def test_every_earlier_checkpoint_of_a_folder_is_put_back_and_no_newer_one_touched(tmp_path):
    for name in (".last.ckpt.replaced", ".step=4.ckpt.replaced", "step=4.ckpt", ".other.ckpt.partial"):
        (tmp_path / name).write_text(name)
    put_back_all(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "last.ckpt": ".last.ckpt.replaced", "step=4.ckpt": "step=4.ckpt",
        ".step=4.ckpt.replaced": ".step=4.ckpt.replaced", ".other.ckpt.partial": ".other.ckpt.partial",
    }  # fmt: skip
