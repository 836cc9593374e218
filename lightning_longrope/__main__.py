"""``longrope``: the command line. Imports neither torch nor Lightning for help; they cost seconds."""

import sys

from lightning_longrope.stopping import StoppedError, ends_with, stoppable
from lightning_longrope.streams import make_ready, write_out

USAGE = """\
longrope: a context window up to 2,048k tokens for any RoPE language model

  longrope run RECIPE            run the numbered stages of a folder, skip finished ones, resume the one that was cut
  longrope estimate -c CONFIG    memory per GPU and hours of a configuration or a recipe, before anything is spent
  longrope fit -c CONFIG         train; validate and test measure (LightningCLI)
  longrope search -c CONFIG      the factor search alone, no optimizer
  longrope compare -c CONFIG     none, PI, NTK, dynamic NTK, YaRN and given factors on the same documents
  longrope data -c CONFIG        what the datamodule holds and yields: sources, lengths of documents, rows
  longrope eval -c CONFIG        evaluation callbacks and lm-eval tasks on a checkpoint, folder or Hugging Face model
  longrope tokenize -c CONFIG    text to tokens, once, with many processes; --verify STORE reads a store again
  longrope export RUN OUT        a Hugging Face folder from a checkpoint or run
  longrope generate              an answer to a prompt, as it is written: --model FOLDER --prompt-file F
  longrope report RUN            one self-contained report.html with figures and tables; several runs side by side
  longrope doctor                versions, devices, the attention that will be used, known traps and their remedies

  longrope COMMAND --help        every option of a command
  longrope --version
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words after ``longrope``; those of the process by default.

    Returns:
        The exit status: 0; 2 after one line that says what a user can mend; 143 after one that says that
        SIGTERM came, 130 after one that says so of Ctrl-C.
    """
    make_ready()
    status = _run(sys.argv[1:], last=True) if arguments is None else _run(arguments)
    return write_out() or status


def _run(arguments: list[str], last: bool = False) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return write_out(USAGE)
    if arguments[0] in ("--version", "version"):
        from lightning_longrope import __version__

        return write_out(f"longrope {__version__}\n")
    try:
        with stoppable(last):
            from lightning_longrope.commands import run_command

            status = run_command(arguments[0], arguments[1:])
            if last:
                ends_with(status)
            return status
    except StoppedError as stop:
        if stop.first or not stop.together:
            sys.stderr.write(f"longrope: {stop}\n")
        return 128 + stop.number


if __name__ == "__main__":
    sys.exit(main())
