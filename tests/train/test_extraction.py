"""The extraction test: it finds what was copied, and lets the varied and the smooth pass."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from privacy.empirical import proportion_interval
from train.extraction import find_copies, nearness


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images, held-out images, and others like them."""
    images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:700]], images[order[700:1250]], images[order[1250:]]


def test_images_that_nobody_copied_pass(digits: tuple[torch.Tensor, ...]) -> None:
    train, held_out, others = digits
    found = find_copies(others, train, held_out)
    assert not found.found
    assert found.samples.rate < 0.06
    assert (found.neighbours, found.num_train_images, found.held_out.num_images) == (50, 700, 275)


def test_copies_are_found_among_as_many_others_and_under_noise(digits: tuple[torch.Tensor, ...]) -> None:
    train, held_out, others = digits
    noise = 0.1 * torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = find_copies(torch.cat([train[:100] + noise, others[:100]]), train, held_out)
    assert found.found
    assert found.samples.rate == pytest.approx(0.5, abs=0.06)
    assert (found.samples.low, found.samples.high) == proportion_interval(found.samples.copies, 200)


def test_smooth_samples_in_a_crowd_are_near_everything_and_copies_of_nothing(
    digits: tuple[torch.Tensor, ...],
) -> None:
    train, held_out, _ = digits
    groups = torch.randint(len(train), (200, 8), generator=torch.Generator().manual_seed(2))
    means = train[groups].mean(1)
    assert not find_copies(means, train, held_out).found


def test_nearness_is_zero_for_a_copy_and_one_where_nothing_stands_out() -> None:
    train = torch.eye(4).view(4, 1, 2, 2)
    ratios = nearness(torch.cat([train[:1], torch.zeros(1, 1, 2, 2)]), train, 4)
    assert np.allclose(ratios, [0.0, 1.0])
    assert nearness(train[:1], train[:1].expand(3, 1, 2, 2), 2).tolist() == [0.0]


def test_too_few_images_are_refused_by_name(digits: tuple[torch.Tensor, ...]) -> None:
    train, held_out, others = digits
    with pytest.raises(ValueError, match="0 samples and 550 held-out images"):
        find_copies(others[:0], train, held_out)
    with pytest.raises(ValueError, match="1 training images: a neighbourhood needs two"):
        find_copies(others, train[:1], held_out)
