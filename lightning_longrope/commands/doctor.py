"""``longrope doctor``: versions, devices, the attention that will be used, compilers, known traps."""

import sys

from lightning_longrope import __version__
from lightning_longrope.commands.parsing import Parser
from lightning_longrope.doctor import Finding, examine


def doctor(command: str, arguments: list[str]) -> None:
    """``longrope doctor``.

    Raises:
        ValueError: If something is broken, after everything was shown.
    """
    Parser(
        prog="longrope doctor", description="Versions, devices, attention, compilers, and traps with remedies."
    ).parse_args(arguments)
    sys.stdout.write(f"lightning-longrope {__version__}, Python {sys.version.split()[0]}\n")
    found = examine()
    for heading, findings in found.items():
        sys.stdout.write(f"{heading}\n")
        for finding in findings:
            sys.stdout.write(f"  {_line(finding)}\n")
        if not findings:
            sys.stdout.write("  none found\n")
    broken = [finding.text for findings in found.values() for finding in findings if finding.level == "broken"]
    if broken:
        raise ValueError(f"something is broken: {'; '.join(broken)}.")


def _line(finding: Finding) -> str:
    sign = {"ok": "", "trap": "! ", "broken": "BROKEN "}[finding.level]
    return f"{sign}{finding.text}" + (f" -> {finding.remedy}" if finding.remedy else "")
