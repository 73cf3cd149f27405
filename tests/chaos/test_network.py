"""Two nodes, each in a network namespace of its own, and a cable between them that is cut in the middle of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos import faulty_disk
from tests.chaos.harness import Fault, Trial
from tests.chaos.trainer import TIMEOUT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Names of two namespaces with a cable between them, 10.77.0.1 and 10.77.0.2 at its ends."""
    names = [f"chaos-{os.getpid()}-{node}" for node in range(2)]
    ends = [f"cable{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("-n", first, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", second)
        for node, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def allowed() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with two_namespaces():
            return True
    except subprocess.CalledProcessError:
        return False


def start(namespaces: Sequence[str], folder: Path, epoch: int) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "tests.chaos.trainer", str(folder), str(epoch)],
            cwd=faulty_disk.ROOT,
            env={**os.environ, **faulty_disk.environment(), "RANK": str(node), "WORLD_SIZE": "2", "NNODES": "2",
                 "GLOO_SOCKET_IFNAME": f"cable{node}"},
        )
        for node, name in enumerate(namespaces)
    ]  # fmt: skip


def wait_for_step(account: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (account.exists() and f'"step": {step}}}' in account.read_text()):
        assert time.monotonic() < deadline, "the job never came so far"
        time.sleep(0.005)


@pytest.mark.parametrize("step", [5, 8, 10])
def test_a_cut_cable_ends_the_attempt_on_both_nodes_and_the_next_goes_on_with_every_bit_right(
    tmp_path: Path, step: int
) -> None:
    if not allowed():
        pytest.skip("network namespaces need root and the kernel's leave")
    trial = Trial(tmp_path / "job", Fault("cable cut", num_nodes=2))
    trial.folder.mkdir()
    with two_namespaces() as namespaces:
        ranks = start(namespaces, trial.folder, 1)
        wait_for_step(trial.folder / "account-1-0.jsonl", step)
        ip("-n", namespaces[0], "link", "set", "cable0", "down")
        cut = time.monotonic()
        statuses = [rank.wait(timeout=60) for rank in ranks]
        assert all(statuses), "a rank that lost its peer must not end as if all were well"
        assert time.monotonic() - cut < 3 * TIMEOUT_S
        trial.check(1)
        ip("-n", namespaces[0], "link", "set", "cable0", "up")
        assert [rank.wait(timeout=60) for rank in start(namespaces, trial.folder, 2)] == [0, 0]
        trial.check(2)
        trial.check_end()
    assert trial.outcome.finished and not trial.outcome.broken, trial.outcome.broken
    assert trial.outcome.loaded, "nothing was resumed"
