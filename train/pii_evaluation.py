"""What a policy's detectors find of what is planted, judged by thresholds: stage `eval_pii` and `bench.py pii`."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from privacy.pii.detectors import open_detectors
from privacy.pii.filter import Tools, check_tools
from privacy.pii.measuring import (
    Figures,
    measure_captions,
    measure_false_alarms,
    measure_images,
    measure_metadata,
)
from privacy.pii.pixels import apply_boxes, decode
from privacy.pii.planting import ENTITIES, LOCALES
from privacy.pii.policy import Policy
from train.measurements import Row, judged

Progress = Callable[[str], None]

_METADATA_IMAGES = 120
_EMOJI = ((0x2600, 0x27C0), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FB00))  # Unicode's blocks


def open_policy(policy: Policy) -> Tools:
    """The policy's detectors, opened; pseudonyms need no key here, for nothing is kept."""
    acting = {entity: "fill" if action == "pseudonymise" else action for entity, action in policy.captions.items()}
    tools = Tools(*open_detectors(policy), decode, apply_boxes)
    check_tools(policy.model_copy(update={"captions": acting}), tools)
    return tools


def measure_policy(
    policy: Policy, tools: Tools, *, captions: int, pictures: int, seed: int, progress: Progress
) -> Figures:
    """Figures of `privacy.pii.measuring`: `captions` in English, as many in other languages, `pictures` of each size.

    false_alarms.emoji.ENTITY: Unicode's names of emoji in which one is found; none holds any. 0 captions, or pictures,
    leaves that part out; so does a policy without detectors for it.
    """
    figures: Figures = {}
    if captions and tools.texts:
        figures |= measure_captions(policy, tools, captions, seed, progress)
        false = measure_false_alarms(emoji_names(), policy, tools, progress)
        figures |= {f"false_alarms.emoji.{entity}": share for entity, share in false.items()}
    if pictures and tools.images:
        figures |= measure_images(policy, tools, pictures, progress)
    progress("metadata")
    return figures | measure_metadata(policy, _METADATA_IMAGES, seed)


def emoji_names() -> list[str]:
    """ "grinning face", "red apple", ...: what emoji are called, as the captions of an image set of theirs are."""
    names = (unicodedata.name(chr(code), "") for first, end in _EMOJI for code in range(first, end))
    return [name.lower() for name in names if name]


def judge(prefix: str, figures: Figures, at_least: Mapping[str, float], at_most: Mapping[str, float]) -> list[Row]:
    """Each figure as a row with its interval; those with a threshold come first, in the order of the thresholds.

    Raises ValueError where a threshold names what was not measured, so that no typing error lets anything pass.
    """
    rows = [
        Row(name=name, value=share.rate, unit=f"of {share.of:,}", interval=share.interval)
        for name, share in sorted(figures.items())
    ]
    return judged(prefix, rows, at_least, at_most)


def missed(rows: Sequence[Row]) -> list[str]:
    """Each row that misses its target, in words."""
    told: list[str] = []
    for row in rows:
        if row.get("ok") is False:
            low, high = row.get("interval", (None, None))
            told.append(f"{row['name']} is {row['value']:.4f} [{low:.4f}, {high:.4f}] {row['unit']}, wanted "
                        f"{row.get('target'):g}")  # fmt: skip
    return told


def pii_headline(figures: Figures) -> dict[str, str]:
    """What a person looks for first."""
    recall = {entity: figures[f"recall.{entity}"] for entity in ENTITIES if f"recall.{entity}" in figures}
    told = {"recall": ", ".join(f"{entity} {share.rate:.3f}" for entity, share in recall.items())} if recall else {}
    for label, name in (
        ("captions leaking an identifier", "leak"), ("the same, with the uncertain dropped", "leak.drop_on_uncertain"),
        ("plain captions changed or lost", "changed.plain"), ("faces found", "faces.recall"),
        ("strings found", "strings.recall"), ("values surviving in metadata", "metadata.survives"),
    ):  # fmt: skip
        if share := figures.get(name):
            low, high = share.interval
            told[label] = f"{share.rate:.3f} [{low:.3f}, {high:.3f}] of {share.of:,}"
    return told


def recall_picture(figures: Figures, at_least: Mapping[str, float], path: Path, title: str) -> Path:
    """Recall by entity, and of names and addresses by locale, with intervals and thresholds, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in ("faces.recall", "strings.recall") if name in figures]
    names += [f"recall.{entity}" for entity in ENTITIES if f"recall.{entity}" in figures]
    names += [f"recall.{entity}.{locale}" for entity in ("person", "address") for locale in LOCALES
              if f"recall.{entity}.{locale}" in figures]  # fmt: skip
    figure = Figure(figsize=(7, 0.8 + 0.24 * max(len(names), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(reversed(names)):
        low, high = figures[name].interval
        axes.plot((low, high), (place, place), color="#4477aa", linewidth=3, alpha=0.45, solid_capstyle="butt")
        axes.plot(figures[name].rate, place, "o", color="#224466", markersize=4)
        if name in at_least:
            axes.plot((at_least[name],) * 2, (place - 0.4, place + 0.4), color="#cc3311", linewidth=1.5)
    axes.set_yticks(range(len(names)), [name.removeprefix("recall.") for name in reversed(names)], fontsize=8)
    axes.set_xlim(min([0.9, *(figures[name].interval[0] for name in names)]) - 0.02, 1.005)
    axes.set_xlabel("recall, 95% interval (Wilson); red: threshold")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
    figure.savefig(path, dpi=130)
    return path
