"""What the filter finds, and how fast, beside Presidio on the same captions in the same run; and on foreign captions.

What is measured, by which policy and against which thresholds says `configs/pii`. Speeds are by processor time, so that
more cores than one do not help, in rounds that rivals run in turn.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from privacy.pii.detectors import open_detectors
from privacy.pii.filter import Item, Tools, filter_records
from privacy.pii.findings import MissingDetector, Pixels, TextDetector
from privacy.pii.measuring import Figures, measure_false_alarms, measure_findings
from privacy.pii.model_folders import folder_digest
from privacy.pii.planting import ENTITIES, Gold, GoldCaption, captions
from privacy.pii.planting_images import faceless, faces, strings
from privacy.pii.policy import Policy, Presidio, Threshold
from train import ROOT
from train.benchmarks import interleaved, ratio
from train.config import EvalPiiStage
from train.images import encode_png
from train.measurements import Row
from train.pii_evaluation import judge, measure_policy, open_policy
from train.recipe import load_stage

PARTS = ("captions", "images", "speed")
STAGE = ROOT / "configs" / "pii" / "20_eval_pii.yaml"
CACHE = Path("~/.cache/sfumato")  # where scripts/fetch_data.py puts real captions
RIVAL_CAPTIONS = 1000
TIMED_CAPTIONS, TIMED_IMAGES, ROUNDS, BATCH = 512, 24, 3, 64

# On one core.
LEAST_SPEEDS = {"patterns_mb_a_second": 1.0, "captions_a_second": 500.0, "times_presidio": 3.0, "images_a_second": 8.0}
_OF_LOCALE = re.compile(r"\.[a-z]{2}_[A-Z]{2}$")
_LOCALES_SHOWN = re.compile(r"(?:other_languages\.)?recall\.(?:person|address)\.|recall\.(?:all|phone)\.")
_DULL_IF_NONE = re.compile(r"(?:false_alarms|found_in)\.\w+\.(?!person|address|any)|metadata\.survives\.")

log = logging.getLogger(__name__)


class _Tell:
    """Logs what is under way, each time that it is something else."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str) -> None:
        if what != self._last:
            log.info("%s", what)
        self._last = what


def pii(part: str | None = None, names: Path | None = None) -> list[Row]:
    """All of it, or one of PARTS; by the detector of names in the folder `names`, or by the packaged one."""
    stage = load_stage(STAGE, _tuned(names) if names else ())
    assert isinstance(stage, EvalPiiStage) and stage.policy is not None
    tools = open_policy(stage.policy)
    rows = [
        Row(name=f"pii.detector.{detector.name}", value=detector.version, unit="version")
        for detector in (*tools.texts, *tools.images)
    ]
    rivals = _presidio() if part != "images" else None
    if part != "speed":
        rows += _quality(stage, tools, part)
        if rivals is not None:
            planted = captions(stage.seed, RIVAL_CAPTIONS)
            figures = measure_findings(planted, _RIVAL, rivals, _Tell())
            rows += judge("pii", _without_locales("presidio.", figures), {}, {})
    if part in (None, "speed"):
        rows += _speeds(stage.policy, tools, rivals)
    # What kills do to a filter stage takes longer than all of this: it is a slow test.
    kills = Row(name="pii.records_lost_by_kills", value=None, unit="test_filter_job.py", target=0)
    return rows if part else [*rows, kills]


def _tuned(folder: Path) -> list[str]:
    """The override that puts a trained model of names into the policy."""
    return [f"policy.names={json.dumps({'model': str(folder), 'digest': folder_digest(folder)})}"]


def _quality(stage: EvalPiiStage, tools: Tools, part: str | None) -> list[Row]:
    assert stage.policy is not None
    tell = _Tell()
    of_captions, of_images = part != "images", part != "captions"
    figures = measure_policy(
        stage.policy,
        tools,
        captions=stage.captions if of_captions else 0,
        pictures=stage.pictures if of_images else 0,
        seed=stage.seed,
        progress=tell,
    )
    if of_captions:
        foreign = presidio_sentences(stage.captions, stage.seed)
        if foreign:
            found = measure_findings(foreign, stage.policy, tools, tell)
            figures |= _without_locales("presidio_sentences.", found)
        for name in ("emoji", "openclipart"):
            if texts := fetched_captions(name):
                found = measure_false_alarms(texts, stage.policy, tools, tell)
                figures |= {f"found_in.{name}.{entity}": share for entity, share in found.items()}
    at_most = dict(stage.at_most)
    if "found_in.emoji.person" in figures:  # the real captions beside Unicode's names
        at_most["found_in.emoji.person"] = at_most["false_alarms.emoji.person"]
    measured = ({name: bound for name, bound in bounds.items() if name in figures or part is None}
                for bounds in (stage.at_least, at_most))  # fmt: skip
    return judge("pii", _readable(figures), *measured)


def _without_locales(prefix: str, figures: Figures) -> Figures:
    return {f"{prefix}{name}": share for name, share in figures.items() if not _OF_LOCALE.search(name)}


def _readable(figures: Figures) -> Figures:
    """Without what is too much to read: `eval_pii` writes all."""
    return {
        name: share
        for name, share in figures.items()
        if (_LOCALES_SHOWN.match(name) or not _OF_LOCALE.search(name)) and (share.hits or not _DULL_IF_NONE.match(name))
    }


# --- Presidio, and its sentences ---


# Whatever it reports counts, as it does in Presidio unless one asks for more.
_RIVAL = Policy(
    detectors=("presidio",),
    presidio=Presidio(least_score=0),
    thresholds={entity: Threshold(certain=0) for entity in Presidio().entities},
)


def _presidio() -> Tools | None:
    """Presidio over the small spaCy model; None where it is not installed."""
    try:
        return Tools(open_detectors(_RIVAL)[0])
    except MissingDetector as error:
        log.warning("Presidio is not measured: %s", error)
        return None


# The places of presidio-evaluator's templates: our entity, and what of an identity stands there.
_Identity = Mapping[str, str]
_PLACES: Mapping[str, tuple[str, Callable[[_Identity], str]]] = {
    **dict.fromkeys(("person", "name", "name_male", "name_female"),
                    ("person", lambda one: f"{one['GivenName']} {one['Surname']}")),
    **dict.fromkeys(("first_name", "first_name_male", "first_name_female", "first_name_nonbinary"),
                    ("person", lambda one: one["GivenName"])),
    **dict.fromkeys(("last_name", "last_name_male", "last_name_female"), ("person", lambda one: one["Surname"])),
    "address": ("address", lambda one: f"{one['StreetAddress']}, {one['City']} {one['ZipCode']}".strip()),
    "email": ("email", lambda one: one["EmailAddress"]),
    "phone_number": ("phone", lambda one: one["TelephoneNumber"]),
    "credit_card_number": ("card", lambda one: ""), "iban": ("iban", lambda one: ""), "ssn": ("ssn", lambda one: ""),
    "ip_address": ("ip", lambda one: ""),  # its table has none of these: ours
    "city": ("", lambda one: one["City"]), "country": ("", lambda one: one["CountryFull"]),
    "nationality": ("", lambda one: one["CountryFull"]), "nation_woman": ("", lambda one: one["CountryFull"]),
    "nation_plural": ("", lambda one: one["CountryFull"]), "organization": ("", lambda one: one["Company"]),
    "job": ("", lambda one: one["Occupation"]), "age": ("", lambda one: one["Age"]),
    "date_time": ("", lambda one: one["Birthday"]), "date_of_birth": ("", lambda one: one["Birthday"]),
    "url": ("", lambda one: f"www.{one['Domain']}"), "year": ("", lambda one: one["Birthday"][-4:]),
    **dict.fromkeys(("prefix", "prefix_male", "prefix_female"), ("", lambda one: one["Title"])),
    "day_of_week": ("", lambda one: "Tuesday"),
}  # fmt: skip


def presidio_sentences(number: int, seed: int) -> list[GoldCaption]:
    """Templates of presidio-evaluator (MIT) with its 3,000 invented identities of 31 countries; [] without the package.

    Templates with pieces of addresses are left out: they do not say where an address ends.
    """
    spec = importlib.util.find_spec("presidio_evaluator")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "data_generator" / "raw_data"
    lines = (folder / "templates.txt").read_text("utf-8", errors="replace").replace("\\n", "\n").splitlines()
    templates = [line for line in lines if set(re.findall(r"\{\{(\w+)\}\}", line)) <= set(_PLACES)]
    with (folder / "FakeNameGenerator.com_3000.csv").open(encoding="utf-8-sig") as file:
        identities = list(csv.DictReader(file))
    sentences: list[GoldCaption] = []
    for count in range(number):
        chance = random.Random(f"{seed}\0{count}")
        template, text, gold = templates[count % len(templates)], "", list[Gold]()
        for piece in re.split(r"(\{\{\w+\}\})", template):
            if not piece.startswith("{{"):
                text += piece
                continue
            entity, of = _PLACES[piece.strip("{}")]
            value = of(chance.choice(identities)) or ENTITIES[entity](chance, "en_US")
            gold += [Gold(entity, len(text), len(text) + len(value))] if entity else []
            text += value
        sentences.append(GoldCaption(text, tuple(gold), "en_US", "en"))
    return sentences


def fetched_captions(name: str) -> list[str]:
    """The different captions of a set that scripts/fetch_data.py has fetched; [] where it has not."""
    files = sorted((CACHE.expanduser() / name).rglob("*.txt"))
    return sorted({file.read_text("utf-8", errors="replace").strip() for file in files} - {""})


# --- speed ---


def _speeds(policy: Policy, tools: Tools, rivals: Tools | None) -> list[Row]:
    texts = [caption.text for caption in captions(1, TIMED_CAPTIONS)]
    patterns = tuple(detector for detector in tools.texts if detector.name == "patterns")
    works: dict[str, Callable[[], object]] = {
        "patterns": lambda: _detect(patterns, texts),
        "entities": lambda: _detect(tools.texts, texts),
    }
    if rivals is not None:
        works["presidio"] = lambda: _detect(rivals.texts, texts)
    if tools.images:
        images = [Item(encode_png(Image.fromarray(pixels))) for pixels in _pictures(TIMED_IMAGES)]
        works["images"] = lambda: filter_records(images, policy, tools)
    for work in works.values():
        work()
    times = interleaved(works, ROUNDS, time.process_time)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    size = sum(len(text.encode()) for text in texts)
    figures = {
        "patterns_mb_a_second": (size / 1e6 / seconds["patterns"], "MB/s"),
        "captions_a_second": (TIMED_CAPTIONS / seconds["entities"], "captions/s"),
    }
    if "presidio" in times:
        figures["presidio_captions_a_second"] = (TIMED_CAPTIONS / seconds["presidio"], "captions/s")
        figures["times_presidio"] = (1 / ratio(times, "entities", "presidio"), "1")
    if "images" in times:
        figures["images_a_second"] = (TIMED_IMAGES / seconds["images"], "images/s of 256 px")
    return [
        Row(name=f"pii.{name}", value=value, unit=unit, target=(least := LEAST_SPEEDS.get(name)),
            ok=None if least is None else value >= least)
        for name, (value, unit) in figures.items()
    ]  # fmt: skip


def _detect(detectors: tuple[TextDetector, ...], texts: list[str]) -> None:
    for start in range(0, len(texts), BATCH):
        for detector in detectors:
            detector.detect(texts[start : start + BATCH])


def _pictures(number: int) -> list[Pixels]:
    """A quarter with a face, a quarter with a string, the rest with neither."""
    shown = [picture.pixels for picture in (*faces(48, number // 4), *strings(16, number // 4))]
    return [*shown, *faceless(number - len(shown))]
