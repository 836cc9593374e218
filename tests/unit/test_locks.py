"""Locks of a folder: one holder at a time, whoever waits, and no end where the file system has no locks."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os

import pytest

from lightning_longrope import locks
from lightning_longrope.locks import hold

SPAWN = multiprocessing.get_context("fork")


def count(lock, ledger, times):
    """Adds to a number in a file, which only one may do at a time."""
    for _ in range(times):
        with hold(lock, "it", wait=True):
            ledger.write_text(str(int(ledger.read_text()) + 1))


def test_of_many_that_wait_one_at_a_time_gets_in(tmp_path):
    lock, ledger = tmp_path / "a.lock", tmp_path / "ledger"
    ledger.write_text("0")
    workers = [SPAWN.Process(target=count, args=(lock, ledger, 15)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert ledger.read_text() == "60"


def test_who_waits_and_who_comes_later_wait_for_the_same_file(tmp_path):
    with hold(tmp_path / "a.lock", "it"):
        waiting = os.open(tmp_path / "a.lock", os.O_RDWR)  # another process, before it asks for the lock
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refused = pytest.raises(ValueError, match="it belongs to another process: .* or take a walk")
    with refused, hold(tmp_path / "a.lock", "it", remedy="take a walk"):
        pass
    os.close(waiting)
    with hold(tmp_path / "a.lock", "it"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_one_warning_is_all(tmp_path, monkeypatch, caplog, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    locks._warn.cache_clear()
    monkeypatch.setattr(fcntl, "flock", flock)
    done = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with hold(tmp_path / "a.lock", "it"), hold(tmp_path / "a.lock", "it"):
                done.append(json.loads((tmp_path / "a.lock.json").read_text())["pid"])
    assert done == [os.getpid()] * 2
    (warning,) = caplog.records
    assert os.strerror(number) in warning.message


def test_other_errors_of_the_system_name_the_lock(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"a\.lock"), hold(tmp_path / "a.lock", "it"):
        pass


def test_a_holder_that_cannot_say_who_it_is_holds_all_the_same(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(locks, "write_json", full)
    refused = pytest.raises(ValueError, match="another process")
    with hold(tmp_path / "a.lock", "it"), refused, hold(tmp_path / "a.lock", "it"):
        pass
