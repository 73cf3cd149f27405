"""Persons and addresses in captions: a small tagger of our own, trained by `python -m privacy.pii train-names`.

A token is the sum of the rows that its word, its pieces and its form hash to; three convolutions over its neighbours
and one softmax say what it is. All before the softmax is arithmetic on small whole numbers, which float32 holds
exactly, and probabilities are rounded: what is found in a text depends neither on its batch nor on the BLAS.
Sources: Bojanowski et al. 2017 (words as sums of hashed pieces); Strubell et al. 2017 (dilated convolutions).
"""

# N tokens, E width of an embedding, H of a hidden layer, L labels, R rows of the table

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.pii.findings import Finding, MissingDetector, TextDetector
from privacy.pii.folding import fold
from privacy.pii.model_folders import users_folder
from privacy.pii.names_spacy import SpacyNamesDetector

Floats = NDArray[np.float32]

NAME = "names"
ENTITIES = ("person", "address")
LABELS = ("nothing", *ENTITIES)
FORMAT = 2  # of a model's folder, and of how texts become tokens and tokens rows
MODEL_FILE, CONFIG_FILE = "model.npz", "config.json"

DILATIONS = (1, 2, 4)
RADIUS = sum(DILATIONS)  # what a token is depends on no token further away
STEP = 1 / 16  # activations are whole multiples of it
PEAK = 127  # and no more than so many, as weights are
_EXACT = 2**24  # float32 holds whole numbers up to here
_SURELY = 0.98  # an address rather than a person: many streets are called as people are
_PIECE = 4096  # tokens of a long text at once
_KNOWN_WORDS = 50_000  # whose sums of rows are kept

# --- tokens ---

_UPPER = "".join(c for c in map(chr, range(0x530)) if c.isupper())
_LOWER = "".join(c for c in map(chr, range(0x530)) if c.isalpha() and not c.isupper())
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces
# with the space before it; CamelCase and letters beside digits are parted
_TOKEN = re.compile(
    rf"\s?(?:[{_UPPER}]+(?![{_LOWER}])|[{_UPPER}]?[{_LOWER}]+|[{_IDEOGRAPH}]|[^\W\d_{_UPPER}{_LOWER}{_IDEOGRAPH}]+"
    r"|\d+|[^\w\s]|_)"
)
_LONGEST = 24  # characters of a token that are looked at


class Token(NamedTuple):
    """What a token is looked up by, the space before it included, and where the token itself lies."""

    key: str
    start: int
    end: int


def tokenise(text: str) -> Iterator[Token]:
    """The tokens of a folded text."""
    for match in _TOKEN.finditer(text):
        key = match[0]
        yield Token(key[: _LONGEST + 1], match.start() + key[0].isspace(), match.end())


class Hashed(NamedTuple):
    """The rows of a token: of the word itself, which training hides at times, and of all else."""

    word: int
    others: tuple[int, ...]


def hash_token(token: str, rows: int) -> Hashed:
    """The rows of a table that stand for a token; row 0 is nobody's."""
    form = token.lstrip()
    lowered = form.lower()
    spaced = "n" if token[0] == "\n" else "s" if token[0] != form[0] else "-"
    features = [f"space {spaced}", f"shape {_shape(form)}"]
    word = f"word {lowered}"
    if form[0].isdigit():
        word = f"digits {len(form)}"
        features += [f"number {lowered}"] if len(form) < 3 else []
    elif form[0].isalpha():
        bounded = f"<{lowered}>"
        features += [
            f"case {_shape(form)} {lowered[:10]}",
            f"length {min(len(lowered), 12)}",
            f"first {ord(form[0]) >> 7}",
        ]
        for size in (2, 3, 4, 5):
            features += [f"piece {bounded[at : at + size]}" for at in range(len(bounded) - size + 1)]
        features += [f"end {lowered[-2:]}", f"end {lowered[-3:]}", f"beginning {lowered[:3]}"]
    return Hashed(_row(word, rows), tuple(_row(feature, rows) for feature in features))


def case_of(text: str) -> str:
    """How a whole text is written: where all is in capitals, capitals tell nothing."""
    if text[1:].islower():
        return "lower" if text[:1].islower() else "sentence"
    return "lower" if text.islower() else "upper" if text.isupper() else "title" if text.istitle() else "mixed"


def case_row(case: str, rows: int) -> int:
    """The row that is added to every token of a text."""
    return _row(f"text {case}", rows)


def _row(feature: str, rows: int) -> int:
    return 1 + zlib.crc32(feature.encode("utf-8", "surrogatepass")) % (rows - 1)


def _shape(form: str) -> str:
    if form[0].isdigit():
        return f"0{min(len(form), 6)}"
    if not form[0].isalpha():
        return form[0]
    if len(form) == 1:
        return "A" if form.isupper() else "a" if form.islower() else "?"
    return "AA" if form.isupper() else "Aa" if form[0].isupper() else "aa" if form.islower() else "??"


# --- the tagger ---


@dataclass(frozen=True)
class Tagger:
    """A trained tagger, all in whole numbers: rows as int8, the rest as float32 that holds them exactly.

    weights: of each convolution, (3 E, H) and (3 H, H), then of the softmax, (H, L); biases: in units of the products
    that they are added to; units: what makes a product an activation, that of the rows first, and a log-odds last.
    """

    rows_RE: NDArray[np.int8]
    weights: tuple[Floats, ...]
    biases: tuple[Floats, ...]
    units: tuple[float, ...]

    def __post_init__(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            assert PEAK * np.abs(weight).sum(0).max() + np.abs(bias).max() < _EXACT

    def word(self, token: str) -> Floats:
        """The sum of a token's rows, (E,)."""
        word, others = hash_token(token, len(self.rows_RE))
        return self.rows_RE[[word, *others]].sum(0, dtype=np.int32).astype(np.float32)

    def log_odds(self, words_NE: Floats) -> Floats:
        """What the softmax takes, (N, L), for the words of a text in order."""
        x = _clipped(np.rint(words_NE * np.float32(self.units[0])))
        for layer, dilation in enumerate(DILATIONS):
            products = neighbours(x, dilation) @ self.weights[layer] + self.biases[layer]
            new = np.rint(np.maximum(products, 0) * np.float32(self.units[layer + 1]))
            x = _clipped(x + new if layer else new)
        return (x @ self.weights[-1] + self.biases[-1]) * np.float32(self.units[-1])


def neighbours(x: Floats, dilation: int) -> Floats:
    """Each row between those `dilation` before and after it, zeros past the ends: (N, C) -> (N, 3 C)."""
    num, width = x.shape
    beside = np.zeros((num, 3 * width), np.float32)
    beside[dilation:, :width] = x[:-dilation]
    beside[:, width : 2 * width] = x
    beside[:-dilation, 2 * width :] = x[dilation:]
    return beside


def _clipped(x: Floats) -> Floats:
    return np.clip(x, -PEAK, PEAK)


class Hot(NamedTuple):
    """A token that may be part of a name: which of the text's tokens it is, where it lies, and how likely.

    address: how likely it is that of an address, if of either.
    """

    number: int
    start: int
    end: int
    address: float
    score: float

    @property
    def entity(self) -> str:
        return ENTITIES[self.address > 0.5]


class NamesDetector:
    """The TextDetector "names" on a folder that train-names wrote.

    A finding is a run of tokens each of which is part of a name with a probability of at least the model's floor, and
    one of them of at least its `least`. Its score is that of its surest token, so that below .5 none of them is one
    more likely than not. Time is linear in a text's length, and memory beside it in that of what is found.
    """

    name = NAME
    entities: tuple[str, ...] = ENTITIES

    def __init__(self, tagger: Tagger, floor: float, version: str, least: float = 0.0) -> None:
        self.version = version
        self._tagger = tagger
        self._floor, self._least = floor, least
        self._words: dict[str, Floats] = {}

    @classmethod
    def load(cls, folder: Path) -> NamesDetector:
        """The model in a folder, whose bytes are trusted: compare its digest before. Raises MissingDetector."""
        try:
            config: Any = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            readable = config["format"] == FORMAT and (folder / MODEL_FILE).is_file()
        except (OSError, ValueError, LookupError, TypeError):
            config, readable = None, False
        if not readable:
            raise MissingDetector(
                f"{folder} holds no model of names of format {FORMAT}, which this release reads: train one with "
                "`python -m privacy.pii train-names`"
            )
        with np.load(folder / MODEL_FILE, allow_pickle=False) as arrays:
            layers = range(len(DILATIONS) + 1)
            tagger = Tagger(
                arrays["rows"],
                tuple(arrays[f"weight{layer}"].astype(np.float32) for layer in layers),
                tuple(arrays[f"bias{layer}"].astype(np.float32) for layer in layers),
                tuple(config["units"]),
            )
        return cls(tagger, config["floor"], config["version"], config["least"])

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Findings of each text, in order and without overlap."""
        return [self._detect(text) for text in texts]

    def _detect(self, text: str) -> list[Finding]:
        folded, places = fold(text)
        found: list[Finding] = []
        for entity, run in _runs(self._hot(folded), folded):
            words = [token for token in run if folded[token.start].isalnum()]
            score = max((token.score for token in words), default=0.0)
            if not words or score < self._least:
                continue
            start, end = places[words[0].start], places[words[-1].end - 1] + 1
            found.append(Finding(entity, start, end, self.name, self.version, score))
        return found

    def _hot(self, text: str) -> Iterator[Hot]:
        case = case_of(text)
        done = 0
        for before, here, after in _pieces(text):
            odds_NL = self._tagger.log_odds(self._look_up([*before, *here, *after], case))[len(before) :][: len(here)]
            likely_NL = np.exp(odds_NL.astype(np.float64) - odds_NL.max(1, keepdims=True))
            likely_NL /= likely_NL.sum(1, keepdims=True)
            for number in np.flatnonzero(1 - likely_NL[:, 0] >= self._floor):
                token, likely_L = here[number], likely_NL[number]
                address, score = likely_L[2] / (likely_L[1] + likely_L[2]), round(float(1 - likely_L[0]), 3)
                yield Hot(done + int(number), token.start, token.end, float(address), score)
            done += len(here)

    def _look_up(self, tokens: Sequence[Token], case: str) -> Floats:
        words = self._words
        if len(words) > _KNOWN_WORDS:
            words.clear()
        rows: list[Floats] = []
        for token in tokens:
            row = words.get(token.key)
            if row is None:
                row = words[token.key] = self._tagger.word(token.key)
            rows.append(row)
        return np.array(rows) + self._tagger.rows_RE[case_row(case, len(self._tagger.rows_RE))]


def _pieces(text: str) -> Iterator[tuple[list[Token], list[Token], list[Token]]]:
    """The tokens of a text piece by piece, and those that reach into a piece from before and after it."""
    tokens = tokenise(text)
    before: list[Token] = []
    here = list(itertools.islice(tokens, _PIECE))
    while here:
        after = list(itertools.islice(tokens, _PIECE))
        yield before[-RADIUS:], here, after[:RADIUS]
        before, here = here, after


def _runs(tokens: Iterator[Hot], text: str) -> Iterator[tuple[str, list[Hot]]]:
    """Neighbouring tokens of one entity; those without a digit are an address only where they surely are."""
    for _, beside in itertools.groupby(enumerate(tokens), lambda counted: counted[1].number - counted[0]):
        parts: list[tuple[str, list[Hot]]] = []
        for likely, part in itertools.groupby((token for _, token in beside), lambda token: token.entity):
            run = [*part]
            numbered = any(text[token.start].isdigit() for token in run)
            surely = sum(token.address for token in run) > _SURELY * len(run)
            entity = likely if numbered else ENTITIES[surely]
            if parts and parts[-1][0] == entity:
                parts[-1][1].extend(run)
            else:
                parts.append((entity, run))
        yield from parts


def open_names(model: str | None = None, digest: str | None = None) -> TextDetector:
    """The detector on the user's `model` folder of that `digest`; without one, on the packaged spaCy model.

    Raises MissingDetector.
    """
    if model is None or digest is None:
        return SpacyNamesDetector()
    return NamesDetector.load(users_folder(NAME, model, digest))
