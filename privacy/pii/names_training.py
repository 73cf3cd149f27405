"""Train the tagger of names on generated sentences, measure it on templates and names held out, and write its folder.

Plain numpy, in minutes on two cores. What is trained is what runs: activations are rounded as the whole-number tagger
rounds them, with a gradient that passes straight through (Bengio et al. 2013); weights are rounded at the end.
"""

# B tokens of a batch with gaps between its sentences, U different ones among them; E, H, L, R as in names.py

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.pii.folding import fold
from privacy.pii.model_folders import folder_digest
from privacy.pii.names import (
    CONFIG_FILE,
    DILATIONS,
    ENTITIES,
    FORMAT,
    LABELS,
    MODEL_FILE,
    PEAK,
    STEP,
    Floats,
    NamesDetector,
    Tagger,
    case_of,
    case_row,
    hash_token,
    neighbours,
    tokenise,
)
from privacy.pii.names_corpus import Corpus, Sentence
from privacy.pii.names_pools import emoji_names

Ints = NDArray[np.int64]

STEPS_PER_MINUTE = 500  # on two cores
FLOOR = 0.03  # a token less likely to be part of a name is none
LEAST = 0.25  # nor are tokens beside each other of which each is less likely
SURE = 0.5
# is added to the log-odds of LABELS: fewer false alarms, and as few addresses taken for persons as the other way round
_LEANING = np.array([0.4, 0, 1.75], np.float32)
_ROWS, _WIDTH, _HIDDEN = 2**18, 64, 128
_ROW_UNIT = 1 / 64
_SENTENCES = 300  # a batch
_LEARNING_RATE = 3e-3
_TABLE_RATE = 8.0  # times that of the rest: most rows are seen a few times only
_DROPOUT = 0.1
_HIDDEN_WORDS = 0.2  # of words are shown without their own row: names are known by their pieces and neighbours

CARD = """# Persons and addresses in captions

Version {version}, for the detector `names` of Sfumato: a tagger of hashed pieces of words and three convolutions.
Trained on generated sentences alone, with names of Faker's providers (MIT), WordNet's words and Python's reference as
plain English: {told}. No personal data went in, and none but names that many people have can come out.

Measured on templates, names and places held out from training, as fractions:

| | |
|---|---|
{table}

A name is found where half of its letters are, and leaks where one is left. Names in captions of other languages than
English, of few letters, or that are ordinary words are found less often. Cities and countries alone are no addresses.

SHA-256:
```
{files}
```
"""


@dataclass
class Batch:
    """Sentences in one row of tokens, with gaps: the rows of the U different ones, which one each is, its label."""

    rows: Ints  # of all U tokens, one after the other
    starts: Ints  # where each one's begin, (U,)
    tokens: Ints  # (B,); that of gaps is 0, with row 0, which stays nothing
    labels: Ints  # (B,)
    inside: Floats  # (B, 1), 0 in gaps


class Vocabulary:
    """The rows of tokens, remembered."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, Ints]] = {}

    def batch(self, sentences: Iterable[Sentence], chance: random.Random | None) -> Batch:
        """Sentences as a batch; with `chance`, some without the rows of their words."""
        rows: list[Ints] = [np.zeros(1, np.int64)]
        places: dict[tuple[str, str, bool], int] = {}
        tokens: list[int] = []
        labels: list[int] = []
        for sentence in sentences:
            folded, origin = fold(sentence.text)
            case = case_of(folded)
            spans = iter(sentence.spans)
            span = next(spans, None)
            for token in tokenise(folded):
                at = origin[token.start]
                while span and at >= span[2]:
                    span = next(spans, None)
                labels.append(LABELS.index(span[0]) if span and at >= span[1] else 0)
                hidden = chance is not None and chance.random() < _HIDDEN_WORDS
                key = (token.key, case, hidden)
                place = places.get(key)
                if place is None:
                    place = places[key] = len(rows)
                    rows.append(self._rows(*key))
                tokens.append(place)
            tokens += [0] * max(DILATIONS)
            labels += [0] * max(DILATIONS)
        indices = np.array(tokens)
        starts = np.cumsum([0, *map(len, rows[:-1])])
        inside = (indices > 0)[:, None].astype(np.float32)
        return Batch(np.concatenate(rows), starts, indices, np.array(labels), inside)

    def _rows(self, key: str, case: str, hidden: bool) -> Ints:
        known = self._known.get(key)
        if known is None:
            word, others = hash_token(key, _ROWS)
            known = self._known[key] = (word, np.array(others))
        word, others = known
        return np.append(others, [case_row(case, _ROWS)] if hidden else [case_row(case, _ROWS), word])


class Network:
    """The tagger in training: parameters in float32, and how a batch moves them."""

    def __init__(self, seed: int) -> None:
        self._chance = chance = np.random.default_rng(seed)
        sizes = [(3 * _WIDTH, _HIDDEN), (3 * _HIDDEN, _HIDDEN), (3 * _HIDDEN, _HIDDEN), (_HIDDEN, len(LABELS))]
        self.table_RE: Floats = chance.normal(0, 0.03, (_ROWS, _WIDTH)).astype(np.float32)
        self.table_RE[0] = 0
        self.weights = [chance.normal(0, (2 / size[0]) ** 0.5, size).astype(np.float32) for size in sizes]
        self.biases = [np.zeros(size[1], np.float32) for size in sizes]
        self._moments: dict[int, tuple[Floats, Floats]] = {}
        self._steps = 0

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Adam (Kingma, Ba 2015) on a batch's cross-entropy, which is returned; of the table only the rows in it."""
        sums_UE = np.add.reduceat(self.table_RE[batch.rows], batch.starts)
        x, seen = _rounded(sums_UE[batch.tokens])
        kept: list[tuple[Any, Any, Any]] = []
        first_seen = seen
        for layer, dilation in enumerate(DILATIONS):
            beside = neighbours(x, dilation)
            new = np.maximum(beside @ self.weights[layer] + self.biases[layer], 0)
            x, seen = _rounded(x + new if layer else new)
            spared = batch.inside * (self._chance.random(x.shape, np.float32) >= _DROPOUT).astype(np.float32)
            spared /= np.float32(1 - _DROPOUT)
            x *= spared
            kept.append((beside, (new > 0).astype(np.float32), seen * spared))
        likely = _softmax(x @ self.weights[-1] + self.biases[-1])
        num = batch.inside.sum()
        loss = -float((np.log(likely[np.arange(len(x)), batch.labels] + 1e-9) * batch.inside[:, 0]).sum() / num)

        slope = likely
        slope[np.arange(len(x)), batch.labels] -= 1
        slope *= batch.inside / np.float32(num)
        slopes = [(x.T @ slope, slope.sum(0))]
        slope_x: Any = slope @ self.weights[-1].T
        for layer in reversed(range(len(DILATIONS))):
            beside, positive, seen = kept[layer]
            slope_x = slope_x * seen
            slope_new = slope_x * positive
            slopes.append((beside.T @ slope_new, slope_new.sum(0)))
            spread = _gathered(slope_new @ self.weights[layer].T, DILATIONS[layer])
            slope_x = slope_x + spread if layer else spread
        slope_x *= first_seen * batch.inside
        slope_UE = _summed(slope_x, batch.tokens, len(batch.starts))
        per_row = np.repeat(np.arange(len(batch.starts)), np.diff(batch.starts, append=len(batch.rows)))
        touched, place = np.unique(batch.rows, return_inverse=True)
        slope_table = _summed(slope_UE[per_row], place, len(touched))

        self._steps += 1
        for index, (weight, bias) in enumerate(reversed(slopes)):
            self._adam(2 * index + 1, self.weights[index], weight, learning_rate)
            self._adam(2 * index + 2, self.biases[index], bias, learning_rate)
        slope_table[touched == 0] = 0
        self._adam(0, self.table_RE, slope_table, _TABLE_RATE * learning_rate, touched)
        return loss

    def _adam(self, index: int, values: Floats, slope: Floats, learning_rate: float, rows: Any = ...) -> None:
        if index not in self._moments:
            self._moments[index] = (np.zeros_like(values), np.zeros_like(values))
        mean, square = self._moments[index]
        mean[rows] = 0.9 * mean[rows] + 0.1 * slope
        square[rows] = 0.99 * square[rows] + 0.01 * slope**2
        rate = learning_rate * (1 - 0.99**self._steps) ** 0.5 / (1 - 0.9**self._steps)
        values[rows] -= rate * mean[rows] / (np.sqrt(square[rows]) + 1e-8)

    def tagger(self, temperature: float = 1.0, leaning_L: Floats | float = 0.0) -> Tagger:
        """The network in whole numbers, its log-odds divided by `temperature` and then raised by `leaning_L`."""
        rows = np.clip(np.rint(self.table_RE / _ROW_UNIT), -PEAK, PEAK).astype(np.int8)
        weights: list[Floats] = []
        biases: list[Floats] = []
        units = [_ROW_UNIT / STEP]
        last = self.biases[-1] + np.float32(temperature) * leaning_L
        for weight, bias in zip(self.weights, (*self.biases[:-1], last), strict=True):
            unit = float(np.abs(weight).max()) / PEAK
            weights.append(np.rint(weight / unit).astype(np.float32))
            biases.append(np.rint(bias / (unit * STEP)).astype(np.float32))
            units.append(unit)
        units[-1] *= STEP / temperature
        return Tagger(rows, tuple(weights), tuple(biases), tuple(units))


def _rounded(x: Floats) -> tuple[Floats, Floats]:
    """x as the tagger holds it, and where its gradient passes."""
    steps = np.rint(x / np.float32(STEP))
    return np.clip(steps, -PEAK, PEAK) * np.float32(STEP), (np.abs(steps) <= PEAK).astype(np.float32)


def _softmax(odds: Floats) -> Floats:
    likely = np.exp(odds - odds.max(1, keepdims=True))
    return likely / likely.sum(1, keepdims=True)


def _gathered(slope: Floats, dilation: int) -> Floats:
    """The gradient through `neighbours`."""
    width = slope.shape[1] // 3
    gathered = slope[:, width : 2 * width].copy()
    gathered[:-dilation] += slope[dilation:, :width]
    gathered[dilation:] += slope[:-dilation, 2 * width :]
    return gathered


def _summed(values: Floats, groups: Ints, num: int) -> Floats:
    """The sum of each group's rows of `values`."""
    order = np.argsort(groups, kind="stable")
    there, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((num, values.shape[1]), np.float32)
    sums[there] = np.add.reduceat(values[order], starts)
    return sums


# --- the command ---


def train_names(out: Path, minutes: float, seed: int, progress: Callable[[int, int, float], None]) -> dict[str, Any]:
    """Train, measure and write a model to `out`, which appears whole or not at all; returns its figures and digest.

    minutes: of two idle cores; it sets the number of steps, so that the same seed gives the same model on one machine.
    progress: (steps done, of how many, loss). Raises ValueError where `out` is there already or a package is absent.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: give a folder that is not, or remove it")
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes:g}: give more than 0, 3 for a model that is good enough")
    training, held_out = Corpus(held_out=False), Corpus(held_out=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:  # unwritable is told now
        network = _train(training, max(1, round(minutes * STEPS_PER_MINUTE)), seed, progress)
        temperature = _temperature(network, held_out, seed)
        tagger = network.tagger(temperature, _LEANING)
        version = _version(tagger)
        figures = measure(NamesDetector(tagger, FLOOR, version, LEAST), held_out, seed + 1)
        folder = Path(scratch, "model")
        folder.mkdir()
        _write(folder, tagger, version, {"minutes": minutes, "seed": seed, "temperature": temperature}, figures)
        digest = folder_digest(folder)
        folder.rename(out)
    return {"digest": digest, "version": version, **figures}


def _train(corpus: Corpus, steps: int, seed: int, progress: Callable[[int, int, float], None]) -> Network:
    network, vocabulary, chance = Network(seed), Vocabulary(), random.Random(seed)
    for step in range(steps):
        batch = vocabulary.batch((corpus.sentence(chance) for _ in range(_SENTENCES)), chance)
        warmth = min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        progress(step + 1, steps, network.step(batch, _LEARNING_RATE * warmth))
    return network


def _temperature(network: Network, held_out: Corpus, seed: int) -> float:
    """What to divide the log-odds by for the least cross-entropy on what is held out (Guo et al. 2017); at least 1."""
    chance = random.Random(seed)
    sentences = [held_out.sentence(chance) for _ in range(2000)]
    tagger = network.tagger()
    odds: list[Floats] = []
    labels: list[Ints] = []
    for sentence in sentences:
        batch = Vocabulary().batch([sentence], None)
        words = np.array(
            [tagger.rows_RE[rows].sum(0, dtype=np.int32) for rows in np.split(batch.rows, batch.starts[1:])]
        )
        inside = batch.tokens > 0
        odds.append(tagger.log_odds(words[batch.tokens[inside]].astype(np.float32)))
        labels.append(batch.labels[inside])
    odds_NL, labels_N = np.concatenate(odds), np.concatenate(labels)

    def cross_entropy(temperature: float) -> float:
        return -float(
            np.log(_softmax(odds_NL / np.float32(temperature))[np.arange(len(labels_N)), labels_N] + 1e-9).mean()
        )

    return min((1 + tenths / 10 for tenths in range(31)), key=cross_entropy)


def measure(detector: NamesDetector, held_out: Corpus, seed: int) -> dict[str, float]:
    """What a detector finds in sentences of templates and pools held out, as fractions.

    A name is found where half of its letters are, and leaks where one is left: by findings of SURE or more.
    """
    chance = random.Random(seed)
    named = [held_out.sentence(chance, kind, as_meant=True) for kind in ("person", "address") for _ in range(1500)]
    counts: Counter[str] = Counter()
    for sentence, found in zip(named, detector.detect([one.text for one in named]), strict=True):
        sure = [finding for finding in found if finding.score >= SURE]
        leaks = False
        for entity, start, end in sentence.spans:
            letters = [place for place in range(start, end) if sentence.text[place].isalnum()]
            hidden = sum(any(one.start <= place < one.end for one in sure) for place in letters)
            words = "one_word" if entity == "person" and " " not in sentence.text[start:end].strip() else "words"
            for what in (entity, f"{entity}_of_{words}"):
                counts[what] += 1
                counts[f"{what} found"] += 2 * hidden >= len(letters)
            leaks |= hidden < len(letters)
        uncertain = len(sure) < len(found)
        counts["holding"] += bool(sentence.spans)
        counts["leaking"] += leaks
        counts["leaking and certain"] += leaks and not uncertain
    kinds = (*ENTITIES, "person_of_words", "person_of_one_word")
    figures = {f"{kind}_recall": counts[f"{kind} found"] / counts[kind] for kind in kinds}
    figures["leaking"] = counts["leaking"] / counts["holding"]
    figures["leaking_without_the_uncertain"] = counts["leaking and certain"] / counts["holding"]
    for name, texts in (
        ("plain", [held_out.sentence(chance, "plain", as_meant=True) for _ in range(2000)]),
        ("emoji", [Sentence(name) for name in emoji_names()]),
    ):
        alone = [sentence.text for sentence in texts if not sentence.spans]
        people = [[one.score for one in found if one.entity == "person"] for found in detector.detect(alone)]
        figures[f"person_alarms_{name}"] = sum(any(score >= SURE for score in scores) for scores in people) / len(alone)
        figures[f"person_alarms_{name}_with_uncertain"] = sum(map(bool, people)) / len(alone)
    return {name: round(value, 4) for name, value in figures.items()}


def _version(tagger: Tagger) -> str:
    total = hashlib.sha256(str(tagger.units).encode())
    for array in (tagger.rows_RE, *tagger.weights, *tagger.biases):
        total.update(array.tobytes())
    return f"tagger-{FORMAT}-{total.hexdigest()[:12]}"


def _write(folder: Path, tagger: Tagger, version: str, told: Mapping[str, float], figures: Mapping[str, float]) -> None:
    arrays: dict[str, Any] = {f"weight{layer}": weight.astype(np.int8) for layer, weight in enumerate(tagger.weights)}
    arrays |= {f"bias{layer}": bias.astype(np.int32) for layer, bias in enumerate(tagger.biases)}
    np.savez_compressed(folder / MODEL_FILE, rows=tagger.rows_RE, **arrays)
    config = {
        "format": FORMAT,
        "version": version,
        "units": tagger.units,
        "floor": FLOOR,
        "least": LEAST,
        "trained": told,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    table = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in figures.items())
    files = "\n".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in (MODEL_FILE, CONFIG_FILE)
    )
    card = CARD.format(version=version, told=json.dumps(told), table=table, files=files)
    (folder / "MODEL.md").write_text(card, "utf-8")
