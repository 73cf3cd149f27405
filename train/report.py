"""What a launch says: the plan before it starts, the table when it ends, and the same figures in summary.json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.config import StageConfig
from train.measurements import Row, measurement
from train.plan import StagePlan
from train.run_folder import RunFolder, write_json
from train.timeline import effective_time

GB = 1e9


def print_plan(console: Console, recipe: str, plans: Sequence[StagePlan]) -> None:
    """The dry run: one table of figures, then the command line of each stage and what is not known yet."""
    table = Table(title=f"Plan of recipe {escape(recipe)}: nothing is started")
    for column in ("stage", "processes", "parameters", "memory a device", "fits on", "noise", "epsilon"):
        table.add_column(column)
    for stage in plans:
        memory, privacy = stage.memory, stage.privacy
        table.add_row(
            stage.name,
            str(stage.world_size),
            f"{stage.num_parameters / 1e6:,.1f} M" if stage.num_parameters is not None else "",
            f"{memory.total / GB:.2f} GB" if memory is not None else "",
            ", ".join(stage.fits) or ("none known" if memory is not None else ""),
            f"{privacy.noise_multiplier:.3f}" if privacy is not None else "",
            f"{privacy.epsilon:.3f} (target {privacy.target:g}) at delta {privacy.delta:g}"
            if privacy is not None
            else "",
        )
    console.print(table)
    for stage in plans:
        if stage.memory is not None:
            parts = {name: value for name, value in vars(stage.memory).items() if value}
            shown = ", ".join(f"{name} {value / GB:.3f}" for name, value in parts.items())
            console.print(f"{stage.name}: memory in GB, an estimate: {shown}", highlight=False)
        if stage.privacy is not None:
            privacy = stage.privacy
            console.print(
                f"{stage.name}: {privacy.num_units} units, sampling rate {privacy.sampling_rate:.6g}; epsilon without "
                f"replays, {privacy.target:g} with all of them and with what was spent before; the data set has spent "
                f"{privacy.spent:.3f} and has {max(0.0, privacy.target - privacy.spent):.3f} left",
                highlight=False,
            )
        for note in stage.notes:
            console.print(f"{stage.name}: {escape(note)}", highlight=False)
    console.print("\nEach stage would be started with:")
    for stage in plans:
        console.print(f"  {escape(shlex.join(stage.command))}", highlight=False, soft_wrap=True)


def print_summary(console: Console, run: RunFolder, stages: Sequence[StageConfig]) -> None:
    """The table a launch ends with: each finished stage, its time, its restarts, and what its manifest has to show."""
    table = Table(title=f"Run {escape(str(run.path))} of recipe {escape(run.recipe)}", show_lines=True)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("restarts", justify="right")
    table.add_column("what it made", overflow="fold")
    for stage in stages:
        manifest = run.read_manifest(stage.name)
        if manifest is None:
            continue
        headline: Mapping[str, str] = manifest["metrics"].get("headline", {})
        made = "\n".join(f"{label}: {value}" for label, value in headline.items())
        restarts = max(len(read_attempts(run.path / stage.name)) - 1, 0)
        table.add_row(stage.name, f"{manifest['seconds']:.1f} s", str(restarts), escape(made))
    console.print(table)
    for stage in stages:
        if time := effective_time(run.path / stage.name):
            console.print(f"{stage.name}: {_where_time_went(time)}", highlight=False, soft_wrap=True)


def _where_time_went(time: Mapping[str, float]) -> str:
    parts = {
        name: time[name] for name in time if name not in {"productive", "wall_clock", "ratio"} and time[name] >= 0.05
    }
    rest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(parts.items(), key=lambda p: -p[1]))
    return f"effective training time {time['ratio']:.1%} of {time['wall_clock']:.1f} s; the rest: {rest or 'nothing'}"


def write_summary(run: RunFolder, stages: Sequence[StageConfig]) -> list[Row]:
    """Write summary.json and return its rows: time and restarts of each finished stage, and its manifest's figures.

    Figures are `metrics["rows"]`, already in the measurement form, and every other number in `metrics` by dotted name.
    """
    rows: list[Row] = []
    attempts: dict[str, Any] = {}
    for stage in stages:
        manifest = run.read_manifest(stage.name)
        if manifest is None:
            continue
        attempts[stage.name] = read_attempts(run.path / stage.name)
        rows.append({"name": f"{stage.name}.seconds", "value": manifest["seconds"], "unit": "s"})
        restarts = max(len(attempts[stage.name]) - 1, 0)
        rows.append({"name": f"{stage.name}.restarts", "value": restarts, "unit": "1"})
        if time := effective_time(run.path / stage.name):
            ratio = time.pop("ratio")
            rows.append({"name": f"{stage.name}.effective_time", "value": ratio, "unit": "1"})
            for kind, seconds in time.items():
                rows.append({"name": f"{stage.name}.time.{kind}", "value": seconds, "unit": "s"})
        metrics = dict(manifest["metrics"])
        rows += metrics.pop("rows", [])
        metrics.pop("headline", None)
        for name, value in _numbers(stage.name, metrics):
            rows.append({"name": name, "value": value, "unit": "1"})
    write_json(run.path / "summary.json", {**measurement(rows), "attempts": attempts})
    return rows


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Every attempt at a stage that a launch has recorded, over all launches."""
    path = folder / "attempts.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _numbers(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [(prefix, value)]
    if isinstance(value, Mapping):
        return [number for key, inner in value.items() for number in _numbers(f"{prefix}.{key}", inner)]
    return []
