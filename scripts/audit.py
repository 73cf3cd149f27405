"""Audit a run folder: what was spent, recomputed from the ledger alone, and whether the run's manifests bear it out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from privacy.audit import AuditReport, UnreadableRunError, audit_run

EPILOG = """\
exit status:
  0  every claim holds (or there is no private stage, and no manifest claims a ledger)
  1  a claim is false: the ledger is broken, or says something else than the manifests
  2  the folder cannot be read as a run

The audit needs neither the weights nor the data nor the secret, and changes nothing.

examples:
  python scripts/audit.py runs/digits
  python scripts/audit.py runs/digits --json > audit.json
"""


def main() -> int:
    """Print the audit of the folder named; the exit status is its verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as launch.py made it, finished or not")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    arguments = parser.parse_args()
    try:
        report = audit_run(arguments.run)
    except (UnreadableRunError, OSError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report)
    return report.exit_code


def show(report: AuditReport) -> None:
    """The report as tables, for somebody who answers for privacy and did not write the code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    colour = "green" if report.exit_code == 0 else "red"
    console.print(f"[bold {colour}]{escape(report.verdict)}[/]  ({escape(report.run)})", soft_wrap=True)
    if report.spending is not None:
        table = Table(title="What was spent", title_justify="left", show_header=False)
        for name, value in spent_rows(report):
            table.add_row(name, escape(value))
        console.print(table)
    table = Table("claim", "", "evidence", title="What the run says of itself", title_justify="left")
    for claim in report.claims:
        table.add_row(
            escape(claim.claim), "[green]holds[/]" if claim.holds else "[bold red]FALSE[/]", escape(claim.evidence)
        )
    console.print(table)
    if report.caveats:
        console.print("What the guarantee leaves out, and what to know:")
        for caveat in report.caveats:
            console.print(f"  - {escape(caveat)}", soft_wrap=True)


def spent_rows(report: AuditReport) -> list[tuple[str, str]]:
    """The rows of the first table."""
    spent = report.spending
    assert spent is not None
    return [
        ("epsilon", f"{spent.epsilon:.6g} at delta {spent.delta:g}"),
        ("protects", f"one {spent.unit}; neighbouring data sets differ by adding or removing it"),
        ("accountant", spent.accountant),
        ("cross-check", f"epsilon {spent.epsilon_by_rdp:.6g} by {spent.cross_check}"),
        ("data set's cap", "none" if spent.dataset_cap is None else f"epsilon {spent.dataset_cap:g}"),
        (
            "charges",
            f"{spent.charges}, of which {spent.wasted} wasted (never done) and {spent.replayed} replays; all count",
        ),
        ("data set", spent.dataset_root),
        ("ledger", spent.ledger),
        ("ledger head", spent.head),
    ]


if __name__ == "__main__":
    sys.exit(main())
