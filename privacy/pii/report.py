"""A filter stage's run as a page for people: what was found, what was done, and what none of it proves.

The reader signs for the data and did not write the code. The page is made from the stage's metrics, which hold counts
and no value, and from its policy; what it shows of records is invented (`report_samples`). No time is in it: the same
metrics, policy and detectors make the same page.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, cast

from privacy.pages import document, items, write_whole
from privacy.pii.filter import Tools
from privacy.pii.policy import IMAGE_DETECTORS, TEXT_DETECTORS, Policy
from privacy.pii.report_samples import Sample, make_samples

HTML_FILE = "report.html"
_OUTCOMES = ("kept", "dropped", "quarantined")

_PLACES = {"captions": "caption", "images": "image", "svg": "drawing (SVG)"}
_ACTIONS = {
    "fill": "covered: [NAME OF THE ENTITY] in a text, a flat colour in an image",
    "redact": "cut out",
    "blur": "blurred",
    "pseudonymise": "replaced by a pseudonym",
    "drop": "record dropped",
    "quarantine": "record quarantined",
    "keep": "left as it is",
}
_REASONS = {
    "duplicate": "near another record of its split that was kept, by image and caption together",
    "detector_failed": "a detector failed on it, so that nobody can say what it holds",
    "caption_too_long": "its caption is longer than the policy reads",
    "undecodable": "its image does not decode",
    "not_covered": "what was found in its image could not be covered",
    "crashed": "decoding or detecting it killed the process, twice and alone",
    "timed_out": "decoding or detecting it did not end in time, twice and alone",
}
_BY_POLICY = (
    ("still_shows_", "after acting a detector still found: {}"),
    ("uncertain_", "perhaps holds: {} (within the uncertain band)"),
    ("holds_", "holds: {}, for which the policy ends a record"),
)
_LEFT_OUT = "svg:left_out:"
_DUPLICATES = {
    "records": "compared",
    "groups": "groups of near ones",
    "dropped": "left out",
    "dropped_exact": "of them the same bytes and words",
    "largest_group": "records in the largest group",
    "same_image_other_caption": "kept: same image, other words",
    "small": "too small to tell but by their bytes",
    "undecoded": "told by their bytes: no decoded image",
}
_NOT_PROVEN = (
    "That nothing personal is left. Detectors miss: how much, by entity, language and size, is measured by "
    "<code>scripts/bench.py pii</code> and the stage <code>eval_pii</code>, on planted data, not on this.",
    "That what was found was personal. Counts include false alarms.",
    "That nobody is recognisable. A face is found by its features, and a person also by place, clothes, company or a "
    "rare fact; the detectors named below look for none of these.",
    "That pseudonyms hide who is who. The same value has the same pseudonym everywhere: records of one person stay "
    "linked, and who holds the key and guesses a value can check the guess.",
    "Any limit on what a model trained on this reveals: that is for differential privacy and its ledger. These counts "
    "were taken from the data without noise, and lie outside that guarantee.",
    "That the input was complete or lawful to use. The page is about what went in.",
)


class _Finding(NamedTuple):
    place: str
    entity: str
    by: str  # detector or action
    times: int


def write_filter_report(folder: Path, stage: str, metrics: Mapping[str, Any], policy: Policy, tools: Tools) -> Path:
    """Write report.html of the filter stage `stage` into its folder, whole or not at all; returns where it is.

    metrics: what `train.filtering.filter_shards` returns. tools: open for `policy`; they filter the invented samples.
    """
    path = folder / HTML_FILE
    write_whole(path, render(stage, metrics, policy, make_samples(policy, tools)))
    return path


def render(stage: str, metrics: Mapping[str, Any], policy: Policy, samples: Sequence[Sample]) -> str:
    """The run as one self-contained HTML page."""
    splits: Mapping[str, Mapping[str, Any]] = metrics["splits"]
    num_in = sum(split["in"] for split in splits.values())
    body = (
        _heading(stage, splits)
        + _balance(splits)
        + _found(metrics, policy, num_in)
        + _acted(metrics)
        + _reasons(metrics, num_in)
        + _duplicates(metrics)
        + _samples(samples)
        + _policy(metrics, policy)
        + f"<h2>What this does not prove</h2>\n<ul>{items(_NOT_PROVEN)}</ul>\n"
        + _identity(metrics)
    )
    return document(f"What the filter did: {stage}", f"<main>\n{body}</main>\n")


# --- the parts of the page ---


def _heading(stage: str, splits: Mapping[str, Mapping[str, Any]]) -> str:
    total = {name: sum(split[name] for split in splits.values()) for name in ("in", *_OUTCOMES)}
    adds_up = all(split["in"] == sum(split[name] for name in _OUTCOMES) for split in splits.values())
    mark = "✓ Every record is accounted for" if adds_up else "✗ FALSE: the outcomes do not add up to the records"
    told = "; ".join(f"{total[name]:,} {name}" for name in _OUTCOMES)
    kind = "verdict" if adds_up else "verdict false"
    return (
        f"<h1>What the filter did: {escape(stage)}</h1>\n"
        '<p class="where">Counts of one run. No value of the data is on this page; its examples are invented.</p>\n'
        f'<div class="{kind}">{mark}: {total["in"]:,} in; {told}</div>\n'
    )


def _balance(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            escape(name),
            *(f"{split[key]:,}" for key in ("in", *_OUTCOMES)),
            f"{split['kept'] / max(split['in'], 1):.1%}",
            _stacked([split[outcome] for outcome in _OUTCOMES], split["in"]),
        )
        for name, split in splits.items()
    ]
    head = (
        "split",
        "#in",
        "#kept",
        "#dropped",
        "#quarantined",
        "#share kept",
        "|kept, dropped, quarantined",
    )
    return (
        "<h2>Balance sheet</h2>\n"
        + _table("Records by split: in = kept + dropped + quarantined", head, rows)
        + '<p class="small">Dropped: by the policy, or as a copy. Quarantined: damaged, or set aside by the policy. '
        "Neither is in the output; both are listed by key and reason in quarantine.jsonl.</p>\n"
    )


def _found(metrics: Mapping[str, Any], policy: Policy, num_in: int) -> str:
    found = _split_names(metrics["found_by"])
    drawings = Counter[str]()
    for one in found:
        if one.place == "svg":
            drawings[one.entity] += one.times
    columns = (metrics["entities"], metrics["boxes"], drawings)
    total = {entity: sum(column.get(entity, 0) for column in columns) for column in columns for entity in column}
    by_entity = [
        (
            escape(entity),
            *(f"{column.get(entity, 0):,}" for column in columns),
            f"{1000 * times / max(num_in, 1):.2f}",
            _does(entity, metrics, policy),
            _bar(times, max(total.values())),
        )
        for entity, times in sorted(total.items(), key=lambda counted: -counted[1])
        if times
    ]
    head = (
        "entity",
        "#in captions",
        "#in images",
        "#in drawings",
        "#per 1,000 records",
        "the policy does",
        "|how often",
    )
    absent = ", ".join(escape(entity) for entity, times in total.items() if not times)
    return (
        "<h2>What was found</h2>\n"
        + _table(
            "By entity; of captions and images what several detectors found in one place counts once", head, by_entity
        )
        + _table("By place, entity and detector, each finding of each detector", *_ranked(found, "found by"))
        + (f'<p class="small">Looked for and not found: {absent}.</p>\n' if absent else "")
    )


def _acted(metrics: Mapping[str, Any]) -> str:
    acted = _split_names(metrics["acted"])
    words = {one.by: _ACTIONS[one.by] for one in acted if one.by in _ACTIONS}
    legend = items(f"{escape(action)}: {escape(text)}" for action, text in words.items())
    counts: Mapping[str, int] = metrics["metadata"]
    left_out = {kind: count for kind, count in counts.items() if kind.startswith(_LEFT_OUT)}
    stripped = {kind: count for kind, count in counts.items() if kind not in left_out}
    reasons = {_reason(kind.removeprefix(_LEFT_OUT)): count for kind, count in left_out.items()}
    return (
        "<h2>What was done</h2>\n"
        + _table("Actions in records that were kept, copies not yet left out", *_ranked(acted, "action"))
        + (f'<ul class="small">{legend}</ul>\n' if legend else "")
        + _table("Metadata stripped, by kind", ("kind", "#pieces", "|how often"), _counted(stripped))
        + '<p class="small">An image file keeps nothing but what its pixels need, whatever the policy.</p>\n'
        + _table("Drawings (SVG) left out of records", ("a drawing that", "#drawings", "|how often"), _counted(reasons))
    )


def _reasons(metrics: Mapping[str, Any], num_in: int) -> str:
    reasons: Mapping[str, int] = metrics["reasons"]
    most = max(reasons.values(), default=0)
    rows = [
        (
            _code(reason),
            escape(_reason(reason)),
            f"{count:,}",
            f"{count / max(num_in, 1):.2%}",
            _bar(count, most),
        )
        for reason, count in sorted(reasons.items(), key=lambda kv: -kv[1])
    ]
    head = ("code", "a record that", "#records", "#of all", "|how often")
    return "<h2>Why records were not kept</h2>\n" + _table(
        "Records dropped or quarantined, by their first reason", head, rows
    )


def _duplicates(metrics: Mapping[str, Any]) -> str:
    reports: Mapping[str, Mapping[str, int]] = metrics["duplicates"]
    if not reports:
        return "<h2>Copies</h2>\n<p>Not looked for: the stage has no section duplicates.</p>\n"
    rows = [
        (words, *(f"{report.get(name, 0):,}" for report in reports.values())) for name, words in _DUPLICATES.items()
    ]
    head = ("records", *(f"#{escape(split)}" for split in reports))
    return (
        "<h2>Copies</h2>\n"
        + _table("Records whose image and caption are both near another's, by split", head, rows)
        + '<p class="small">Which record is kept of several was decided by comparing records: a promise of privacy is '
        "about the records that stayed.</p>\n"
    )


def _samples(samples: Sequence[Sample]) -> str:
    figures = "".join(f'<figure class="sample">{_sample(sample)}</figure>\n' for sample in samples)
    return (
        "<h2>Before and after: invented records</h2>\n"
        '<p class="small">Made up for this page and put through the same policy and detectors; none is of the data. '
        f'Pseudonyms here are of another key.</p>\n<div class="samples">\n{figures}</div>\n'
    )


def _sample(sample: Sample) -> str:
    after = sample.after
    kept = after.outcome == "kept"
    title = f"<figcaption><h3>{escape(sample.title)}: {escape(after.outcome)}</h3></figcaption>"
    before = f"<p>{_image(sample.before.image, f'Before: {sample.shows}')}“{escape(sample.before.caption or '')}”</p>"
    if kept:
        gone = f"<p>{_image(after.image, f'After: {sample.shows}, as it was kept')}“{escape(after.caption or '')}”</p>"
    else:
        gone = f'<div class="gone">not in the output: {escape(_reason(after.reason or ""))}</div>'
    counted = [f"{_one(finding)} {finding.times}" for finding in _split_names(after.found_by)]
    counted += [
        f"drawing left out: {_reason(kind.removeprefix(_LEFT_OUT))}"
        if kind.startswith(_LEFT_OUT)
        else f"{kind} stripped {count}"
        for kind, count in after.metadata.items()
    ]
    told = escape("; ".join(counted) or "nothing found, nothing stripped")
    return f'{title}\n<div class="two">{before}{gone}</div>\n<p class="small">{told}</p>\n'


def _policy(metrics: Mapping[str, Any], policy: Policy) -> str:
    detectors = [(escape(name), _code(version)) for name, version in sorted(metrics["detectors"].items())]
    unused = {*TEXT_DETECTORS, *IMAGE_DETECTORS} - {*policy.detectors}  # their sections decide nothing
    rows = [(escape(key), _code(_told(value))) for key, value in policy.choices().items() if key not in unused]
    return (
        "<h2>How it was decided</h2>\n"
        + _table("Detectors that looked, and their versions", ("detector", "version, models and settings"), detectors)
        + _table("The policy; an entity that it does not name is covered (fill)", ("key", "value"), rows)
    )


def _identity(metrics: Mapping[str, Any]) -> str:
    key = metrics.get("pseudonym_key_id")
    rows = [
        ("shards, Merkle root", _code(metrics.get("shards_root") or "not computed")),
        *(
            (f"records of {escape(name)}, root", _code(split.get("root", "-")))
            for name, split in metrics["splits"].items()
        ),
        ("policy, SHA-256", _code(metrics["policy_sha256"])),
        ("pseudonyms, key id", _code(key) if key else "none were made"),
    ]
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>\n' for name, value in rows)
    return (
        f'<h2>What this is bound to, and how to check it</h2>\n<table class="facts"><tbody>{cells}</tbody></table>\n'
        "<p>The stage’s manifest.json names these and this page’s own digest. <code>python scripts/audit.py RUN</code> "
        "reads every shard’s manifest and bytes and computes the Merkle root again; checkpoints, ledger and model card "
        "name the same one. A key id tells keys apart and says nothing of them.</p>\n"
    )


# --- words, tables and bars ---


def _split_names(counts: Mapping[str, int]) -> list[_Finding]:
    """Counts by "place.entity.detector" or "place.entity.action", the largest first."""
    found: list[_Finding] = []
    for name, count in counts.items():
        place, _, rest = name.partition(".")
        entity, _, by = rest.rpartition(".")
        found.append(_Finding(place, entity, by, count))
    return sorted(found, key=lambda one: -one.times)


def _ranked(found: Sequence[_Finding], by: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    most = max((one.times for one in found), default=0)
    rows = [
        (_place(one.place), escape(one.entity), escape(one.by), f"{one.times:,}", _bar(one.times, most))
        for one in found
    ]
    return ("place", "entity", by, "#findings", "|how often"), rows


def _place(place: str) -> str:
    return escape(_PLACES.get(place, place))


def _one(finding: _Finding) -> str:
    return f"{finding.entity} in the {_PLACES.get(finding.place, finding.place)} by {finding.by}"


def _does(entity: str, metrics: Mapping[str, Any], policy: Policy) -> str:
    does = [f"captions: {policy.action(entity)}"] if entity in metrics["entities"] else []
    does += [f"images: {policy.image_action(entity)}"] if entity in metrics["boxes"] else []
    return "<br>".join(map(escape, does))


def _reason(reason: str) -> str:
    """A reason code in words."""
    where, code = ("in its image ", reason.removeprefix("image_")) if reason.startswith("image_") else ("", reason)
    for prefix, words in _BY_POLICY:
        if code.startswith(prefix):
            return where + words.format(code.removeprefix(prefix))
    return _REASONS.get(reason, f"is damaged or not allowed: {reason.replace('_', ' ')}")


def _told(value: object) -> str:
    """JSON as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_told(inner)}" for key, inner in cast("dict[str, object]", value).items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_told, cast("list[object]", value))) or "none"
    return "-" if value is None else str(value)


def _counted(counts: Mapping[str, int]) -> list[tuple[str, ...]]:
    most = max(counts.values(), default=0)
    ranked = sorted(counts.items(), key=lambda counted: -counted[1])
    return [(escape(name), f"{count:,}", _bar(count, most)) for name, count in ranked]


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells, the first of a row its header; in `head`, # begins a column of numbers, | one of bars."""
    kinds = {"#": ' class="number"', "|": ' class="bars"'}
    classes = [kinds.get(name[0], "") for name in head]
    cells = "".join(f'<th scope="col"{kind}>{name.lstrip("#|")}</th>' for name, kind in zip(head, classes, strict=True))
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, classes[1:], strict=True))
        + "</tr>\n"
        for first, *rest in rows
    )
    if not body:
        return f"<p>{caption}: none.</p>\n"
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _bar(count: int, most: int) -> str:
    """A bar of `count`, where `most` is the longest; the number stands beside it."""
    return _drawn([("", count / most)] if most else [])


def _stacked(counts: Sequence[int], total: int) -> str:
    return _drawn([(kind, count / max(total, 1)) for kind, count in zip(("", "second", "third"), counts, strict=True)])


def _drawn(parts: Sequence[tuple[str, float]]) -> str:
    rects, left = "", 0.0
    for kind, share in parts:
        if share > 0:
            rects += f'<rect class="{kind}" x="{left:.2f}" y="0.5" width="{198 * share:.2f}" height="9"/>'
            left += 198 * share
    return f'<svg class="bar" viewBox="-1 0 200 10" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>'


def _image(image: bytes, alt: str) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(image).decode("ascii")
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'
