"""The audit of a run folder, by whoever was not there: what was spent, and whether the folder bears out what it says.

`audit_run` reads a folder and reports; `compare` puts two reports side by side; `write_report` makes `audit.json` and a
page for people. No torch, no data, no weights and no secret are needed.
"""

from privacy.audit.claims import Claim
from privacy.audit.compare import Comparison, compare
from privacy.audit.evidence import UnreadableRunError
from privacy.audit.page import write_page, write_report
from privacy.audit.report import AuditReport, audit_run

__all__ = [
    "AuditReport",
    "Claim",
    "Comparison",
    "UnreadableRunError",
    "audit_run",
    "compare",
    "write_page",
    "write_report",
]
