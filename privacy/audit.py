"""The audit of a run folder: what its ledger spent, recomputed from nothing else, and whether its manifests agree.

What is read was written by the run; what is concluded rests on the ledger's chain, the hashes in the manifests and the
accountant. No weights, no data and no secret are needed, and torch is not loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from privacy import accounting
from privacy.ledger import LedgerError, LedgerView, StageTally, read_ledger

# Two machines' FFTs may differ in the last digits of one epsilon; more than this is another number.
SAME_EPSILON = 1e-6

CAVEATS: tuple[str, ...] = (
    "The number of records is treated as public.",
    "Hyper-parameters chosen by the user are assumed to come from public data.",
    "Whoever can write the whole run folder can write a consistent false one: keep the ledger head elsewhere too.",
)


class UnreadableRunError(ValueError):
    """The folder is no run, or a file an audit needs cannot be read at all."""


@dataclass(frozen=True)
class Claim:
    """One thing the run says of itself, whether it holds, and what was seen."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Spending:
    """What one ledger says was spent, all of its charges together."""

    ledger: str
    ledger_id: str
    head: str
    unit: str
    relation: str
    dataset_root: str
    dataset_cap: float | None
    delta: float
    epsilon: float
    accountant: str
    epsilon_by_rdp: float
    cross_check: str
    charges: int
    wasted: int  # charged and never done: they count
    replayed: int  # charges beyond a step's first: they count


@dataclass
class AuditReport:
    """The verdict on a run folder. `exit_code` is 0 where every claim holds and 1 where one is false."""

    run: str
    spending: Spending | None = None
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

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Add a claim that was looked into."""
        self.claims.append(Claim(claim, holds, evidence))


@dataclass(frozen=True)
class Manifest:
    """A finished stage's manifest and where it lies."""

    path: Path
    stage: str
    content: dict[str, Any]

    def section(self, *keys: str) -> dict[str, Any]:
        """The mapping under these keys; empty where there is none."""
        value = self.content
        for key in keys:
            inner = value.get(key)
            value = cast(dict[str, Any], inner) if isinstance(inner, dict) else {}
        return value


def audit_run(run_dir: Path) -> AuditReport:
    """Audit a run folder, finished or not; UnreadableRunError where there is nothing that can be audited."""
    manifests = _read_manifests(run_dir)
    own_ledger = run_dir / "ledger.jsonl"
    if not manifests and not own_ledger.exists():
        raise UnreadableRunError(
            f"{run_dir} holds neither a stage's manifest.json nor a ledger.jsonl: name a run folder"
        )
    report = AuditReport(str(run_dir))
    _check_inputs(report, run_dir, manifests)
    private = [manifest for manifest in manifests if manifest.section("ledger")]
    _check_private_stages_have_ledgers(report, manifests)
    ledgers = {_ledger_path(run_dir, str(manifest.section("ledger").get("path"))) for manifest in private}
    if own_ledger.exists():
        ledgers.add(own_ledger.resolve())
    if len(ledgers) > 1:
        names = ", ".join(sorted(str(path) for path in ledgers))
        report.check("one ledger holds all that the run spent", False, f"there are {len(ledgers)}: {names}")
    elif ledgers:
        _audit_ledger(report, ledgers.pop(), manifests, private)
    report.caveats += _caveats(report)
    return report


def _ledger_path(run_dir: Path, recorded: str) -> Path:
    """Where a recorded ledger lies now: runs are moved, so the path counts from the run folder, then by name within it.

    Which file it is decides nothing by itself: the head that the manifest recorded must lie in its chain.
    """
    places = [run_dir / recorded, Path(recorded), run_dir / Path(recorded).name]
    return next((place for place in places if place.is_file()), places[0]).resolve()


def _audit_ledger(report: AuditReport, path: Path, manifests: list[Manifest], private: list[Manifest]) -> None:
    heads = [str(manifest.section("ledger").get("head")) for manifest in private]
    try:
        view = read_ledger(path, heads)
    except LedgerError as error:
        report.check("the ledger is there and its chain is whole", False, str(error))
        return
    torn = f", then {view.torn_bytes} bytes of a torn last line that nobody acted on" if view.torn_bytes else ""
    report.check(
        "the ledger is there and its chain is whole",
        True,
        f"{path.name}: {view.num_records} records, {view.num_charges} charges{torn}",
    )
    try:
        spending = report.spending = _spending(path, view)
    except ValueError as error:  # the chain is whole, but its charges are beyond the accountant
        report.check("what was charged can be bounded", False, str(error))
        return
    cap = spending.dataset_cap
    if cap is not None:
        evidence = f"epsilon {spending.epsilon:.4g} of {cap:g}"
        report.check("the data set's cap is kept", spending.epsilon <= cap * (1 + SAME_EPSILON), evidence)
    for manifest in private:
        _check_stage(report, view, manifest)
        _check_dataset(report, view, manifest, manifests)
    report.caveats += _plan_caveats(view)


def _spending(path: Path, view: LedgerView) -> Spending:
    opening = view.opening
    return Spending(
        ledger=str(path),
        ledger_id=opening["ledger_id"],
        head=view.head,
        unit=opening["unit"],
        relation=opening["relation"],
        dataset_root=opening["dataset_root"],
        dataset_cap=opening["dataset_cap"],
        delta=opening["delta"],
        epsilon=accounting.epsilon(view.counts, opening["delta"]),
        accountant=accounting.describe("pld"),
        epsilon_by_rdp=accounting.epsilon(view.counts, opening["delta"], "rdp"),
        cross_check=accounting.describe("rdp"),
        charges=view.num_charges,
        wasted=len(view.unfinished),
        replayed=view.num_charges - sum(len(tally.attempts) for tally in view.stages.values()),
    )


def _check_stage(report: AuditReport, view: LedgerView, manifest: Manifest) -> None:
    """What one private stage's manifest says, against the ledger."""
    stage, ledger, metrics = manifest.stage, manifest.section("ledger"), manifest.section("metrics")
    label = str(ledger.get("stage"))  # the stage's name in the ledger, which runs may share
    plan = view.plans.get(label)
    planned, stated = (plan or {}).get("config_sha256"), manifest.content.get("config_sha256")
    report.check(
        f"{stage} ran the configuration it planned in the ledger",
        planned is not None and planned == stated,
        f"planned {_short(planned)}, manifest {_short(stated)}",
    )
    counts = view.heads.get(str(ledger.get("head")))
    report.check(
        f"the ledger head that {stage} recorded lies in the chain",
        counts is not None and counts.total() == ledger.get("charges"),
        f"head {_short(ledger.get('head'))} "
        + ("is not there" if counts is None else f"after {counts.total()} charges; recorded {ledger.get('charges')}"),
    )
    _check_steps(report, view.stages.get(label, StageTally()), stage, metrics.get("steps"))
    _check_stated_epsilon(report, stage, metrics, view, counts)


def _check_steps(report: AuditReport, tally: StageTally, stage: str, steps: object) -> None:
    if not isinstance(steps, int):
        report.check(f"every step of {stage} was charged and done", False, f"its manifest says {steps!r} steps")
        return
    uncharged = [step for step in range(steps) if step not in tally.attempts]
    undone = [step for step in range(steps) if step not in tally.finished]
    beyond = sum(step >= steps for step in tally.attempts)
    report.check(
        f"every step of {stage} was charged and done",
        not uncharged and not undone and not beyond,
        f"{steps} steps: {len(uncharged)} not charged{_first(uncharged)}, {len(undone)} not done{_first(undone)}, "
        f"{beyond} charged beyond the last",
    )


def _check_stated_epsilon(
    report: AuditReport, stage: str, metrics: Mapping[str, Any], view: LedgerView, counts: Mapping[str, int] | None
) -> None:
    claim = f"{stage} states no less epsilon than its charges cost, and kept its target"
    delta, stated, target = (_number(metrics.get(name)) for name in ("delta", "epsilon", "target_epsilon"))
    if delta is None or stated is None or target is None or counts is None:
        report.check(claim, False, f"the manifest says epsilon {stated} of target {target} at delta {delta}")
        return
    cost = accounting.epsilon(counts, view.opening["delta"])
    report.check(
        claim,
        delta == view.opening["delta"] and cost <= min(stated, target) * (1 + SAME_EPSILON),
        f"recomputed {cost:.6g} at delta {view.opening['delta']:g}; stated {stated:.6g} of {target:g} at {delta:g}",
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _check_dataset(report: AuditReport, view: LedgerView, manifest: Manifest, manifests: list[Manifest]) -> None:
    """The root of the split that the stage trained on, by the manifest of who wrote it, is the one charged."""
    config = manifest.section("config")
    source, split = config.get("data_from"), config.get("split", "private")
    written = next((m.section("metrics", "splits", split).get("root") for m in manifests if m.stage == source), None)
    charged = view.opening["dataset_root"]
    report.check(
        f"the ledger is for the data that {manifest.stage} trained on",
        written == charged,
        f"ledger {_short(charged)}, {split} split of {source} {_short(written)}",
    )


def _check_inputs(report: AuditReport, run_dir: Path, manifests: list[Manifest]) -> None:
    """Each manifest names the manifests it was made from by their SHA-256."""
    digests = {manifest.stage: hashlib.sha256(manifest.path.read_bytes()).hexdigest() for manifest in manifests}
    wrong = [
        f"{manifest.stage} was made from another {source}"
        for manifest in manifests
        for source, digest in manifest.section("inputs").items()
        if digests.get(source) != digest
    ]
    number = sum(len(manifest.section("inputs")) for manifest in manifests)
    evidence = "; ".join(wrong) or f"{number} links between {len(manifests)} manifests in {run_dir.name}"
    report.check("every stage was made from the manifests that lie here", not wrong, evidence)


def _check_private_stages_have_ledgers(report: AuditReport, manifests: list[Manifest]) -> None:
    silent = [m.stage for m in manifests if m.content.get("kind") == "finetune_dp" and not m.section("ledger")]
    if silent:
        report.check("every private stage names its ledger", False, f"{', '.join(silent)} names none")


def _caveats(report: AuditReport) -> list[str]:
    """What the guarantee leaves out, in plain words."""
    spent = report.spending
    if spent is None:
        return []
    caveats = list(CAVEATS)
    if spent.wasted:
        caveats.append(f"Charges never followed by a finished step: {spent.wasted}. They are counted.")
    if spent.replayed:
        caveats.append(
            f"Charges for replays: {spent.replayed}, each with a draw and noise of its own. They are counted."
        )
    return caveats


def _plan_caveats(view: LedgerView) -> list[str]:
    """What the stages planned to do outside the guarantee, by the ledger's own word."""
    caveats: list[str] = []
    for stage, plan in view.plans.items():
        if plan.get("secure_noise") is False:
            caveats.append(f"{stage} drew its noise from Philox, which is no cryptographic generator.")
        if plan.get("operator_metrics") is True:
            caveats.append(f"{stage} showed operator-only metrics of private data, outside the guarantee.")
    return caveats


def _read_manifests(run_dir: Path) -> list[Manifest]:
    try:
        return [_read_manifest(path) for path in sorted(run_dir.resolve(strict=True).glob("*/manifest.json"))]
    except OSError as error:
        raise UnreadableRunError(f"{error.filename or run_dir} cannot be read: {error.strerror}") from error


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != 1:
            raise UnreadableRunError(f"{path} has format {content['format']!r}: this version reads 1")
        return Manifest(path, path.parent.name, content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UnreadableRunError):
            raise
        raise UnreadableRunError(f"{path} is no manifest of format 1: restore it or run the stage again") from error


def _short(digest: object) -> str:
    if not isinstance(digest, str):
        return "nothing"
    algorithm, _, value = digest.rpartition(":")
    return f"{algorithm}:{value[:12]}" if algorithm else value[:12]


def _first(steps: list[int]) -> str:
    return f" (first: {steps[0]})" if steps else ""
