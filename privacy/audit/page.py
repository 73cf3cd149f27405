"""The audit as a page for people: one HTML file that asks for nothing from outside, and reads well printed.

The reader answers for privacy and did not write the code: what was checked, what the figures mean, what they do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from privacy.audit.claims import short
from privacy.audit.figure import draw
from privacy.audit.report import AuditReport, CrossCheck, Spending, StageSpending
from privacy.pages import document, items, write_whole

JSON_FILE, HTML_FILE = "audit.json", "audit.html"
FALSE_ACCUSATIONS = 0.01  # the rate at which the page tells what an attacker's guess is worth
ALMOST_ALL = 0.999


def write_report(report: AuditReport, folder: Path) -> tuple[Path, Path]:
    """Write audit.json and audit.html into `folder`, each whole or not at all; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_FILE, folder / HTML_FILE
    write_whole(paths[0], json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")
    write_page(report, paths[1])
    return paths


def write_page(report: AuditReport, path: Path) -> None:
    """Write the page alone."""
    write_whole(path, render(report))


def render(report: AuditReport) -> str:
    """The report as one self-contained HTML page."""
    body = _heading(report)
    if report.spending is not None:
        body += _meaning(report.spending) + _spent(report.spending)
        body += f'<figure class="drawn">{draw(report)}</figure>\n' + _stages(report.stages)
    body += _claims(report) + _attacks(report) + _caveats(report) + _repeat(report)
    return document(f"Privacy audit of {Path(report.run).name}", body)


# --- the parts of the page ---


def _heading(report: AuditReport) -> str:
    holds = report.exit_code == 0
    mark, kind = ("\u2713", "") if holds else ("\u2717", " false")
    verdict = report.verdict[0].upper() + report.verdict[1:]
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    caution = "<p><strong>Rely on no figure of this page before each FALSE below is explained.</strong></p>"
    return (
        f"<h1>Privacy audit: {escape(Path(report.run).name)}</h1>\n"
        f'<p class="where">run folder {escape(report.run)}; page written {written}</p>\n'
        f'<div class="verdict{kind}">{mark} {escape(verdict)}</div>\n{"" if holds else caution}'
    )


def _meaning(spent: Spending) -> str:
    unit, epsilon, delta = spent.unit, spent.epsilon, spent.delta
    caught = detection_bound(epsilon, delta, FALSE_ACCUSATIONS)
    means = [
        f"There is a proven limit to how much everything that training released (the weights, their samples, the loss "
        f"curve) depends on any one {unit} of the private data.",
        f"The limit: no result becomes more than e<sup>ε</sup> = {_factor(epsilon)} times as likely by one {unit} "
        f"being in or out, but for results of total probability δ = {delta:g}.",
        f"So somebody who knows everything else, and wrongly accuses 1 of 100 {unit}s that were absent, recognises "
        + (f"at most {caught:.1%} of those present" if caught < ALMOST_ALL else "at most nearly all of those present")
        + ". By guessing it would be 1%; without protection it may be all of them.",
    ]
    not_means = [
        _strength(epsilon),
        f"It protects each {unit}, not what many {unit}s have in common: that the model learns.",
        "It says nothing about data that is not behind the ledger: public data, captions, or what is typed in later.",
        "It does not say that the code did what the ledger says. The ledger shows what was charged; tests, and the "
        "code version named below, stand for the rest.",
        "What is listed under “What to know” lies outside the guarantee, or is assumed.",
    ]
    return (
        '<div class="two">\n'
        f"<div><h2>What it means</h2><ul>{items(means)}</ul></div>\n"
        f"<div><h2>What it does not mean</h2><ul>{items(not_means)}</ul></div>\n</div>\n"
    )


def _attacks(report: AuditReport) -> str:
    """Attacks that the run carried out on itself: they can refute a promise, and never prove one."""
    texts = {
        "empirical": "Canaries put through the private step, on public data, under an epsilon of their own",
        "extraction": "Samples that are copies of training images",
    }
    found = [f"{texts[name]}: {escape(str(attack.get('verdict')))}" for name, attack in report.attacks.items()]
    return f"<h2>Attacks that were tried</h2><ul>{items(found)}</ul>\n" if found else ""


def _strength(epsilon: float) -> str:
    """How much an epsilon is worth by itself, without reassurance."""
    if epsilon <= 1:
        return f"ε = {epsilon:.3g} is a strong promise; it is still not secrecy, and it weakens with every further use."
    if epsilon <= 4:
        return f"ε = {epsilon:.3g} is a moderate promise: one record can be told apart somewhat better than by chance."
    return (
        f"ε = {epsilon:.3g} is by itself a weak promise against somebody who knows all other records. Known attacks "
        "reach less than the bound, but only the bound is proven."
    )


def detection_bound(epsilon: float, delta: float, false_rate: float) -> float:
    """The most true positives that any membership test has at this rate of false ones, given (epsilon, delta).

    Source: Kairouz, Oh and Viswanath 2015 (arXiv:1311.0776), Theorem 2.1.
    """
    growth = math.exp(min(epsilon, 700.0))
    return max(0.0, min(1.0, growth * false_rate + delta, 1 - (1 - false_rate - delta) / growth))


def _spent(spent: Spending) -> str:
    rows = [
        ("epsilon (ε)", f"<strong>{spent.epsilon:.5g}</strong> at δ = {spent.delta:g}, by {escape(spent.accountant)}"),
        ("by two others", "; ".join(map(_opinion, spent.cross_checks))),
        ("protects", f"one {escape(spent.unit)}; neighbouring data sets differ by {escape(_relation(spent.relation))}"),
        (
            "charges",
            f"{spent.charges:,}: {spent.wasted:,} of them never finished, {spent.replayed:,} replays; all count",
        ),
        ("data set's cap", "none set" if spent.dataset_cap is None else f"ε = {spent.dataset_cap:g} over all runs"),
        ("data set", f"<code>{escape(spent.dataset_root)}</code>"),
        ("ledger", f"<code>{escape(Path(spent.ledger).name)}</code>, id <code>{escape(spent.ledger_id)}</code>"),
        ("its head", f"<code>{escape(spent.head)}</code>"),
        ("its public key", f"<code>{escape(spent.public_key)}</code>"),
    ]
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>\n" for name, value in rows)
    return f'<h2>What was spent</h2>\n<table class="facts">{cells}</table>\n'


def _opinion(check: CrossCheck) -> str:
    return f"{'no figure' if check.epsilon is None else f'{check.epsilon:.5g}'} by {escape(check.accountant)}"


def _stages(stages: Sequence[StageSpending]) -> str:
    rows = "".join(
        "<tr>"
        f'<td class="name">{escape(stage.run or "-")}</td><td class="name">{escape(stage.stage)}</td>'
        f"<td>{escape('; '.join(stage.mechanisms))}</td>"
        f'<td class="number">{stage.steps:,}</td><td class="number">{stage.charges:,}</td>'
        f'<td class="number">{stage.epsilon_alone:.4g}</td>'
        f"<td class='name'><code>{escape(', '.join(short(version) for version in stage.code_versions))}</code></td>"
        "</tr>\n"
        for stage in stages
    )
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("run", ""),
            ("stage", ""),
            ("mechanism", ""),
            ("steps", ' class="number"'),
            ("charges", ' class="number"'),
            ("ε alone", ' class="number"'),
            ("code", ""),
        )
    )
    return (
        "<h2>Spend by run and stage</h2>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>\n"
        '<p class="small">ε alone is what the stage would have cost by itself. These do not add up: together the '
        "stages cost the ε above.</p>\n"
    )


def _claims(report: AuditReport) -> str:
    rows = "".join(
        f'<tr><td class="mark">{"✓ holds" if claim.holds else "✗ FALSE"}</td>'
        f'<td>{escape(claim.claim[0].upper() + claim.claim[1:])}<br><span class="small where">{escape(claim.evidence)}'
        "</span></td></tr>\n"
        for claim in sorted(report.claims, key=lambda claim: claim.holds)
    )
    return f"<h2>What was checked</h2>\n<table><tbody>{rows}</tbody></table>\n"


def _caveats(report: AuditReport) -> str:
    if not report.caveats:
        return ""
    caveats = items(map(escape, report.caveats))
    return f"<h2>What to know: what the guarantee leaves out or assumes</h2>\n<ul>{caveats}</ul>\n"


def _repeat(report: AuditReport) -> str:
    key = "" if report.spending is None else " --public-key YOUR_COPY"
    return (
        "<h2>How to repeat it</h2>\n"
        f"<p><code>python scripts/audit.py {escape(Path(report.run).name)}{key}</code><br>It reads manifests "
        "and ledger only: no data, no weights, no secret, no GPU. Give a copy of the public key that you keep where "
        "nobody who writes runs can change it.</p>\n"
    )


def _relation(relation: str) -> str:
    return "adding or removing it" if relation == "add_or_remove_one" else relation


def _factor(epsilon: float) -> str:
    return f"{math.exp(epsilon):,.3g}" if epsilon < 7 else f"10<sup>{epsilon / math.log(10):.1f}</sup>"
