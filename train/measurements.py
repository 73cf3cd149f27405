"""The one form of every measurement: where it was measured, with what, and rows of name, value, unit, target, ok."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from train import ROOT

VERSIONED = ("torch", "triton", "deepspeed", "opacus", "dp-accounting", "numpy", "safetensors", "wandb")


class Row(TypedDict):
    """One figure; `value` and `ok` are None where it was not measured, `target` and `ok` where nothing is promised.

    interval: 95% of what the value is an estimate of, where that is told.
    """

    name: str
    value: float | str | None
    unit: str
    target: NotRequired[float | str | None]
    ok: NotRequired[bool | None]
    interval: NotRequired[tuple[float, float]]


def judged(prefix: str, rows: Sequence[Row], at_least: Mapping[str, float], at_most: Mapping[str, float]) -> list[Row]:
    """The rows as `prefix.name`, those with a threshold first, in the order of the thresholds, each with its verdict.

    Raises ValueError where a threshold names what is no row, so that no typing error lets anything pass.
    """
    measured = {row["name"]: row for row in rows}
    found: list[Row] = []
    for key, thresholds in (("at_least", at_least), ("at_most", at_most)):
        for name, bound in thresholds.items():
            if name not in measured:
                near = difflib.get_close_matches(name, measured, n=1)
                meant = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"{key} names {name!r}, which was not measured{meant}: take it out, or measure it")
            value = measured[name]["value"]
            assert not isinstance(value, str), name
            met = None if value is None else value >= bound if key == "at_least" else value <= bound
            found.append({**measured[name], "target": bound, "ok": met})
    found += [row for row in rows if row["name"] not in {*at_least, *at_most}]
    return [{**row, "name": f"{prefix}.{row['name']}"} for row in found]


def measurement(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows with the machine, the versions and the commit they were measured on, as JSON types."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": code_version(),
        "rows": [
            {
                "name": row["name"],
                "value": row["value"],
                "unit": row["unit"],
                "target": row.get("target"),
                "ok": row.get("ok"),
                **({"interval": list(row["interval"])} if "interval" in row else {}),
            }
            for row in rows
        ],
    }


def all_met(rows: Sequence[Row]) -> bool:
    """Whether no row misses its target; one that was not measured does not."""
    return all(row.get("ok") is not False for row in rows)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, and CUDA devices by name."""
    import torch

    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages whose version can change a figure; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def code_version() -> str:
    """As "git:COMMIT", with "+dirty" where tracked files differ from it; outside a clone, the package's version."""
    if (ROOT / ".git").exists():
        commit = _git("rev-parse", "--verify", "HEAD")
        if commit is not None:
            dirty = _git("status", "--porcelain", "--untracked-files=no")
            return f"git:{commit}{'+dirty' if dirty else ''}"
    try:
        return f"sfumato=={importlib.metadata.version('sfumato')}"
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
