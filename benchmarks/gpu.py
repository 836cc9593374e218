"""Times the work of a 7B at long rows on one GPU of 80 GiB or more, in under nine minutes.

A slice of Llama-2 7B stands for the model: its real layers, one or two of them, in bfloat16 with random weights.

    python benchmarks/gpu.py              writes benchmarks/results/gpu.json, after every row
    python benchmarks/gpu.py --out FILE   writes it there
    python benchmarks/gpu.py --quick      rows of 131,072 tokens at most; writes nothing
    python benchmarks/gpu.py --dry-run    every part at toy sizes on the CPU; writes nothing but a FILE given
    python benchmarks/gpu.py --check      exit status 1 where a goal is missed, or a row failed or never came

Every part is a process of its own with a time of its own: one that fails, hangs or loses the device leaves a row that
says so, and the others run. The projected searches are those of the default settings; they are held against the model's
operations at the utilisation to expect of a GPU (as in ``longrope estimate``).
"""

import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

from _results import RESULTS, Row, failed, finish, line_of, parser, record_of

from lightning_longrope.files import write_json

PACKAGES = ("torch", "transformers", "lightning")
MINUTES = 8.5  # from the first line of ``main`` to the end of the last part
SECONDS = {  # the most that a part may take; those whose figures the projection needs come first
    "device": 20.0,
    "slice": 130.0,
    "window": 190.0,
    "attention": 80.0,
    "batching": 40.0,
    "loss": 50.0,
}


def main() -> int:
    """Runs the parts one after another, then projects a search from them."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path, help="file to write in place of results/gpu.json")
    options.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, to exercise the script")
    given, end = options.parse_args(), monotonic() + 60 * MINUTES
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # which leaves CUDA alone, so that forked processes can use it
    from _gpu import PARTS, device
    from _gpu_plan import missing, plan_for, projection

    plan = plan_for(toy=given.dry_run, quick=given.quick)
    if plan is None:
        sys.stderr.write("benchmarks/gpu.py needs a CUDA device, and torch finds none here: try --dry-run.\n")
        return 2
    given.quick = (given.quick or given.dry_run) and given.out is None
    path = given.out or RESULTS / "gpu.json"
    where, peak = told(_in_process(lambda: device(plan), SECONDS["device"]))
    rows: list[Row] = []
    for name, part in PARTS.items():
        for row in _in_process(lambda part=part: part(plan), min(SECONDS[name], end - monotonic())):
            row = row if isinstance(row, Row) else failed(name, row)
            sys.stderr.write(line_of(row) + "\n")
            rows.append(row)
            if not given.quick:
                write_json(path, record_of("gpu", rows, PACKAGES, where))
    rows += projection(plan, rows, peak)
    rows += missing(plan, rows)
    return finish("gpu", rows, given, PACKAGES, {"machine": where}, path)


def told(facts: Iterator[Any]) -> tuple[str, float | None]:
    """What a process of its own says of the machine, and the peak of its GPU; None where it cannot tell."""
    where, *peaks = facts
    return str(where), next((peak for peak in peaks if isinstance(peak, float)), None)


def _in_process(part: Callable[[], Iterator[Any]], seconds: float) -> Iterator[Any]:
    """What a part yields in a process of its own, as it comes; a text for how it ended if that was not well."""
    if seconds < 5:
        yield "not begun, the time is spent"
        return
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(part, theirs), daemon=True)
    process.start()
    theirs.close()
    end = monotonic() + seconds
    try:
        while ours.poll(max(0.0, end - monotonic())):
            yield ours.recv()
        yield f"ended after {seconds:.0f} s, its time"
    except EOFError:  # it has closed its side
        process.join(10)
        if process.exitcode:
            yield f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _send_all(part: Callable[[], Iterator[Any]], pipe: Connection) -> None:
    try:
        for row in part():
            pipe.send(row)
    except Exception as error:  # whatever it was, the row says it
        pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    pipe.close()


if __name__ == "__main__":
    sys.exit(main())
