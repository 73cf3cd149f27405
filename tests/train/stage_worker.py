"""Stands in for `python -m train` in the supervisor's tests: a real process that ends as its first argument says."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from train.heartbeat import Heartbeat, install

behaviour, folder = sys.argv[1], Path(sys.argv[2])
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
again = os.environ.get("SFUMATO_ATTEMPT", "1") != "1"


def report(step: int) -> None:
    if rank == 0:
        with (folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "steps": 10, "text": "loss 0.5", "time": time.time()}) + "\n")


def await_report(step: int) -> None:
    """Until rank 0 has reported the step: ranks step together."""
    progress = folder / "progress.jsonl"
    while not progress.exists() or f'"step": {step},' not in progress.read_text():
        time.sleep(0.01)


def commit(step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}.attempt-{os.getpid()}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")


def finish() -> None:
    report(10)
    if rank == 0:
        (folder / "manifest.json").write_text("{}")
    sys.exit(0)


def begin() -> Heartbeat:
    """Through the sections of a training stage, to its first steps."""
    heartbeat = install()
    heartbeat.section("load")
    heartbeat.section("step")
    for step in (1, 2, 3):
        time.sleep(0.05)
        heartbeat.beat(step)
        report(step)
    return heartbeat


def wait_for_a_peer_that_never_comes() -> None:
    time.sleep(60)


def end_orderly(*_: object) -> None:
    report(5)
    sys.exit(75)


match behaviour:
    case "finishes":
        finish()
    case "dies once":
        report(3)
        if not again and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            await_report(3)
            os.kill(os.getpid(), signal.SIGKILL)
        if not again:
            time.sleep(60)
        finish()
    case "loses a peer once":
        report(3)
        if not again:
            connection = folder / "connection"
            with suppress(FileExistsError):
                os.mkfifo(connection)
            if rank == 1:
                with connection.open("w"):
                    os.kill(os.getpid(), signal.SIGKILL)
            connection.read_text()  # until the peer is gone
            sys.exit("connection reset by peer")
        finish()
    case "never progresses":
        report(3)
        sys.exit("the disk is on fire")
    case "commits and dies":
        step = 1 + len(list(folder.glob("checkpoints/*")))
        if step == 7:
            finish()
        commit(step)
        sys.exit(1)
    case "refuses":
        # one write, as train/__main__.py does: ranks share the log
        sys.stderr.write("error: 40_finetune_dp.yaml: privacy.target_epsilon is 1, but 1.2 is spent\n")
        sys.exit(2)
    case "ends without a manifest":
        sys.exit(0)
    case "saves when told":
        signal.signal(signal.SIGTERM, end_orderly)
        report(4)
        time.sleep(60)
    case "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(4)
        time.sleep(60)
    case "leaves a child in another session":
        child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", child, str(folder)], start_new_session=True)
        report(1)
        sys.exit(1)
    case "is stopped once":
        heartbeat = begin()
        if not again:
            if rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            wait_for_a_peer_that_never_comes()
        finish()
    case "hangs":
        begin()
        wait_for_a_peer_that_never_comes()
    case "hangs in a save once":
        heartbeat = begin()
        with heartbeat.section("save"):
            if not again:
                wait_for_a_peer_that_never_comes()
        finish()
    case "never begins":
        time.sleep(60)
    case "loses a peer and waits":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        heartbeat = begin()
        if not again:
            if rank == 1:
                await_report(3)
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for_a_peer_that_never_comes()
        finish()
    case "fails and leaves its peers waiting":
        heartbeat = begin()
        if not again:
            if rank == 1:
                await_report(3)
                heartbeat.exiting(1)
                sys.exit("out of memory")
            wait_for_a_peer_that_never_comes()
        finish()
    case "has a slow rank":
        heartbeat = begin()
        for step in range(4, 60):
            time.sleep(0.03 if rank == 1 else 0.01)
            heartbeat.waiting()
            time.sleep(0.01 if rank == 1 else 0.03)
            heartbeat.beat(step)
        finish()
    case "meets a bad step once":
        heartbeat = begin()
        if not again:
            heartbeat.exiting(76)
            sys.exit(76)
        finish()
    case "meets bad steps":
        sys.exit(76)
    case "needs a person":
        sys.stderr.write("error: step 7 of pretrain is bad: loss nan\n")
        sys.exit(77)
    case "needs fewer ranks":
        heartbeat = begin()
        with (folder / "sizes.txt").open("a") as file:  # a line an attempt
            if rank == 0:
                file.write(f"{world_size}\n")
        while len(sizes := (folder / "sizes.txt").read_text().split()) < int(os.environ["SFUMATO_ATTEMPT"]):
            time.sleep(0.02)  # rank 0 has yet to write this attempt's
        if sizes[-2:] == ["1", "2"]:
            finish()
        if world_size == 1:
            commit(10)
        sys.exit(1)
    case "takes a while":
        signal.signal(signal.SIGTERM, end_orderly)
        heartbeat = begin()
        (folder / f"rank-{rank}-of-{world_size}").write_text(str(os.getpid()))
        for step in range(4, 60):
            time.sleep(0.1)
            heartbeat.beat(step)
        finish()
