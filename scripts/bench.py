#!/usr/bin/env python3
"""Measure this machine: a table on the screen and, with --json, the same as a file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # our `kernels`, whatever else is installed

from rich.console import Console
from rich.table import Table

from train import check_packages


def main() -> int:
    """Exit status: 0 where no figure misses its target, 1 otherwise."""
    check_packages()
    from train.benchmarks import BENCHMARKS
    from train.measurements import all_met, measurement

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="F", help="write machine, versions, commit and rows to this file")
    arguments = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status(f"measuring {arguments.what}"):
        rows = BENCHMARKS[arguments.what]()
    measured = measurement(rows)
    table = Table(title=f"{measured['machine']['cpu']}, {measured['machine']['cores']} cores; {measured['commit']}")
    for column in ("figure", "value", "unit", "target", ""):
        table.add_column(column, justify="right" if column in ("value", "target") else "left")
    for row in measured["rows"]:
        verdict = {True: "met", False: "missed", None: ""}[row["ok"]]
        target = "" if row["target"] is None else f"{row['target']:g}"
        table.add_row(row["name"], f"{row['value']:,.4g}", row["unit"], target, verdict)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return 0 if all_met(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
