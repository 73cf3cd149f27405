"""Commands of the filter's own models: `python -m privacy.pii train-names --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from privacy.pii.names_training import train_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 with the error on the last line where a user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m privacy.pii", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = commands.add_parser(
        "train-names",
        help="train the detector of persons and addresses on generated sentences, and measure it",
        description="Train the detector of persons and addresses on generated sentences, measure it on templates and "
        "names held out, and write config, weights and card to a folder that a policy can name.",
    )
    names.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; it must not be there yet")
    names.add_argument("--minutes", type=float, default=3, help="of two idle cores (default: %(default)s)")
    names.add_argument("--seed", type=int, default=0, help="of sentences and weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        figures = _train(options.out, options.minutes, options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    digest = figures.pop("digest")
    for name, value in figures.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"\npolicy:\n  detectors: [patterns, names]\n  names: {{model: {options.out}, digest: {digest}}}")
    return 0


def _train(out: Path, minutes: float, seed: int) -> dict[str, float | str]:
    columns = (
        TextColumn("train-names"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, loss=0.0)
        return train_names(
            out, minutes, seed, lambda done, steps, loss: bar.update(task, completed=done, total=steps, loss=loss)
        )


if __name__ == "__main__":
    sys.exit(main())
