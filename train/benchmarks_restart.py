"""What a lost rank costs: the digits recipe on two ranks, one of them killed or stopped by a real signal."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from train import ROOT
from train.heartbeat import RankWatch, pages_folder
from train.measurements import Row
from train.timeline import read_timeline

ROUNDS = 3
STRUCK_AT = 24  # steps done, between two of the snapshots in memory, which are taken every 10
STEP_S = 5.0  # the limit of a step, for the stopped rank
SETTINGS = (
    "pretrain.train.steps=100000",
    "pretrain.checkpoint.every=100000",
    f"pretrain.supervision.step_s={STEP_S:g}",
    "log.wandb=disabled",
)

log = logging.getLogger(__name__)


def restart() -> list[Row]:
    """Kill -9 of one of two ranks, three times, and a stop of one; what it took, as the launch itself tells it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run(_launch(run, "--until", "filter"), check=True, stdout=subprocess.DEVNULL)
        killed = [_strike(run, number, signal.SIGKILL) for number in range(1, ROUNDS + 1)]
        (stopped,) = [_strike(run, ROUNDS + 1, signal.SIGSTOP)]
    total_s = statistics.median(sum(took[part] for part in PARTS) for took in killed)
    rows: list[Row] = [
        {"name": "kill -9 of one of two ranks: training again", "value": total_s, "unit": "s", "target": 15.0,
         "ok": total_s <= 15},
    ]  # fmt: skip
    for part, words in PARTS.items():
        rows.append({"name": f"  {words}", "value": statistics.median(took[part] for took in killed), "unit": "s"})
    lost = max(took["lost_steps"] for took in killed)
    rows.append(
        {
            "name": "  steps done again, of a snapshot every 10",
            "value": lost,
            "unit": "1",
            "target": 10.0,
            "ok": lost <= 10,
        }
    )
    limit_s = STEP_S + 5
    rows.append(
        {"name": f"SIGSTOP of one, at a limit of {STEP_S:g} s: seen after", "value": stopped["detect_s"], "unit": "s",
         "target": limit_s, "ok": stopped["detect_s"] <= limit_s}
    )  # fmt: skip
    return rows


PARTS = {
    "detect_s": "until it was seen",
    "start_s": "to end the other, and start both again",
    "load_s": "to load",
    "step_s": "for the first step",
}


def _launch(run: Path, *arguments: str) -> Sequence[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    recipe = str(ROOT / "configs" / "digits")
    return [
        sys.executable, str(ROOT / "scripts" / "launch.py"), recipe, "--run-dir", str(run), "--nproc", "2", *settings,
        *arguments,
    ]  # fmt: skip


def _strike(run: Path, number: int, with_signal: signal.Signals) -> dict[str, Any]:
    """Launch, strike rank 1 once it trains, and wait for the launch to say what the restart took."""
    stage = run / "pretrain"
    told = len(_resumed(stage))
    with subprocess.Popen(_launch(run, "--until", "pretrain"), stdout=subprocess.DEVNULL) as process:
        try:
            step = _strike_rank(stage, process, with_signal)
            while len(_resumed(stage)) == told:
                _alive(process)
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    took = _resumed(stage)[-1]
    loaded = [event["step"] for event in read_timeline(stage) if event["event"] == "loaded"][-1]
    log.info("%s %d at step %d: %s", with_signal.name, number, step, took)
    return took | {"lost_steps": step - loaded}


def _strike_rank(stage: Path, process: subprocess.Popen[bytes], with_signal: signal.Signals) -> int:
    """Signal rank 1 when it has done STRUCK_AT steps more than it began with, and return how many it had done."""
    pages = pages_folder(stage)
    while not (pages / "rank-00001").exists():
        _alive(process)
        time.sleep(0.1)
    with closing(RankWatch(pages, range(2), {})) as watch:
        first = None
        while True:
            _alive(process)
            watch.look()
            sign = watch.signs.get(1)
            step = None if sign is None or sign.section != "step" else sign.step
            first = step if first is None else first
            if sign is not None and step is not None and first is not None and step >= first + STRUCK_AT:
                os.kill(sign.pid, with_signal)
                return step
            time.sleep(0.005)


def _resumed(stage: Path) -> list[dict[str, Any]]:
    return [event for event in read_timeline(stage) if event["event"] == "resumed"]


def _alive(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the launch ended with status {process.returncode} before it was through")
