#!/usr/bin/env python3
"""Measure this machine: a table on the screen and, with --json, the same as a file."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # our `kernels`, whatever else is installed

from rich.console import Console
from rich.table import Table

from train import check_packages

_WIDEST = 28  # characters of a word that is a value; the file has all


def main() -> int:
    """Exit status: 0 where no figure misses its target, 1 otherwise. What is under way is told on stderr."""
    check_packages()
    from privacy.pii.findings import MissingDetector
    from train.benchmarks import data, train
    from train.benchmarks_checkpoint import checkpoint
    from train.benchmarks_experts import experts
    from train.benchmarks_goodput import goodput
    from train.benchmarks_kernels import kernels, tune_kernels
    from train.benchmarks_packing import packing
    from train.benchmarks_pii import PARTS, pii
    from train.benchmarks_privacy import dp
    from train.benchmarks_restart import restart
    from train.measurements import Row, all_met, measurement

    benchmarks: dict[str, Callable[..., list[Row]]] = {
        "dp": dp,
        "train": train,
        "kernels": kernels,
        "checkpoint": checkpoint,
        "restart": restart,
        "data": data,
        "pii": pii,
        "goodput": goodput,
        "packing": packing,
        "experts": experts,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=benchmarks, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="F", help="write machine, versions, commit and rows to this file")
    parser.add_argument("--picture", type=Path, metavar="F", help="with goodput: draw it to this PNG file")
    parser.add_argument("--tune", action="store_true", help="with kernels, on a GPU: first find its best tiles")
    parser.add_argument("--part", choices=PARTS, help="with pii: this part alone")
    parser.add_argument("--names", type=Path, metavar="FOLDER", help="with pii: the model that train-names wrote there")
    arguments = parser.parse_args()
    if arguments.picture and arguments.what != "goodput":
        parser.error("--picture draws goodput: leave it out")
    if (arguments.part or arguments.names) and arguments.what != "pii":
        parser.error("--part and --names are for pii: leave them out")
    if arguments.tune and arguments.what != "kernels":
        parser.error("--tune is for kernels: leave it out")

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("train").setLevel(logging.INFO)
    if arguments.tune:
        try:
            print(f"tiles written to {tune_kernels()}")
        except ValueError as error:
            parser.error(str(error))
    given = {"goodput": ("picture",), "pii": ("part", "names")}.get(arguments.what, ())
    try:
        rows = benchmarks[arguments.what](*(getattr(arguments, option) for option in given))
    except MissingDetector as error:
        parser.error(str(error))
    measured = measurement(rows)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(measured))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return 0 if all_met(rows) else 1


def _table(measured: Mapping[str, Any]) -> Table:
    machine = measured["machine"]
    table = Table(title=f"{machine['cpu']}, {machine['cores']} cores; {measured['commit']}")
    intervals = any("interval" in row for row in measured["rows"])
    for column in ("figure", "value", *(("95%",) if intervals else ()), "unit", "target", ""):
        table.add_column(column, justify="right" if column in ("value", "target") else "left", overflow="fold")
    for row in measured["rows"]:
        verdict = {True: "met", False: "missed", None: ""}[row["ok"]]
        value = row["value"]
        shown = "not measured" if value is None else value[:_WIDEST] if isinstance(value, str) else f"{value:,.4g}"
        target = "" if row["target"] is None else f"{row['target']:g}"
        between = [" – ".join(f"{end:.3f}" for end in row.get("interval", ()))] if intervals else []
        table.add_row(row["name"], shown, *between, row["unit"], target, verdict)
    return table


if __name__ == "__main__":
    sys.exit(main())
