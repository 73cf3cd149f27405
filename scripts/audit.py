"""Audit a run folder: what was spent, recomputed from the ledger alone, and whether the run's manifests bear it out."""

from __future__ import annotations

import argparse
import json
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from privacy.audit import (
    AuditReport,
    Comparison,
    UnreadableRunError,
    audit_run,
    compare,
    write_page,
    write_report,
)

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
exit status:
  0  every claim holds (or there is no private stage, and no manifest claims a ledger)
  1  a claim is false: the ledger is broken, or says something else than the manifests
  2  the folder cannot be read as a run, or a file in it cannot be read

The audit needs neither the weights nor the data nor the secret, and changes nothing. Where filtered shards and latents
lie in the run folder, it reads every byte of them, unless --no-shards is given.

examples:
  python scripts/audit.py runs/digits
  python scripts/audit.py runs/digits --json > audit.json
  python scripts/audit.py runs/digits --html --public-key keys/digits.pub
  python scripts/audit.py runs/digits --compare runs/digits-again
"""
KEY_DIGITS = 64


def main() -> int:
    """Print the audit of the folder named; the exit status is its verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as launch.py made it, finished or not")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="write the report as a page to FILE; without FILE, audit.html and audit.json into RUN/audit",
    )
    parser.add_argument("--public-key", metavar="HEX|FILE", help="the ledger's public key as you keep it elsewhere")
    parser.add_argument("--every-signature", action="store_true", help="verify every line's signature; takes longer")
    parser.add_argument("--no-shards", action="store_true", help="check the shards' manifests, and read no shard")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="set this run beside another one")
    arguments = parser.parse_args()
    try:
        key = None if arguments.public_key is None else read_public_key(arguments.public_key)
        how = {"public_key": key, "every_signature": arguments.every_signature, "shards": not arguments.no_shards}
        report = audit_run(arguments.run, **how)
        if arguments.compare is not None:
            other = audit_run(arguments.compare, **how)
            return show(compare(report, other), as_json=arguments.json)
        if arguments.html == Path():
            write_report(report, arguments.run / "audit")
        elif arguments.html is not None:
            write_page(report, arguments.html)
    except (UnreadableRunError, OSError, ValueError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    return show(report, as_json=arguments.json)


def read_public_key(given: str) -> str:
    """The key as lower-case hex, from the argument itself or from the file that it names."""
    text = Path(given).read_text(encoding="utf-8") if Path(given).is_file() else given
    key = text.strip().lower()
    if len(key) != KEY_DIGITS or not set(key) <= set(string.hexdigits):
        raise ValueError(f"--public-key is {given}: give {KEY_DIGITS} hex digits, or a file that holds them")
    return key


def show(result: AuditReport | Comparison, *, as_json: bool) -> int:
    """Print a report or a comparison; returns its exit status."""
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return result.exit_code
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if isinstance(result, AuditReport):
        show_report(console, result)
    else:
        show_comparison(console, result)
    return result.exit_code


def show_report(console: Console, report: AuditReport) -> None:
    """The report as tables, for somebody who answers for privacy and did not write the code."""
    from rich.markup import escape
    from rich.table import Table

    colour = "green" if report.exit_code == 0 else "red"
    console.print(f"[bold {colour}]{escape(report.verdict)}[/]  ({escape(report.run)})", soft_wrap=True)
    if report.spending is not None:
        table = Table(title="What was spent", title_justify="left", show_header=False)
        for name, value in spent_rows(report):
            table.add_row(name, escape(value))
        console.print(table)
    table = Table("claim", "", "evidence", title="What the run says of itself", title_justify="left")
    for claim in report.claims:
        table.add_row(escape(claim.claim), holds(claim.holds), escape(claim.evidence))
    console.print(table)
    for name, attack in report.attacks.items():
        console.print(f"attack ({name}): {escape(str(attack.get('verdict')))}", soft_wrap=True)
    if report.caveats:
        console.print("What the guarantee leaves out, and what to know:")
        for caveat in report.caveats:
            console.print(f"  - {escape(caveat)}", soft_wrap=True)


def spent_rows(report: AuditReport) -> list[tuple[str, str]]:
    """The rows of the first table."""
    spent = report.spending
    assert spent is not None
    stages = [
        (f"{stage.run}/{stage.stage}" if stage.run else stage.stage)
        + f": {stage.charges} charges, epsilon {stage.epsilon_alone:.4g} if alone"
        for stage in report.stages
    ]
    return [
        ("epsilon", f"{spent.epsilon:.6g} at delta {spent.delta:g}"),
        ("protects", f"one {spent.unit}; neighbouring data sets differ by adding or removing it"),
        ("accountant", spent.accountant),
        *(
            (
                "cross-check",
                (f"epsilon {c.epsilon:.6g}" if c.epsilon is not None else "nothing") + f" by {c.accountant}",
            )
            for c in spent.cross_checks
        ),
        ("data set's cap", "none" if spent.dataset_cap is None else f"epsilon {spent.dataset_cap:g}"),
        (
            "charges",
            f"{spent.charges}, of which {spent.wasted} wasted (never done) and {spent.replayed} replays; all count",
        ),
        ("by stage", "\n".join(stages)),
        ("data set", spent.dataset_root),
        ("ledger", spent.ledger),
        ("ledger head", spent.head),
        ("public key", spent.public_key),
    ]


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Two runs side by side; what differs is marked."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(comparison.ledgers)}[/]", soft_wrap=True)
    for claim in comparison.claims:
        console.print(f"{holds(claim.holds)}  {escape(claim.claim)}: {escape(claim.evidence)}", soft_wrap=True)
    table = Table("", "")
    for report in (comparison.first, comparison.second):
        table.add_column(escape(report.run), overflow="fold")
    for row in comparison.rows:
        table.add_row("[bold]differs[/]" if row.differs else "", *map(escape, (row.what, row.first, row.second)))
    console.print(table)


def holds(claim_holds: bool) -> str:
    """The mark of a claim, in colour."""
    return "[green]holds[/]" if claim_holds else "[bold red]FALSE[/]"


if __name__ == "__main__":
    sys.exit(main())
