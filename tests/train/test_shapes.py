"""Every scene has one caption and one look, the recogniser reads both back, and takes nothing else for a scene."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from train.shapes import (
    COLOURS,
    FORMS,
    SCENES,
    Scene,
    combinations,
    draw,
    least_image_size,
    random_scene,
    recognise,
    scene_of,
)

RED, BLUE = COLOURS["red"], COLOURS["blue"]
CIRCLE = Scene("circle", "red", 1, "large", "in the centre")


def test_captions_say_everything_and_are_read_back_exactly() -> None:
    assert len(SCENES) == len({scene.caption for scene in SCENES}) == 6 * 6 * 3 * 2 * 5
    assert all(scene_of(scene.caption) == scene for scene in SCENES)
    assert CIRCLE.caption == "one large red circle in the centre"
    assert Scene("cross", "cyan", 2, "small", "on the left").caption == "two small cyan crosses on the left"
    assert scene_of(" one large red circle in the centre\n") == CIRCLE
    for other in ("", "one large red circles in the centre", "a large red circle", CIRCLE.caption.upper()):
        assert scene_of(other) is None


@pytest.mark.parametrize("held_out", [0, 1, 2, 5])
def test_what_is_held_out_was_met_in_every_colour_and_form_but_never_together(held_out: int) -> None:
    for seed in range(3):
        seen, unseen = combinations(held_out, seed)
        assert sorted(seen + unseen) == sorted((colour, form) for colour in COLOURS for form in FORMS)
        for place, all_of_them in enumerate((COLOURS, FORMS)):
            assert Counter(pair[place] for pair in unseen) == {each: held_out for each in all_of_them if held_out}
            assert {pair[place] for pair in seen} == set(all_of_them)
    assert not held_out or combinations(held_out, 0) != combinations(held_out, 1)


@pytest.mark.parametrize("held_out", [-1, 6])
def test_holding_out_all_or_less_than_nothing_is_refused(held_out: int) -> None:
    with pytest.raises(ValueError, match=f"held_out is {held_out}: give 0 to 5"):
        combinations(held_out, 0)


def test_random_scenes_keep_to_their_combinations_and_count() -> None:
    chance, (_, unseen) = random.Random(0), combinations(1, 0)
    scenes = [random_scene(chance, unseen, 2) for _ in range(600)]
    assert {(scene.colour, scene.form) for scene in scenes} == set(unseen)
    assert set(scenes) <= set(SCENES) and {scene.count for scene in scenes} == {1, 2}


def test_a_drawing_has_its_colour_its_place_and_smooth_edges() -> None:
    image = draw(replace(CIRCLE, place="on the left"), 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert tuple(image[16, 9]) == RED and tuple(image[16, 28]) == (255, 255, 255)
    shades = len(np.unique(image.reshape(-1, 3), axis=0))
    assert 4 < shades <= 17
    moved = [draw(CIRCLE, 32, random.Random(seed)) for seed in (0, 0, 1)]
    assert (moved[0] == moved[1]).all() and (moved[0] != moved[2]).any()


def recognised(image_size: int, max_count: int, noise: float, number: int = 150) -> tuple[float, float]:
    """The shares of random drawings of which form and colour, and of which all, is recognised."""
    chance, normal, (among, _) = random.Random(7), np.random.default_rng(7), combinations(0, 0)
    told = whole = 0
    for _ in range(number):
        scene = random_scene(chance, among, max_count)
        image = draw(scene, image_size, chance) + noise * normal.standard_normal((image_size, image_size, 3))
        seen = recognise(image.clip(0, 255))
        if seen is not None:
            told += (seen.scene.form, seen.scene.colour) == (scene.form, scene.colour)
            whole += seen.scene == scene
    return told / number, whole / number


@pytest.mark.parametrize(("image_size", "max_count"), [(16, 2), (20, 3), (32, 3)])
def test_drawings_are_recognised(image_size: int, max_count: int) -> None:
    assert image_size >= least_image_size(max_count)
    assert min(recognised(image_size, max_count, noise=0)) >= 0.99


@pytest.mark.parametrize(("image_size", "max_count", "noise"), [(16, 2, 12), (24, 3, 25)])
def test_drawings_are_recognised_under_noise(image_size: int, max_count: int, noise: float) -> None:
    assert min(recognised(image_size, max_count, noise)) >= 0.99


def test_every_scene_is_recognised_as_drawn() -> None:
    wrong = [scene for scene in SCENES[::11] if (seen := recognise(draw(scene, 24))) is None or seen.scene != scene]
    assert wrong == []


def test_pale_and_blurred_drawings_are_recognised_and_how_well_is_told() -> None:
    clean = draw(CIRCLE, 24)
    blurred = np.asarray(Image.fromarray(clean).filter(ImageFilter.GaussianBlur(1)))
    found = [recognise(image) for image in (clean, 255 - 0.7 * (255.0 - clean), blurred)]
    assert [seen and seen.scene for seen in found] == [CIRCLE] * 3
    overlaps = [seen.overlap for seen in found if seen is not None]
    assert overlaps[0] > 0.97 and overlaps[1] > 0.97 > overlaps[2]


def test_a_speck_is_no_form() -> None:
    image = draw(CIRCLE, 24)
    image[1:4, 1:3] = RED
    seen = recognise(image)
    assert seen is not None and seen.scene == CIRCLE


def painted(*shapes: tuple[str, tuple[int, ...], tuple[int, int, int]]) -> NDArray[np.uint8]:
    image = Image.new("RGB", (24, 24), "white")
    for kind, points, colour in shapes:
        getattr(ImageDraw.Draw(image), kind)(points, fill=colour)
    return np.asarray(image)


def test_what_another_program_draws_is_recognised_too() -> None:
    seen = recognise(painted(("ellipse", (6, 6, 17, 17), RED)))
    assert seen is not None and seen.scene == CIRCLE
    two = recognise(painted(("rectangle", (2, 8, 9, 15), BLUE), ("rectangle", (14, 8, 21, 15), BLUE)))
    assert two is not None and two.scene == Scene("square", "blue", 2, "large", "in the centre")


NO_SCENES = {
    "nothing": painted(),
    "black": np.zeros((24, 24, 3)),
    "noise": np.random.default_rng(0).integers(0, 256, (24, 24, 3)),
    "not numbers": np.full((24, 24, 3), np.nan),
    "a bar": painted(("rectangle", (4, 10, 20, 13), RED)),
    "a corner": painted(("rectangle", (6, 4, 8, 20), RED), ("rectangle", (6, 18, 16, 20), RED)),
    "a triangle on its head": painted(("polygon", (12, 20, 4, 5, 20, 5), RED)),
    "a black circle": painted(("ellipse", (6, 6, 17, 17), (0, 0, 0))),
    "circles of two colours": painted(("ellipse", (2, 8, 9, 15), RED), ("ellipse", (14, 8, 21, 15), BLUE)),
    "a circle and a square": painted(("ellipse", (2, 8, 9, 15), RED), ("rectangle", (14, 8, 21, 15), RED)),
    "four circles": painted(*(("ellipse", (x, y, x + 7, y + 7), RED) for x in (2, 14) for y in (2, 14))),
}


@pytest.mark.parametrize("name", NO_SCENES)
def test_what_is_none_of_our_scenes_is_taken_for_none(name: str) -> None:
    assert recognise(NO_SCENES[name]) is None


def test_an_image_of_another_shape_is_refused() -> None:
    for shape in ((24, 24), (24, 20, 3), (24, 24, 1)):
        with pytest.raises(ValueError, match=r"give \(S, S, 3\)"):
            recognise(np.zeros(shape))
