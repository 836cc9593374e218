"""Standard streams that are closed, full, without a reader or of another encoding, with the real process."""

import os
import subprocess
import sys

import pytest

HELP = "import sys; from lightning_longrope.__main__ import main; sys.exit(main(['--help']))"
PIPE = """
import sys
from lightning_longrope import commands
from lightning_longrope.__main__ import main
def show(command, words):
    sys.stdin.readline()
    for _ in range(9999):
        print("text " * 99)
commands.command_of = lambda word: show
sys.exit(main(["doctor"]))
"""


def ended(code, shell, buffered=True, **environment):
    """Status, output and errors of code whose streams a shell redirects."""
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    done = subprocess.run(words, env=kept | environment, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line(buffered):
    line = "longrope: error: cannot write to the standard output: No space left on device.\n"
    assert ended(HELP, ">/dev/full", buffered) == (2, "", line)


@pytest.mark.parametrize("streams", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(streams):
    status, _, errors = ended(HELP, streams)
    assert (status, errors) == (0, "")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(buffered):
    process = subprocess.Popen(
        [sys.executable, *([] if buffered else ["-u"]), "-c", PIPE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(100) == 141


def test_letters_that_the_encoding_of_the_output_lacks_are_escaped():
    code = "import sys; from lightning_longrope.streams import make_ready; make_ready(); print('\\u2514 ä')"
    assert ended(code, "", PYTHONIOENCODING="ascii") == (0, "\\u2514 \\xe4\n", "")


def test_help_imports_neither_torch_nor_lightning():
    code = f"{HELP.rsplit(';', 1)[0]}; main(['--help']); print({{'torch', 'lightning'}} & set(sys.modules))"
    assert ended(code, "")[1].endswith("set()\n")
