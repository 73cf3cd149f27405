"""The dual encoder finds what belongs together, and its figures are what they say."""

import itertools

import pytest
import torch

from train.retrieval import DualEncoder, train_encoder

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "grey": (0, 0, 0)}
PLACES = {"left": (slice(None), slice(0, 8)), "right": (slice(None), slice(8, 16)), "top": (slice(0, 8), slice(None))}
CAPTIONS = [f"{colour} on the {place}" for colour, place in itertools.product(COLOURS, PLACES)]


def drawn(captions: list[str], seed: int = 0) -> torch.Tensor:
    """A coloured half on white, noise over it."""
    images = torch.ones(len(captions), 3, 16, 16)
    for image, caption in zip(images, captions, strict=True):
        colour, _, _, place = caption.split()
        rows, columns = PLACES[place]
        image[:, rows, columns] = torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None]
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return train_encoder(drawn(CAPTIONS * 8), CAPTIONS * 8, seed=0, steps=60)


def test_captions_find_fresh_images_of_what_they_say(encoder: DualEncoder) -> None:
    found = encoder.recall(drawn(CAPTIONS, seed=1), CAPTIONS, at=(1, 3))
    assert found["recall_at_1"] >= 0.9 and found["recall_at_3"] >= found["recall_at_1"]
    assert found["recall_at_1_chance"] == pytest.approx(1 / 12) and found["recall_at_3_chance"] == pytest.approx(3 / 12)


def test_images_of_the_wrong_captions_are_found_no_more_than_by_chance(encoder: DualEncoder) -> None:
    shifted = [*CAPTIONS[4:], *CAPTIONS[:4]]
    assert encoder.recall(drawn(shifted, seed=1), CAPTIONS)["recall_at_1"] <= 1 / 12


def test_one_image_for_every_caption_finds_nothing(encoder: DualEncoder) -> None:
    same = drawn(CAPTIONS[:1]).expand(12, -1, -1, -1)
    assert encoder.recall(same, CAPTIONS)["recall_at_5"] == 0


def test_a_caption_with_several_images_counts_once_and_its_chance_is_exact(encoder: DualEncoder) -> None:
    captions = [CAPTIONS[0]] * 3 + [CAPTIONS[4]]
    found = encoder.recall(drawn(captions), captions, at=(1, 2, 9))
    assert found["recall_at_1"] == 1
    # of pairs out of four images, one in two holds the second caption's, and all hold one of the first's three
    assert found["recall_at_2_chance"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["recall_at_9"] == found["recall_at_9_chance"] == 1


def test_the_same_seed_gives_the_same_encoder_and_touches_no_global_state() -> None:
    state, threads, told = torch.get_rng_state(), torch.get_num_threads(), list[tuple[int, int | None]]()
    made = [
        train_encoder(drawn(CAPTIONS), CAPTIONS, seed, lambda *done: told.append(done), steps=3) for seed in (0, 0, 1)
    ]
    assert made[0].sha256 == made[1].sha256 != made[2].sha256
    assert told == [(1, 3), (2, 3), (3, 3)] * 3
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_captions_without_a_word_or_in_any_script_have_features(encoder: DualEncoder) -> None:
    features = encoder.captions(["", "...", "赤い丸", "Ärger", "ÄRGER"])
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-5) and torch.equal(features[3], features[4])


def test_what_does_not_pair_up_is_refused(encoder: DualEncoder) -> None:
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        train_encoder(drawn(CAPTIONS[:2]), CAPTIONS[:1], seed=0)
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        encoder.recall(torch.zeros(0, 3, 16, 16), [])
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), and the encoder knows \(3, 16, 16\)"):
        encoder.recall(torch.zeros(1, 3, 8, 8), ["a"])
