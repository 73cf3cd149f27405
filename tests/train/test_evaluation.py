"""The judge and its figures: against closed forms, at their extremes, and on the digits the demo is judged by."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from models.flow import Objective
from train.evaluation import (
    Classifier,
    class_fidelity,
    copy_rate,
    evaluate,
    frechet_distance,
    image_grid,
    kernel_distance,
    precision_recall,
    train_classifier,
    validation_loss,
)

Split = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> dict[str, Split]:
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = {"public": order[:750], "other": order[750:1437], "test": order[1437:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


@pytest.fixture(scope="module")
def judge(digits: dict[str, Split]) -> Classifier:
    return train_classifier(*digits["public"], seed=0)


def gaussian(n: int, dim: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).standard_normal((n, dim))


# --- the classifier ------------------------------------------------------------------------------------------------


def test_the_judge_knows_97_of_100_digits_it_never_saw(digits: dict[str, Split], judge: Classifier) -> None:
    assert class_fidelity(judge, *digits["test"]) >= 0.97
    assert class_fidelity(judge, *digits["other"]) >= 0.97
    assert judge.features(digits["test"][0]).shape == (360, 64)


def test_the_same_seed_gives_the_same_judge_and_touches_no_global_state(digits: dict[str, Split]) -> None:
    images, labels = digits["public"]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    hashes = [train_classifier(images[:100], labels[:100], seed, steps=5).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 17)])
def test_small_grey_and_colour_images_of_any_shape_are_learnt(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = (labels.view(-1, 1, 1, 1) - 1) * 0.8 + 0.2 * torch.randn(60, *shape, generator=generator)
    judge = train_classifier(images, labels, seed=0, steps=20)
    assert class_fidelity(judge, images, labels) == 1.0


def test_images_of_another_shape_and_an_empty_training_set_are_refused(judge: Classifier) -> None:
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), and the classifier knows \(1, 8, 8\)"):
        judge.predict(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="0 images and 0 labels"):
        train_classifier(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), seed=0)


# --- distances -----------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """N(0, I) against N(m, s^2 I): |m|^2 + D (s - 1)^2, here 4 * 0.25 + 4 * 0.25 = 2."""
    distance = frechet_distance(gaussian(200_000, 4, seed=0), gaussian(200_000, 4, seed=1, mean=0.5, scale=1.5))
    assert distance == pytest.approx(2.0, rel=0.02)


def test_the_frechet_distance_sees_correlation() -> None:
    """Correlations +r and -r, unit variances: 4 - 4 sqrt(1 - r^2), by the eigenvalues 1 - r^2 of the product."""
    x, y = gaussian(200_000, 2, seed=0), gaussian(200_000, 2, seed=1)
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    y[:, 1] = -0.8 * y[:, 0] + 0.6 * y[:, 1]
    assert frechet_distance(x, y) == pytest.approx(4 - 4 * 0.6, rel=0.02)


def test_the_frechet_distance_of_a_set_to_itself_is_0_even_without_full_rank() -> None:
    few = gaussian(10, 64, seed=0)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-10)


def test_the_kernel_distance_is_the_mean_over_distinct_pairs() -> None:
    x, y = gaussian(7, 3, seed=0), gaussian(5, 3, seed=1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within[0] + within[1] - 2 * across, rel=1e-12)


def test_the_kernel_distance_of_equals_is_0_within_its_confidence_interval() -> None:
    draws = [kernel_distance(gaussian(60, 8, seed=2 * i), gaussian(60, 8, seed=2 * i + 1)) for i in range(200)]
    standard_error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * standard_error
    assert min(draws) < 0 < max(draws)
    shifted = kernel_distance(gaussian(60, 8, seed=0), gaussian(60, 8, seed=1, mean=0.5))
    assert shifted > 5 * np.std(draws)


# --- precision, recall, fidelity, copies ---------------------------------------------------------------------------


def test_precision_and_recall_at_their_extremes() -> None:
    real = gaussian(300, 4, seed=0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    real = np.concatenate([gaussian(200, 4, seed=0), gaussian(200, 4, seed=1) + 100])
    precision, recall = precision_recall(gaussian(400, 4, seed=2), real)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_a_manifold_of_too_few_images_is_refused() -> None:
    with pytest.raises(ValueError, match="need more than 3 images of each, not 3"):
        precision_recall(gaussian(10, 2, seed=0), gaussian(3, 2, seed=1))


def test_class_fidelity_of_wrong_requests_is_0(digits: dict[str, Split], judge: Classifier) -> None:
    images, labels = digits["public"]
    assert class_fidelity(judge, images, (labels + 1) % 10) <= 0.01


def test_copies_are_all_found(digits: dict[str, Split]) -> None:
    public, test = digits["public"][0], digits["test"][0]
    assert copy_rate(public, public, test) == 1.0
    assert copy_rate(public + 0.01, public, test) == 1.0


def test_real_images_that_are_no_copies_get_about_the_quantile(digits: dict[str, Split]) -> None:
    public, other, test = (digits[name][0] for name in ("public", "other", "test"))
    assert copy_rate(other, public, test, quantile=0.05) == pytest.approx(0.05, abs=0.03)
    assert copy_rate(torch.randn(200, 1, 8, 8), public, test) == 0.0


# --- all of it -----------------------------------------------------------------------------------------------------


def test_real_images_score_as_the_real_ones_and_damaged_ones_worse(digits: dict[str, Split], judge: Classifier) -> None:
    (other, labels), public, (test, test_labels) = digits["other"], digits["public"][0], digits["test"]
    real = evaluate(other, labels, test, test_labels, public, judge)
    blurred = torch.nn.functional.avg_pool2d(other, 3, stride=1, padding=1)
    worse = evaluate(blurred, labels, test, test_labels, public, judge)
    few = evaluate(other[labels < 5], labels[labels < 5], test, test_labels, public, judge)
    assert float(real["frechet_distance"]) < 3 * float(real["frechet_distance_real"])
    assert float(real["precision"]) == pytest.approx(float(real["precision_real"]), abs=0.1)
    assert float(real["class_fidelity"]) > 0.97
    for damaged in (worse, few):
        assert float(damaged["frechet_distance"]) > 10 * float(damaged["frechet_distance_real"])
        assert float(damaged["kernel_distance"]) > 5 * abs(float(damaged["kernel_distance_real"]))
        assert float(damaged["recall"]) < 0.7 * float(damaged["recall_real"])
    assert real["num_compared"] == 687
    assert real["classifier_sha256"] == judge.sha256
    assert real == evaluate(other, labels, test, test_labels, public, judge)


def test_no_figure_is_called_fid(digits: dict[str, Split], judge: Classifier) -> None:
    images, labels = digits["test"]
    assert not any("fid" in name.split("_") for name in evaluate(images, labels, images, labels, images, judge))


class _Zero(torch.nn.Module):
    """Predicts 0 everywhere: under the flow objective its loss is the mean of (noise - x0)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.times: list[float] = []

    def forward(self, x: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.times.append(float(t_B[0]))
        return torch.zeros_like(x)


def test_validation_loss_is_the_mean_over_fixed_times_and_noises() -> None:
    model, images, labels = _Zero(), torch.full((600, 1, 8, 8), 0.5), torch.zeros(600, dtype=torch.int64)
    losses = validation_loss(model, Objective(), images, labels)
    assert sorted(set(model.times)) == [(index + 0.5) / 8 for index in range(8)]
    assert len(losses) == 9
    assert losses["validation_loss"] == pytest.approx(1 + 0.25, rel=0.01)
    assert losses == validation_loss(model, Objective(), images, labels)
    assert losses != validation_loss(model, Objective(), images, labels, noise_seed=1)
    assert model.training


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_pixel_as_a_square(channels: int, tmp_path: Path) -> None:
    images = torch.full((5, channels, 8, 8), -1.0)
    images[4, :, 0, 0] = 1.0
    path = image_grid(images, columns=2, path=tmp_path / "new" / "grid.png", title="ε = 9.9")
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (28 + 3 * 52 + 4, 2 * 52 + 4, 3)
    square = pixels[28 + 4 + 2 * 52 :, 4:][:6, :6]  # the third row's first image, its top left pixel 6 times enlarged
    assert (square == 255).all()
    assert (pixels[28 + 4 + 2 * 52 + 6, 4:10] == 0).all()
    assert pixels[:28].min() < 128  # the title


def test_a_grid_of_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 channels"):
        image_grid(torch.zeros(2, 4, 8, 8), columns=2, path=tmp_path / "grid.png")


@pytest.mark.slow
def test_training_the_judge_takes_less_than_15_seconds(digits: dict[str, Split]) -> None:
    started = time.perf_counter()
    train_classifier(*digits["public"], seed=3)
    assert time.perf_counter() - started < 15
