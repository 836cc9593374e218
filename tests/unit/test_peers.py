"""Processes that watch each other: what is decided reaches all, and whoever is lost is named by those who are left."""

import json
import logging
import os
import signal
import socket
import sys
import time

import pytest
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from processes import free_port, start_ranks

from lightning_longrope import peers
from lightning_longrope.callbacks import PeerWatch

pytestmark = pytest.mark.distributed
LONG, SHORT = 40.0, 4.0  # timeouts in seconds
HOST = socket.gethostname()


def run(tmp_path, scenario, world_size=3, survivors=None, limit=60):
    """Runs ``scenario(peers, rank)`` on every rank; exit codes, log texts, and seconds until the survivors ended."""
    ranks = start_ranks(world_size, enter, scenario, logs=tmp_path)
    begin = time.monotonic()
    for rank in range(world_size) if survivors is None else survivors:
        ranks[rank].join(limit)
    seconds, codes = time.monotonic() - begin, [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes, [(tmp_path / f"rank{rank}.log").read_text() for rank in range(world_size)], seconds


def enter(scenario):
    logging.getLogger("lightning_longrope").handlers = [logging.StreamHandler(sys.stderr)]  # and none of other tests
    try:
        me = peers.connect(TorchElasticEnvironment(), LONG)
        scenario(me, me.me.rank)
    except Exception as error:
        if not peers.explain(error):
            raise
        raise SystemExit(1) from None


def agreeing(me, rank):
    assert me.decide(lambda: [rank, "first"]) == [0, "first"]
    begin = time.monotonic()
    me.wait() if rank else (time.sleep(0.5), me.wait())
    assert time.monotonic() - begin > 0.4
    for number in range(50):
        assert me.decide(lambda n=number: {"n": n, "by": rank}) == {"n": number, "by": 0}
    with pytest.raises(ValueError, match="no such folder") as refusal:
        me.decide(refuse)
    assert isinstance(refusal.value, peers.DecidedError) == (rank > 0)
    me.close()
    if rank == 0:  # the others have said goodbye, which is no loss
        time.sleep(1)
        assert me.loss is None


def refuse():
    raise ValueError("no such folder")


def test_what_rank_0_decides_reaches_all_and_nobody_goes_on_alone(tmp_path):
    codes, logs, _ = run(tmp_path, agreeing)
    assert codes == [0, 0, 0], "\n".join(logs)


def killed_1(me, rank):
    if rank == 1:
        if os.fork() == 0:  # a worker that outlives it, as a data loader's may, must not keep its line open
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    me.wait()


def killed_0(me, rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    me.decide(list)


def frozen_1(me, rank):
    me.timeout = SHORT
    me.wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    me.wait()


def frozen_0(me, rank):
    me.timeout = SHORT
    me.wait()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    me.wait()


def failed_2(me, rank):
    if rank == 2:
        raise KeyError("power cut")
    me.wait()


def stuck(me, rank):
    me.timeout = SHORT
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as in a collective that never ends


@pytest.mark.parametrize(
    ("scenario", "lost", "text", "slow"),
    [
        (killed_1, 1, rf"rank 1 ({HOST}, 127.0.0.1) is gone: its process was killed", False),
        (killed_0, 0, rf"rank 0 ({HOST}, 127.0.0.1) is gone: its process was killed", False),
        (frozen_1, 1, rf"rank 1 ({HOST}, 127.0.0.1) has not answered for", True),
        (frozen_0, 0, rf"rank 0 ({HOST}, 127.0.0.1) has not answered for", True),
        (failed_2, 2, None, False),
        (stuck, 1, rf"rank 1 ({HOST}, 127.0.0.1) is gone: its process was killed", False),
    ],
)
def test_those_who_are_left_end_in_time_and_one_of_a_node_names_the_lost(tmp_path, scenario, lost, text, slow):
    left = [rank for rank in range(3) if rank != lost]
    codes, logs, seconds = run(tmp_path, scenario, survivors=left)
    assert [codes[rank] for rank in left] == [1, 1], "\n".join(logs)
    assert (SHORT / 2 if slow else 0) < seconds < LONG / 2
    said = [line for rank in left for line in logs[rank].splitlines() if "longrope: error:" in line]
    if text is None:  # it has said itself why it ended, on the same node
        assert said == []
        assert "KeyError: 'power cut'" in logs[lost]
        return
    assert len(said) == 1, said
    assert text in said[0]


def other_node(me, rank):
    if rank == 0:
        raise KeyError("power cut")
    me.wait()


def test_an_error_is_told_on_other_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(TorchElasticEnvironment, "node_rank", lambda self: int(os.environ["RANK"]))
    monkeypatch.setattr(TorchElasticEnvironment, "local_rank", lambda self: 0)
    _, logs, _ = run(tmp_path, other_node, world_size=2)
    assert f"longrope: error: rank 0 ({HOST}, 127.0.0.1) has ended with KeyError: 'power cut'." in logs[1]


def with_stranger(me, rank):
    if rank == 0:
        port = json.loads(me._store.get("longrope/hub"))[0]
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"lost": {}}\n', b'{"hello": {"rank": 1}, "secret": "guess"}\n'):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)
                stranger.settimeout(5)
                assert stranger.recv(10) == b""  # hung up on
    me.wait()
    assert me.loss is None
    me.close()


def refused_1(me, rank):
    if rank == 0:
        return me.wait()
    send = me._send_all

    def sent_and_heard(**message):
        send(**message)
        time.sleep(1 if "lost" in message else 0)  # a busy machine: the answer is here before this goes on

    me._send_all = sent_and_heard
    raise ValueError("another recipe")


def test_a_process_does_not_take_its_own_error_for_the_loss_of_another(tmp_path):
    codes, logs, _ = run(tmp_path, refused_1, world_size=2)
    assert codes == [1, 1], "\n".join(logs)
    assert "ValueError: another recipe" in logs[1]
    assert "ValueError" not in logs[0]


def test_strangers_are_hung_up_on(tmp_path):
    codes, logs, _ = run(tmp_path, with_stranger, world_size=2)
    assert codes == [0, 0], "\n".join(logs)


def late(me, rank):
    pass


def test_a_process_that_does_not_come_is_missed(tmp_path, monkeypatch):
    real = peers.connect
    monkeypatch.setattr(peers, "connect", lambda *a: time.sleep(60) if os.environ["RANK"] == "2" else real(*a))
    monkeypatch.setitem(globals(), "LONG", SHORT)
    codes, logs, _ = run(tmp_path, late, survivors=[0, 1])
    assert codes[:2] == [1, 1]
    assert "waited for rank 2, which did not come within 4 s" in logs[0]
    assert codes[1] == 1


class SlowToEnd(BoringModel):
    """Rank 0 has much to do after the last step."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def teardown(self, stage):
        if self.trainer.global_rank == 0:
            time.sleep(SHORT)
        (self.folder / f"rank{self.trainer.global_rank}").touch()


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a small model
def test_workers_that_a_launcher_has_forked_say_goodbye(tmp_path, monkeypatch):
    for name, value in (("GLOO_SOCKET_IFNAME", "lo"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    trainer = Trainer(
        strategy="ddp_fork", accelerator="cpu", devices=2, max_steps=1, limit_train_batches=1, limit_val_batches=0,
        callbacks=[PeerWatch(SHORT)], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(SlowToEnd(tmp_path))  # rank 0 is killed a second after rank 1 has gone without a word
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
