"""The launch of a recipe: resolve it, start each stage under its launcher, watch it, and say where everything lies."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console

from privacy.secrets import create_key_file
from train.config import FilterStage, FinetuneStage, StageConfig, TrainStage
from train.display import StageDisplay
from train.launchers import (
    DEFAULT_PORT,
    LaunchError,
    Placement,
    check_port,
    stage_command,
    stage_environment,
    worker_arguments,
)
from train.measurements import all_met
from train.plan import plan
from train.recipe import Recipe, load_recipe
from train.rendezvous import ManyNodes, Meeting, NodeLost, OneNode, Rendezvous, Team
from train.report import print_plan, print_summary, write_summary
from train.run_folder import RunFolder, RunFolderError
from train.schedulers import SCHEDULERS, hand_over
from train.supervisor import Outcome, Reason, RestartPolicy, StopRequest, run_stage, stop_on_signals

# What the launch ends with where restarts brought a stage no further.
GAVE_UP: dict[Reason, int] = {"": 1, "crash": 3, "hang": 4, "bad steps": 5}


def launch(arguments: argparse.Namespace) -> int:
    """Do what the command line of scripts/launch.py asks and return its exit status; a ValueError is the user's."""
    overrides = list(arguments.overrides)
    if arguments.nproc is not None:
        overrides.append(f"parallel.nproc={arguments.nproc}")
    recipe = load_recipe(arguments.recipe, overrides)
    stages = _selected(recipe, arguments)
    run_dir: Path = arguments.run_dir or Path("runs") / recipe.name
    placement = _placement(arguments)
    # Where there is no terminal, 80 columns would fold every path.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.dry_run:
        print_plan(console, recipe.name, plan(recipe, run_dir, placement, stages))
        return 0
    if arguments.port is not None and placement.node_rank == 0:
        check_port(arguments.port)
    run = RunFolder.open(run_dir, recipe.name)
    if arguments.launcher in SCHEDULERS:
        return hand_over(arguments, recipe, stages, run)
    with run.launch_lock() if placement.node_rank == 0 else nullcontext():
        return _Run(recipe, run, placement, console).run_all(stages)


class _Run:
    """One launch of a recipe on this node: the first node leads, the others help in the training stages."""

    def __init__(self, recipe: Recipe, run: RunFolder, placement: Placement, console: Console) -> None:
        self.recipe, self.run, self.placement, self.console = recipe, run, placement, console
        self.leads = placement.node_rank == 0
        self.meeting: Meeting | None = None

    def run_all(self, stages: Sequence[StageConfig]) -> int:
        """Run `stages` in order and return the exit status."""
        done = {stage.name for stage in self.recipe.stages if self.run.finished(stage)}  # refuses before anything runs
        with stop_on_signals() as stop, self._meeting(stages):
            for stage in stages:
                if stage.name in done:
                    self.console.print(f"{stage.name}: finished before, skipped", highlight=False)
                    continue
                if stop.requested:
                    return self._stopped(stage, stop)
                try:
                    outcome = self._run(stage, stop)
                except NodeLost as error:
                    print(f"error: stage {stage.name} ended: {error}", file=sys.stderr)
                    return 128 + signal.SIGHUP  # hung up on: a scheduler starts this launch again, beside a new one
                if outcome is None or outcome.status == "interrupted":
                    return self._stopped(stage, stop)
                if outcome.status != "finished":
                    return self._gave_up(outcome)
                self.console.print(f"{stage.name}: done in {outcome.seconds:.1f} s", highlight=False)
        return self._report() if self.leads else 0

    @contextmanager
    def _meeting(self, stages: Sequence[StageConfig]) -> Iterator[None]:
        """Where the launches of several nodes agree, for as long as this one runs."""
        if self.placement.nnodes == 1:
            yield
            return
        assert self.placement.port is not None
        wait_s = max((stage.supervision.start_s for stage in stages if isinstance(stage, TrainStage)), default=60)
        self.meeting = Meeting(
            self.placement.address,
            self.placement.port,
            nnodes=self.placement.nnodes,
            node_rank=self.placement.node_rank,
            wait_s=wait_s,
        )
        try:
            yield
        finally:
            self.meeting.close()

    def _run(self, stage: StageConfig, stop: StopRequest) -> Outcome | None:
        """Run one stage to its end; None where this node was told to stop while it waited for the first."""
        if not self.leads and not isinstance(stage, TrainStage):
            while not self.run.finished(stage):
                if stop.requested:
                    return None
                time.sleep(1)
            return Outcome(stage.name, "finished", 0.0, ())
        if self.leads:
            self.run.input_hashes(stage)  # refuses, naming the unfinished stage it needs
            self._make_key(stage)
        with StageDisplay(self.console, stage.name) as display:
            return run_stage(
                stage.name,
                self.run.stage_folder(stage.name),
                lambda team: self._command(stage, team),
                env=stage_environment(stage, os.environ, cuda=torch.cuda.is_available()),
                watcher=display,
                stop=stop,
                policy=self._policy(stage),
                rendezvous=self._rendezvous(stage, display),
                devices=_devices,
                log_name="log" if self.leads else f"log-node-{self.placement.node_rank}",
            )

    def _policy(self, stage: StageConfig) -> RestartPolicy:
        manifest_wait_s = 0 if self.leads else 60
        if not isinstance(stage, TrainStage):
            return RestartPolicy(manifest_wait_s=manifest_wait_s)
        limits = stage.supervision
        return RestartPolicy(
            stalled_restarts=limits.stalled_restarts,
            grace_s=limits.grace_s,
            manifest_wait_s=manifest_wait_s,
            nproc=stage.parallel.nproc,
            min_ranks=stage.parallel.min_ranks,
            limits={
                "start": limits.start_s,
                "load": limits.load_s,
                "step": limits.step_s,
                "save": limits.save_s,
                "evaluate": limits.load_s,
                "finish": limits.save_s,
            },
            straggler=limits.straggler,
        )

    def _rendezvous(self, stage: StageConfig, display: StageDisplay) -> Rendezvous:
        def epoch() -> int:
            return self.run.next_fencing_epoch(self.run.ledger_path(stage))

        if self.meeting is None or not isinstance(stage, TrainStage):
            together = isinstance(stage, TrainStage) and stage.parallel.backend != "single"
            return OneNode(epoch, together=together and self.placement.launcher == "torchrun")
        return ManyNodes(self.meeting, stage.name, epoch, display.say, first_wait_s=stage.supervision.start_s)

    def _command(self, stage: StageConfig, team: Team) -> list[str]:
        path, overrides = self.recipe.paths[stage.name], self.recipe.overrides[stage.name]
        worker = worker_arguments(path, self.run.path, overrides, team.epoch)
        return stage_command(stage, self.placement, worker, team)

    def _make_key(self, stage: StageConfig) -> None:
        """Make the run's own secret key where `stage` needs one, unless one is given, or there is one, or something it
        was used for.
        """
        key, ledger = self.run.path / "secret.key", self.run.ledger_path(stage)
        if not needs_own_key(stage) or os.environ.get("SFUMATO_SECRET") or key.exists():
            return
        if ledger is not None and ledger.exists():
            raise RunFolderError(
                f"{ledger} was written with a key that is not there: {key} is missing. Put it back, or set "
                "privacy.key_file or SFUMATO_SECRET"
            )
        create_key_file(key)
        self.console.print(f"made {key} (mode 0600): keep it, and keep it secret", highlight=False)

    def _stopped(self, stage: StageConfig, stop: StopRequest) -> int:
        self.console.print(
            f"{stage.name}: stopped. It goes on from where it was with:\n  {shlex.join([sys.executable, *sys.argv])}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return 128 + (
            stop.signals[0] if stop.signals else signal.SIGTERM
        )  # by another node's signal, where by none here

    def _gave_up(self, outcome: Outcome) -> int:
        gave_up = f", given up ({outcome.reason})" if outcome.reason else ""
        print(f"error: stage {outcome.stage} {outcome.status}{gave_up}: {outcome.message}", file=sys.stderr)
        return 2 if outcome.status == "refused" else GAVE_UP[outcome.reason]

    def _report(self) -> int:
        print_summary(self.console, self.run, self.recipe.stages)
        rows = write_summary(self.run, self.recipe.stages)
        self.console.print(f"figures: {self.run.path / 'summary.json'}", highlight=False)
        return 0 if all_met(rows) else 1


def needs_own_key(stage: StageConfig) -> bool:
    """Whether the stage draws noise or pseudonyms from a key that its configuration does not name."""
    if isinstance(stage, FilterStage):
        return stage.policy.pseudonymises and stage.key_file is None and stage.policy.pseudonyms is None
    return isinstance(stage, FinetuneStage) and stage.privacy.key_file is None


def _devices() -> int | None:
    """GPUs that this node has now; None where it trains on its cores, however many ranks there are."""
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def _selected(recipe: Recipe, arguments: argparse.Namespace) -> list[StageConfig]:
    names = [stage.name for stage in recipe.stages]
    for name in (arguments.only, arguments.first, arguments.last):
        if name is not None:
            recipe.stage(name)  # refuses an unknown one
    if arguments.only is not None:
        if arguments.first or arguments.last:
            raise LaunchError("--only names one stage: leave out --from and --until")
        return [recipe.stage(arguments.only)]
    first = names.index(arguments.first) if arguments.first else 0
    last = names.index(arguments.last) if arguments.last else len(names) - 1
    if first > last:
        raise LaunchError(f"--from {arguments.first} comes after --until {arguments.last}: turn them round")
    return list(recipe.stages[first : last + 1])


def _placement(arguments: argparse.Namespace) -> Placement:
    if arguments.nnodes < 1:
        raise LaunchError(f"--nnodes is {arguments.nnodes}: give 1 or more")
    if arguments.nnodes == 1 or arguments.launcher in SCHEDULERS or arguments.dry_run:
        return Placement(arguments.launcher, arguments.nnodes, port=arguments.port)
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        raise LaunchError(f"--nnodes is {arguments.nnodes}, but MASTER_ADDR, the first node's address, is not set")
    node_rank = os.environ.get("SLURM_NODEID") or os.environ.get("NODE_RANK")
    if node_rank is None or not node_rank.isdigit() or int(node_rank) >= arguments.nnodes:
        raise LaunchError(f"NODE_RANK is {node_rank}: set it to this node's number, 0 to {arguments.nnodes - 1}")
    port = arguments.port or int(os.environ.get("MASTER_PORT") or DEFAULT_PORT)
    return Placement(arguments.launcher, arguments.nnodes, int(node_rank), address, port)
