"""Findings to verdicts: which of them are one thing, what the policy says of it, what of the record is acted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from privacy.pii.findings import Box, Finding
from privacy.pii.policy import Policy
from privacy.pii.pseudonyms import Pseudonyms

Seen = TypeVar("Seen", Finding, Box)

_SAME_BOX = 0.5  # two boxes of an entity are one where they share this much of the smaller


@dataclass(frozen=True)
class Verdict(Generic[Seen]):
    """Findings that overlap, as one: the one that leads gives entity and action."""

    leader: Seen
    action: str
    certain: bool
    group: list[Seen]


def judge(
    found: Sequence[Seen],
    policy: Policy,
    action: Callable[[str], str],
    grouped: Callable[[Sequence[Seen]], list[list[Seen]]],
) -> list[Verdict[Seen]]:
    """What becomes of findings, group by group, without those that are kept or not `possible`.

    A group is uncertain where none of it is certain. Of the certain ones the strictest action stands, then the longest.
    """
    verdicts: list[Verdict[Seen]] = []
    strictness = {"drop": 2, "quarantine": 1}
    for group in grouped(
        [one for one in found if action(one.entity) != "keep" and one.score >= policy.threshold(one.entity).possible]
    ):
        certain = [
            one for one in group if policy.uncertain == "act" or one.score >= policy.threshold(one.entity).certain
        ]
        if certain:
            leader = max(certain, key=lambda one: (strictness.get(action(one.entity), 0), _size(one), one.score))
            verdicts.append(Verdict(leader, action(leader.entity), True, group))
        else:
            verdicts.append(Verdict(max(group, key=lambda one: one.score), policy.uncertain, False, group))
    return verdicts


def _size(one: Finding | Box) -> int:
    if isinstance(one, Finding):
        return one.end - one.start
    return (one.right - one.left) * (one.bottom - one.top)


def overlapping(found: Sequence[Finding]) -> list[list[Finding]]:
    """Findings in order, those that share characters, by themselves or through others, together."""
    groups: list[list[Finding]] = []
    end = 0
    for finding in sorted(found, key=lambda finding: (finding.start, finding.end)):
        if groups and finding.start < end:
            groups[-1].append(finding)
        else:
            groups.append([finding])
        end = max(end, finding.end)
    return groups


def sharing_pixels(found: Sequence[Box]) -> list[list[Box]]:
    """Boxes of one entity that share much of their pixels together: one thing, found twice."""
    groups: list[list[Box]] = []
    for box in found:
        same = [group for group in groups if any(_shared(box, other) >= _SAME_BOX for other in group)]
        groups = [group for group in groups if group not in same] + [[*(b for group in same for b in group), box]]
    return groups


def _shared(one: Box, other: Box) -> float:
    """The part of the smaller box that lies in the larger; 0 where they are of two entities."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    if one.entity != other.entity or width <= 0 or height <= 0:
        return 0.0
    return width * height / min(_size(one), _size(other))


def rewrite(text: str, verdicts: Sequence[Verdict[Finding]], pseudonyms: Pseudonyms | None) -> tuple[str, str]:
    """The text with every group of findings replaced, and the same with spaces for the replacements."""
    rewritten: list[str] = []
    theirs: list[str] = []
    done = 0
    for verdict in verdicts:
        leader = verdict.leader
        start, end = verdict.group[0].start, max(finding.end for finding in verdict.group)
        if verdict.action == "pseudonymise":
            assert pseudonyms is not None  # check_tools
            ours = pseudonyms.name(leader.entity, text[leader.start : leader.end])
        elif verdict.action == "redact":
            ours = ""
            if text[end : end + 1] == " " and text[max(start - 1, 0) : start] in ("", " "):
                end += 1  # else two spaces would stand side by side
        else:
            ours = f"[{leader.entity.upper()}]"
        rewritten += (text[done:start], ours)
        theirs += (text[done:start], " " * len(ours))
        done = end
    return "".join((*rewritten, text[done:])), "".join((*theirs, text[done:]))


def around(verdict: Verdict[Box]) -> Box:
    """The smallest box around a group, in its leader's name."""
    group, leader = verdict.group, verdict.leader
    edges = (
        min(b.left for b in group),
        min(b.top for b in group),
        max(b.right for b in group),
        max(b.bottom for b in group),
    )
    return Box(leader.entity, *edges, leader.detector, leader.version, leader.score)


def within(box: Box, filled: Box, margin: float) -> bool:
    """Whether a box, or the middle half of a face's, shows nothing but paint: hair around paint is found as a face."""
    part = 0.25 if box.entity == "face" else 0.0
    across, down = part * (box.right - box.left), part * (box.bottom - box.top)
    by = margin * max(filled.right - filled.left, filled.bottom - filled.top)
    return (
        box.left + across >= filled.left - by
        and box.top + down >= filled.top - by
        and box.right - across <= filled.right + by
        and box.bottom - down <= filled.bottom + by
    )
