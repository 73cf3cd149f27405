"""What detectors of images are measured on."""

import itertools

import numpy as np
import pytest

from privacy.pii.findings import Box

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from privacy.pii import planting_images as planting


def box(left: int, top: int, right: int, bottom: int) -> Box:
    return Box("face", left, top, right, bottom, "d", "1")


def test_the_halves_share_nothing() -> None:
    for named in (planting._SCENES, planting._FONTS):
        assert not set(named["tune"]) & set(named["measure"])
    heads = [{face.tobytes() for face in planting._faces(half)} for half in ("tune", "measure")]
    assert len(heads[0]) == len(heads[1]) == 50 and not heads[0] & heads[1]
    assert len(planting.faceless_crops("tune")) == len(planting.faceless_crops("measure")) == 50


@pytest.mark.parametrize("plant", [planting.faces, planting.strings])
def test_a_picture_is_a_function_of_half_size_and_number(plant) -> None:
    few, more = list(plant(24, 2)), list(itertools.islice(plant(24, 5), 2))
    for one, other in zip(few, more, strict=True):
        assert one[1:] == other[1:] and (one.pixels == other.pixels).all()
    other_half = next(plant(24, 1, "tune"))
    assert (other_half.pixels != few[0].pixels).any()


@pytest.mark.parametrize(("plant", "size"), [(planting.faces, 20), (planting.faces, 256), (planting.strings, 12)])
def test_what_is_planted_lies_within_its_edges(plant, size: int) -> None:
    for picture in plant(size, 3):
        left, top, right, bottom = picture.edges
        assert picture.pixels.shape == (256, 256, 3) and picture.pixels.dtype == np.uint8
        assert 0 <= left < right <= 256 and 0 <= top < bottom <= 256
        assert picture.found([box(*picture.edges)]) and not picture.found([])


def test_a_face_is_found_by_a_box_of_its_size_around_its_middle() -> None:
    face = planting.Picture(np.zeros((256, 256, 3), np.uint8), "face", 40, (100, 100, 140, 140))
    assert face.found([box(105, 100, 135, 140)])
    assert not face.found([box(0, 0, 256, 256)]) and not face.found([box(150, 100, 190, 140)])


def test_a_string_is_found_where_boxes_together_hide_it() -> None:
    line = planting.Picture(np.zeros((256, 256, 3), np.uint8), "iban", 10, (50, 100, 150, 110))
    assert line.found([box(48, 98, 100, 112), box(100, 98, 152, 112)])
    assert not line.found([box(48, 98, 130, 112)]) and not line.found([box(48, 98, 152, 103)])
