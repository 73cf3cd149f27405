"""Stands in for `python -m train` in the supervisor's tests: a real process that ends as its first argument says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

behaviour, folder = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ.get("RANK", "0"))
again = (folder / "log-2.txt").exists()


def report(step: int) -> None:
    if rank == 0:
        with (folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "steps": 10, "text": "loss 0.5", "time": time.time()}) + "\n")


def commit(step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}.attempt-{os.getpid()}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")


def finish() -> None:
    report(10)
    if rank == 0:
        (folder / "manifest.json").write_text("{}")
    sys.exit(0)


def end_orderly(*_: object) -> None:
    report(5)
    sys.exit(75)


match behaviour:
    case "finishes":
        finish()
    case "dies once":
        report(3)
        if not again and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if not again:
            time.sleep(60)
        finish()
    case "loses a peer once":
        report(3)
        if not again:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
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
