"""Launch scripts, with stand-ins for Slurm's programs: what they start on which node, and how they end."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
trap 'kill $(jobs -p)' TERM
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait
wait
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$NOTES/told"
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; fi
if [ "$1" = requeue ]; then kill -TERM $(cat "$NOTES"/pid-*); fi  # which ends the job
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" > "$NOTES/words-$NODE_RANK"
echo $$ > "$NOTES/pid-$NODE_RANK"
if [ "$LONG" ]; then exec sleep 30; fi
exit "${STATUS:-0}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Environment of a job on two nodes."""
    for name, script in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "31007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**os.environ, **job, "PATH": path, "NOTES": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "LONG": ""}


def start(environment, *words):
    return subprocess.Popen([ROOT / "configs" / "launch" / "slurm.sh", *words], env=environment)


def test_every_node_gets_the_command_and_a_place(slurm, tmp_path):
    assert start(slurm, "run", "my recipe", "--seed", "3").wait(20) == 0
    for node in range(2):
        words = (tmp_path / f"words-{node}").read_text().splitlines()
        assert words[-6:] == ["-m", "lightning_longrope", "run", "my recipe", "--seed", "3"]
        options = dict(word.split("=", 1) for word in words[2:-6])
        assert options["--nnodes"] == "2"
        assert options["--rdzv-endpoint"] == f"node-a:{20000 + 31007 % 20000}"
        assert options["--rdzv-conf"] == f"is_host={1 - node}"
        assert options["--rdzv-id"] == "31007-0"
        assert int(options["--max-restarts"]) > 0


def test_the_status_of_the_step_is_that_of_the_job(slurm):
    assert start({**slurm, "STATUS": "0"}, "run").wait(20) == 0
    srun = Path(slurm["NOTES"]) / "srun"
    srun.write_text("#!/bin/bash\nexit 7\n")
    assert start(slurm, "run").wait(20) == 7


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_time_is_up_the_job_is_queued_again_and_a_cancelled_one_ends(slurm, tmp_path, number, queued):
    job = start({**slurm, "LONG": "yes"}, "run")
    end = time.monotonic() + 20
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(number)
    job.wait(20)
    assert ("requeue 31007" in (tmp_path / "told").read_text()) == queued
    for path in tmp_path.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    subprocess.run(["shellcheck", *(ROOT / "configs" / "launch").glob("*.sh")], check=True)
