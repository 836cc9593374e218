"""The examination of a machine: every trap is found where it is laid, and nothing on a sound one."""

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_longrope import doctor
from lightning_longrope.__main__ import main

Usage = namedtuple("Usage", "total")


def texts(check, *arguments):
    return [f"{finding.level}: {finding.text} -> {finding.remedy}" for finding in check(*arguments)]


def test_a_lock_that_a_killed_compilation_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("cpu_adam", "fused_adam"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    old = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    os.utime(old, (time.time() - 3600,) * 2)
    (found,) = texts(doctor.check_deepspeed)  # the other may be at work
    assert found.startswith(f"trap: {old} was left by a compilation")
    assert found.endswith(f"rm {old}")


def test_deepspeed_without_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "accelerate" else "1.0")
    assert texts(doctor.check_deepspeed)[0].endswith("-> pip install accelerate")


@pytest.mark.parametrize(
    ("address", "found"), [("127.0.1.1", "resolves to 127.0.1.1"), (None, "does not resolve"), ("10.0.0.7", None)]
)
def test_a_host_name_that_other_nodes_cannot_use(monkeypatch, address, found):
    def resolve(name):
        if address is None:
            raise socket.gaierror
        return address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    lines = texts(doctor.check_network)
    assert (len(lines), "MASTER_ADDR" in str(lines)) == ((0, False) if found is None else (1, True))
    assert found is None or found in lines[0]


def test_little_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20))
    assert "has 64 MiB" in texts(doctor.check_shared_memory, tmp_path)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(8 * 2**30))
    assert not texts(doctor.check_shared_memory, tmp_path)
    assert not texts(doctor.check_shared_memory, tmp_path / "none")


def test_versions_and_builds(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not texts(doctor.check_torch) or torch.version.cuda
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert texts(doctor.check_torch)[0] == 'broken: torch 2.8.0 is too old -> pip install "torch>=2.11"'
    monkeypatch.setattr(doctor, "version", lambda package: "5.17.0")
    assert "Gemma 3" in texts(doctor.check_transformers)[0]
    monkeypatch.setattr(doctor, "version", lambda package: "5.16.2")
    assert texts(doctor.check_transformers)[0].startswith("broken: transformers 5.16.2 is too old")
    assert "no C++ compiler" in texts(doctor.check_compiler)[0]
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None, hip=None))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "built for processors alone" in texts(doctor.check_torch)[-1]
    assert not texts(doctor.check_compiler)


def test_what_is_installed_and_does_not_import_is_broken_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "installed", lambda package: "2.8.3" if package == "flash-attn" else None)
    assert main(["doctor"]) == 2
    output = capsys.readouterr()
    assert "  BROKEN flash-attn does not import: undefined symbol: _ZN3c10 -> pip install" in output.out
    assert output.err.startswith("longrope: error: something is broken: flash-attn does not import")


@pytest.mark.filterwarnings("ignore")  # what other packages warn of when they are imported is theirs
def test_a_sound_machine_shows_what_it_has(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_transformers, doctor.check_shared_memory))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"Python {sys.version.split()[0]}")
    assert f"  torch {torch.__version__}" in lines
    assert "  CPU, weights in bfloat16: sdpa (FlashAttention needs CUDA)" in lines
    assert sum(line.startswith("  CUDA, weights in") for line in lines) == 2
    assert any(" processor cores, " in line for line in lines)
    assert any(line.startswith("  g++ ") for line in lines)


def test_the_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = dict(line.split(">=") for line in project["dependencies"])
    assert {name: required[name] for name in ("torch", "transformers")} == doctor.OLDEST


def test_an_old_torch_is_told_of_although_the_package_does_not_run_with_it():
    code = (
        "import sys, torch; torch.__version__ = '2.9.1'; sys.modules['torch.nn.attention.varlen'] = None;"
        "from lightning_longrope import doctor; from lightning_longrope.__main__ import main;"
        "doctor.CHECKS = (doctor.check_torch,); assert main(['doctor']) == 2;"
        "assert not doctor._varlen_has_windows()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'BROKEN torch 2.9.1 is too old -> pip install "torch>=2.11"' in done.stdout
