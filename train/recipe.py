"""From YAML files and `--set key=value` to checked stages; whoever mistypes a key is told the file and the nearest key.

recipe = load_recipe(Path("configs/digits"), ["privacy.target_epsilon=4", "pretrain.train.steps=10"])
stage = load_stage(Path("configs/digits/30_pretrain.yaml"), ["train.steps=10"])
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from train.config import STAGES, FilterStage, LatentsStage, StageConfig, TrainStage, check_model

FILE_NAME = re.compile(r"^\d+_(?P<name>[a-z][a-z0-9_]*)\.yaml$")

SectionType = TypeVar("SectionType", bound=BaseModel)

# What a stage may read from: init_from needs weights, data_from needs shards; what makes shards, those of images.
SOURCES = {"init_from": ("pretrain", "finetune_dp"), "data_from": ("ingest", "filter", "latents")}
IMAGE_SOURCES = ("ingest", "filter")


class ConfigError(ValueError):
    """A recipe, a stage file or an override is wrong; the message names the file, the key and the mend."""


@dataclass(frozen=True)
class Recipe:
    """The stages of one folder, in order, each with its file and the overrides that touch it."""

    name: str
    folder: Path
    stages: tuple[StageConfig, ...]
    paths: Mapping[str, Path]
    overrides: Mapping[str, tuple[str, ...]]

    def stage(self, name: str) -> StageConfig:
        """The stage named `name`; another name is a ConfigError that suggests the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise ConfigError(f"{self.folder}: no stage named {name!r}{_nearest(name, names)}; it has {', '.join(names)}")


def load_recipe(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read every stage of `folder`, put each override where it belongs, and check that the stages fit together.

    An override `train.steps=10` goes to every stage that has the key, `pretrain.train.steps=10` to the stage named
    first; one that no stage has is refused.
    """
    named = {path: _stage_name(path) for path in _stage_files(folder)}
    files = sorted(named, key=lambda path: int(path.name.split("_", 1)[0]))
    raw = {named[path]: (path, _read(path)) for path in files}
    if len(raw) != len(files):
        raise ConfigError(f"{folder}: two files name the same stage: {', '.join(path.name for path in files)}")
    placed: dict[str, list[str]] = {name: [] for name in raw}
    for override in overrides:
        for name, text in _place(override, raw, folder):
            placed[name].append(text)
    stages = tuple(_build(path, data, placed[name]) for name, (path, data) in raw.items())
    recipe = Recipe(
        name=folder.resolve().name,
        folder=folder,
        stages=stages,
        paths={name: path for name, (path, _) in raw.items()},
        overrides={name: tuple(texts) for name, texts in placed.items()},
    )
    _check_references(recipe)
    return recipe


def load_stage(path: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Read one stage file; every override must be of a key this stage has."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such stage file{_nearest_file(path)}")
    data = _read(path)
    name = _stage_name(path)
    texts = [text for override in overrides for _, text in _place(override, {name: (path, data)}, path)]
    return _build(path, data, texts)


def read_section(model: type[SectionType], path: Path, **given: Any) -> SectionType:
    """One mapping from a YAML file of its own, with the keys `given` that the file does not hold."""
    return _validate(model, path, {**given, **_read(path)})


def differing_key(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first dotted key, in the order of `new`, whose value differs, with both values; None where all agree."""
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            deeper = differing_key(before, after)
            if deeper is not None:
                return f"{key}.{deeper[0]}", deeper[1], deeper[2]
        return key, before, after
    return None


# --- files ---


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's core types (`1e-5` is a number, `no` and `12:30` are strings); a key given twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"^(?:true|false)$", ["t", "f"]),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
# PyYAML's own constructors read YAML 1.1, where a leading 0 is octal.
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _read(path: Path) -> dict[str, Any]:
    data = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, expected a mapping that begins with `stage:`")
    return data


def _stage_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such recipe folder{_nearest_file(folder)}")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder}: holds no stage files; expected names such as 10_ingest.yaml")
    return files


def _stage_name(path: Path) -> str:
    match = FILE_NAME.match(path.name)
    if match is None:
        raise ConfigError(f"{path}: a stage file is named NUMBER_NAME.yaml in lower case, such as 10_ingest.yaml")
    return match["name"]


# --- overrides ---


def _place(override: str, raw: Mapping[str, tuple[Path, dict[str, Any]]], where: Path) -> Iterator[tuple[str, str]]:
    """Yield (stage name, "key=value") for each stage that `override` touches; at least one."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as train.steps=10")
    first, _, rest = key.partition(".")
    keys = {name: list(_settable(_kind(path, data), data)) for name, (path, data) in raw.items()}
    if first in raw and rest in keys[first]:
        yield first, f"{rest}={value}"
        return
    touched = [name for name in raw if key in keys[name]]
    if not touched:
        known = [qualified for name in raw for k in keys[name] for qualified in (k, f"{name}.{k}")]
        raise ConfigError(f"--set {override}: {where} has no key {key}{_nearest(key, known)}")
    for name in touched:
        yield name, f"{key}={value}"


def _settable(model: type[BaseModel], data: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of `model` that an override may set; a section the file leaves null has none inside."""
    for key, field in model.model_fields.items():
        if not prefix and key in ("name", "stage"):
            continue
        yield prefix + key
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, dict) or isinstance(field.get_default(call_default_factory=True), BaseModel):
            for section in _sections(field.annotation):
                yield from _settable(section, value, f"{prefix}{key}.")


def _apply(data: Any, key: str, value: Any) -> dict[str, Any]:
    """`data` with `value` at the dotted `key`, the mapping given left as it was."""
    first, _, rest = key.partition(".")
    data = dict(data or {})
    data[first] = _apply(data.get(first), rest, value) if rest else value
    return data


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as `Model | None` or a discriminated union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        return [model for inner in get_args(annotation) for model in _sections(inner)]
    return []


# --- checks ---


def _kind(path: Path, data: Mapping[str, Any]) -> type[StageConfig]:
    kind = data.get("stage")
    if kind in STAGES:
        return STAGES[kind]
    if kind is None:
        raise ConfigError(f"{path}: stage is missing; expected one of {', '.join(STAGES)}")
    raise ConfigError(f"{path}: stage is {kind!r}{_nearest(str(kind), list(STAGES))}; {_known(list(STAGES))}")


def _build(path: Path, data: dict[str, Any], overrides: Sequence[str]) -> StageConfig:
    model = _kind(path, data)
    if "name" in data:
        raise ConfigError(f"{path}: name: a stage is named by its file, {_stage_name(path)} here; remove the key")
    for override in overrides:
        key, _, text = override.partition("=")
        data = _apply(data, key, _parse(text, f"--set {override}"))
    return _validate(model, path, {"name": _stage_name(path), **data})


def _validate(model: type[SectionType], path: Path, data: Mapping[str, Any]) -> SectionType:
    try:
        # Through JSON, so that strictness still lets a list be a tuple and a string a path, but no `true` be 1.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = [_explain(model, data, detail) for detail in error.errors()]
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems)) from error


def _explain(model: type[BaseModel], data: Any, error: ErrorDetails) -> str:
    """One pydantic error as "dotted.key: what is wrong"."""
    keys: list[str] = []
    candidates: list[type[BaseModel]] = [model]
    siblings: list[str] = []
    for part in error["loc"]:
        fields = {name: field for candidate in candidates for name, field in candidate.model_fields.items()}
        present = isinstance(data, dict) and part in data
        if isinstance(part, int):
            data = data[part] if isinstance(data, list) and part < len(data) else None
        elif part in fields or present or part == error["loc"][-1]:
            siblings = [name for name in fields if name not in ("name", "stage")]
            candidates = _sections(fields[part].annotation) if part in fields else []
            data = data.get(part) if isinstance(data, dict) else None
        else:
            # A union's tag is no key of the file; it says which of the union's models is meant.
            tagged = [c for c in candidates if any(part in get_args(f.annotation) for f in c.model_fields.values())]
            candidates = tagged or candidates
            continue
        keys.append(str(part))
    return _sentence(".".join(keys), siblings, error)


def _sentence(dotted: str, siblings: Sequence[str], error: ErrorDetails) -> str:
    context, given = error.get("ctx", {}), error["input"]
    said = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "value_error" if not dotted or said.startswith(dotted):
            sentence = said
        case "value_error":
            sentence = f"{dotted}: {said}"
        case "extra_forbidden":
            section, _, key = dotted.rpartition(".")
            sentence = f"{dotted}: unknown key{_nearest(key, siblings, section)}; {_known(siblings)}"
        case "missing":
            sentence = f"{dotted} is missing"
        case "union_tag_invalid":
            known = re.findall(r"'([^']*)'", context["expected_tags"])
            sentence = f"{dotted}: unknown kind {context['tag']!r}{_nearest(context['tag'], known)}; {_known(known)}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            sentence = f"{dotted} is {given!r}{_nearest(str(given), known)}; {_known(known)}"
        case "model_type":
            sentence = f"{dotted} is {given!r}: it should be a mapping"
        case _:
            sentence = f"{dotted} is {given!r}: " + re.sub(r"^(Input|Tuple|List|String) should", "it should", said)
    return sentence


def _check_references(recipe: Recipe) -> None:
    """Each stage named in init_from or data_from comes earlier and is of a kind that makes what is asked of it."""
    earlier: dict[str, StageConfig] = {}
    for stage in recipe.stages:
        path = recipe.paths[stage.name]
        for key, kinds in SOURCES.items():
            images = key == "data_from" and isinstance(stage, FilterStage | LatentsStage)
            made_by = IMAGE_SOURCES if images else kinds
            value = getattr(stage, key, None)
            for name in [value] if isinstance(value, str) else list(value or ()):
                usable = [other.name for other in earlier.values() if other.kind in made_by]
                if name in usable:
                    if key == "init_from":
                        _check_model(recipe, stage, name)
                    continue
                why = f"is of kind {earlier[name].kind}" if name in earlier else "is no earlier stage of the recipe"
                raise ConfigError(
                    f"{path}: {key} is {name!r}, which {why}{_nearest(name, usable)}; "
                    f"it can be {' or '.join(usable) or 'nothing here, for no earlier stage gives what it needs'}"
                )
        earlier[stage.name] = stage


def _check_model(recipe: Recipe, stage: StageConfig, source: str) -> None:
    """The stage can do something with the model that `source` has trained."""
    trained = recipe.stage(source)
    assert isinstance(trained, TrainStage)
    model = model_of(recipe, trained).model
    assert model is not None, "a stage without init_from has a model"
    try:
        if isinstance(stage, TrainStage):
            check_model(stage, model)
        elif (model.name == "vae") != isinstance(stage, LatentsStage):
            raise ValueError(
                f"init_from is {source!r}, whose model is {model.name}: a latents stage takes a vae, and other stages "
                "any other"
            )
    except ValueError as error:
        raise ConfigError(f"{recipe.paths[stage.name]}: {error}") from None


def model_of(recipe: Recipe, stage: TrainStage) -> TrainStage:
    """The stage that gives `stage` its architecture: itself, or the end of its init_from chain."""
    while stage.init_from is not None:
        source = recipe.stage(stage.init_from)
        assert isinstance(source, TrainStage), "checked when the recipe was loaded"
        stage = source
    return stage


def _known(words: Sequence[str]) -> str:
    return f"known are {', '.join(words)}"


def _nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    dotted = f"{prefix}.{match[0]}" if match and prefix else (match[0] if match else "")
    return f" (did you mean {dotted}?)" if match else ""


def _nearest_file(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    return _nearest(path.name, siblings, str(path.parent)).replace(f"{path.parent}.", f"{path.parent}/")
