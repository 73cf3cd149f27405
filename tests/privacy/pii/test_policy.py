import pytest
import yaml
from pydantic import ValidationError

from privacy.pii.policy import Gliner, Names, Policy, Presidio, Threshold, check_entities

WHOLE = """
detectors: [patterns, names, faces_fast, faces]
captions: {email: pseudonymise, person: redact, card: drop, ip: keep}
images: {face: blur}
thresholds: {person: {certain: 0.7, possible: 0.4}}
uncertain: quarantine
box_margin: 0.2
pseudonyms: {key_id: 0123456789abcdef}
"""


GLINER = Gliner(model="/models/one", digest="a" * 64, labels={"a person's name": "person", "badge number": "badge"})


def policy(text: str) -> Policy:
    return Policy.model_validate(yaml.safe_load(text))


def test_an_empty_policy_fills_what_the_patterns_find_and_decodes_no_image() -> None:
    empty = policy("{}")
    assert (empty.text_detectors, empty.image_detectors) == (("patterns",), ())
    assert empty.action("email") == "fill" and empty.image_action("face") == "fill"
    assert empty.threshold("email") == Threshold(certain=0.5, possible=0.0)
    assert (empty.uncertain, empty.pseudonymises, empty.settings("patterns")) == ("drop", False, {"apart": ()})


def test_a_whole_policy_says_what_it_says() -> None:
    whole = policy(WHOLE)
    assert (whole.text_detectors, whole.image_detectors) == (("patterns", "names"), ("faces_fast", "faces"))
    assert [whole.action(entity) for entity in ("email", "person", "phone")] == ["pseudonymise", "redact", "fill"]
    assert whole.image_action("face") == "blur" and whole.pseudonymises
    assert (whole.threshold("person").certain, whole.threshold("person").possible) == (0.7, 0.4)
    assert whole.settings("patterns") == {"apart": ("ip",)} and whole.settings("faces") == {}


def test_the_digest_follows_every_choice_and_not_how_it_is_written() -> None:
    whole = policy(WHOLE)
    assert policy("captions: {email: drop, ip: keep}").digest() == policy("captions: {ip: keep, email: drop}").digest()
    assert policy("{}").digest() == policy("uncertain: drop").digest()
    changed = {
        "detectors": ("patterns", "names", "faces"), "captions": {}, "images": {}, "thresholds": {},
        "uncertain": "act", "box_margin": 0.3, "pseudonyms": None, "max_caption_length": 7,
        "names": Names(model="m", digest="b" * 64), "presidio": Presidio(least_score=0.1), "gliner": GLINER,
    }  # fmt: skip
    assert set(changed) == set(Policy.model_fields)
    digests = {whole.model_copy(update={key: value}).digest() for key, value in changed.items()}
    assert len(digests | {whole.digest()}) == 1 + len(changed)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        policy("{}").uncertain = "keep"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("captions: {emial: fill}", r"captions: no detector finds 'emial'; did you mean 'email'\?: the entities are "),
        (
            "captions: {person: fill}",
            "captions: no detector finds 'person': add names to detectors, which are patterns",
        ),
        ("images: {face: blur}", "images: no detector finds 'face': add faces_fast to detectors, which are patterns"),
        ("{detectors: [faces], images: {email: fill}}", "images: no detector finds 'email'"),
        ("thresholds: {adress: {certain: 1}}", "thresholds: no detector finds 'adress'"),
        ("detectors: [patern]", r"no detector is named 'patern'; did you mean 'patterns'\?: choose of patterns, names"),
        ("detectors: [patterns, patterns]", "names 'patterns' twice"),
        ("captions: {email: blur}", r"captions\.email\n.*'fill', 'redact', 'pseudonymise', 'drop', 'quarantine' or"),
        ("{detectors: [faces], images: {face: redact}}", r"images\.face\n.*'fill', 'blur', 'drop', 'quarantine' or"),
        (
            "{detectors: [patterns], thresholds: {email: {certain: 0.3, possible: 0.6}}}",
            r"thresholds\.email\n.*possible is 0.6, above certain 0.3: lower possible",
        ),
        ("thresholds: {email: {certain: 1.5}}", r"thresholds\.email\.certain\n.*less than or equal to 1"),
        ("uncertain: fill", r"uncertain\n.*'drop', 'quarantine', 'act' or 'keep'"),
        ("box_margin: -1", r"box_margin\n.*greater than or equal to 0"),
        ("pseudonyms: {key_id: secret}", r"pseudonyms\.key_id\n"),
        ("detektors: []", r"detektors\n.*Extra inputs are not permitted"),
        ("detectors: [gliner]", "detectors and the section gliner go together"),
        (
            "gliner: {model: here, digest: " + "a" * 64 + ", labels: {person: person}}",
            "detectors and the section gliner go together",
        ),
        ("{detectors: [gliner], gliner: {model: here, digest: ab, labels: {}}}", r"digest\n.*\n.*\n.*labels\n"),
        ("presidio: {least_score: 0.1}", "there is a section presidio, and detectors does not name it"),
        ("{detectors: [presidio], presidio: {entities: [persons]}}", "finds no 'persons'; did you mean 'person'"),
        ("{detectors: [presidio], captions: {PERSON: drop}}", "captions: no detector finds 'PERSON'; did you mean 'pe"),
    ],
)
def test_a_mistake_is_told_by_key_value_and_mend(text: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        policy(text)


def test_what_an_adapter_finds_is_what_its_section_asks_for_in_captions_and_in_images() -> None:
    choices = {"captions": {"badge": "drop"}, "images": {"badge": "drop"}, "gliner": GLINER}
    asked = Policy.model_validate({"detectors": ["gliner", "image_text"], **choices})
    assert asked.settings("gliner") == GLINER.model_dump()
    with pytest.raises(ValidationError, match="images: no detector finds 'badge'"):
        Policy.model_validate({"detectors": ["gliner", "faces"], **choices})
    with pytest.raises(ValueError, match=r"policy.captions: no detector finds 'badge'"):
        check_entities(asked, ("person",), ())  # the open detector is not the one of the policy


def test_where_a_models_folder_lies_is_no_part_of_the_digest() -> None:
    there = Policy(detectors=("gliner",), gliner=GLINER)
    moved = Policy(detectors=("gliner",), gliner=GLINER.model_copy(update={"model": "/elsewhere"}))
    other = Policy(detectors=("gliner",), gliner=GLINER.model_copy(update={"digest": "b" * 64}))
    assert there.digest() == moved.digest() != other.digest()


def test_no_detector_at_all_is_a_policy_that_strips_metadata_alone() -> None:
    assert policy("detectors: []").text_detectors == ()
