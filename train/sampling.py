"""Sampling for a person: what scripts/sample.py does, from a finished run's stage or from an exported folder."""

from __future__ import annotations

import argparse
import codecs
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Picture
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from models.dit import DiT
from models.flow import Objective
from models.packed import MAX_ASPECT_RATIO, Document, Image, Text
from models.tokenizer import SPECIALS, Tokenizer
from models.unified import Unified, UnifiedConfig
from models.unified_objective import UnifiedObjective
from train.autoencoding import VAE_FOLDER, Decoder, decoder_of, open_decoder
from train.config import STAGES as STAGE_KINDS
from train.config import ExportStage, TrainStage
from train.documents import layout_of
from train.evaluation import image_grid
from train.generation import build, draw, generate, load_export, objective_of, write
from train.images import ImageError, open_image, pixels
from train.loop import load_average
from train.run_folder import RunFolder

IMAGE = "<|image|>"  # in a prompt: an image goes here
_SPECIAL = re.compile(r"<\|[^|<>\s]*\|>")
_COLUMNS = 8


@dataclass(frozen=True)
class Opened:
    """A model ready to sample from; `decode` makes images of what it draws where that is latents."""

    model: nn.Module
    objective: Objective | UnifiedObjective
    decode: Decoder | None
    name: str  # for people


def sample(arguments: argparse.Namespace) -> int:
    """Do what the command line of scripts/sample.py asks and return its exit status; a ValueError is the user's."""
    opened = open_model(arguments.model)
    opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(opened.model, Unified):
        return _sample_unified(opened, opened.model, arguments)
    if isinstance(opened.model, DiT):
        return _sample_classes(opened, opened.model, arguments)
    raise ValueError(f"{opened.name} neither draws nor writes: give a model dit or unified")


def open_model(given: str) -> Opened:
    """The model of an exported folder, or of a run's stage: "runs/shapes:pretrain", or its last one, "runs/shapes"."""
    if (Path(given) / "config.json").is_file():
        return _open_export(Path(given))
    path, _, stage = (given, "", "") if Path(given).exists() else given.rpartition(":")
    if not (Path(path) / "run.json").is_file():
        raise ValueError(f"--model is {given}: give a run folder, RUN:STAGE, or an exported folder (with config.json)")
    run = RunFolder.existing(Path(path))
    finished = [manifest for folder in sorted(run.path.iterdir()) if (manifest := run.read_manifest(folder.name))]
    fit = {
        manifest["stage"]: manifest
        for manifest in sorted(finished, key=lambda manifest: manifest["finished"])
        if issubclass(STAGE_KINDS[manifest["kind"]], TrainStage | ExportStage)
    }
    if not fit or (stage and stage not in fit):
        has = ", ".join(fit) or "none"
        raise ValueError(f"--model is {given}: the run's finished stages with a model are {has}")
    chosen = fit[stage or [name for name, manifest in fit.items() if manifest["kind"] != ExportStage.kind][-1]]
    if chosen["kind"] == ExportStage.kind:
        return _open_export(run.path / stage / "model")
    config, weights, _ = load_average(run, chosen["stage"])
    objective, decode = objective_of(run, chosen["stage"], config), decoder_of(run, chosen["config"]["data_from"])
    return Opened(build(config, weights), objective, decode, f"{run.recipe}, stage {chosen['stage']}")


def _open_export(folder: Path) -> Opened:
    model, objective, config = load_export(folder)
    decoder = open_decoder(folder / VAE_FOLDER) if (folder / VAE_FOLDER).is_dir() else None
    return Opened(model, objective, decoder, f"{folder} ({config['source']})")


def documents_of(
    prompts: Sequence[str | bytes], images: Sequence[Tensor], config: UnifiedConfig, tokenizer: Tokenizer
) -> list[Document]:
    """A document a prompt, with the images where it says `<|image|>`, in order; without prompts, one an image.

    Of what the model's vocabulary lacks it is said, on the standard error, what the model reads instead.
    Raises ValueError for a prompt that is empty, too long for the model, not valid UTF-8, or has another special token,
    and where prompts ask for another number of images than there are.
    """
    if not prompts:
        return [[Image(image)] for image in images]
    left = list(images)
    documents: list[Document] = []
    for number, given in enumerate(prompts, 1):
        _tokens(given, None, tokenizer, number)  # refuses what is not UTF-8
        text = _shown(given)
        for token in _SPECIAL.findall(text):
            if token != IMAGE:
                known = "the program alone places" if token in SPECIALS.values() else "is unknown"
                raise ValueError(f"prompt {number} has the special token {token}, which {known}: take it out")
        parts = list[Text | Image]()
        for place, words in enumerate(text.split(IMAGE)):
            if place:
                if not left:
                    raise ValueError(f"prompt {number} says {IMAGE} once more than there are images: give --image too")
                parts.append(Image(left.pop(0)))
            if words.strip():
                parts.append(Text(_tokens(words.strip(), config.max_caption_tokens, tokenizer, number)))
        if not parts:
            raise ValueError(f"prompt {number} is empty: say what to draw")
        documents.append(parts)
    if left:
        raise ValueError(f"{len(left)} of {len(images)} images are in no prompt: say {IMAGE} where each goes")
    return documents


def _tokens(words: str | bytes, most: int | None, tokenizer: Tokenizer, number: int) -> list[int]:
    try:
        tokens = tokenizer.encode(words, max_tokens=most, too_long="refuse").tokens
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
    read = tokenizer.decode(tokens)
    if most is not None and read.split() != _shown(words).split():
        print(f"prompt {number} has what the model's vocabulary lacks: it reads {read!r}", file=sys.stderr)
    return tokens


def read_image(path: Path, channels: int, image_size: int) -> Tensor:
    """An image file as the model sees it, [C, S, S] in [-1, 1]: cropped in the middle and scaled.

    Raises ValueError where it cannot be read, has no area, or one side is more than 8 times the other.
    """
    try:
        data = path.read_bytes()
        width, height = open_image(data).size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"{path} is {width} x {height}: crop it to a ratio of {MAX_ASPECT_RATIO} or less")
        return torch.from_numpy(pixels(data, channels, image_size, image_size).copy()).float().div_(127.5).sub_(1)
    except ImageError as error:
        raise ValueError(f"{path} is no image that can be read ({error.reason}): give PNG, JPEG, WebP or GIF") from None


def read_images(paths: Sequence[Path], config: UnifiedConfig, vae: Decoder | None) -> list[Tensor]:
    """Image files as the model sees them: their pixels or, of a model trained on latents, what `vae` encodes them to.

    An image's latents are a function of it and the VAE alone. Raises ValueError as `read_image`.
    """
    if vae is None:
        return [read_image(path, config.channels, config.image_size) for path in paths]
    channels, image_size, _ = vae.image_shape
    return [vae.encode(read_image(path, channels, image_size)[None])[0] for path in paths]


def _sample_unified(opened: Opened, model: Unified, arguments: argparse.Namespace) -> int:
    if arguments.label:
        raise ValueError(f"--label is for models of classes, and {opened.name} is unified: give --prompt or --image")
    assert isinstance(opened.objective, UnifiedObjective)
    config, tokenizer = model.config, layout_of(model.config).tokenizer
    images = read_images(arguments.image, config, opened.decode)
    prompts = _prompts(arguments.prompt)
    documents = documents_of(prompts, images, config, tokenizer)
    if not documents:
        raise ValueError("nothing to do: give --prompt or --image")
    names = [_shown(prompt) for prompt in prompts] or [path.name for path in arguments.image]
    documents = [document for document in documents for _ in range(arguments.number)]
    names = [name for name in names for _ in range(arguments.number)]
    if arguments.make == "text" or (arguments.make is None and not prompts):
        with _bar("writing", len(documents)) as told:
            texts = write(
                model, documents, temperature=arguments.temperature, seed=arguments.seed, progress=told
            )  # fmt: skip
        for name, text in zip(names, texts, strict=True):
            line = f"{name}: {text}" if len(texts) > 1 else text
            # a model may write anything, and a file be called anything
            print("".join(each if each.isprintable() else "\ufffd" for each in line))
        return 0
    _require_place(arguments.out)
    with _bar("drawing", len(documents)) as told:
        drawn = draw(
            model, opened.objective, documents, seed=arguments.seed, sampler=arguments.sampler, steps=arguments.steps,
            guidance=arguments.guidance, decode=opened.decode, progress=told,
        )  # fmt: skip
    return _keep(drawn, names, arguments.out)


def _sample_classes(opened: Opened, model: DiT, arguments: argparse.Namespace) -> int:
    if arguments.prompt or arguments.image or arguments.make:
        raise ValueError(f"--prompt, --image and --make are for unified models, and {opened.name} has classes: --label")
    config, wanted = model.config, arguments.label or list(range(model.config.num_classes))
    if beyond := [label for label in wanted if not 0 <= label < config.num_classes]:
        raise ValueError(f"--label is {beyond[0]}: {opened.name} has classes 0 to {config.num_classes - 1}")
    assert isinstance(opened.objective, Objective)
    labels = torch.tensor(wanted).repeat_interleave(arguments.number)
    _require_place(arguments.out)
    with _bar("drawing", len(labels)) as told:
        drawn = generate(
            model, opened.objective, labels, seed=arguments.seed, sampler=arguments.sampler, steps=arguments.steps,
            guidance=arguments.guidance, decode=opened.decode, progress=told,
        )  # fmt: skip
    return _keep(drawn, [f"class {label}" for label in labels.tolist()], arguments.out)


def _prompts(given: Sequence[str]) -> list[str | bytes]:
    """As they were given; "-" stands for the lines of the standard input, as bytes, without a byte order mark."""
    prompts: list[str | bytes] = []
    for prompt in given:
        if prompt == "-":
            lines = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8).splitlines()
            prompts += [line for line in lines if line.strip()]
        else:
            prompts.append(prompt)
    return prompts


def _shown(prompt: str | bytes) -> str:
    return prompt.decode() if isinstance(prompt, bytes) else prompt


def _require_place(out: Path) -> None:
    """Make the folder that the images go to; ValueError or OSError where they cannot, before they are drawn."""
    is_sheet = _is_sheet(out)
    if out.is_dir() if is_sheet else out.suffix.lower() in Picture.registered_extensions():
        raise ValueError(f"--out is {out}: give one sheet, FILE.png, or a folder that is not called like an image")
    (out.parent if is_sheet else out).mkdir(parents=True, exist_ok=True)


def _is_sheet(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def _keep(images: Tensor, names: Sequence[str], out: Path) -> int:
    """One sheet with the names beneath the images or, into a folder, each image by itself."""
    if _is_sheet(out):
        image_grid(images, min(_COLUMNS, len(images)), out, notes=[[(name, "black")] for name in names])
        print(out)
        return 0
    values_NHWC = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(-1).numpy()
    for number, values in enumerate(values_NHWC):
        Picture.fromarray(values).save(out / f"{number:04d}.png")
    print(f"{out}: {len(images)} images")
    return 0


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar where there is a terminal, on the standard error; what it gives is told how many are done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
