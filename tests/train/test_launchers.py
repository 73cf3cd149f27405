import os
import socket
import sys
from pathlib import Path

import pytest

from train import ROOT
from train.launchers import (
    LaunchError,
    Placement,
    check_port,
    free_port,
    stage_command,
    stage_environment,
    worker_arguments,
)
from train.recipe import load_stage
from train.rendezvous import Team

DIGITS = ROOT / "configs" / "digits"
PRETRAIN = load_stage(DIGITS / "30_pretrain.yaml", ["parallel={backend: ddp, nproc: 2}"])
WORKER = ["p.yaml", "--run-dir", "runs/x"]


def test_a_worker_is_told_its_file_folder_overrides_and_epoch() -> None:
    arguments = worker_arguments(Path("p.yaml"), Path("runs/x"), ["a.b=1", "c=2"], 7)
    assert arguments == ["p.yaml", "--run-dir", "runs/x", "--set", "a.b=1", "--set", "c=2", "--fencing-epoch", "7"]


def test_a_stage_that_does_not_train_is_one_plain_process() -> None:
    command = stage_command(load_stage(DIGITS / "20_filter.yaml"), Placement("deepspeed"), WORKER)
    assert command == [sys.executable, "-m", "train", *WORKER]


def test_a_single_backend_needs_no_launcher() -> None:
    stage = load_stage(DIGITS / "30_pretrain.yaml", ["parallel={backend: single, nproc: 1}", "train.microbatch_size=1"])
    assert stage_command(stage, Placement(), WORKER)[1:3] == ["-m", "train"]


def test_torchrun_starts_nproc_ranks_and_leaves_restarts_to_us() -> None:
    command = stage_command(PRETRAIN, Placement(), WORKER)
    assert command[1:] == [
        "-m", "train.torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0", "-m", "train", *WORKER
    ]  # fmt: skip


def test_several_nodes_meet_at_the_first() -> None:
    command = stage_command(PRETRAIN, Placement(nnodes=2, node_rank=1, address="node7", port=1234), WORKER)
    assert command[command.index("--rdzv-endpoint") + 1] == "node7:1234"
    assert command[command.index("--nnodes") + 1] == "2"


def test_a_team_meets_at_the_launchs_store_with_as_many_ranks_as_it_has() -> None:
    team = Team(nproc=1, nnodes=2, node_rank=1, address="node7", port=4711, generation=3)
    command = stage_command(PRETRAIN, Placement(nnodes=2, node_rank=1), WORKER, team)
    options = dict(zip(command[3 : -len(WORKER) - 2 : 2], command[4 : -len(WORKER) - 2 : 2], strict=True))
    assert options == {
        "--nnodes": "2", "--rdzv-backend": "launch", "--rdzv-endpoint": "node7:4711",
        "--rdzv-conf": "node_rank=1,timeout=180", "--rdzv-id": "sfumato-pretrain-3", "--monitor-interval": "0.1",
        "--nproc-per-node": "1", "--max-restarts": "0",
    }  # fmt: skip


def test_deepspeed_starts_nproc_ranks_on_a_free_port() -> None:
    command = stage_command(PRETRAIN, Placement("deepspeed"), WORKER)
    assert Path(command[0]).name == "deepspeed" and Path(command[0]).exists()
    assert command[1:3] == ["--num_accelerators", "2"]
    assert command[-len(WORKER) - 2 :] == ["--module", "train", *WORKER]


def test_deepspeed_on_several_nodes_is_refused_with_the_mend() -> None:
    with pytest.raises(LaunchError, match="use torchrun or slurm"):
        stage_command(PRETRAIN, Placement("deepspeed", nnodes=2), WORKER)


def test_ranks_share_the_cores_and_find_our_packages_first() -> None:
    env = stage_environment(PRETRAIN, {"PYTHONPATH": "/theirs"}, cuda=False)
    assert env["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/theirs"])
    assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert env["DS_ACCELERATOR"] == "cpu"
    assert stage_environment(PRETRAIN, {"OMP_NUM_THREADS": "5"}, cuda=True)["OMP_NUM_THREADS"] == "5"


def test_where_launches_meet_is_not_taken_for_a_stages_own_process_group() -> None:
    told = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "4", "PET_NNODES": "4"}
    env = stage_environment(PRETRAIN, {**told, "HOME": "/root"}, cuda=False)
    assert not told.keys() & env.keys() and env["HOME"] == "/root"


def test_a_port_in_use_is_refused_with_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"--port {port} cannot be used \(Address already in use\): give another"
        ):
            check_port(port)
    check_port(free_port())
