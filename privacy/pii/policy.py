"""What to do with personal data: which detectors look, what becomes of each entity, and how sure they have to be.

detectors: [patterns, names, faces]              # two detectors of one entity: what either finds
captions: {email: pseudonymise, person: redact}  # an entity that is not named is filled
images: {face: blur}
thresholds: {person: {certain: 0.7, possible: 0.4}}
uncertain: drop
box_margin: 0.1
pseudonyms: {key_id: 0123456789abcdef}
names: {model: FOLDER, digest: SHA256}           # of train-names; without it the packaged spaCy model
presidio: {entities: [person, organisation]}     # sections of the adapters, where detectors names them
gliner: {model: FOLDER, digest: SHA256, labels: {name of a person: person}}
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privacy.pii import patterns
from privacy.pii.adapters import PRESIDIO_ENTITIES

# fill: with the entity's name, [EMAIL], or a flat colour. redact: cut out. pseudonymise: with a name that only the
# key's holder can tie to the value, the same wherever the value stands. drop, quarantine: the record. keep: as it is.
CaptionAction = Literal["fill", "redact", "pseudonymise", "drop", "quarantine", "keep"]
ImageAction = Literal["fill", "blur", "drop", "quarantine", "keep"]
# act: as though it were certain. keep: as though it had not been found.
UncertainAction = Literal["drop", "quarantine", "act", "keep"]

Score = Annotated[float, Field(ge=0, le=1)]

# What each detector can find; the adapters' own sections say what they are asked for.
TEXT_DETECTORS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "patterns": patterns.ENTITIES, "names": ("person", "address"), "presidio": (), "gliner": (),
})  # fmt: skip
_IN_TEXT = tuple(dict.fromkeys(entity for found in TEXT_DETECTORS.values() for entity in found))
IMAGE_DETECTORS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "faces_fast": ("face",), "faces": ("face",), "image_text": (*_IN_TEXT, "text"),
})  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Threshold(_Section):
    """A finding whose score is `certain` or more is acted on; below that, and not below `possible`, it is uncertain.

    What scores less than `possible` is ignored. By default nothing is that a detector reports.
    """

    certain: Score = 0.5
    possible: Score = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.possible > self.certain:
            raise ValueError(
                f"possible is {self.possible:g}, above certain {self.certain:g}: lower possible, or make them equal "
                "for no uncertain band"
            )
        return self


class Pseudonymisation(_Section):
    """The key that pseudonyms must be made with; another one is refused, for it would name everyone anew."""

    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Names(_Section):
    """The folder that `python -m privacy.pii train-names` wrote, and the digest that it printed."""

    model: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Presidio(_Section):
    """What Presidio is asked for: names of ours, and how sure it has to be for us to hear of it."""

    entities: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "person", "address", "email", "phone", "url", "card", "iban", "ip", "mac", "ssn", "national_id",
    )  # fmt: skip
    least_score: Score = 0.4

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = tuple(dict.fromkeys(PRESIDIO_ENTITIES.values()))
        for entity in self.entities:
            if entity not in known:
                raise ValueError(f"Presidio finds no {entity!r}{_nearest(entity, known)}: choose of {', '.join(known)}")
        return self


class Gliner(_Section):
    """A GLiNER model in a folder of the user's, told by its digest, and the labels it is asked for.

    digest: `folder_digest`; the error about another one names it. labels: a label in the model's words -> the entity's
    name here, as {street address: address}.
    """

    model: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    labels: Annotated[dict[str, Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]], Field(min_length=1)]
    least_score: Score = 0.5


class Policy(_Section):
    """What happens to the personal data of captions and images.

    Refused, before the first record is read: a detector that does not exist, an action or threshold for an entity that
    none of the named detectors finds.
    """

    detectors: tuple[str, ...] = ("patterns",)
    captions: dict[str, CaptionAction] = {}
    images: dict[str, ImageAction] = {}
    thresholds: dict[str, Threshold] = {}
    uncertain: UncertainAction = "drop"
    box_margin: Annotated[float, Field(ge=0, le=2)] = 0.1  # of a box's longer side, added on each side
    max_caption_length: Annotated[int, Field(gt=0)] = 100_000  # characters; a longer caption is quarantined unread
    pseudonyms: Pseudonymisation | None = None  # null: any key, whose id goes to the manifest
    names: Names | None = None  # null: the packaged model
    presidio: Presidio = Presidio()
    gliner: Gliner | None = None

    @model_validator(mode="after")
    def _detectors_exist(self) -> Self:
        known = (*TEXT_DETECTORS, *IMAGE_DETECTORS)
        for name in self.detectors:
            if name not in known:
                raise ValueError(f"no detector is named {name!r}{_nearest(name, known)}: choose of {', '.join(known)}")
            if self.detectors.count(name) > 1:
                raise ValueError(f"detectors names {name!r} twice: once is enough")
        return self

    @model_validator(mode="after")
    def _sections_have_detectors(self) -> Self:
        if (self.gliner is None) == ("gliner" in self.detectors):
            raise ValueError(
                "detectors and the section gliner go together: name gliner among the detectors, and its model, digest "
                "and labels in the section, or neither"
            )
        if self.names and "names" not in self.detectors:
            raise ValueError("there is a section names, and detectors does not name it: add it there")
        if self.presidio != Presidio() and "presidio" not in self.detectors:
            raise ValueError("there is a section presidio, and detectors does not name it: add it there")
        return self

    @model_validator(mode="after")
    def _entities_have_detectors(self) -> Self:
        texts, images = self._entities(TEXT_DETECTORS), self._entities(IMAGE_DETECTORS)
        for key, named, found in (
            ("captions", self.captions, texts),
            ("images", self.images, images),
            ("thresholds", self.thresholds, (*texts, *images)),
        ):
            for entity in named:
                if entity not in found:
                    raise ValueError(f"{key}: {_unfindable(entity, found, self.detectors)}")
        return self

    @property
    def text_detectors(self) -> tuple[str, ...]:
        """Those of `detectors` that read captions."""
        return tuple(name for name in self.detectors if name in TEXT_DETECTORS)

    @property
    def image_detectors(self) -> tuple[str, ...]:
        """Those of `detectors` that look at pixels; without one, no image is decoded."""
        return tuple(name for name in self.detectors if name in IMAGE_DETECTORS)

    @property
    def pseudonymises(self) -> bool:
        """Whether a key is needed."""
        return "pseudonymise" in self.captions.values()

    def action(self, entity: str) -> CaptionAction:
        """What happens to `entity` in a caption."""
        return self.captions.get(entity, "fill")

    def image_action(self, entity: str) -> ImageAction:
        """What happens to `entity` in an image."""
        # Not blur: networks still recognise many blurred faces. Source: McPherson, Shokri, Shmatikov 2016.
        return self.images.get(entity, "fill")

    def threshold(self, entity: str) -> Threshold:
        """How sure a detector of `entity` has to be."""
        return self.thresholds.get(entity, Threshold())

    def settings(self, detector: str) -> Mapping[str, Any]:
        """What opening `detector` takes: for `patterns` what to look for apart.

        What is kept is looked for apart, so that it cannot hide, by overlap, what is not.
        """
        if detector == "patterns":
            return {"apart": tuple(sorted(entity for entity, action in self.captions.items() if action == "keep"))}
        if detector == "image_text":
            return {"any_text": self.images.get("text", "keep") != "keep"}  # any text at all, where that is asked for
        if detector == "names":
            return self.names.model_dump() if self.names else {}
        if detector == "presidio":
            return self.presidio.model_dump()
        if detector == "gliner":
            assert self.gliner is not None  # _sections_have_detectors
            return self.gliner.model_dump()
        return {}

    def choices(self) -> dict[str, Any]:
        """All that the policy decides, defaults written out, as JSON has it.

        Where a model's folder lies is left out: its digest says which it is.
        """
        return self.model_dump(mode="json", exclude={"names": {"model"}, "gliner": {"model"}})

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON of `choices`."""
        canonical = json.dumps(self.choices(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _entities(self, finds: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """What the named detectors of `finds` find, those of the adapters also where text in images is read."""
        sections = {
            "presidio": self.presidio.entities,
            "gliner": (*self.gliner.labels.values(),) if self.gliner else (),
        }
        asked = [entity for name in self.detectors for entity in sections.get(name, ())]
        reading = finds is TEXT_DETECTORS or "image_text" in self.detectors
        found = [entity for name in self.detectors for entity in finds.get(name, ())]
        return tuple(dict.fromkeys(found + asked if reading else found))


def check_entities(policy: Policy, in_texts: tuple[str, ...], in_images: tuple[str, ...]) -> None:
    """Refuse a policy for entities that the open detectors do not find: some tell only once they are open."""
    for key, named, found in (
        ("captions", policy.captions, in_texts),
        ("images", policy.images, in_images),
        ("thresholds", policy.thresholds, (*in_texts, *in_images)),
    ):
        for entity in named:
            if entity not in found:
                raise ValueError(f"policy.{key}: {_unfindable(entity, found, policy.detectors)}")


def _unfindable(entity: str, found: tuple[str, ...], detectors: tuple[str, ...]) -> str:
    for name, entities in (*TEXT_DETECTORS.items(), *IMAGE_DETECTORS.items()):
        if name not in detectors and entity in entities and name != "image_text":
            return f"no detector finds {entity!r}: add {name} to detectors, which are {', '.join(detectors) or 'none'}"
    entities = ", ".join(found) or "none"
    return f"no detector finds {entity!r}{_nearest(entity, found)}: the entities are {entities}"


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
