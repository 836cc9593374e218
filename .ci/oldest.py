"""Prints a constraint for every package of pyproject.toml: the oldest version that it admits.

    .ci/oldest.py > oldest.txt && pip install -c oldest.txt .

Words such as ``torch==2.13.0`` take the place of what pyproject.toml says, where a machine has no older build.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("deepspeed", "gguf", "lm-eval", "lora", "wandb")
"""Those that need neither a GPU nor a compiler."""


def oldest(project: dict[str, object], instead: list[str]) -> list[str]:
    """A constraint for each package that ``project`` needs, and for those of ``EXTRAS``.

    Raises:
        ValueError: If a package has no oldest version.
    """
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    pins = {}
    for requirement in [*project["dependencies"], *(entry for extra in EXTRAS for entry in extras[extra])]:  # type: ignore[misc]
        found = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
        if found is None:
            raise ValueError(f"pyproject.toml: {requirement!r} must say which is the oldest version: name>=version.")
        pins[found[1]] = found[2]
    return [f"{name}=={version}" for name, version in {**pins, **dict(word.split("==") for word in instead)}.items()]


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    sys.stdout.write("\n".join(oldest(pyproject["project"], sys.argv[1:])) + "\n")
