"""The audit of a run folder: what its ledger spent, recomputed from nothing else, and whether its manifests agree.

What is read was written by the run; what is concluded rests on the ledger's chain and signatures, the hashes in the
manifests, the bytes of filtered shards and latents where they lie, and the accountants. No weights and no secret are
needed, nor the data, and torch is not loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from privacy import accounting
from privacy.accounting import Accountant
from privacy.accounting.tally import Tally
from privacy.audit.charges import Charges, StageCharges, read_charges
from privacy.audit.claims import (
    SAME_EPSILON,
    Claim,
    checkpoint_claims,
    filter_claims,
    ledger_claims,
    link_claims,
    stage_claims,
)
from privacy.audit.evidence import RunEvidence, read_run
from privacy.audit.latents import latent_claims
from privacy.ledger import LedgerError, LedgerView, read_ledger

CURVE_POINTS = 16  # an accountant's query takes a tenth of a second or so
CURVE_EVENTS = 1_000_000  # different events that are counted for the curve, all points together: some ten seconds
AGREEMENT = 0.05  # relative
ATTACKS = ("empirical", "extraction")  # what a stage of kind audit may carry out, by its manifest's name for it
CROSS_CHECKS: tuple[Accountant, ...] = ("rdp", "prv")

STANDING_CAVEATS: tuple[str, ...] = (
    "The number of records is treated as public.",
    "Hyper-parameters chosen by the user are assumed to come from public data.",
    "The guarantee is about the private split as it was filtered and fixed before the ledger opened: what the filter "
    "did to one record is taken not to depend on the others.",
    "How long steps took is outside the guarantee: whoever saw it can tell larger batches from smaller ones.",
)


@dataclass(frozen=True)
class CrossCheck:
    """Another accountant's epsilon for the same charges; None where it cannot bound them, and `note` says why."""

    accountant: str
    epsilon: float | None
    note: str = ""


@dataclass(frozen=True)
class Spending:
    """What one ledger says was spent, all of its charges together."""

    ledger: str
    ledger_id: str
    head: str
    public_key: str
    unit: str
    relation: str
    dataset_root: str
    dataset_cap: float | None
    delta: float
    epsilon: float
    accountant: str
    cross_checks: list[CrossCheck]
    charges: int
    wasted: int  # charged and never done: they count
    replayed: int  # charges beyond a step's first: they count


@dataclass(frozen=True)
class StageSpending:
    """What one stage of one run was charged. Epsilons of stages do not add up: together they cost less."""

    run: str
    stage: str
    own: bool  # of the run folder that was audited
    mechanisms: list[str]
    steps: int  # that were charged at least once
    charges: int
    wasted: int
    replayed: int
    epsilon_alone: float
    code_versions: list[str]


@dataclass
class AuditReport:
    """The verdict on a run folder. `exit_code` is 0 where every claim holds and 1 where one is false."""

    run: str
    spending: Spending | None = None
    stages: list[StageSpending] = field(default_factory=list[StageSpending])
    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])  # charges so far, epsilon
    filtered: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # filter stage -> counts
    configs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # finished stage -> config
    attacks: dict[str, dict[str, Any]] = field(
        default_factory=dict[str, dict[str, Any]]
    )  # carried out, with a `verdict`
    claims: list[Claim] = field(default_factory=list[Claim])
    caveats: list[str] = field(default_factory=list[str])

    @property
    def exit_code(self) -> int:
        """The exit status of scripts/audit.py for this report."""
        return 0 if all(claim.holds for claim in self.claims) else 1

    @property
    def verdict(self) -> str:
        """One sentence for whoever reads nothing else."""
        false = sum(not claim.holds for claim in self.claims)
        if false:
            return f"{false} of {len(self.claims)} claims {'is' if false == 1 else 'are'} false"
        if self.spending is None:
            return "no private stage and no ledger: nothing was spent, and no privacy is promised"
        return f"every claim holds: epsilon {self.spending.epsilon:.4g} at delta {self.spending.delta:g}"

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"verdict": self.verdict, "exit_code": self.exit_code, **asdict(self)}


def audit_run(
    run_dir: Path, *, public_key: str | None = None, every_signature: bool = False, shards: bool = True
) -> AuditReport:
    """Audit a run folder, finished or not; UnreadableRunError where there is nothing that can be audited, or where
    a file that is there cannot be read.

    public_key: hex of the key that the auditor knows from elsewhere; without it, the run's own word is taken.
    every_signature: verify the signature of each record, and not only of the last and of each change of key.
    shards: read every byte of filtered shards and of latents that lie in the run folder; else their manifests alone.
    """
    evidence = read_run(run_dir)
    claims = link_claims(evidence) + filter_claims(evidence, shards=shards) + latent_claims(evidence, shards=shards)
    report = AuditReport(str(run_dir), claims=claims, filtered=_filtered(evidence))
    report.configs = {manifest.stage: manifest.section("config") for manifest in evidence.manifests}
    for manifest in evidence.manifests:
        report.attacks |= {name: found for name in ATTACKS if (found := manifest.section("metrics", name))}
    ledgers = evidence.ledgers()
    if len(ledgers) > 1:
        names = ", ".join(str(path) for path in ledgers)
        report.claims.append(
            Claim("one ledger holds all that the run spent", False, f"there are {len(ledgers)}: {names}")
        )
    elif ledgers:
        _audit_ledger(report, ledgers[0], evidence, public_key, every_signature)
    return report


def _audit_ledger(
    report: AuditReport, path: Path, evidence: RunEvidence, public_key: str | None, every_signature: bool
) -> None:
    try:
        view = read_ledger(path, evidence.heads(), every_signature=every_signature)
    except LedgerError as error:
        claim = "the ledger is whole: no line was changed, removed, moved or added by another hand"
        report.claims.append(Claim(claim, False, str(error)))
        return
    report.claims += ledger_claims(view, evidence, public_key, every_signature)
    charges = read_charges(path, view.num_records, evidence.heads())
    try:
        spending = report.spending = _spending(path, view)
        report.stages = [_stage_spending(label, view, charged, evidence) for label, charged in charges.stages.items()]
        report.curve = _curve(view)
    except ValueError as error:  # the chain is whole, but its charges are beyond the accountant
        report.claims.append(Claim("what was charged can be bounded", False, str(error)))
        return
    cap = spending.dataset_cap
    if cap is not None:
        kept = spending.epsilon <= cap * (1 + SAME_EPSILON)
        report.claims.append(Claim("the data set's cap is kept", kept, f"epsilon {spending.epsilon:.4g} of {cap:g}"))
    report.claims += checkpoint_claims(view, charges, evidence)
    for manifest in evidence.private:
        report.claims += stage_claims(view, charges, evidence, manifest)
    report.caveats = _caveats(report, view, charges, public_key)


# --- what was spent ---


def _spending(path: Path, view: LedgerView) -> Spending:
    opening, delta = view.opening, view.opening["delta"]
    paid = Tally(view.counts).charges()  # once: a stream has as many events as steps
    epsilon = accounting.epsilon(paid, delta)
    if math.isinf(epsilon):
        raise ValueError(f"epsilon is infinite at delta {delta:g}: the charges promise nothing")
    return Spending(
        ledger=str(path),
        ledger_id=opening["ledger_id"],
        head=view.head,
        public_key=view.public_key,
        unit=opening["unit"],
        relation=opening["relation"],
        dataset_root=opening["dataset_root"],
        dataset_cap=opening["dataset_cap"],
        delta=delta,
        epsilon=epsilon,
        accountant=accounting.describe("pld"),
        cross_checks=[_cross_check(paid, delta, accountant) for accountant in CROSS_CHECKS],
        charges=view.num_charges,
        wasted=len(view.unfinished),
        replayed=view.num_charges - sum(len(tally.attempts) for tally in view.stages.values()),
    )


def _cross_check(counts: Mapping[str, int], delta: float, accountant: Accountant) -> CrossCheck:
    name = accounting.describe(accountant)
    try:
        epsilon = accounting.epsilon(counts, delta, accountant)
    except ValueError as error:
        return CrossCheck(name, None, str(error))
    return CrossCheck(name, epsilon) if math.isfinite(epsilon) else CrossCheck(name, None, "its bound is infinite")


def _stage_spending(label: str, view: LedgerView, charged: StageCharges, evidence: RunEvidence) -> StageSpending:
    run, _, stage = label.rpartition("/")
    steps = len(view.stages[label].attempts)
    return StageSpending(
        run=run,
        stage=stage,
        own=label == evidence.label(stage),
        mechanisms=sorted(_describe(*mechanism) for mechanism in charged.mechanisms),
        steps=steps,
        charges=charged.num_charges,
        wasted=charged.wasted,
        replayed=charged.num_charges - steps,
        epsilon_alone=accounting.epsilon(charged.paid, view.opening["delta"]),
        code_versions=sorted(charged.code_versions),
    )


def _curve(view: LedgerView) -> list[tuple[int, float]]:
    """Epsilon after so many charges, at marks spread evenly over the ledger's history; the last is the end."""
    points = max(2, min(CURVE_POINTS, CURVE_EVENTS // max(1, len(view.counts))))
    curve: list[tuple[int, float]] = []
    for mark in view.history:
        if mark.num_charges * points >= view.num_charges * (len(curve) + 1):
            paid = Tally(mark.counts).charges()
            curve.append((mark.num_charges, accounting.epsilon(paid, view.opening["delta"])))
    return curve


def _describe(event: Mapping[str, Any], parted: bool) -> str:
    """A mechanism as a person says it."""
    noise = f"noise multiplier {event['noise_multiplier']:.4g}"
    rate = f"sampling rate {event['sampling_rate']:.4g}" if "sampling_rate" in event else ""
    match event["mechanism"]:
        case "gaussian":
            return f"Gaussian over {'one part of a partition' if parted else 'all records'}, not amplified, {noise}"
        case "poisson_sampled_gaussian":
            return f"{'cyclic ' if parted else ''}Poisson-sampled Gaussian, {rate}, {noise}"
        case "truncated_poisson_sampled_gaussian":
            return f"truncated Poisson-sampled Gaussian, {rate}, at most {event['max_batch_size']} records, {noise}"
        case mechanism:
            return f"{mechanism}, {noise}"


def _filtered(evidence: RunEvidence) -> dict[str, dict[str, Any]]:
    """What each filter stage's manifest counts: records by outcome, findings by kind. None of it is a value."""
    counted = ("splits", "entities", "metadata", "reasons")
    return {
        manifest.stage: {name: manifest.section("metrics", name) for name in counted}
        for manifest in evidence.manifests
        if manifest.content.get("kind") == "filter"
    }


# --- what to know ---


def _caveats(report: AuditReport, view: LedgerView, charges: Charges, public_key: str | None) -> list[str]:
    """What the guarantee leaves out, in plain words."""
    caveats = [*STANDING_CAVEATS, _key_caveat(view, public_key), *_accountant_caveats(report)]
    if report.filtered:
        caveats.append("The filter's counts were taken from the data without noise: they are outside the guarantee.")
    if any(counts["reasons"].get("duplicate") for counts in report.filtered.values()):
        caveats.append("Near-duplicates were left out by comparing records: the guarantee is about those that stayed.")
    spent = report.spending
    assert spent is not None
    if spent.wasted:
        caveats.append(f"Charges never followed by a finished step: {spent.wasted}. They are counted.")
    if spent.replayed:
        caveats.append(f"Charges for replays: {spent.replayed}, each with noise of its own. They are counted.")
    if spent.unit != "record":
        caveats.append(f"The guarantee protects one {spent.unit}, that is all of its records together.")
    caveats += _event_caveats(charges)
    for label, plan in view.plans.items():
        caveats += _plan_caveats(label, plan, spent.delta)
    for stage in report.stages:
        caveats += _code_caveats(stage)
    return caveats


def _key_caveat(view: LedgerView, public_key: str | None) -> str:
    key = view.public_key
    if public_key is not None:
        return f"The ledger was held against the public key {public_key[:12]}.. that the auditor gave: keep it safe."
    return (
        "No public key was given to this audit, so the signatures show only that one hand wrote ledger and manifests: "
        f"compare the key with one kept elsewhere (now {key[:12]}..), or whoever can write the whole run folder can "
        "write a consistent false one."
    )


def _accountant_caveats(report: AuditReport) -> list[str]:
    """Where an independent accountant cannot look, or says something else than the one the figure comes from."""
    spent = report.spending
    assert spent is not None
    caveats: list[str] = []
    for check in spent.cross_checks:
        if check.epsilon is None:
            caveats.append(f"No second opinion from {check.accountant}: {check.note}")
        elif check.epsilon < spent.epsilon * (1 - AGREEMENT):
            caveats.append(
                f"The figure stated is larger than need be: {check.accountant} proves epsilon {check.epsilon:.4g}."
            )
    return caveats


def _event_caveats(charges: Charges) -> list[str]:
    """What the charged mechanisms mean for who is protected, and against what."""
    kinds = {(event["mechanism"], parted) for stage in charges.stages.values() for event, parted in stage.mechanisms}
    caveats: list[str] = []
    if ("gaussian", True) in kinds:
        caveats.append(
            "Batches were shuffled, not drawn at random for each step: the charges count no amplification by sampling."
        )
    if any(parted for _, parted in kinds):
        caveats.append(
            "Records were read by fixed places (a cycle, a stream or a shuffle): neighbouring data sets differ by "
            "emptying one record's place, and each record pays only for the part it lies in."
        )
    if any(mechanism == "truncated_poisson_sampled_gaussian" for mechanism, _ in kinds):
        caveats.append("Batches had a largest size and larger draws were cut: accounted as truncated Poisson sampling.")
    return caveats


def _plan_caveats(label: str, plan: Mapping[str, Any], delta: float) -> list[str]:
    """What a stage planned to do outside the guarantee, by the ledger's own word."""
    caveats: list[str] = []
    if plan.get("secure_noise") is False:
        caveats.append(f"{label} drew its noise from Philox, which is no cryptographic generator.")
    if plan.get("operator_metrics") is True:
        caveats.append(f"{label} showed operator-only metrics of private data, outside the guarantee.")
    bands, cap = plan.get("bands"), plan.get("max_records")
    if isinstance(bands, int) and bands > 1:
        caveats.append(
            f"{label} used noise correlated over {bands} steps (DP-BandMF): its charges hold because no unit is read "
            f"twice within so many steps, which a cycle of {plan.get('cycle')} parts sees to."
        )
    if isinstance(cap, int) and cap > 1:
        caveats.append(f"{label} read at most {cap} records of one unit in a step; all of them together count as one.")
    units = plan.get("num_units")
    if isinstance(units, int) and (warning := accounting.delta_warning(delta, units)) is not None:
        caveats.append(f"{label}: {warning}.")
    return caveats


def _code_caveats(stage: StageSpending) -> list[str]:
    name = f"{stage.run}/{stage.stage}" if stage.run else stage.stage
    caveats: list[str] = []
    if len(stage.code_versions) > 1:
        caveats.append(f"{name} was charged by {len(stage.code_versions)} versions of the code.")
    if any(version.endswith("+dirty") for version in stage.code_versions):
        caveats.append(f"{name} ran code with changes that no version names (+dirty): it cannot be read again.")
    return caveats
