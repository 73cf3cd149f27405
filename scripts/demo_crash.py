"""The demo with four faults, for real: it ends as if nothing had happened, and a table says what did.

    python scripts/demo_crash.py [--run-dir runs/crash] [--nproc 2] [--set SETTING ...]

1. A rank is killed (SIGKILL) in the middle of a pretraining step.
2. The launch is told to stop (SIGTERM), as by a scheduler that wants the machine; it is launched again.
3. In between, a bit flips in the newest checkpoint.
4. In private finetuning rank 0 is killed while a save is being copied.

Beside it the pretraining runs once unbroken: both must end with the same bits. Exit status: 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from privacy.ledger import read_ledger

ROOT = Path(__file__).resolve().parent.parent
PUBLIC, PRIVATE = "pretrain", "finetune_dp"
STEPS = {PUBLIC: 100, PRIVATE: 30}
SHORT = (
    f"{PUBLIC}.train.steps={STEPS[PUBLIC]}",
    f"{PUBLIC}.optim.warmup_steps=10",
    f"{PUBLIC}.checkpoint.every=20",
    f"{PRIVATE}.train.steps={STEPS[PRIVATE]}",
    f"{PRIVATE}.train.batch_size=32",
    f"{PRIVATE}.optim.warmup_steps=2",
    f"{PRIVATE}.checkpoint.every=10",
    "privacy.replay_steps=16",
    "eval.samples_per_class=20",
    "eval.sampler_steps=10",
    "eval.minimum_fidelity={}",  # too few steps for any
    "log.wandb=disabled",
)
KILLED_STEP, STOPPED_AFTER, SAVED_STEP = 33, 50, 20
MARKER = ".demo-crash"  # in a folder that this script made, and may remove
STOPPED = (130, 143)  # exit statuses of a launch that was told to stop


def main() -> int:
    """Run it; the exit status says whether everything came out as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "crash", help="made anew (default: runs/crash)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as launch.py takes it")
    arguments = parser.parse_args()
    if arguments.nproc < 2:
        parser.error(f"--nproc is {arguments.nproc}: of one rank nothing is left to go on without")
    folder: Path = arguments.run_dir
    if folder.exists():
        if not (folder / MARKER).exists():
            parser.error(f"{folder} is not a folder that this demo made: give another --run-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    console = Console()
    demo = Demo(folder, console, [*SHORT, *arguments.set], arguments.nproc)
    demo.run()
    console.print(demo.table())
    for claim, holds in demo.claims():
        console.print(f"{'holds' if holds else 'FALSE':<6} {claim}", highlight=False, markup=False, soft_wrap=True)
    return 0 if all(holds for _, holds in demo.claims()) else 1


@dataclass(frozen=True)
class Row:
    """One fault: what was done, what it cost, and from where the stage went on."""

    fault: str
    seen: str
    went_on: str


class Demo:
    """The two runs and what became of them."""

    def __init__(self, folder: Path, console: Console, settings: Sequence[str], nproc: int) -> None:
        self.unbroken, self.broken = folder / "unbroken", folder / "broken"
        self.once, self.console, self.settings, self.nproc = folder / "struck", console, settings, nproc
        self.rows: list[Row] = []

    def run(self) -> None:
        """Launch the unbroken pretraining, then the whole recipe under fire."""
        self.say(f"{PUBLIC} without a fault")
        self.launch(self.unbroken, "--until", PUBLIC)

        self.say(f"the whole recipe: rank 1 is killed in step {KILLED_STEP}, and SIGTERM comes after {STOPPED_AFTER}")
        self.launch(
            self.broken,
            failpoint=f"step.computed@rank=1,step={KILLED_STEP}",
            stopped_after=STOPPED_AFTER,
        )
        self.rows.append(self.restart(f"SIGKILL of rank 1 in step {KILLED_STEP} of {PUBLIC}", PUBLIC, KILLED_STEP))
        stopped = next(event for event in self.events(PUBLIC) if event["event"] == "stopped")

        path, at = flip_a_bit(self.broken / PUBLIC / "checkpoints")
        self.say(f"one bit of byte {at:,} of {path.relative_to(self.broken)} is flipped; launched again")
        seen_before = len(list(self.events(PUBLIC)))
        self.launch(self.broken, failpoint=f"snapshot.copying@rank=0,step={SAVED_STEP}")
        loaded = next(event for event in list(self.events(PUBLIC))[seen_before:] if event["event"] == "loaded")
        went_on = f"step {loaded['step']}, from {loaded['tier']}: {stopped['step'] - loaded['step']} steps again"
        self.rows.append(
            Row("SIGTERM to the launch", f"saved step {stopped['step']} and ended in order", "launched again")
        )
        refused = self.said(PUBLIC, path.parent.name)
        self.rows.append(Row(f"a bit flipped in {path.parent.name}", refused, went_on))
        fault = f"SIGKILL of rank 0 in the save of step {SAVED_STEP} of {PRIVATE}"
        self.rows.append(self.restart(fault, PRIVATE, SAVED_STEP))

    def say(self, text: str) -> None:
        """A headline between the launches' own words."""
        self.console.rule(text)

    def launch(self, run: Path, *arguments: str, failpoint: str = "", stopped_after: int | None = None) -> None:
        """One launch of the recipe; SystemExit where it does not end as it should."""
        command = [sys.executable, "scripts/launch.py", "configs/digits", "--run-dir", str(run)]
        command += ["--nproc", str(self.nproc), *(word for setting in self.settings for word in ("--set", setting))]
        environment = dict(os.environ)
        if failpoint:
            environment |= {"SFUMATO_FAILPOINT": failpoint, "SFUMATO_FAILPOINT_ONCE": f"{self.once}-{failpoint}"}
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment)
        if stopped_after is not None:
            stop = threading.Thread(target=self.stop, args=(process, run, stopped_after), daemon=True)
            stop.start()
        status = process.wait()
        if status not in (STOPPED if stopped_after is not None else (0,)):
            raise SystemExit(f"the launch into {run} ended with status {status}")
        if failpoint and not Path(f"{self.once}-{failpoint}").exists():
            raise SystemExit(f"{failpoint} was never reached: the settings leave it out")

    def stop(self, process: subprocess.Popen[bytes], run: Path, after: int) -> None:
        """SIGTERM to the launch once pretraining is so far."""
        progress = run / PUBLIC / "progress.jsonl"
        while process.poll() is None:
            if progress.exists() and any(line["step"] >= after for line in lines_of(progress)):
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.05)

    def events(self, stage: str) -> Iterator[dict[str, Any]]:
        """The stage's timeline."""
        return lines_of(self.broken / stage / "timeline.jsonl")

    def restart(self, fault: str, stage: str, done: int) -> Row:
        """What the timeline tells of the stage's first failure, when so many steps were done."""
        events = list(self.events(stage))
        at = next(number for number, event in enumerate(events) if event["event"] == "detected")
        loaded, resumed = (
            next(event for event in events[at:] if event["event"] == name) for name in ("loaded", "resumed")
        )
        seconds = sum(value for name, value in resumed.items() if name in ("detect_s", "start_s", "load_s", "step_s"))
        seen = f"{events[at]['text']}; seen after {resumed['detect_s']:.1f} s, stepping again after {seconds:.1f} s"
        return Row(fault, seen, f"step {loaded['step']}, from {loaded['tier']}: {done - loaded['step']} steps again")

    def said(self, stage: str, name: str) -> str:
        """What a log of the stage says of why the save was passed over."""
        for log in sorted((self.broken / stage).glob("log-*.txt"), reverse=True):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if "skipped a save" in line and name in line:
                    return line.partition(f"{name}/")[2].partition(": digest")[0]
        return "NOT SAID"

    def table(self) -> Table:
        """What happened, a row a fault."""
        table = Table("fault", "what was seen", "went on from", title="Four faults", show_lines=True)
        for row in self.rows:
            table.add_row(row.fault, row.seen, row.went_on)
        return table

    def claims(self) -> list[tuple[str, bool]]:
        """What must hold at the end."""
        expected, got = (digest_of_newest(run / PUBLIC / "checkpoints") for run in (self.unbroken, self.broken))
        steps = {stage: json.loads((self.broken / stage / "manifest.json").read_text())["metrics"]["steps"]
                 for stage in STEPS}  # fmt: skip
        (tally,) = read_ledger(self.broken / "ledger.jsonl").stages.values()
        again = sum(attempts - 1 for attempts in tally.attempts.values())
        audit = subprocess.run(
            [sys.executable, "scripts/audit.py", str(self.broken)], cwd=ROOT, capture_output=True, check=False
        )
        return [
            (f"every step was taken: {steps}", steps == STEPS),
            (f"{PUBLIC}: weights, optimiser and average have the unbroken run's digest {expected[:16]}, bit for bit",
             expected == got),
            (f"{PRIVATE}: {again} steps were taken again on fresh noise, and each was charged again", again > 0),
            ("the audit of the ledger bears the run's claims out", audit.returncode == 0),
        ]  # fmt: skip


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def newest_save(checkpoints: Path) -> Path:
    """The folder of the newest committed save: they are numbered by epoch and sequence after their step."""
    return max(
        (path.parent for path in checkpoints.glob("step-*/MANIFEST.json")),
        key=lambda folder: folder.name.partition(".")[2],
    )


def flip_a_bit(checkpoints: Path) -> tuple[Path, int]:
    """One bit in the middle of the newest save's last shard; returns the file and the byte."""
    path = sorted(newest_save(checkpoints).glob("rank-*.safetensors"))[-1]
    at = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return path, at


def digest_of_newest(checkpoints: Path) -> str:
    """Of all shards of the newest save: every tensor of the state and its place."""
    digest = hashlib.sha256()
    for path in sorted(newest_save(checkpoints).glob("rank-*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
