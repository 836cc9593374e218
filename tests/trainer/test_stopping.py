"""Commands that get SIGTERM end in good order, with their state saved; and no second run gets into a folder."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from helpers import tiny_llama
from lightning.pytorch.utilities import rank_zero_only
from processes import start_ranks
from torture.material import MODEL, STEPS, write_material

from lightning_longrope import peers
from lightning_longrope.__main__ import main
from lightning_longrope.cli import LongRoPECLI
from lightning_longrope.locks import hold
from lightning_longrope.search.journal import Journal
from lightning_longrope.stopping import STATUS

pytestmark = pytest.mark.distributed
STAGE = "1-pretrain"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    write_material(root)
    return root


def rows(out):
    path = out / STAGE / "rows" / "rank0.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def command(words):
    rank_zero_only.rank = int(os.environ["RANK"])
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
    code = main(words)
    sys.stderr.flush()
    os._exit(code)


def ended(processes, logs):
    for process in processes:
        process.join(100)
    texts = [(logs / f"rank{rank}.log").read_text() for rank in range(len(processes))]
    return [process.exitcode for process in processes], texts


def fit(material, out, *more):
    return ["fit", "-c", str(material / "recipe" / f"{STAGE}.yaml"), "--out", str(out), *more]


def stop(step, ranks=(0,)):
    """Words for SIGTERM in the step after so many, on some ranks."""
    return [
        "--trainer.callbacks+=stop_signals.SignalAt",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.ranks={list(ranks)}",
    ]


def weights(out):
    return torch.load(out / STAGE / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def uncut(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("uncut")
    assert ended(start_ranks(1, command, fit(material, out), logs=out), out)[0] == [0]
    return weights(out)


def test_a_fit_is_saved_after_the_step_under_way_and_runs_none_twice(material, uncut, tmp_path):
    for step in (7, 23):
        more = ("--ckpt_path", "last") if step > 7 else ()
        codes, (said,) = ended(
            start_ranks(1, command, fit(material, tmp_path, *more, *stop(step)), logs=tmp_path), tmp_path
        )
        assert codes == [STATUS], said
        (line,) = [line for line in said.splitlines() if line.startswith("longrope:")]
        assert f"Step {step + 1} is saved in {tmp_path}/{STAGE}/checkpoints/last.ckpt" in line
        assert len(rows(tmp_path)) == step + 1
    fitting = start_ranks(1, command, fit(material, tmp_path, "--ckpt_path", "last"), logs=tmp_path)
    assert ended(fitting, tmp_path)[0] == [0]
    assert rows(tmp_path) == list(range(STEPS[STAGE]))
    assert all(torch.equal(weight, uncut[name]) for name, weight in weights(tmp_path).items())


def test_ctrl_c_saves_a_fit_after_the_step_under_way_too(material, tmp_path):
    words = fit(material, tmp_path, *stop(7), f"--trainer.callbacks.number={int(signal.SIGINT)}")
    words += ["--data.num_workers=1"]
    codes, (said,) = ended(start_ranks(1, command, words, logs=tmp_path), tmp_path)
    assert codes == [130], said
    (line,) = [line for line in said.splitlines() if line.startswith("longrope:")]
    assert line.startswith("longrope: stopped by Ctrl-C (SIGINT). Step 8 is saved in ")
    assert "Traceback" not in said
    assert len(rows(tmp_path)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_one_signal_stops_all_ranks_after_the_same_step(material, tmp_path, told):
    words = fit(material, tmp_path, "--trainer.devices", "2", "--trainer.strategy", "ddp", *stop(4, told))
    codes, texts = ended(start_ranks(2, command, words, logs=tmp_path), tmp_path)
    assert codes == [STATUS, STATUS], texts
    (line,) = [line for line in "".join(texts).splitlines() if line.startswith("longrope:")]
    saved = torch.load(tmp_path / STAGE / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    steps = [len((tmp_path / STAGE / "rows" / f"rank{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert steps == [saved, saved] == [5, 5]
    assert f"Step {saved} is saved" in line


@pytest.mark.slow
def test_a_validation_ends_on_all_ranks_together(material, tmp_path):
    words = fit(material, tmp_path, "--trainer.devices", "2", "--trainer.strategy", "ddp", *stop(5, [1]))
    words += ["--trainer.callbacks.batch=0", "--trainer.limit_val_batches=3", "--trainer.val_check_interval=5"]
    codes, texts = ended(start_ranks(2, command, words, logs=tmp_path), tmp_path)
    assert codes == [STATUS, STATUS], texts
    saved = torch.load(tmp_path / STAGE / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert saved["callbacks"]["SaveOnStop"] == {"validation_is_owed": True}
    steps = [len((tmp_path / STAGE / "rows" / f"rank{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert steps == [5, 5]


def stopped_search(words):
    """The command, which gets SIGTERM when its journal has eight lines."""
    append = Journal.append

    def noticed(journal, records):
        append(journal, records)
        if len(journal) >= 8:
            os.kill(os.getpid(), signal.SIGTERM)

    Journal.append = noticed
    command(words)


def test_a_search_ends_at_once_and_goes_on(material, uncut, tmp_path):
    stage = yaml.safe_load((material / "recipe" / "2-search.yaml").read_text())
    stage["model"]["init_args"] = {"config": MODEL}
    (tmp_path / "2-search.yaml").write_text(yaml.safe_dump(stage))
    words = ["search", "-c", str(tmp_path / "2-search.yaml"), "--out", str(tmp_path)]
    journal = tmp_path / "2-search" / "search" / "history.jsonl"

    searching = start_ranks(1, stopped_search, words, logs=tmp_path)
    codes, (said,) = ended(searching, tmp_path)
    assert codes == [STATUS]
    assert said.splitlines()[-1] == "longrope: stopped by SIGTERM. The same command goes on from what is finished."
    before = journal.read_bytes()
    assert 8 < before.count(b"\n") < 40
    assert ended(start_ranks(1, command, words, logs=tmp_path), tmp_path)[0] == [0]
    assert journal.read_bytes().startswith(before)


HOLDER = """
import os, sys
from pathlib import Path
from lightning_longrope.locks import hold
with hold(Path(sys.argv[1]), "it"):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_kept_out_until_the_first_is_dead(material, tmp_path, capfd):
    commands = {
        tmp_path / "out" / ".lock": ["run", str(material / "recipe"), "--out", str(tmp_path / "out")],
        tmp_path / "out" / STAGE / ".lock": fit(material, tmp_path / "out"),
        tmp_path / ".hf.lock": ["export", str(tmp_path / "model"), str(tmp_path / "hf")],
    }
    tiny_llama().save_pretrained(tmp_path / "model")
    capfd.readouterr()
    for lock, words in commands.items():
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            pid = int(holder.stdout.readline())
            assert main(words) == 2
            (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longrope: error")]
            folder = str(tmp_path / "hf") if words[0] == "export" else str(lock.parent)
            assert line.startswith(f"longrope: error: {folder} belongs to process {pid} on {os.uname().nodename}, at ")
            assert line.endswith("export to another." if words[0] == "export" else "give another folder with --out.")
            assert not list(tmp_path.rglob("*.ckpt"))
            os.kill(pid, signal.SIGKILL)
            holder.wait()
            with hold(lock, "it"):  # what the dead have left is no lock
                assert json.loads(lock.with_name(f"{lock.name}.json").read_text())["pid"] == os.getpid()
            assert not lock.with_name(f"{lock.name}.json").exists()
        finally:
            holder.kill()
            holder.communicate()


def test_a_folder_that_was_not_named_is_not_kept_from_others(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = []
    monkeypatch.setattr("lightning_longrope.cli.only_run", lambda folder: nullcontext(taken.append(str(folder))))
    monkeypatch.setattr("lightning_longrope.cli.LongRoPECLI._run_subcommand", lambda *arguments: None)
    (tmp_path / "eval.yaml").write_text((material / "eval.yaml").read_text().replace("{out}", str(tmp_path)))
    stage = str(tmp_path / "eval.yaml")
    model = ["--model.config", json.dumps(MODEL), "--trainer.logger", "false"]
    for words in (["eval"], ["validate", "--out", "a"], ["test", "--out", "a"], ["eval", "--out", "b"]):
        assert main([words[0], "-c", stage, *model, *words[1:]]) == 0
    assert taken == ["b"]
    assert not list(tmp_path.rglob(".lock"))


def test_only_the_first_process_of_all_nodes_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for given, first in (
        ({}, True),
        ({"NODE_RANK": "1"}, False),  # started by hand: Lightning has not numbered them yet
        ({"GROUP_RANK": "1"}, False),
        ({"NODE_RANK": "0"}, True),
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_NODEID": "1",
                "SLURM_JOB_NAME": "a",
            },
            False,
        ),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_NODEID": "0",
                "SLURM_JOB_NAME": "a",
            },
            True,
        ),
    ):
        with monkeypatch.context() as inner:
            for name, value in given.items():
                inner.setenv(name, value)
            assert peers.is_first() is first, given


def test_a_stage_file_s_own_folder_counts_unless_a_flag_names_another(material, tmp_path, monkeypatch):
    stage = yaml.safe_load((material / "recipe" / f"{STAGE}.yaml").read_text())
    folders = []

    def note(words):
        folders.append(LongRoPECLI(words, check=True).config["fit"].trainer.default_root_dir)

    monkeypatch.setattr("lightning_longrope.commands.train.LongRoPECLI", note)
    for name, root in (("own", "mine"), ("none", None)):
        (tmp_path / name).mkdir()
        stage["trainer"]["default_root_dir"] = root
        (tmp_path / name / "1-fit.yaml").write_text(yaml.safe_dump(stage))
        for more in ([], ["--out", "there"], ["--trainer.default_root_dir", "here"]):
            assert main(["fit", "-c", str(tmp_path / name / "1-fit.yaml"), *more]) == 0
    assert folders == ["mine", "there/1-fit", "here", "runs/none/1-fit", "there/1-fit", "here"]


INTERRUPTED = """
import os, signal, sys
from lightning_longrope import __main__
def run_command(command, words):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        raise AssertionError("SIGINT was taken for an error") from error
sys.modules["lightning_longrope.commands"] = sys.modules[__name__]
sys.exit(__main__.main(["search"]))
"""


def test_ctrl_c_ends_a_command_in_one_line_and_is_ignored_where_it_was():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        130,
        "longrope: stopped by Ctrl-C (SIGINT). The same command goes on from what is finished.\n",
    )
    ignoring = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", ignoring], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


TWICE = """
import os, signal
from lightning_longrope.stopping import StoppedError, stoppable
try:
    with stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
except StoppedError:
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_one_more_signal_on_the_way_out_leaves_the_status_as_it_is():
    assert subprocess.run([sys.executable, "-c", TWICE], check=False).returncode == STATUS


def test_a_signal_after_a_command_has_ended_is_no_crash():
    script = (
        "import atexit, os, signal, sys; from lightning_longrope.__main__ import main;"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM); sys.argv = ['longrope', 'tokenize']; sys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2  # that of the command
    assert ended.stderr.strip().startswith("longrope: error: `longrope tokenize` needs")
