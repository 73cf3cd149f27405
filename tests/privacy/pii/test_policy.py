import pytest
import yaml
from pydantic import ValidationError

from privacy.pii.policy import Policy, Threshold, check_entities

WHOLE = """
detectors: [patterns, names, faces_fast, faces]
captions: {email: pseudonymise, person: redact, card: drop, ip: keep}
images: {face: blur}
thresholds: {person: {certain: 0.7, possible: 0.4}}
uncertain: quarantine
box_margin: 0.2
pseudonyms: {key_id: 0123456789abcdef}
"""


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
    ],
)
def test_a_mistake_is_told_by_key_value_and_mend(text: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        policy(text)


def test_what_an_adapter_finds_is_checked_once_it_is_open() -> None:
    open_ended = policy("{detectors: [presidio], captions: {PERSON: drop}}")
    with pytest.raises(ValueError, match=r"policy.captions: no detector finds 'PERSON'; did you mean 'person'"):
        check_entities(open_ended, ("person",), ())
    check_entities(policy("{detectors: [presidio], captions: {person: drop}}"), ("person",), ())


def test_no_detector_at_all_is_a_policy_that_strips_metadata_alone() -> None:
    assert policy("detectors: []").text_detectors == ()
