"""The measures measure: what is known to be found, missed, unsure or imagined comes out as such."""

from collections.abc import Callable, Sequence

import pytest
from scipy.stats import binomtest

from privacy.pii.filter import Tools
from privacy.pii.findings import Finding
from privacy.pii.measuring import (
    Figures,
    Share,
    measure_captions,
    measure_false_alarms,
    measure_findings,
    measure_metadata,
)
from privacy.pii.planting import ENTITIES, Gold, captions
from privacy.pii.policy import Policy, Threshold

POLICY = Policy(detectors=("patterns", "names"))  # whose entities are all that is planted; the oracles stand for them
NUMBER = 120
KNOWN = {caption.text: caption.gold for caption in captions(0, NUMBER)}


class Oracle:
    """Knows what is planted, and says of each value what `say` says: findings (start, end, score)."""

    name, version, entities = "oracle", "1", tuple(ENTITIES)

    def __init__(self, say: Callable[[str, Gold], Sequence[tuple[int, int, float]]]) -> None:
        self._say = say

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        return [
            [
                Finding(gold.entity, start, end, self.name, self.version, score)
                for gold in KNOWN.get(text, ())
                for start, end, score in self._say(text, gold)
            ]
            for text in texts
        ]


def measured(say: Callable[[str, Gold], Sequence[tuple[int, int, float]]], policy: Policy = POLICY) -> Figures:
    return measure_captions(policy, Tools((Oracle(say),)), NUMBER, 0)


def pooled(figures: Figures, name: str) -> float:
    shares = [share for key, share in figures.items() if key.startswith(name) and key.count(".") == 1]
    return sum(share.hits for share in shares) / sum(share.of for share in shares)


@pytest.mark.parametrize(("hits", "of"), [(0, 1), (1, 1), (0, 40), (3, 40), (97, 100), (100, 100), (1, 10_000)])
def test_intervals_are_wilsons(hits: int, of: int) -> None:
    theirs = binomtest(hits, of).proportion_ci(0.95, method="wilson")
    assert Share(hits, of).interval == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_who_finds_all_leaks_nothing() -> None:
    figures = measured(lambda text, gold: [(gold.start, gold.end, 1.0)])
    assert pooled(figures, "recall.") == pooled(figures, "precision.") == 1
    assert figures["leak"].rate == figures["leak.drop_on_uncertain"].rate == figures["changed.plain"].rate == 0
    assert figures["leak"].of == NUMBER / 2


def test_who_finds_nothing_leaks_all() -> None:
    figures = measured(lambda text, gold: [])
    assert pooled(figures, "recall.") == 0 and figures["leak"].rate == 1
    assert not any(name.startswith("precision.") for name in figures)


def test_one_letter_that_is_left_leaks() -> None:
    def all_but_one_letter(text: str, gold: Gold) -> list[tuple[int, int, float]]:
        at = next(place for place in range(gold.start, gold.end) if text[place].isalnum())
        return [(start, end, 1.0) for start, end in ((gold.start, at), (at + 1, gold.end)) if start < end]

    figures = measured(all_but_one_letter)
    assert pooled(figures, "recall.") == 0 and figures["leak"].rate == 1 and pooled(figures, "precision.") == 1


def test_a_sign_that_is_left_leaks_nothing() -> None:
    def alphanumeric(text: str, gold: Gold) -> list[tuple[int, int, float]]:
        return [(place, place + 1, 1.0) for place in range(gold.start, gold.end) if text[place].isalnum()]

    figures = measured(alphanumeric)
    assert pooled(figures, "recall.") == 1 and figures["leak"].rate == 0


def test_what_is_uncertain_leaks_unless_it_is_dropped() -> None:
    unsure = POLICY.model_copy(update={"thresholds": {entity: Threshold(certain=0.7) for entity in ENTITIES}})
    figures = measured(lambda text, gold: [(gold.start, gold.end, 0.6)], unsure)
    assert pooled(figures, "recall.") == 0 and figures["leak"].rate == 1
    assert figures["leak.drop_on_uncertain"].rate == 0 and figures["lost.holding"].rate == 1


def test_what_is_imagined_costs_precision() -> None:
    class Dreamer(Oracle):
        def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
            return [[*found, Finding("person", 0, 1, "oracle", "1")] for found in super().detect(texts)]

    tools = Tools((Dreamer(lambda text, gold: [(gold.start, gold.end, 1.0)]),))
    figures = measure_captions(POLICY, tools, NUMBER, 0)
    assert figures["precision.person"].rate < 0.5 and figures["recall.person"].rate == 1
    assert figures["changed.plain"].rate > 0.9 and figures["changed.lookalike"].rate > 0.9
    assert measure_false_alarms(["a cat", "a dog"], POLICY, tools)["person"].rate == 1


def test_what_is_kept_on_purpose_is_not_judged() -> None:
    keeping = POLICY.model_copy(update={"captions": {"person": "keep"}})
    figures = measured(lambda text, gold: [(gold.start, gold.end, 1.0)] if gold.entity != "person" else [], keeping)
    assert "recall.person" not in figures and figures["leak"].rate == 0


def test_anothers_findings_hide_by_whatever_name() -> None:
    def as_something(text: str, gold: Gold) -> list[tuple[int, int, float]]:
        return [(gold.start, gold.end, 1.0)]

    class Confused(Oracle):
        def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
            return [[Finding("plate", f.start, f.end, "oracle", "1") for f in found] for found in super().detect(texts)]

    figures = measure_findings(captions(0, NUMBER), POLICY, Tools((Confused(as_something),)))
    assert figures["leak"].rate == 0 and figures["recall.email"].rate == 0


def test_no_value_in_metadata_gets_through_the_filter() -> None:
    figures = measure_metadata(Policy(), 24, 1)
    assert figures["metadata.survives"].rate == figures["metadata.lost"].rate == 0
    assert {"metadata.survives.svg.RDF", "metadata.survives.png.zTXt", "metadata.survives.jpeg.IPTC"} <= set(figures)
