"""Imports every module of the installed package, in the environment it is run in, and says how many there are."""

import importlib
import pkgutil
import sys
from pathlib import Path

import lightning_longrope

home = Path(lightning_longrope.__file__).parent
assert Path(__file__).parents[1] not in home.parents, f"{home} is the checkout, not what is installed"
names = [info.name for info in pkgutil.walk_packages([str(home)], "lightning_longrope.")]
assert len(names) > 100, names
for name in names:
    importlib.import_module(name)
sys.stdout.write(f"{len(names)} modules import\n")
