"""What a machine has for long contexts, and known traps on it, each with its remedy."""

import inspect
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from packaging.version import Version

from lightning_longrope.attention import choose_attention
from lightning_longrope.checkpoints import choose_accelerator
from lightning_longrope.layers import has_compiler

PACKAGES = (
    "torch", "lightning", "transformers", "deepspeed", "accelerate", "flash-attn", "peft", "lm-eval", "wandb",
    "datasets", "jsonargparse", "numpy",
)  # fmt: skip
OLDEST = {"torch": "2.11", "transformers": "5.17"}
"""The oldest versions that work, those of ``pyproject.toml``."""
GIB = 2**30
STALE = 600
"""Seconds after which a lock of a compilation is taken for a forgotten one."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        level: ``ok``, ``trap`` for what hurts some runs, ``broken`` for what no run survives.
        text: What was found.
        remedy: What to do about it.
    """

    level: Literal["ok", "trap", "broken"]
    text: str
    remedy: str = ""


def examine() -> dict[str, list[Finding]]:
    """Everything, by the heading it is shown under."""
    return {
        "versions": [Finding("ok", f"{name} {installed(name) or '- not installed'}") for name in PACKAGES],
        "devices": list(devices()),
        "attention": list(attention()),
        "compilers": list(compilers()),
        "traps": [finding for check in CHECKS for finding in check()],
    }


def installed(package: str) -> str | None:
    """Version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """Processors and GPUs with their memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("ok", f"{os.cpu_count()} processor cores, {memory:.0f} GiB")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        kind = f"compute capability {card.major}.{card.minor}"
        yield Finding("ok", f"cuda:{index} {card.name}, {card.total_memory / GIB:.0f} GiB, {kind}")
    if not torch.cuda.is_available():
        yield Finding("ok", "no CUDA device")


def attention() -> Iterator[Finding]:
    """The kernel that ``attn_implementation: auto`` comes to on CUDA, be it there or not, and on processors."""
    for place, cuda in (("CUDA", True), ("CPU", False)):
        for dtype in (torch.bfloat16, torch.float32):
            kernel, reason = choose_attention("auto", dtype, cuda)
            name = str(dtype).removeprefix("torch.")
            yield Finding("ok", f"{place}, weights in {name}: {kernel or 'sdpa'} ({reason})")


def compilers() -> Iterator[Finding]:
    """What compiles layers (C++) and kernels (CUDA)."""
    for name in ("g++", "clang++", "nvcc", "ninja"):
        yield Finding("ok", f"{name} {shutil.which(name) or '- not found'}")


def check_imports() -> Iterator[Finding]:
    """Packages that are installed and do not import: built for another torch, mostly."""
    for package, module in (("flash-attn", "flash_attn"), ("deepspeed", "deepspeed"), ("peft", "peft")):
        if installed(package):
            choose_accelerator()
            try:
                import_module(module)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                remedy = f"pip install --force-reinstall --no-build-isolation {package}, or uninstall it"
                yield Finding("broken", f"{package} does not import: {reason}", remedy)


def check_torch() -> Iterator[Finding]:
    """Old versions, and a torch without CUDA beside a GPU."""
    yield from _too_old("torch", torch.__version__)
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        remedy = "pip install torch from an index with CUDA builds"
        yield Finding("broken", "there is an NVIDIA driver, but this torch is built for processors alone", remedy)
    elif torch.version.cuda and not torch.cuda.is_available():
        yield Finding(
            "trap", "torch is built for CUDA, but sees no device", "check the driver and CUDA_VISIBLE_DEVICES"
        )


def check_transformers() -> Iterator[Finding]:
    """Versions whose own code is wrong for extended models."""
    transformers = version("transformers")
    yield from _too_old("transformers", transformers)
    if Version(transformers) < Version("5.23"):
        text = (
            f"transformers {transformers} cannot load an exported Gemma 3 (longrope on one of its two kinds of layers)"
        )
        yield Finding("trap", text, 'pip install "transformers>=5.23" where Gemma 3 is exported')


def _too_old(package: str, found: str) -> Iterator[Finding]:
    oldest = OLDEST[package]
    if Version(found).release < Version(oldest).release:  # builds of vendors are pre-releases
        yield Finding("broken", f"{package} {found} is too old", f'pip install "{package}>={oldest}"')


def check_deepspeed() -> Iterator[Finding]:
    """DeepSpeed without what loads pretrained models in parts, and compilations that were killed."""
    if installed("deepspeed") and not installed("accelerate"):
        text = "deepspeed without accelerate: under ZeRO stage 3 every rank would hold the whole pretrained model"
        yield Finding("trap", text, "pip install accelerate")
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        if time.time() - lock.stat().st_mtime > STALE:
            yield Finding("trap", f"{lock} was left by a compilation that was killed: runs hang there", f"rm {lock}")


def check_compiler() -> Iterator[Finding]:
    """No compiler for ``compile_layers``."""
    if not has_compiler():
        yield Finding("trap", "no C++ compiler: `compile_layers` has no effect", "install g++ (apt-get install g++)")


def check_network() -> Iterator[Finding]:
    """A host name that other nodes could not use."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding("trap", f"the host name {name!r} does not resolve", f"add it to /etc/hosts; {_INTERFACE}")
        return
    if address.startswith("127."):
        text = (
            f"the host name {name!r} resolves to {address}: over several nodes ranks would wait for each other in vain"
        )
        yield Finding("trap", text, _INTERFACE)


_INTERFACE = "for several nodes set MASTER_ADDR, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Little room for what data loaders and NCCL share."""
    if path.is_dir() and (size := shutil.disk_usage(path).total) < GIB:
        text = f"{path} has {size / 2**20:.0f} MiB, too little for data loaders with workers and for NCCL"
        yield Finding("trap", text, "docker run --shm-size=8g (or --ipc=host), or `num_workers: 0`")


def check_cuda() -> Iterator[Finding]:
    """Cards without bf16, and an allocator that breaks long rows into fragments."""
    if not torch.cuda.is_available():
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("trap", "the GPU has no bf16", "`trainer.precision: 16-mixed`")
    if not _varlen_has_windows():
        text = f"torch {torch.__version__} attends to isolated documents and sliding windows one after another"
        yield Finding("trap", text, "a newer torch, whose variable-length attention has windows, or flash-attn")
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" not in settings:
        text = "the CUDA allocator keeps fragments, which costs long rows some GiB"
        yield Finding("trap", text, "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")


def _varlen_has_windows() -> bool:
    try:
        from torch.nn.attention import varlen  # which a torch that is too old has not
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_imports,
    check_torch,
    check_transformers,
    check_deepspeed,
    check_compiler,
    check_network,
    check_shared_memory,
    check_cuda,
)
