"""Searches whose processes are killed, again and again, end as if they had not been, and repeat nothing finished."""

import os
import random
import signal
import time

import pytest
import torch
from helpers import tiny_llama
from processes import start_ranks

from lightning_longrope import evaluating, score_book
from lightning_longrope.evaluating import ProcessWorkers
from lightning_longrope.search import RampSearch
from lightning_longrope.searching import search_factors

pytestmark = pytest.mark.distributed
LENGTH, ROWS = 64, 3


def run_search(folder=None, workers=None):
    texts = list(torch.randint(96, (11, LENGTH), generator=torch.Generator().manual_seed(2)))
    settings = {"algorithm": RampSearch(max_evaluations=50), "race": 1.0, "batch_tokens": ROWS * LENGTH, "held_out": 2}
    settings["schedule"] = ((0.3, 4), (0.5, 6))
    return search_factors(tiny_llama(), texts, LENGTH, folder=folder, workers=workers, **settings)


def outcome(result):
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    return repr((result.factors, result.score, result.evaluations, result.forwards, history, vars(result.held_out)))


@pytest.fixture(scope="module")
def uncut():
    """What an uncut search on one process comes to, and its number of passes."""
    real, count = evaluating.row_sums, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "row_sums", lambda *arguments: count.append(1) or real(*arguments))
        return outcome(run_search()), len(count)


def watched_search(folder):
    """A search that notes every pass it runs, as a byte in a file of its rank."""
    rank, real, workers = os.environ["RANK"], evaluating.row_sums, None
    score_book._ROWS_EVERY = 0.0
    if os.environ["WORLD_SIZE"] != "1":
        torch.distributed.init_process_group("gloo")
        workers = ProcessWorkers()

    def noted(model, factors, documents):
        with (folder / f"passes{rank}").open("ab") as file:
            file.write(b".")
        time.sleep(0.005)
        return real(model, factors, documents)

    evaluating.row_sums = noted
    found = outcome(run_search(folder / "search", workers))
    (folder / f"outcome{rank}").write_text(found)


def passes(folder):
    return [path.stat().st_size for path in sorted(folder.glob("passes*"))]


def kill_until_done(folder, world_size, victim, most_kills, most_passes):
    """Starts the search over and over; kills ``victim`` within a random pass, the last run is left alone."""
    moments, kills = random.Random(5), 0
    while True:
        ranks = start_ranks(world_size, watched_search, folder, logs=folder / "logs")
        before = sum(passes(folder))
        enough = before + moments.randint(1, most_passes)
        while kills < most_kills and ranks[victim].is_alive() and sum(passes(folder)) < enough:
            time.sleep(0.001)
        if kills < most_kills:
            time.sleep(moments.uniform(0, 0.008))
        if kills < most_kills and ranks[victim].is_alive():
            os.kill(ranks[victim].pid, signal.SIGKILL)
            kills += 1
        else:
            for rank in ranks:
                rank.join(60)
        finished = [rank.exitcode for rank in ranks] == [0] * world_size
        for rank in ranks:  # the others would wait for the one that is gone
            rank.kill()
            rank.join()
        if finished:
            return kills
        assert kills <= most_kills, (folder / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize(("world_size", "victim", "kills"), [(1, 0, 12), (2, 1, 5), (2, 0, 3)])
def test_a_killed_search_ends_as_if_it_had_not_been(tmp_path, uncut, world_size, victim, kills):
    killed = kill_until_done(tmp_path, world_size, victim, kills, most_passes=uncut[1] // (kills + 2))
    assert killed == kills
    for rank in range(world_size):
        assert (tmp_path / f"outcome{rank}").read_text() == uncut[0]
    # What was under way at a kill is done again, on every rank; two ranks have dummy work too, a pass a block at most.
    again = world_size * kills + (world_size - 1) * uncut[1] // 2
    assert uncut[1] <= sum(passes(tmp_path)) <= uncut[1] + again
    assert not list(tmp_path.rglob("*.rows.jsonl"))
