"""Drawn shapes with exact captions, and a recogniser that tells from pixels what was drawn: data whose truth is known.

    scene = Scene("circle", "red", count=2, size="large", place="on the left")
    scene.caption                                    # "two large red circles on the left"
    scene_of(scene.caption) == scene                 # None for any other text
    recognise(draw(scene, image_size=24)).scene == scene

The recogniser shares with the drawings the definition of forms, colours and places, and nothing else: nothing in it is
trained or fitted, so that it judges a model's images without knowing the model.
"""

# S image side in pixels; images [S, S, 3] of 0 to 255
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

# What is inside, in half diameters from the centre of mass, y downward.
FORMS: Mapping[str, Callable[[Floats, Floats], Mask]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.55) & (math.sqrt(3) * abs(x) - y <= 1.1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.1,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.35) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: abs(x**2 + y**2 - 0.625) <= 0.375,  # from half of the radius on
}
COLOURS = {
    "red": (225, 40, 40), "green": (40, 165, 60), "blue": (40, 80, 225), "yellow": (240, 205, 30),
    "purple": (150, 50, 180), "cyan": (30, 195, 215),
}  # fmt: skip
SIZES = ("small", "large")
BACKGROUND = (255, 255, 255)
COUNTS = {1: "one", 2: "two", 3: "three"}
# In sides of the image: diameters by count and size, and how far apart centres are.
DIAMETERS = {
    1: {"small": 0.32, "large": 0.5},
    2: {"small": 0.28, "large": 0.4},
    3: {"small": 0.2, "large": 0.26},
}
DISTANCES = {1: 0.0, 2: 0.5, 3: 0.33}
# The middle of all, (x, y); on the left and right they stand one above the other, elsewhere side by side.
PLACES = {
    "in the centre": (0.5, 0.5), "on the left": (0.3, 0.5), "on the right": (0.7, 0.5), "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
}  # fmt: skip
JITTER = 0.02  # at most, along each axis
LEAST_DIAMETER = 4.0  # pixels; smaller forms are not told apart
SAMPLES = 4  # along each side of a pixel
LEAST_OVERLAP = 0.75  # of a recognised form and its ideal drawing
MOST_DOUBT = 0.05  # by which another form may overlap more in one of several
MOST_COLOUR_ERROR = 0.15  # squared, of a form's pixels, in distances between its colour and the background's

Combination = tuple[str, str]  # a colour and a form


@dataclass(frozen=True)
class Scene:
    """What an image shows: `count` equal forms of one colour."""

    form: str
    colour: str
    count: int
    size: str
    place: str

    @property
    def caption(self) -> str:
        """All that there is to say; no two scenes have the same."""
        plural = ("es" if self.form.endswith("s") else "s") if self.count > 1 else ""
        return f"{COUNTS[self.count]} {self.size} {self.colour} {self.form}{plural} {self.place}"


class Seen(NamedTuple):
    """What was recognised, and how much of it and of the ideal drawing is common to both, from 0 to 1."""

    scene: Scene
    overlap: float


SCENES = tuple(
    Scene(form, colour, count, size, place)
    for form, colour, count, size, place in itertools.product(FORMS, COLOURS, COUNTS, SIZES, PLACES)
)
_BY_CAPTION = {scene.caption: scene for scene in SCENES}


def scene_of(caption: str) -> Scene | None:
    """The scene that has exactly this caption, but for white space around it; None where none has."""
    return _BY_CAPTION.get(caption.strip())


def combinations(held_out: int, seed: int) -> tuple[list[Combination], list[Combination]]:
    """All combinations of colour and form: those to be learnt from, and those that tests alone show.

    Each colour lacks `held_out` forms, and each form as many colours: whatever is held out was met, but never together.
    Raises ValueError where nothing would be left to learn from.
    """
    if not 0 <= held_out < min(len(COLOURS), len(FORMS)):
        raise ValueError(f"held_out is {held_out}: give 0 to {min(len(COLOURS), len(FORMS)) - 1} forms of each colour")
    seen, unseen = list[Combination](), list[Combination]()
    for (i, colour), (j, form) in itertools.product(enumerate(COLOURS), enumerate(FORMS)):
        tests_alone = (j - i - seed) % max(len(COLOURS), len(FORMS)) < held_out
        (unseen if tests_alone else seen).append((colour, form))
    return seen, unseen


def random_scene(chance: random.Random, among: Sequence[Combination], max_count: int = 3) -> Scene:
    """One of these combinations, with any count up to `max_count`, any size and any place."""
    colour, form = chance.choice(among)
    count, size, place = chance.randint(1, max_count), chance.choice(SIZES), chance.choice(tuple(PLACES))
    return Scene(form, colour, count, size, place)


def least_image_size(max_count: int) -> int:
    """The side in pixels from which up to so many forms can be told."""
    return math.ceil(
        LEAST_DIAMETER / min(DIAMETERS[count][size] for count in range(1, max_count + 1) for size in SIZES)
    )


def draw(scene: Scene, image_size: int, chance: random.Random | None = None) -> NDArray[np.uint8]:
    """The scene with smooth edges; `chance` moves it by up to JITTER of the side, alike for all of its forms.

    The image is uint8 [S, S, 3]. From `least_image_size` on forms can be told from each other.
    """
    diameter = DIAMETERS[scene.count][scene.size] * image_size
    x, y = PLACES[scene.place]
    along_x = x == 0.5
    dx, dy = (chance.uniform(-JITTER, JITTER) for _ in range(2)) if chance else (0.0, 0.0)
    covered = np.zeros((image_size, image_size))
    for number in range(scene.count):
        shift = (number - (scene.count - 1) / 2) * DISTANCES[scene.count]
        centre_x, centre_y = x + dx + shift * along_x, y + dy + shift * (not along_x)
        form = _coverage(scene.form, centre_x * image_size, centre_y * image_size, diameter, image_size)
        covered = np.maximum(covered, form)
    image = np.add(BACKGROUND, covered[..., None] * np.subtract(COLOURS[scene.colour], BACKGROUND))
    return np.rint(image).astype(np.uint8)


def recognise(image: NDArray[Any]) -> Seen | None:
    """What an image [S, S, 3] of 0 to 255 shows, of any number type; None where it is none of our scenes.

    The colour is the one for which the pixels lie nearest to the line from the background to it. How far along they lie
    is their coverage; what is connected is one form, and its area and centre of mass say how large and where each of
    our forms would have to be. It is the one whose ideal drawing there overlaps most, and where there are several, all
    have to be of it. Raises ValueError for another shape.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"an image has shape {image.shape}: give (S, S, 3)")
    colour, covered, error = _fitted_colour(image.astype(float))
    parts = _parts(covered)
    if len(parts) not in COUNTS or np.average(error, weights=sum(parts)) > MOST_COLOUR_ERROR:
        return None
    overlaps = {form: np.array([_overlap(part, form) for part in parts]) for form in FORMS}
    form = max(FORMS, key=lambda form: overlaps[form].mean())
    doubt = np.max(list(overlaps.values()), axis=0) - overlaps[form]
    if (overlap := float(overlaps[form].mean())) < LEAST_OVERLAP or doubt.max() > MOST_DOUBT:
        return None
    count, side = len(parts), len(image)
    diameter = 2 * math.sqrt(sum(part.sum() for part in parts) / count / _UNIT_AREAS[form]) / side
    size = min(DIAMETERS[count], key=lambda size: abs(DIAMETERS[count][size] - diameter))
    middle = np.mean([_centre(part) for part in parts], axis=0) / side
    place = min(PLACES, key=lambda place: math.dist(PLACES[place], middle))
    return Seen(Scene(form, colour, count, size, place), overlap)


def _coverage(form: str, x: float, y: float, diameter: float, image_size: int) -> Floats:
    """How far each pixel is inside the form whose centre of mass is at (x, y), in pixels: [S, S], from 0 to 1."""
    grid = (np.arange(image_size * SAMPLES) + 0.5) / SAMPLES
    inside = FORMS[form]((grid[None, :] - x) / (diameter / 2), (grid[:, None] - y) / (diameter / 2))
    return inside.reshape(image_size, SAMPLES, image_size, SAMPLES).mean((1, 3))


_UNIT_AREAS = {form: float(_coverage(form, 64, 64, 100, 128).sum()) / 50**2 for form in FORMS}  # of half diameter 1


def _overlap(part: Floats, form: str) -> float:
    """What a part and the form of its area, at its place, have in common, of what they cover together."""
    ideal = _coverage(form, *_centre(part), 2 * math.sqrt(part.sum() / _UNIT_AREAS[form]), len(part))
    return float(np.minimum(part, ideal).sum() / np.maximum(part, ideal).sum())


def _centre(part: Floats) -> tuple[float, float]:
    """The centre of mass, (x, y) in pixels."""
    grid = np.arange(len(part)) + 0.5
    return float(part.sum(0) @ grid / part.sum()), float(part.sum(1) @ grid / part.sum())


def _fitted_colour(image: Floats) -> tuple[str, Floats, Floats]:
    """The colour that leaves the least squared error when each pixel is a mixture of it and the background.

    With each pixel's part of it, from 0 to 1, and its squared error over the squared distance of the two: [S, S].
    """
    from_background = image - BACKGROUND
    found: dict[str, tuple[float, Floats, Floats]] = {}
    for colour, value in COLOURS.items():
        ray = np.subtract(value, BACKGROUND)
        covered = (from_background @ ray / (ray @ ray)).clip(0, 1)
        error = np.square(from_background - covered[..., None] * ray).sum(2)
        found[colour] = float(error.sum()), covered, error / (ray @ ray)
    best = min(found, key=lambda colour: found[colour][0])
    return best, *found[best][1:]


def _parts(covered: Floats) -> list[Floats]:
    """Coverage by connected part, as if nothing were pale; what is small beside the largest part is left out."""
    if not (covered > 0.5).any():
        return []
    covered = (covered / np.quantile(covered[covered > 0.5], 0.9)).clip(max=1)  # pale is not small
    cores = _connected(covered > 0.5)
    largest = max(core.sum() for core in cores)
    cores = [core for core in cores if core.sum() >= max(4, largest / 4)]
    parts: list[Floats] = []
    for core in cores:
        others = np.logical_or.reduce([other for other in cores if other is not core] or [np.zeros_like(core)])
        parts.append(covered * (_widened(core) & ~others))  # with its edge, which is covered by less than half
    return parts


def _connected(mask: Mask) -> list[Mask]:
    """The parts of a mask, each connected along sides and corners."""
    parts: list[Mask] = []
    left = mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part.flat[int(left.argmax())] = True
        while (wider := _widened(part) & mask).sum() > part.sum():
            part = wider
        parts.append(part)
        left &= ~part
    return parts


def _widened(mask: Mask) -> Mask:
    """The mask and all pixels beside it, corners included."""
    padded = np.pad(mask, 1)
    size = len(mask)
    return np.logical_or.reduce([padded[i : i + size, j : j + size] for i in range(3) for j in range(3)])
