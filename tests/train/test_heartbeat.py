import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train import ROOT
from train.heartbeat import HEARTBEATS, Heartbeat, RankWatch, Sign, StragglerWatch, make_folder

WORKER = """
import sys, time
from train.heartbeat import install
heartbeat = install()
def holds_the_lock():
    for line in sys.stdin:
        exec(line)
holds_the_lock()
"""


class Rank:
    """A real process that does what it is told, a line at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        env = {**os.environ, HEARTBEATS: str(folder), "RANK": str(rank), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-u", "-c", WORKER], env=env, stdin=subprocess.PIPE, text=True)

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    pages = make_folder(tmp_path, 0)
    yield pages
    for path in pages.iterdir():
        path.unlink()
    pages.rmdir()


@pytest.fixture
def ranks(folder: Path) -> Iterator[list[Rank]]:
    found = [Rank(folder, rank) for rank in range(2)]
    yield found
    for rank in found:
        rank.process.kill()
        rank.process.wait()
        assert rank.process.stdin is not None
        rank.process.stdin.close()


def until(watch: RankWatch, condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        assert watch.look() is None
        time.sleep(0.02)


def test_the_launch_sees_where_each_rank_is_and_how_far(folder: Path, ranks: list[Rank]) -> None:
    watch = RankWatch(folder, range(2), {})
    until(watch, lambda: len(watch.signs) == 2)
    assert {sign.section for sign in watch.signs.values()} == {"start"}
    assert watch.pids == {number: rank.process.pid for number, rank in enumerate(ranks)}
    ranks[1].do("heartbeat.section('step'); heartbeat.beat(7)")
    until(watch, lambda: watch.signs[1].step == 7)
    assert (watch.signs[0].section, watch.signs[1].section) == ("start", "step")
    watch.close()


def test_a_section_ends_where_its_block_does_and_stays_where_an_error_struck(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HEARTBEATS, str(folder))
    heartbeat = Heartbeat(0)
    watch = RankWatch(folder, range(1), {})

    def section() -> str:
        assert watch.look() is None
        return watch.signs[0].section

    heartbeat.section("step")
    with heartbeat.section("save"):
        assert section() == "save"
    assert section() == "step"
    with pytest.raises(OSError), heartbeat.section("save"):
        raise OSError
    assert section() == "save"
    watch.close()


def test_without_a_launch_a_heartbeat_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEATS, raising=False)
    heartbeat = Heartbeat(0)
    with heartbeat.section("step"):
        heartbeat.beat(1)
        heartbeat.waiting()
    heartbeat.exiting(0)


def test_a_beat_costs_less_than_ten_microseconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEATS, str(folder))
    heartbeat = Heartbeat(0)
    begun = time.perf_counter()
    for step in range(1000):
        heartbeat.beat(step)
    assert (time.perf_counter() - begun) / 1000 < 1e-5


def test_a_killed_rank_is_seen_and_told_from_one_that_ends_by_itself(folder: Path, ranks: list[Rank]) -> None:
    watch = RankWatch(folder, range(2), {})
    until(watch, lambda: len(watch.signs) == 2)
    ranks[1].process.kill()
    ranks[1].process.wait()
    found = watch.look()
    assert found is not None
    assert (found.kind, found.rank, found.text) == ("died", 1, "rank 1 died without a word")
    ranks[0].do("heartbeat.exiting(75); sys.exit(75)")
    ranks[0].process.wait()
    found = watch.look()
    assert found is not None
    assert (found.kind, found.rank, found.status) == ("exited", 0, 75)
    assert watch.all_ended and watch.statuses() == {0: 75, 1: None}
    watch.close()


def test_a_killed_rank_is_blamed_before_the_peer_it_took_along(folder: Path, ranks: list[Rank]) -> None:
    watch = RankWatch(folder, range(2), {})
    until(watch, lambda: len(watch.signs) == 2)
    ranks[1].process.kill()
    ranks[0].do("heartbeat.exiting(1); sys.exit(1)")
    for rank in ranks:
        rank.process.wait()
    found = watch.look()
    assert found is not None and (found.kind, found.rank) == ("died", 1)
    watch.close()


def test_a_rank_may_be_silent_for_the_limit_of_its_own_section_and_no_longer(folder: Path, ranks: list[Rank]) -> None:
    watch = RankWatch(folder, range(2), {"step": 0.5})
    until(watch, lambda: len(watch.signs) == 2)
    begun = time.monotonic()
    ranks[0].do("heartbeat.section('save')")
    ranks[1].do("heartbeat.section('step')")
    while (found := watch.look()) is None:
        assert time.monotonic() - begun < 5
        time.sleep(0.02)
    assert (found.kind, found.rank) == ("hang", 1)
    assert "rank 1 gave no sign of life for 0.5 s in section step (limit 0.5 s)" in found.text
    watch.close()


def test_a_stopped_rank_is_named_though_its_peers_are_silent_too(folder: Path, ranks: list[Rank]) -> None:
    watch = RankWatch(folder, range(2), {"start": 1.0})
    until(watch, lambda: len(watch.signs) == 2)
    ranks[1].process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    while (found := watch.look()) is None:
        assert time.monotonic() - begun < 5
        time.sleep(0.02)
    assert found.rank == 1
    assert f"rank 1 (process {ranks[1].process.pid}) is stopped by a signal" in found.text
    said = watch.describe()
    assert "holds_the_lock" in said.split("== rank 1")[0]
    assert "stopped by a signal" in said.split("== rank 1")[1] and "no stack" in said.split("== rank 1")[1]
    watch.close()


def test_a_rank_that_never_begins_is_a_hang_in_its_start(folder: Path) -> None:
    watch = RankWatch(folder, range(3, 4), {"start": 0.1})
    time.sleep(0.2)
    found = watch.look()
    assert found is not None and (found.kind, found.rank) == ("hang", 3)
    assert "gave no sign of life within" in found.text


def signs(step: int, *own_s: float) -> dict[int, Sign]:
    return {r: Sign(1, step, "step", step, None, int(s * step * 1e9), step) for r, s in enumerate(own_s)}


def test_a_slow_rank_is_named_once_and_only_after_two_slow_windows() -> None:
    stragglers = StragglerWatch(1.5, steps=10)
    looks = [stragglers.look(signs(step, 0.1, 0.1, 0.3)) for step in range(0, 60, 5)]
    (named,) = [name for found in looks for name in found]
    assert named[0] == 2 and named[1:] == pytest.approx((0.3, 0.1))
    assert looks.index([named]) == 4  # the second window of ten steps ends with the fifth look


def test_ranks_that_are_about_as_fast_are_not_named() -> None:
    stragglers = StragglerWatch(1.5, steps=10)
    assert not any(stragglers.look(signs(step, 0.1, 0.12, 0.14)) for step in range(0, 100, 10))
