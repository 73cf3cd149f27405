"""Noise on shards: its law, what it depends on, the grid that answers floating-point attacks, and bands over steps."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg, stats
from torch import Tensor

from kernels.noise import KEYSTREAMS, gaussian
from privacy.noise import (
    GRID_BITS,
    RELEASED_BITS,
    BandedNoise,
    GaussianNoise,
    banded_coefficients,
    grid_spacing,
    rounding_sensitivity,
)

SECRET = bytes(range(32))
DRAW: dict[str, Any] = {"name": "blocks.0.weight", "offset": 0, "step": 3, "attempt": 0, "std": 1.0}


def noise(generator: str = "chacha20", stage: str = "finetune_dp") -> GaussianNoise:
    return GaussianNoise(SECRET, stage, generator)


def released(gradient: Tensor, of: GaussianNoise | BandedNoise | None = None, **changes: Any) -> Tensor:
    out = gradient.clone()
    (of or noise()).add_(out, **(DRAW | changes))
    return out


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("generator", KEYSTREAMS)
def test_a_shard_gets_gaussian_noise_of_the_std_asked_for(generator: str) -> None:
    for std in (0.7, 3e-5):
        sample = released(torch.zeros(1_000_000), noise(generator), std=std).double().numpy()
        assert stats.kstest(sample / std, "norm").pvalue > 1e-3


@pytest.mark.parametrize("generator", KEYSTREAMS)
def test_draws_are_independent_across_steps_attempts_names_stages_and_ranks(generator: str) -> None:
    length = 200_000
    zeros = torch.zeros(length)
    others = [
        released(zeros, noise(generator, stage), **change).double().numpy()
        for stage, change in (
            ("finetune_dp", {}),
            ("finetune_dp", {"step": 4}),
            ("finetune_dp", {"attempt": 1}),
            ("finetune_dp", {"name": "blocks.1.weight"}),
            ("finetune_dp", {"offset": length}),
            ("other_stage", {}),
        )
    ]
    correlations = np.corrcoef(others) - np.eye(len(others))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(length)
    of_sizes = np.corrcoef(np.square(others)) - np.eye(len(others))
    assert np.abs(of_sizes).max() < 4.5 / math.sqrt(length)
    quartiles = stats.norm.ppf([0.25, 0.5, 0.75])
    first = np.digitize(others[0], quartiles)
    for other in others[1:]:
        table = np.bincount(4 * first + np.digitize(other, quartiles), minlength=16)
        assert stats.chisquare(table).pvalue > 1e-4


@pytest.mark.parametrize("bands", [None, 4])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 40_000), max_size=4))
def test_any_sharding_has_the_bits_of_the_whole(bands: int | None, cuts: list[int]) -> None:
    def make() -> GaussianNoise | BandedNoise:
        return noise() if bands is None else BandedNoise(noise(), bands)

    gradients = gaussian(bytes(32), 0, 3 * 40_000).reshape(3, -1)
    edges = [0, *sorted(cuts), 40_000]
    whole, parts = make(), make()
    for step, gradient in enumerate(gradients):
        expected = released(gradient, whole, step=step, std=0.3)
        for low, high in pairwise(edges):
            found = released(gradient[low:high], parts, step=step, std=0.3, offset=low) if high > low else gradient[:0]
            assert torch.equal(found, expected[low:high])


def test_the_number_of_threads_does_not_show(threads: None) -> None:
    gradient = gaussian(bytes(32), 0, 1 << 19)
    found: list[Tensor] = []
    for count in (1, 2):
        torch.set_num_threads(count)
        banded = BandedNoise(noise(), 2)
        found.append(torch.cat([released(gradient, banded, step=step) for step in range(2)]))
    assert torch.equal(*found)


def naive(gradient: Tensor) -> Tensor:
    """What everybody does: the standard normal as a float, added to the gradient as a float."""
    return gradient + gaussian(SECRET, 0, len(gradient))


def finest_bit(x: Tensor) -> NDArray[np.int64]:
    """The exponent of the lowest set bit of each entry."""
    mantissa, exponent = np.frexp(x.double().numpy())
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    return exponent - 53 + np.log2((whole & -whole).astype(np.float64)).astype(np.int64)


def test_mironovs_attack_reads_the_gradient_off_naive_noise_and_nothing_off_the_grid() -> None:
    """An output near zero is fine-grained where the gradient was zero, and coarse where it was one: so is 1 + z."""
    zeros, ones = torch.zeros(1 << 20), torch.ones(1 << 20)

    def share_called_zero(outputs: Tensor) -> float:
        near = outputs[(outputs != 0) & (outputs.abs() < 2.0**-5)]
        assert len(near) > 10_000
        return float((finest_bit(near) < -25).mean())

    assert share_called_zero(naive(zeros)) > 0.9
    assert share_called_zero(naive(ones)) == 0.0  # hence every one of them betrays the record that made the difference
    assert share_called_zero(released(zeros)) == 0.0
    assert share_called_zero(released(ones)) == 0.0


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, -(2.0**-30), 1e-20, 7.7e4])
def test_the_reachable_low_bits_do_not_depend_on_the_gradient(value: float) -> None:
    sums = released(torch.full((200_000,), value, dtype=torch.float64), std=1.7)
    multiples = (sums / (grid_spacing(1.7) * 2.0 ** (GRID_BITS - RELEASED_BITS))).numpy()
    assert np.array_equal(multiples, np.rint(multiples))
    low_bits = np.bincount(multiples.astype(np.int64) % 64, minlength=64)
    assert stats.chisquare(low_bits).pvalue > 1e-4


@given(start=st.integers(-(2**30), 2**30), std=st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_moving_the_gradient_moves_the_release_and_changes_nothing_else(start: int, std: float) -> None:
    step = 2 * grid_spacing(std) * 2.0 ** (GRID_BITS - RELEASED_BITS)  # even: ties round as before
    zeros = torch.zeros(2_000, dtype=torch.float64)
    assert torch.equal(released(zeros + start * step, std=std), released(zeros, std=std) + start * step)


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), std=st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_the_release_is_the_exact_sum_on_the_grid_rounded_afterwards(value: float, std: float) -> None:
    spacing, count = grid_spacing(std), 16
    collected: list[NDArray[np.float64]] = []
    draw = {k: v for k, v in DRAW.items() if k != "std"}
    noise().visit(lambda _, normals: collected.append(normals.copy()), length=count, **draw)
    found = released(torch.full((count,), value, dtype=torch.float64), std=std).tolist()
    for out, normal in zip(found, np.concatenate(collected).tolist(), strict=True):
        whole = round(Fraction(value) / Fraction(spacing)) + round(normal * (std / spacing))
        in_float64 = Fraction(float(whole))  # the exact sum, rounded once
        coarse = 2 ** (GRID_BITS - RELEASED_BITS)
        assert Fraction(out) == round(in_float64 / coarse) * coarse * Fraction(spacing)


def test_the_spacing_is_a_power_of_two_below_the_noise() -> None:
    for std in (1.0, 0.999, 1.001, 3e-9, 5e7):
        ratio = std / grid_spacing(std)
        assert math.frexp(grid_spacing(std))[0] == 0.5
        assert 2.0**GRID_BITS <= ratio < 2.0 ** (GRID_BITS + 1)


def test_what_rounding_adds_to_the_sensitivity_is_inside_the_clippers_margin() -> None:
    assert rounding_sensitivity(1 << 36, 127.9) <= 1e-6
    assert rounding_sensitivity(1 << 30, 8.0, bands=4) <= 1e-6
    std, count = 0.75, 100_000
    x = gaussian(bytes(32), 0, count).double()
    moved = x + 1e-3 * gaussian(bytes([1] * 32), 0, count).double()
    on_grid = [(y / grid_spacing(std)).round() * grid_spacing(std) for y in (x, moved)]
    grown = float((on_grid[0] - on_grid[1]).norm() - (x - moved).norm())
    assert grown <= rounding_sensitivity(count, std)


def test_a_released_loss_of_one_float64_is_noised_too() -> None:
    loss = released(torch.tensor([12.5], dtype=torch.float64), name="released loss", std=0.25)
    assert 0 < abs(float(loss) - 12.5) < 0.25 * 10.3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [noise, lambda: BandedNoise(noise(), 2)])
def test_a_sum_that_is_not_finite_is_refused_and_left_alone(make: Any, value: float) -> None:
    gradient = torch.tensor([1.0, value, 2.0])
    before = gradient.clone()
    with pytest.raises(ValueError, match=r"blocks\.0\.weight at step 3 is not finite.*not released"):
        make().add_(gradient, **DRAW)
    assert torch.equal(gradient.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_standard_deviation_that_gives_no_privacy_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="it must be positive and finite"):
        released(torch.zeros(3), std=std)


def test_an_unknown_generator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'mt19937'.*chacha20, philox"):
        noise("mt19937")


def strategy(steps: int, bands: int) -> NDArray[np.float64]:
    """C: lower-triangular Toeplitz, columns of unit norm but for those cut off at the end."""
    coefficients = np.array(banded_coefficients(bands))
    column = np.zeros(steps)
    column[: min(bands, steps)] = coefficients[:steps]
    return linalg.toeplitz(column, np.zeros(steps)) / np.linalg.norm(coefficients)


def test_the_coefficients_are_the_square_root_of_the_prefix_sum_matrix() -> None:
    root = strategy(32, 32) * np.linalg.norm(banded_coefficients(32))
    np.testing.assert_allclose(root @ root, np.tril(np.ones((32, 32))), atol=1e-13)


@pytest.mark.parametrize("bands", [1, 2, 5, 12])
def test_banded_noise_is_the_dense_inverse_times_independent_noise(bands: int) -> None:
    steps, length, std = 12, 5_000, 0.4
    banded = BandedNoise(noise(), bands)
    shape = torch.zeros(length, dtype=torch.float64)
    independent = np.stack([released(shape, step=step, std=std).numpy() for step in range(steps)])
    found = np.stack([released(shape, banded, step=step, std=std).numpy() for step in range(steps)])
    expected = np.linalg.inv(strategy(steps, bands)) @ independent
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * std * 2.0**-RELEASED_BITS)


def test_one_participation_costs_one_clip_norm_and_returns_after_the_band_are_orthogonal() -> None:
    columns = strategy(40, 8).T
    norms = np.linalg.norm(columns, axis=1)
    np.testing.assert_allclose(norms[:33], 1.0, rtol=1e-14)
    assert (norms[33:] < 1.0).all()
    assert all(columns[i] @ columns[j] == 0 for i in range(40) for j in range(i + 8, 40))


def test_prefix_sums_carry_less_noise_than_independent_draws_at_equal_epsilon() -> None:
    steps, length = 64, 4_000
    prefix = np.tril(np.ones((steps, steps)))
    for bands, promised in ((1, 1.0), (4, 0.588), (16, 0.414)):  # docs/decisions/006, root mean squared error
        error = np.linalg.norm(prefix @ np.linalg.inv(strategy(steps, bands))) / np.linalg.norm(prefix)
        assert error == pytest.approx(promised, abs=5e-4)
        banded = BandedNoise(noise(), bands)
        drawn = np.stack([released(torch.zeros(length), banded, step=step).numpy() for step in range(steps)])
        measured = np.linalg.norm(drawn.cumsum(0)) / math.sqrt(length) / np.linalg.norm(prefix)
        assert measured == pytest.approx(promised, rel=0.05)


def test_one_band_is_independent_noise_bit_for_bit() -> None:
    banded, gradient = BandedNoise(noise(), 1), gaussian(bytes(32), 0, 1_000)
    for step in range(3):
        assert torch.equal(released(gradient, banded, step=step), released(gradient, step=step))


def test_an_empty_draw_still_steps_and_the_history_is_of_noise_alone() -> None:
    """The released sums differ by the gradients alone, whatever they were: nothing of the data enters the history."""
    full, empty = BandedNoise(noise(), 3), BandedNoise(noise(), 3)
    gradient = torch.arange(1_000, dtype=torch.float64) * 2.0**-10
    for step in range(5):
        with_records = released(gradient, full, step=step)
        without = released(torch.zeros_like(gradient), empty, step=step)
        assert torch.equal(with_records, without + gradient)


def test_a_new_segment_starts_from_no_history() -> None:
    once, again = BandedNoise(noise(), 3), BandedNoise(noise(), 3)
    for step in range(3):
        released(torch.zeros(100), once, step=step)
    first = released(torch.zeros(100), again, step=3, std=0.5)
    norm = math.hypot(*banded_coefficients(3))
    assert torch.allclose(first, released(torch.zeros(100), step=3, std=0.5 * norm), rtol=0, atol=2.0**-RELEASED_BITS)


@pytest.mark.parametrize("step", [3, 5, 2])
def test_a_step_repeated_skipped_or_out_of_order_is_refused(step: int) -> None:
    banded, gradient = BandedNoise(noise(), 2), torch.zeros(8)
    released(gradient, banded, step=3)
    with pytest.raises(ValueError, match=rf"at step 4, not {step}: .*begin a new segment"):
        released(gradient, banded, step=step)
    released(gradient, banded, step=4)


def test_a_segment_keeps_its_standard_deviation_and_its_shards() -> None:
    banded = BandedNoise(noise(), 2)
    released(torch.zeros(8), banded, step=3)
    with pytest.raises(ValueError, match=r"standard deviation 1\.0 and is now on 8 with 2\.0"):
        released(torch.zeros(8), banded, step=4, std=2.0)
    with pytest.raises(ValueError, match=r"on 8 elements .* and is now on 7"):
        released(torch.zeros(7), banded, step=4)
    released(torch.zeros(8), banded, step=9, offset=8)  # another shard has a history of its own


def test_a_band_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="bands is 0: it must be at least 1"):
        BandedNoise(noise(), 0)
