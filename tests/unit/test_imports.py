"""The rooms of the house: imports point one way, every module imports, and help costs neither torch nor Lightning."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lightning_longrope

PACKAGE = Path(lightning_longrope.__file__).parent
FLOORS = [  # each may import from its own floor and those before it
    {"files", "geometry", "rope", "factors", "packing", "retrieval", "losses", "search", "rotary", "optimizers"}
    | {"mixing", "summary", "windows", "redaction", "tables", "objectives", "tokenizing", "out_of_memory"}
    | {"onednn", "memory", "plain_errors", "streams"}
    | {"attention", "checkpoints", "estimate", "heads", "levers", "lora", "reading", "run_settings", "sliding"}
    | {"collectives", "locks", "stopping"},
    {"metrics", "model", "loading", "scoring", "fingerprints", "score_book", "evaluating"}
    | {"search_folder", "search_task", "searching"}
    | {"doctor", "generating", "reporting", "isolation", "layers", "long_rows", "sequence_parallel", "sizes"},
    {
        "checking",
        "advising",
        "finite",
        "module",
        "datamodules",
        "callbacks",
        "harness",
        "tracking",
        "strategies",
        "peers",
    },
    {"export", "recipes"},
    {"cli"},
    {"commands"},
    {"__main__"},
]
LIGHTNING = {
    "advising",
    "checking",
    "finite",
    "metrics",
    "module",
    "datamodules",
    "callbacks",
    "tracking",
    "strategies",
    "peers",
    "cli",
}
LIGHTNING |= {"commands"}
TRANSFORMERS_FREE = {"rope", "mixing", "packing", "losses", "search", "files", "geometry", "rotary", "objectives"} | {
    "reading",
    "summary",
    "heads",
    "levers",
    "estimate",
    "run_settings",
}


def rooms():
    return sorted(path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if is_room(path))


def is_room(path):
    return (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()


def sources(room):
    return [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))


def imports(room):
    """Names of all modules a room imports, those inside functions too."""
    names = set()
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(room):
    return next(number for number, names in enumerate(FLOORS) if room in names)


def test_every_room_has_a_floor_and_there_are_rooms():
    assert set().union(*FLOORS) == set(rooms())
    assert len(rooms()) > 15


@pytest.mark.parametrize("room", rooms())
def test_imports_point_one_way(room):
    ours = {name.split(".")[1] for name in imports(room) if name.startswith("lightning_longrope.")} & set(rooms())
    too_high = {other for other in ours if floor(other) > floor(room)}
    assert not too_high, f"{room} must not import {too_high}"
    assert "cli" not in ours or room == "commands"


@pytest.mark.parametrize("room", sorted(set(rooms()) - LIGHTNING))
def test_only_rooms_that_face_lightning_import_it(room):
    found = {name for name in imports(room) if name.split(".")[0] in {"lightning", "pytorch_lightning", "torchmetrics"}}
    assert not found


@pytest.mark.parametrize("room", sorted(TRANSFORMERS_FREE & set(rooms())))
def test_pure_rooms_know_no_models(room):
    assert not {name for name in imports(room) if name.split(".")[0] == "transformers"}


def test_optional_and_heavy_packages_are_imported_where_they_are_used():
    heavy = {"datasets", "deepspeed", "wandb", "matplotlib", "flash_attn", "peft", "lm_eval"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not heavy & {name.split(".")[0] for name in names}, f"{path}: {names}"


def test_every_module_imports():
    names = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "lightning_longrope.")]
    assert len(names) > 25
    for name in names:
        importlib.import_module(name)


def test_public_names_resolve():
    assert len(lightning_longrope.__all__) == 8
    for name in lightning_longrope.__all__:
        assert getattr(lightning_longrope, name)


def test_help_costs_neither_torch_nor_lightning():
    code = (
        "import sys; from lightning_longrope.__main__ import main; main(['--help']); main(['--version']);"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "longrope run RECIPE" in output
    assert output.rstrip().endswith("[]")


def test_what_we_use_that_is_deprecated_ends_a_test_and_what_lightning_uses_does_not(request):
    """Names of modules are patterns there, which that of ours begins like."""
    if request.config.getoption("pythonwarnings"):
        pytest.skip("the command line of pytest lets warnings through")
    for module in ("lightning_longrope.rope", "lightning_longrope", "torchmetrics.text"):
        with pytest.raises(DeprecationWarning):
            warnings.warn_explicit("old", DeprecationWarning, "somewhere.py", 1, module=module)
    for module in ("lightning.pytorch.trainer", "torch.jit"):
        warnings.warn_explicit("old", DeprecationWarning, "somewhere.py", 1, module=module)
