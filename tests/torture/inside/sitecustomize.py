"""Python imports this at its start, before ``longrope``: counts changes of files, and sends signals at some of them."""

import json
import os
import signal
import sys
import threading
import time

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def changed(event, arguments):
    """The file that an audit event says is about to be changed, None if it is no such event."""
    if event == "open":
        path, mode, flags = arguments
        change = bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else not set("wxa+").isdisjoint(mode)
    else:
        path = arguments[0] if arguments else None
        change = event in CHANGES and (event == "os.mkdir" or os.path.lexists(path))
    return os.path.abspath(os.fsdecode(path)) if change and isinstance(path, str | bytes | os.PathLike) else None


def record(path):
    """Writes at the end which files were changed and when, in processor seconds."""
    import atexit

    def note(event, arguments):
        if (name := changed(event, arguments)) is not None:
            seen.append((name, time.process_time()))

    def write():
        with open(path, "w") as file:
            json.dump(list(seen), file)

    seen = []
    sys.addaudithook(note)
    atexit.register(write)


def send(moments, fired):
    """Sends the signal of each moment, and writes the numbers of those that have come to ``fired``."""

    def note(event, arguments):
        if (name := changed(event, arguments)) is not None:
            for number, moment in enumerate(moments):
                if name.startswith(tuple(moment["prefixes"])):
                    counts[number] += 1
                    if counts[number] == moment["change"]:
                        begin(number, moment)

    def begin(number, moment):
        if moment["delay"]:
            end = time.process_time() + moment["delay"]
            threading.Thread(target=strike, args=(number, moment, end), daemon=True).start()
        else:
            strike(number, moment, 0.0)

    def strike(number, moment, end):
        while time.process_time() < end:
            time.sleep(0.001)
        os.write(out, f"{number}\n".encode())
        (os.killpg if moment["group"] else os.kill)(os.getpid(), getattr(signal, moment["signal"]))

    counts, out = [0] * len(moments), os.open(fired, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(note)


if "LONGROPE_TORTURE" in os.environ:  # of this process alone, not of those it starts
    plan = json.loads(os.environ.pop("LONGROPE_TORTURE"))
    record(plan["record"]) if "record" in plan else send(**plan)
