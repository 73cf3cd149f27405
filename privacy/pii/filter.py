"""What becomes of one record: personal data in the caption filled in or the record dropped, image metadata stripped."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from privacy.pii.metadata import ImageMetadataError, strip_metadata
from privacy.pii.patterns import ENTITIES, detect

Action = Literal["fill", "drop", "keep"]
Outcome = Literal["kept", "dropped", "quarantined"]


class Policy(BaseModel):
    """What to do with each entity in a caption: fill it with its name ([EMAIL]), drop the record, or keep it.

    An entity that is not named is filled. One that no detector finds is refused, before the first record is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    captions: dict[str, Action] = {}

    @field_validator("captions")
    @classmethod
    def _entities_have_detectors(cls, captions: dict[str, Action]) -> dict[str, Action]:
        for entity in captions:
            if entity not in ENTITIES:
                near = difflib.get_close_matches(entity.lower(), ENTITIES, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"no detector finds {entity!r}{hint}: the entities are {', '.join(ENTITIES)}")
        return captions

    def action(self, entity: str) -> Action:
        """What happens to `entity`."""
        return self.captions.get(entity, "fill")


@dataclass(frozen=True)
class FilterResult:
    """A record after the filter; image and caption are empty unless it is kept, and its repr shows neither.

    findings: entity -> times found in the caption; metadata: kind -> pieces stripped from the image.
    reason: a code, None for a kept record.
    """

    outcome: Outcome
    reason: str | None
    image: bytes = field(default=b"", repr=False)
    caption: str | None = field(default=None, repr=False)
    findings: Mapping[str, int] = field(default_factory=dict[str, int])
    metadata: Mapping[str, int] = field(default_factory=dict[str, int])


def filter_record(image: bytes, caption: str | None, policy: Policy) -> FilterResult:
    """Apply `policy` to one record; a pure function of its arguments.

    Guarantee: in a kept record no detector finds an entity that the policy does not keep, and the image holds nothing
    but what its pixels need. A caption that still shows something after filling drops the record.
    """
    acted = [entity for entity in ENTITIES if policy.action(entity) != "keep"]
    kept = [entity for entity in ENTITIES if policy.action(entity) == "keep"]
    text = caption or ""
    # Looked for apart, so that what is kept cannot hide, by overlap, what is not.
    found = detect(text, acted)
    findings = dict(Counter(finding.entity for finding in found + detect(text, kept)))
    try:
        stripped = strip_metadata(image)
    except ImageMetadataError as error:
        return FilterResult("quarantined", error.reason, findings=findings)
    dropping = next((finding.entity for finding in found if policy.action(finding.entity) == "drop"), None)
    if dropping is not None:
        return FilterResult("dropped", f"holds_{dropping}", findings=findings, metadata=stripped.removed)
    for finding in reversed(found):
        text = f"{text[: finding.start]}[{finding.entity.upper()}]{text[finding.end :]}"
    if residue := detect(text, acted):
        return FilterResult("dropped", f"still_shows_{residue[0].entity}", findings=findings, metadata=stripped.removed)
    return FilterResult(
        "kept", None, stripped.image, None if caption is None else text, findings=findings, metadata=stripped.removed
    )
