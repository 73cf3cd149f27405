"""What a run says of itself, held against its ledger: one claim each, with what was seen.

A claim is a sentence that is true of an honest run. The ledger was read and verified before (`privacy.ledger`); here
the manifests, the checkpoints and the auditor's own key are compared with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from privacy import accounting
from privacy.audit.charges import Charges, StageCharges
from privacy.audit.evidence import Manifest, PaidCheckpoint, RunEvidence, UnreadableRunError, identity_sha256
from privacy.ledger import LedgerView, StageTally
from privacy.pii.latent_manifests import LatentManifest
from privacy.pii.manifests import OUTCOMES, ManifestError, verify_manifests, verify_shards

# Two machines' FFTs may differ in the last digits of one epsilon; more than this is another number.
SAME_EPSILON = 1e-6

# Where a configuration states the promise, and the name under which the ledger's plan or its opening repeats it.
PROMISE_IN_PLAN = {
    "train.steps": "steps",
    "train.batch_size": "expected_batch_size",
    "privacy.target_epsilon": "target_epsilon",
    "privacy.max_grad_norm": "max_grad_norm",
    "privacy.loss_bound": "loss_bound",
    "privacy.loss_share": "loss_share",
    "privacy.sampling.method": "sampling",
    "privacy.sampling.max_batch_size": "max_batch_size",
    "privacy.sampling.cycle": "cycle",
    "privacy.bands": "bands",
    "privacy.secure_noise": "secure_noise",
    "privacy.operator_metrics": "operator_metrics",
}
PROMISE_IN_OPENING = {"privacy.delta": "delta", "privacy.unit": "unit", "privacy.dataset_cap": "dataset_cap"}


@dataclass(frozen=True)
class Claim:
    """One thing the run says of itself, whether it holds, and what was seen."""

    claim: str
    holds: bool
    evidence: str


def link_claims(evidence: RunEvidence) -> list[Claim]:
    """What the manifests say of each other, before any ledger is read."""
    digests = {m.stage: hashlib.sha256(m.path.read_bytes()).hexdigest() for m in evidence.manifests}
    links = [(m.stage, source, digest) for m in evidence.manifests for source, digest in m.section("inputs").items()]
    wrong = [f"{stage} was made from another {source}" for stage, source, sha in links if digests.get(source) != sha]
    seen = "; ".join(wrong) or f"{len(links)} links between {len(digests)} manifests, each by SHA-256"
    claims = [Claim("every stage was made from the manifests that lie here", not wrong, seen)]
    silent = [m.stage for m in evidence.manifests if m.is_private and not m.section("ledger")]
    if silent:
        claims.append(Claim("every private stage names its ledger", False, f"{', '.join(silent)} names none"))
    if evidence.damaged:
        claims.append(Claim("every checkpoint's manifest can be read", False, "; ".join(evidence.damaged)))
    return claims


def filter_claims(evidence: RunEvidence, *, shards: bool) -> list[Claim]:
    """What each filter stage says of its shards, against their manifests and, where they lie here, every byte of them.

    A stage of an older run names no Merkle root, and then there is nothing to claim.
    """
    claims: list[Claim] = []
    for manifest in evidence.manifests:
        root = manifest.section("metrics").get("shards_root")
        if isinstance(root, str) and manifest.content.get("kind") != LatentManifest.KIND:
            claim = f"the shards of {manifest.stage} are those that its Merkle root binds"
            claims.append(judged(claim, lambda one=manifest, root=root: _verify_shards(one, root, read=shards)))
    return claims


def judged(claim: str, verify: Callable[[], str]) -> Claim:
    """The claim with what `verify` has seen, false where it raises ManifestError; UnreadableRunError where there is a
    file that cannot be read.
    """
    try:
        return Claim(claim, True, verify())
    except ManifestError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise UnreadableRunError(str(error)) from error
        return Claim(claim, False, str(error))


def _verify_shards(manifest: Manifest, root: str, *, read: bool) -> str:
    """What was seen; ManifestError where the shards, their manifests, the root and the splits' roots do not agree."""
    folder = manifest.path.parent
    found = verify_manifests(folder, root)
    seen = f"root {short(root)} recomputed from {len(found)} shard manifests"
    splits = manifest.section("metrics", "splits")
    if set(splits) != {one.split for one in found}:
        raise ManifestError(f"{manifest.path} names splits {', '.join(splits)}, and its shard manifests name others")
    for split in splits:
        stated = manifest.section("metrics", "splits", split)
        for outcome in ("in", *OUTCOMES):
            counted = sum(one.counts[outcome] for one in found if one.split == split)
            if stated.get(outcome) != counted:
                raise ManifestError(
                    f"{manifest.path} says {stated.get(outcome)} records of {split} {outcome}, and its shard "
                    f"manifests add up to {counted}"
                )
    if not read or not any(folder.glob("[!.]*/*.tar")):
        return f"{seen}; the shards were not read" + (": they are not here" if read else "")
    for split, records in verify_shards(folder, found).items():
        stated = manifest.section("metrics", "splits", split).get("root")
        if records != stated:
            raise ManifestError(f"the records of split {split} have root {records}, and {manifest.path} names {stated}")
    kept = sum(one.counts["kept"] for one in found)
    return f"{seen}, and from every byte of the {kept:,} records in them"


def ledger_claims(view: LedgerView, evidence: RunEvidence, pinned: str | None, every_signature: bool) -> list[Claim]:
    """What reading the whole ledger has shown: its chain, its signatures, its order."""
    torn = f", then {view.torn_bytes} bytes of a torn last line that nobody acted on" if view.torn_bytes else ""
    verified = "every signature" if every_signature else "the last signature, which covers all lines before it"
    changes = len(view.public_keys) - 1
    rotated = f" and {changes} signed change{'s' if changes > 1 else ''} of key" if changes else ""
    return [
        Claim(
            "the ledger is whole: no line was changed, removed, moved or added by another hand",
            True,
            f"{view.path.name}: {view.num_records} records chained by SHA-256{torn}; verified {verified}{rotated}",
        ),
        _key_claim(view, evidence, pinned),
        Claim(
            "no noise was used twice",
            True,
            f"{view.num_charges} charges: no two have the same stage, step and attempt, and none was finished twice",
        ),
        Claim(
            "no process charged after another had replaced it",
            True,
            f"the fencing epoch never falls from one charge to the next, and ends at {view.fencing_epoch}",
        ),
    ]


def _key_claim(view: LedgerView, evidence: RunEvidence, pinned: str | None) -> Claim:
    named = {m.stage: m.section("ledger").get("public_key") for m in evidence.private}
    if pinned is not None:
        named["the auditor"] = pinned
    strange = [f"{who} names {short(key)}" for who, key in named.items() if key not in view.public_keys]
    keys = ", then ".join(short(key) for key in view.public_keys)
    expected = "; ".join(strange) or f"named by {', '.join(named) or 'nobody: the run has no finished private stage'}"
    return Claim(
        "the ledger was signed by the key that is expected",
        not strange,
        f"signed by {keys}; {expected}" + ("; the ledger was written by another key" if strange else ""),
    )


def checkpoint_claims(view: LedgerView, charges: Charges, evidence: RunEvidence) -> list[Claim]:
    """Nothing was saved before it was paid for: each checkpoint's head is in the chain, after all of its steps."""
    claims: list[Claim] = []
    for stage in dict.fromkeys(checkpoint.stage for checkpoint in evidence.checkpoints):
        label = evidence.label(stage)
        saved = [checkpoint for checkpoint in evidence.checkpoints if checkpoint.stage == stage]
        wrong = [problem for checkpoint in saved if (problem := _unpaid(view, charges, label, checkpoint)) is not None]
        steps = ", ".join(str(checkpoint.step) for checkpoint in saved)
        seen = "; ".join(wrong) or f"checkpoints at step {steps}: the ledger held every step below when each was saved"
        claims.append(Claim(f"every checkpoint of {stage} was paid for before it was saved", not wrong, seen))
        planned = view.plans.get(label, {}).get("config_sha256")
        other = [checkpoint.folder for checkpoint in saved if checkpoint.config_sha256 != planned]
        if other:
            seen = f"planned {short(planned)}; of another configuration: {', '.join(other)}"
            claims.append(Claim(f"every checkpoint of {stage} is of the configuration it planned", False, seen))
    return claims


def _unpaid(view: LedgerView, charges: Charges, label: str, checkpoint: PaidCheckpoint) -> str | None:
    """Why the ledger does not bear the checkpoint out; None where it does."""
    if checkpoint.head not in charges.done_at:
        lost = _lost(view.stages.get(label, StageTally()), checkpoint.step)
        return f"{checkpoint.folder} names head {short(checkpoint.head)}, which {lost}"
    done = charges.done_at[checkpoint.head].get(label, 0)
    if done < checkpoint.step:
        return f"{checkpoint.folder} holds {checkpoint.step} steps, and step {done} was not charged and done before it"
    return None


def _lost(tally: StageTally, steps: int) -> str:
    """Why a recorded head may be missing, as far as the ledger's own steps tell."""
    known = sum(step < steps for step in tally.finished)
    if known < steps:
        return (
            f"is not in the chain, and the ledger knows {known} of the {steps} steps it paid for: "
            "the ledger's end was cut off, or this is another ledger"
        )
    return f"is not in the chain, though the ledger knows all {steps} steps: one of the two is of another ledger"


def stage_claims(view: LedgerView, charges: Charges, evidence: RunEvidence, manifest: Manifest) -> list[Claim]:
    """What one finished private stage's manifest says, against the ledger."""
    label = evidence.label(manifest.stage)
    plan, tally = view.plans.get(label, {}), view.stages.get(label, StageTally())
    return [
        _config_claim(manifest, plan),
        _promise_claim(view, manifest, plan),
        _head_claim(view, manifest, tally),
        _steps_claim(manifest, tally),
        _epsilon_claim(view, manifest, plan),
        _dataset_claim(view, evidence, manifest),
        *_filtered_claims(plan, evidence, manifest),
        _code_claim(manifest, charges.stages.get(label, StageCharges())),
    ]


def _config_claim(manifest: Manifest, plan: Mapping[str, Any]) -> Claim:
    claim = f"the configuration that {manifest.stage} ran is the one it planned in the ledger"
    planned, stated = plan.get("config_sha256"), manifest.content.get("config_sha256")
    if planned is None or not isinstance(plan.get("operational"), list):
        missing = "no plan of the stage" if planned is None else "no list of its operational keys"
        return Claim(claim, False, f"the ledger holds {missing}, so there is nothing to compare with")
    operational = cast(list[str], plan["operational"])
    recomputed = identity_sha256(manifest.section("config"), operational)
    edited = "" if recomputed == stated else ": the manifest's configuration was edited after the run"
    return Claim(
        claim,
        planned == stated == recomputed,
        f"planned {short(planned)}, manifest {short(stated)}, recomputed {short(recomputed)}{edited}; "
        f"left out as operational: {', '.join(operational) or 'nothing'}",
    )


def _promise_claim(view: LedgerView, manifest: Manifest, plan: Mapping[str, Any]) -> Claim:
    """The promise is the ledger's, key by key: a hash that leaves keys out as operational cannot hide one of these."""
    compared: list[str] = []
    differing: list[str] = []
    for places, word in ((PROMISE_IN_PLAN, plan), (PROMISE_IN_OPENING, view.opening)):
        for dotted, name in places.items():
            *sections, key = dotted.split(".")
            stated = manifest.section("config", *sections).get(key)
            if stated is None or name not in word:  # a cap of null takes the ledger's
                continue
            compared.append(dotted)
            if stated != word[name]:
                differing.append(f"{dotted} is {stated!r}, in the ledger {word[name]!r}")
    return Claim(
        f"the promise in the configuration of {manifest.stage} is the one in the ledger",
        bool(compared) and not differing,
        "; ".join(differing) or f"compared: {', '.join(compared) or 'nothing, for the configuration has none'}",
    )


def _head_claim(view: LedgerView, manifest: Manifest, tally: StageTally) -> Claim:
    recorded, charges = str(manifest.section("ledger").get("head")), manifest.section("ledger").get("charges")
    counts, steps = view.heads.get(recorded), manifest.section("metrics").get("steps")
    if counts is not None:
        seen = f"after {counts.total()} charges; recorded {charges}"
    else:
        seen = _lost(tally, steps) if isinstance(steps, int) else "is not in the chain"
    return Claim(
        f"the ledger head that {manifest.stage} recorded lies in the chain",
        counts is not None and counts.total() == charges,
        f"head {short(recorded)} {seen}",
    )


def _steps_claim(manifest: Manifest, tally: StageTally) -> Claim:
    claim, steps = f"every step of {manifest.stage} was charged and done", manifest.section("metrics").get("steps")
    if not isinstance(steps, int):
        return Claim(claim, False, f"its manifest says {steps!r} steps")
    uncharged = [step for step in range(steps) if step not in tally.attempts]
    undone = [step for step in range(steps) if step not in tally.finished]
    beyond = sum(step >= steps for step in tally.attempts)
    return Claim(
        claim,
        not uncharged and not undone and not beyond,
        f"{steps} steps: {len(uncharged)} not charged{_first(uncharged)}, {len(undone)} not done{_first(undone)}, "
        f"{beyond} charged beyond the last",
    )


def _epsilon_claim(view: LedgerView, manifest: Manifest, plan: Mapping[str, Any]) -> Claim:
    claim = f"the epsilon that {manifest.stage} states is no less than its charges cost, and within its target"
    metrics, delta = manifest.section("metrics"), view.opening["delta"]
    counts = view.heads.get(str(manifest.section("ledger").get("head")))
    given, stated, target = (number(metrics.get(name)) for name in ("delta", "epsilon", "target_epsilon"))
    planned = plan.get("target_epsilon", target)
    if given is None or stated is None or target is None or counts is None:
        missing = "and its head is not in the chain" if counts is None else "where all three are needed"
        seen = f"the manifest says epsilon {stated} of target {target} at delta {given}, {missing}"
        return Claim(claim, False, seen)
    cost = accounting.epsilon(counts, delta)
    return Claim(
        claim,
        given == delta and target == planned and cost <= min(stated, target) * (1 + SAME_EPSILON),
        f"recomputed {cost:.6g} at delta {delta:g}; stated {stated:.6g} of {target:g} at {given:g}"
        + ("" if target == planned else f", and the target planned in the ledger is {planned:g}"),
    )


def _dataset_claim(view: LedgerView, evidence: RunEvidence, manifest: Manifest) -> Claim:
    """The root of the split that the stage trained on, by the manifest of who wrote it, is the one charged."""
    config = manifest.section("config")
    source, split = config.get("data_from"), config.get("split", "private")
    writer = evidence.manifest(source)
    written = None if writer is None else writer.section("metrics", "splits", split).get("root")
    charged = view.opening["dataset_root"]
    return Claim(
        f"the ledger is for the data that {manifest.stage} trained on",
        written == charged,
        f"ledger {short(charged)}, {split} split of {source} {short(written)}",
    )


def _filtered_claims(plan: Mapping[str, Any], evidence: RunEvidence, manifest: Manifest) -> list[Claim]:
    """The Merkle root in plan and checkpoints is that of the stage whose shards were read, of filtered ones or latents;
    nothing where neither names any.
    """
    source = manifest.section("config").get("data_from")
    writer = evidence.manifest(source)
    written = None if writer is None else writer.section("metrics").get("shards_root")
    saved = {
        checkpoint.folder: checkpoint.shards_root
        for checkpoint in evidence.checkpoints
        if checkpoint.stage == manifest.stage
    }
    planned = plan.get("shards_root")
    if not any([planned, *saved.values()]) and (written is None or "shards_root" not in plan):
        return []  # of a stage without one, or before there were any
    wrong = [f"{name} names {short(root)}" for name, root in saved.items() if root != written]
    latents = writer is not None and writer.content.get("kind") == LatentManifest.KIND
    which = "latents" if latents else "filtered shards"
    return [
        Claim(
            f"the ledger and the checkpoints of {manifest.stage} name the {which} it was trained on",
            planned == written and not wrong,
            f"planned {short(planned)}, {source} {short(written)}; "
            + ("; ".join(wrong) or f"{len(saved)} checkpoints name it"),
        )
    ]


def _code_claim(manifest: Manifest, stage: StageCharges) -> Claim:
    stated, charged = manifest.content.get("code_version"), sorted(stage.code_versions)
    return Claim(
        f"the code that finished {manifest.stage} is one it was charged under",
        stated in charged,
        f"manifest {short(stated)}; charges {', '.join(short(version) for version in charged) or 'none'}",
    )


def number(value: object) -> float | None:
    """The value as a float; None where it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def short(digest: object) -> str:
    """A hash as people compare it: its first twelve digits, between what stands before ":" and after "+"."""
    if not isinstance(digest, str):
        return "nothing"
    prefix, _, value = digest.rpartition(":")
    value, plus, mark = value.partition("+")
    return f"{prefix}:{value[:12]}{plus}{mark}" if prefix else f"{value[:12]}{plus}{mark}"


def _first(steps: Sequence[int]) -> str:
    return f" (first: {steps[0]})" if steps else ""
