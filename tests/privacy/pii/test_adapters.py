import importlib
import io
import itertools
import json
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from privacy.pii.adapters import GlinerDetector, PresidioDetector
from privacy.pii.filter import Tools, filter_record
from privacy.pii.findings import Finding, MissingDetector
from privacy.pii.model_folders import folder_digest, packaged_folder, users_folder
from privacy.pii.policy import Policy, Presidio

CAPTION = "Maria Schmidt of Lisbon, maria.schmidt@example.com, 10.20.30.40"
LABELS = {"person": "person", "postal address": "address"}


def of(findings: list[Finding], text: str) -> dict[str, str]:
    return {finding.entity: text[finding.start : finding.end] for finding in findings}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


# --- folders ---


def test_a_folders_digest_is_of_every_files_name_and_bytes_and_of_nothing_else(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "sub").mkdir(parents=True)
    (one / "sub" / "weights").write_bytes(b"weights")
    (one / "config").write_bytes(b"config")
    shutil.copytree(one, other)
    (other / "__pycache__").mkdir()
    (other / "__pycache__" / "left.pyc").write_bytes(b"by chance")
    assert folder_digest(one) == folder_digest(other)
    seen = {folder_digest(one)}
    (other / "config").write_bytes(b"Config")
    seen.add(folder_digest(other))
    (other / "config").rename(other / "configuration")
    seen.add(folder_digest(other))
    (other / "more").touch()
    seen.add(folder_digest(other))
    assert len(seen) == 4


def test_a_folder_that_is_absent_or_another_is_refused_by_name_and_digest(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    assert users_folder("gliner", str(tmp_path), folder_digest(tmp_path)) == tmp_path
    with pytest.raises(MissingDetector, match=rf"policy.gliner.digest is a+, and .* has {folder_digest(tmp_path)}"):
        users_folder("gliner", str(tmp_path), "a" * 64)
    with pytest.raises(MissingDetector, match=r"policy.gliner.model is '.*/absent', which is no folder"):
        users_folder("gliner", str(tmp_path / "absent"), "a" * 64)
    with pytest.raises(MissingDetector, match="needs folder of the package no_such_package, absent"):
        packaged_folder("presidio", "no_such_package", "folder", "a" * 64)
    with pytest.raises(
        MissingDetector, match=r"measured with pii of SHA-256 a+, and .*: install the version of privacy"
    ):
        packaged_folder("presidio", "privacy", "pii", "a" * 64)


@pytest.mark.parametrize(("name", "package"), [("presidio", "presidio_analyzer"), ("gliner", "gliner")])
def test_an_absent_package_is_refused_with_the_extra_that_brings_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDetector, match=rf"'{name}' needs the package {package}.*pip install 'sfumato\[{name}\]'"
    ):
        if name == "presidio":
            PresidioDetector(**Policy(detectors=("presidio",)).settings("presidio"))
        else:
            GlinerDetector("nowhere", "a" * 64, LABELS, 0.5)


# --- Presidio: importing it takes seconds, and so these are slow ---


@pytest.fixture(scope="module")
def presidio() -> PresidioDetector:
    pytest.importorskip("presidio_analyzer")
    return PresidioDetector(**Policy(detectors=("presidio",)).settings("presidio"))


@pytest.mark.slow
def test_presidio_finds_under_our_names_and_asks_no_network(no_network: None) -> None:
    pytest.importorskip("presidio_analyzer")
    presidio = PresidioDetector(**Policy(detectors=("presidio",)).settings("presidio"))
    found, empty = presidio.detect([CAPTION, ""])
    named = of(found, CAPTION)
    assert named["person"] == "Maria Schmidt"
    assert (named["address"], named["email"], named["ip"]) == ("Lisbon", "maria.schmidt@example.com", "10.20.30.40")
    assert empty == [] and found == sorted(found, key=lambda one: one.start)
    assert set(named) <= set(presidio.entities)
    assert all(one.detector == "presidio" and one.version == presidio.version for one in found)
    assert len(presidio.version) <= 200


@pytest.mark.slow
def test_what_presidio_logs_is_dropped(
    presidio: PresidioDetector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError

    iban = importlib.import_module("presidio_analyzer.predefined_recognizers").IbanRecognizer
    monkeypatch.setattr(iban, "_IbanRecognizer__generate_iban_check_digits", fail)
    with caplog.at_level("DEBUG"):
        presidio.detect(["IBAN GB82WEST12345698765432"])
    assert "GB82" not in caplog.text


@pytest.mark.slow
def test_presidio_says_the_same_of_a_text_alone_and_among_others(presidio: PresidioDetector) -> None:
    texts = [
        CAPTION,
        "a red flag on a hill",
        "Call Omar Haddad at 212-555-0143 on Monday",
        "",
        "IBAN GB82WEST12345698765432",
    ]
    assert presidio.detect(texts) == [found for text in texts for found in presidio.detect([text])]


@pytest.mark.slow
def test_presidio_reports_what_it_is_asked_for_and_is_sure_enough_of(presidio: PresidioDetector) -> None:
    text = "Acme Holdings was founded by Maria Schmidt in Lisbon on 3 May 2019; phone 212-555-0143"
    asked = Presidio(entities=("organisation", "date"), least_score=0.0)
    assert {one.entity for one in PresidioDetector(**asked.model_dump()).detect([text])[0]} == {"organisation", "date"}
    assert all(one.score >= 0.4 for one in presidio.detect([text])[0])
    sure = PresidioDetector(presidio.entities, 0.9)
    assert sure.detect([text]) == [[]] and sure.version != presidio.version


@pytest.mark.slow
def test_a_policy_over_presidio_filters_a_record(presidio: PresidioDetector) -> None:
    policy = Policy(detectors=("presidio",), captions={"person": "redact"})
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    result = filter_record(image.getvalue(), "Maria Schmidt in her garden", policy, Tools((presidio,)))
    assert (result.outcome, result.caption) == ("kept", "in her garden")


# --- GLiNER: a small model of random weights, which finds what it finds, the same each time ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gliner: Any = pytest.importorskip("gliner")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gliner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "person", "postal", "address", "maria", "schmidt", "flag"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "tokenizer")
    encoder = {
        "model_type": "deberta-v2", "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40,
    }  # fmt: skip
    sizes = {"hidden_size": 16, "max_width": 3, "max_len": 24, "dropout": 0.0, "num_rnn_layers": 0}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        made = gliner.GLiNER.from_config(
            {"model_name": str(folder / "tokenizer"), **sizes, "encoder_config": encoder},
            backbone_from_pretrained=False,
        )
    made.save_pretrained(folder / "model")
    shutil.rmtree(folder / "tokenizer")
    return folder / "model"


@pytest.fixture
def gliner(model: Path) -> Iterator[GlinerDetector]:
    yield GlinerDetector(str(model), folder_digest(model), LABELS, 0.3)


@pytest.mark.slow
def test_gliner_reads_a_whole_folder_and_answers_the_same_each_time_without_network_or_shared_random_state(
    no_network: None, model: Path
) -> None:
    import torch

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    detectors = [GlinerDetector(str(model), folder_digest(model), LABELS, 0.3) for _ in range(2)]
    texts = [CAPTION, "", "  ", "flag"]
    first, second = (detector.detect(texts) for detector in detectors)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert first == second == [found for text in texts for found in detectors[0].detect([text])]
    assert first[0] and not first[1] and not first[2]  # random weights find something at a low threshold
    assert {one.entity for one in first[0]} <= {"person", "address"}
    assert all(CAPTION[one.start : one.end].strip() and one.score >= 0.3 for one in first[0])
    assert len(detectors[0].version) <= 200


@pytest.mark.slow
def test_gliner_reads_every_word_of_a_text_longer_than_itself(gliner: GlinerDetector) -> None:
    text = " ".join(f"word{number}" for number in range(150))
    windows = list(gliner._windows(text))
    assert all(text[start : start + len(window)] == window for start, window in windows)
    assert {word for _, window in windows for word in window.split()} == set(text.split())
    assert all(len(window.split()) <= 24 for _, window in windows)
    for (start, window), (following, _) in itertools.pairwise(windows):
        assert len(text[following : start + len(window)].split()) == 3  # the longest span lies whole in one of them
    found = gliner.detect([text])[0]
    assert max(one.end for one in found) > len(text) // 2


@pytest.mark.slow
def test_a_word_that_gliner_cannot_read_whole_is_no_silence(gliner: GlinerDetector) -> None:
    many = " ".join(["of-many-parts"] * 20)  # more tokens than the model reads, in fewer words
    windows = list(gliner._windows(many))
    assert len(windows) > 1 and windows[-1][0] + len(windows[-1][1]) == len(many)
    with pytest.raises(ValueError, match="a word has more tokens than the model reads"):
        gliner.detect(["-".join(["part"] * 50)])


@pytest.mark.slow
def test_a_gliner_folder_that_would_take_a_part_from_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    whole = json.loads((folder / "gliner_config.json").read_text())

    def refused(told: str) -> None:
        with pytest.raises(MissingDetector, match=told):
            GlinerDetector(str(folder), folder_digest(folder), LABELS, 0.3)

    theirs = whole["encoder_config"] | {"auto_map": {"AutoModel": "theirs"}}
    for changes, told in (
        ({"encoder_config": None}, "gliner_config.json has no encoder_config: save the model with"),
        ({"labels_encoder": "some/encoder"}, "gliner_config.json has no labels_encoder_config"),
        ({"encoder_config": theirs}, "runs code of its own"),
        ({"hidden_size": 8}, r"which GLiNER .* does not load \(RuntimeError\): save it"),
    ):
        (folder / "gliner_config.json").write_text(json.dumps(whole | changes))
        refused(told)
    (folder / "gliner_config.json").write_text("{")
    refused("without a gliner_config.json that reads")
    (folder / "gliner_config.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").unlink()
    refused("has no tokenizer_config.json")
