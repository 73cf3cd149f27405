import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train import ROOT
from train.timeline import FILE, Timeline, effective_time, read_timeline

WRITER = """
import sys
from pathlib import Path
from train.timeline import Timeline
timeline = Timeline(Path(sys.argv[1]))
for number in range(500):
    timeline.event("stall", step=number, seconds=0.5, text="x" * 200)
"""


def write(folder: Path, *events: tuple[float, int, str, dict[str, Any]]) -> None:
    """The timeline of a stage: (time, attempt, event, fields) each."""
    lines = (json.dumps({"time": t, "attempt": a, "event": name, **fields}) for t, a, name, fields in events)
    (folder / FILE).write_text("\n".join(lines) + "\n")


def test_two_processes_write_lines_that_never_mix(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "SFUMATO_ATTEMPT": str(number)},
        )
        for number in (1, 2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    events = read_timeline(tmp_path)
    for attempt in (1, 2):
        assert [event["step"] for event in events if event["attempt"] == attempt] == list(range(500))


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    Timeline(tmp_path, attempt=1).event("joined")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": 1, "attem')
    assert [event["event"] for event in read_timeline(tmp_path)] == ["joined"]


def test_only_rank_0_tells(tmp_path: Path) -> None:
    Timeline(tmp_path, enabled=False).event("joined")
    assert read_timeline(tmp_path) == []


def test_an_unbroken_run_is_productive_but_for_its_start_load_and_saves(tmp_path: Path) -> None:
    write(
        tmp_path,
        (100, 1, "launched", {"launch": "a", "nproc": 2}),
        (105, 1, "joined", {}),
        (106, 1, "loaded", {"step": 0}),
        (126, 1, "steps", {"first": 0, "last": 100, "seconds": 20.0}),
        (126, 1, "stall", {"step": 50, "seconds": 1.5}),
        (128, 1, "drained", {"seconds": 2.0}),
        (131, 1, "ended", {"exit_code": 0, "cause": "finished"}),
    )
    time = effective_time(tmp_path)
    assert time["wall_clock"] == pytest.approx(31)
    expected = {"starting": 5, "loading": 1, "productive": 18.5, "saving": 3.5, "other": 3}
    assert {kind: time[kind] for kind in time if kind in expected} == pytest.approx(expected)
    assert time["ratio"] == pytest.approx(18.5 / 31)
    assert time["lost"] == time["detecting"] == time["restarting"] == 0


def test_what_a_failure_cost_is_told_by_kind_and_adds_up_to_the_wall_clock(tmp_path: Path) -> None:
    write(
        tmp_path,
        (0, 1, "launched", {"launch": "a"}),
        (4, 1, "joined", {}),
        (5, 1, "loaded", {"step": 0}),
        (25, 1, "steps", {"first": 0, "last": 40, "seconds": 20.0}),
        (33, 1, "detected", {"cause": "hang", "rank": 1, "since_s": 5.0}),
        (34, 1, "ended", {"exit_code": -9, "cause": "hang"}),
        (36, 2, "launched", {"launch": "a"}),
        (40, 2, "joined", {}),
        (42, 2, "loaded", {"step": 30, "tier": "memory"}),
        (52, 2, "steps", {"first": 30, "last": 50, "seconds": 10.0}),
        (52, 2, "ended", {"exit_code": 0, "cause": "finished"}),
    )
    time = effective_time(tmp_path)
    assert time["wall_clock"] == pytest.approx(52)
    assert {kind: time[kind] for kind in time if kind not in {"wall_clock", "ratio"}} == pytest.approx(
        {
            "starting": 4,
            "loading": 1 + 2,
            "productive": 15 + 10,  # steps 0 to 29 of the first attempt
            "lost": 5 + 3,  # steps 30 to 39, and what came after the last steps it told of
            "detecting": 5,
            "restarting": 1 + 2 + 4,
            "saving": 0,
            "other": 0,
        }
    )


def test_a_stage_that_saved_before_it_was_stopped_lost_nothing(tmp_path: Path) -> None:
    write(
        tmp_path,
        (0, 1, "launched", {"launch": "a"}),
        (1, 1, "joined", {}),
        (2, 1, "loaded", {"step": 0}),
        (12, 1, "steps", {"first": 0, "last": 10, "seconds": 10.0}),
        (14, 1, "drained", {"seconds": 1.0}),
        (14, 1, "stopped", {"step": 11, "why": "signal"}),
        (14, 1, "detected", {"cause": "exited", "since_s": 0.0}),
        (14, 1, "ended", {"exit_code": 75, "cause": "preempted"}),
        (15, 2, "launched", {"launch": "a"}),
        (16, 2, "joined", {}),
        (17, 2, "loaded", {"step": 11}),
        (27, 2, "steps", {"first": 11, "last": 21, "seconds": 10.0}),
        (27, 2, "ended", {}),
    )
    time = effective_time(tmp_path)
    assert (time["lost"], time["productive"], time["saving"]) == pytest.approx((0, 21, 1))


def test_steps_that_two_failures_in_a_row_undid_are_lost(tmp_path: Path) -> None:
    write(
        tmp_path,
        (0, 1, "launched", {"launch": "a"}),
        (1, 1, "joined", {}),
        (1, 1, "loaded", {"step": 0}),
        (11, 1, "steps", {"first": 0, "last": 10, "seconds": 10.0}),
        (11, 1, "detected", {"since_s": 0.0}),
        (11, 1, "ended", {}),
        (11, 2, "launched", {"launch": "a"}),
        (15, 2, "detected", {"since_s": 0.0}),
        (15, 2, "ended", {}),
        (15, 3, "launched", {"launch": "a"}),
        (16, 3, "joined", {}),
        (16, 3, "loaded", {"step": 5}),
        (26, 3, "steps", {"first": 5, "last": 15, "seconds": 10.0}),
        (26, 3, "ended", {}),
    )
    time = effective_time(tmp_path)
    assert (time["productive"], time["lost"], time["restarting"]) == pytest.approx((15, 5, 5))
    assert time["wall_clock"] == pytest.approx(26)


def test_the_hours_between_two_launches_are_nobodys(tmp_path: Path) -> None:
    write(
        tmp_path,
        (0, 1, "launched", {"launch": "a"}),
        (1, 1, "joined", {}),
        (2, 1, "loaded", {"step": 0}),
        (12, 1, "steps", {"first": 0, "last": 10, "seconds": 10.0}),  # and then the launch itself was killed
        (9000, 2, "launched", {"launch": "b"}),
        (9001, 2, "joined", {}),
        (9002, 2, "loaded", {"step": 10}),
        (9012, 2, "steps", {"first": 10, "last": 20, "seconds": 10.0}),
        (9012, 2, "ended", {}),
    )
    time = effective_time(tmp_path)
    assert time["wall_clock"] == pytest.approx(24)
    assert time["productive"] == pytest.approx(20)
    assert time["starting"] == pytest.approx(2)


def test_a_stage_that_tells_no_steps_has_no_effective_time(tmp_path: Path) -> None:
    assert effective_time(tmp_path) == {}
    write(tmp_path, (0, 1, "launched", {"launch": "a"}), (9, 1, "ended", {}))
    assert effective_time(tmp_path) == {}
