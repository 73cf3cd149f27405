"""Several nodes on one machine: each is a real process with a supervisor of its own, and torchrun under it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from train import ROOT
from train.launchers import free_port

WORKER = Path(__file__).with_name("stage_worker.py")
NODE = """
import os, sys
from dataclasses import replace
from pathlib import Path
from train.launchers import agent_command
from train.rendezvous import ManyNodes, Meeting, NodeLost
from train.supervisor import RestartPolicy, run_stage, stop_on_signals
node, nnodes, port, behaviour, folder, min_ranks = sys.argv[1:]
class Screen:
    def progress(self, step, steps, text): pass
    def say(self, text): print(text, flush=True)
def command(team):
    print("team", team.generation, "of", team.nnodes, "epoch", team.epoch, flush=True)
    return [*agent_command(team, "pretrain", 30), os.environ["WORKER"], behaviour, folder]
policy = RestartPolicy(first_wait_s=0.1, grace_s=5, manifest_wait_s=10, min_ranks=int(min_ranks) or None,
                       limits={"start": 60, "step": 3})
epochs = iter(range(10, 100))
try:
    meeting = Meeting("localhost", int(port), nnodes=int(nnodes), node_rank=int(node), wait_s=30)
    meet = ManyNodes(meeting, "pretrain", lambda: next(epochs), Screen().say, first_wait_s=20, wait_s=3)
    with stop_on_signals() as stop:
        outcome = run_stage("pretrain", Path(folder), command, env=os.environ, watcher=Screen(), stop=stop,
                            policy=policy, rendezvous=meet, log_name=f"log-{node}")
    meeting.close()
    print("outcome", outcome.status, outcome.reason, [a.cause for a in outcome.attempts], flush=True)
except NodeLost as error:
    print("lost", error, flush=True)
"""


class Node:
    """The launch of one node."""

    def __init__(self, folder: Path, node: int, port: int, behaviour: str, *, nnodes: int = 2, min_ranks: int = 0):
        self.said = folder.parent / f"node-{node}-{time.monotonic_ns()}.txt"
        arguments = [str(node), str(nnodes), str(port), behaviour, str(folder), str(min_ranks)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORKER": str(WORKER)}
        with self.said.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-c", NODE, *arguments], env=env, stdout=file, stderr=file)

    def end(self, timeout_s: float = 90) -> str:
        self.process.wait(timeout_s)
        return self.said.read_text()


Start = Callable[..., Node]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pretrain"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    nodes: list[Node] = []
    port = free_port()

    def start_node(node: int, behaviour: str, **options: int) -> Node:
        nodes.append(Node(folder, node, port, behaviour, **options))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.process.kill()
        node.process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_nodes_meet_and_finish_together(folder: Path, start: Start) -> None:
    nodes = [start(1, "takes a while"), start(0, "takes a while")]  # whichever comes first waits
    said = [node.end() for node in nodes]
    assert all("team 1 of 2 epoch 10" in text and "outcome finished" in text for text in said), said
    assert {path.name for path in folder.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}


@pytest.mark.distributed
def test_a_hang_on_one_node_ends_and_restarts_the_attempt_on_all(folder: Path, start: Start) -> None:
    nodes = [start(0, "is stopped once"), start(1, "is stopped once")]
    said = [node.end() for node in nodes]
    assert all("outcome finished" in text for text in said), said
    assert "rank 1" in said[1] and "is stopped by a signal" in said[1]
    assert all("team 2 of 2 epoch 11" in text for text in said), said


@pytest.mark.distributed
def test_a_killed_node_is_waited_for_and_taken_back(folder: Path, start: Start) -> None:
    first, second = start(0, "takes a while"), start(1, "takes a while")
    wait_for((folder / "rank-1-of-2").exists)
    second.process.kill()
    again = start(1, "takes a while")
    said = [first.end(), again.end()]
    assert all("outcome finished" in text for text in said), said
    assert "team 2 of 2 epoch 11" in said[0]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_node_is_done_without_where_that_is_allowed(folder: Path, start: Start) -> None:
    first, second = start(0, "takes a while", min_ranks=1), start(1, "takes a while", min_ranks=1)
    wait_for((folder / "rank-1-of-2").exists)
    second.process.kill()
    said = first.end()
    assert "team 2 of 1 epoch 11" in said and "outcome finished" in said, said
    assert (folder / "rank-0-of-1").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_when_the_launch_of_node_0_is_killed_the_others_say_so_and_end(folder: Path, start: Start) -> None:
    first, second = start(0, "takes a while"), start(1, "takes a while")
    wait_for(lambda: (folder / "rank-0-of-2").exists() and (folder / "rank-1-of-2").exists())
    first.process.kill()
    said = second.end()
    assert "lost the launch of node 0 is gone" in said, said


@pytest.mark.distributed
@pytest.mark.slow
def test_a_stop_of_one_node_saves_on_all_and_a_stop_of_all_ends_them(folder: Path, start: Start) -> None:
    nodes = [start(0, "takes a while"), start(1, "takes a while")]
    wait_for(lambda: (folder / "rank-0-of-2").exists() and (folder / "rank-1-of-2").exists())
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    assert all("outcome interrupted" in node.end() for node in nodes)
