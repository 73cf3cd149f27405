"""Command lines: how a stage's processes are started by torchrun, deepspeed or plain python."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train import ROOT
from train.config import StageConfig, TrainStage
from train.rendezvous import Team

LauncherName = Literal["torchrun", "deepspeed", "slurm", "kubernetes"]
DEFAULT_PORT = 29500
OF_THE_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class LaunchError(ValueError):
    """The stage cannot be started as asked; the message names the option and the mend."""


@dataclass(frozen=True)
class Placement:
    """Where a stage's processes run: this node is `node_rank` of `nnodes`, which meet at `address`:`port`."""

    launcher: LauncherName = "torchrun"
    nnodes: int = 1
    node_rank: int = 0
    address: str = "localhost"
    port: int | None = None


def worker_arguments(path: Path, run_dir: Path, overrides: Sequence[str], fencing_epoch: int | None) -> list[str]:
    """What `python -m train` is given for one stage."""
    arguments = [str(path), "--run-dir", str(run_dir)]
    for override in overrides:
        arguments += ["--set", override]
    if fencing_epoch is not None:
        arguments += ["--fencing-epoch", str(fencing_epoch)]
    return arguments


def stage_command(
    config: StageConfig, placement: Placement, worker: Sequence[str], team: Team | None = None
) -> list[str]:
    """The command line that runs `python -m train` with the arguments `worker` on every process of the stage.

    With `team` the ranks meet where the launch says, and there are as many as it says; without, as by hand.
    """
    if not isinstance(config, TrainStage) or config.parallel.backend == "single":
        return [sys.executable, "-m", "train", *worker]
    nproc = str(config.parallel.nproc if team is None else team.nproc)
    if placement.launcher == "deepspeed":
        if placement.nnodes > 1:
            raise LaunchError(
                "--launcher deepspeed starts one node only: use torchrun or slurm, which run the zero backends too"
            )
        port = placement.port or free_port()
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        return [deepspeed, "--num_accelerators", nproc, "--master_port", str(port), "--module", "train", *worker]
    if team is not None:
        return [*agent_command(team, config.name, config.supervision.start_s), "-m", "train", *worker]
    torchrun = [sys.executable, "-m", "train.torchrun"]
    if placement.nnodes == 1 and placement.port is None:
        torchrun += ["--standalone"]
    else:
        endpoint = f"{placement.address}:{placement.port or DEFAULT_PORT}"
        torchrun += ["--nnodes", str(placement.nnodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        torchrun += ["--rdzv-id", f"sfumato-{config.name}"]
    return [*torchrun, "--nproc-per-node", nproc, "--max-restarts", "0", "-m", "train", *worker]


def agent_command(team: Team, name: str, timeout_s: float) -> list[str]:
    """torchrun for this node's ranks of `team`, up to what they run; it gives up on the others after `timeout_s`."""
    torchrun = [sys.executable, "-m", "train.torchrun", "--nnodes", str(team.nnodes)]
    torchrun += ["--rdzv-backend", "launch", "--rdzv-endpoint", f"{team.address}:{team.port}"]
    torchrun += ["--rdzv-conf", f"node_rank={team.node_rank},timeout={timeout_s:.0f}"]
    torchrun += ["--rdzv-id", f"sfumato-{name}-{team.generation}", "--monitor-interval", "0.1"]
    return [*torchrun, "--nproc-per-node", str(team.nproc), "--max-restarts", "0"]


def stage_environment(config: StageConfig, base: Mapping[str, str], *, cuda: bool) -> dict[str, str]:
    """The environment of a stage's processes: our packages first on the path, and a share of the cores each.

    What a scheduler says of the launch itself (where launches meet, its number among pods) is left out: a stage of one
    process would take it for a process group of its own, and torchrun for its defaults.
    """
    env = {name: value for name, value in base.items() if name not in OF_THE_LAUNCH and not name.startswith("PET_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [base.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"  # a killed worker's last lines are in its log
    processes = config.parallel.nproc if isinstance(config, TrainStage) else 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    if not cuda:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Refuse a port that is in use on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for torchrun as well
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"--port {port} cannot be used ({error.strerror}): give another, such as {free_port()}, "
                "or none on a single node"
            ) from error
