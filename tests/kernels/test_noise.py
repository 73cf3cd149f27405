"""Noise as a function of key and element: the keystream against RFC 8439, the normals against their twin and law."""

import itertools
import math
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from kernels import noise, reference

KEY = bytes(range(32))


def words(generator: str, start: int, count: int) -> NDArray[np.uint64]:
    out = np.empty(count, dtype="<u8")
    noise.KEYSTREAMS[generator](KEY, start, out)
    return out


def normals(offset: int, length: int, generator: str = "chacha20") -> NDArray[np.float64]:
    out = np.full(length, np.nan)

    def store(start: int, chunk: NDArray[np.float64]) -> None:
        assert np.isnan(out[start : start + len(chunk)]).all(), "an element is visited once"
        out[start : start + len(chunk)] = chunk

    noise.visit_gaussian(KEY, offset, length, store, generator)
    return out


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_keystream_is_rfc_8439s() -> None:
    for counter in (0, 1, 77, (1 << 32) - 1):
        block = words("chacha20", 8 * counter, 8).tobytes()
        assert block == reference.chacha20_block(KEY, counter, bytes(12))


def test_the_keystream_goes_on_past_the_32_bit_counter() -> None:
    assert words("chacha20", 8 << 32, 8).tobytes() == reference.chacha20_block(KEY, 0, (1).to_bytes(12, "little"))


def test_the_reference_block_is_the_rfcs_own_vector() -> None:
    block = reference.chacha20_block(KEY, 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")  # RFC 8439, section 2.3.2


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
def test_the_normals_are_the_plain_twins(generator: str) -> None:
    block, half = 3, noise.BLOCK // 2
    drawn = normals(block * noise.BLOCK, noise.BLOCK, generator)
    of_block = words(generator, block * noise.BLOCK, noise.BLOCK).tolist()
    expected = np.array([reference.box_muller(*pair) for pair in zip(of_block[:half], of_block[half:], strict=True)])
    np.testing.assert_allclose(drawn, np.concatenate([expected[:, 0], expected[:, 1]]), rtol=0, atol=4e-15)


def test_the_first_normals_never_change() -> None:
    """A golden vector from the twin: RFC 8439's block function by struct and integers, Box-Muller by `math`."""
    radius_word = struct.unpack("<Q", reference.chacha20_block(KEY, 0, bytes(12))[:8])[0]
    angle_word = struct.unpack("<Q", reference.chacha20_block(KEY, noise.BLOCK // 16, bytes(12))[:8])[0]
    first, paired = reference.box_muller(radius_word, angle_word)
    assert (first, paired) == pytest.approx((-0.60934770571017929, 0.063079970420223886), abs=1e-15)
    drawn = noise.gaussian(KEY, 0, noise.BLOCK)
    assert (float(drawn[0]), float(drawn[noise.BLOCK // 2])) == pytest.approx((first, paired), rel=1e-7)


@pytest.mark.parametrize("word", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 53])
def test_extreme_words_give_finite_normals(word: int) -> None:
    box_muller = noise._BoxMuller(1)
    box_muller.words[:] = word
    found = box_muller(1)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= math.sqrt(150 * math.log(2)) * (1 + 1e-15)
    np.testing.assert_allclose(found[[0, -1]], reference.box_muller(word, word), rtol=0, atol=4e-15)


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 200_000), length=st.integers(0, 9_000))
def test_any_slice_has_the_bits_of_the_whole(generator: str, offset: int, length: int) -> None:
    whole = noise.gaussian(KEY, 0, 210_000, generator)
    assert torch.equal(noise.gaussian(KEY, offset, length, generator), whole[offset : offset + length])


def test_the_number_of_threads_does_not_show(threads: None) -> None:
    drawn: list[NDArray[np.float64]] = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn.append(normals(12_345, (1 << 20) + 77))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("function", [np.log, np.tan, np.sqrt])
def test_where_a_number_lies_in_memory_does_not_show(function: np.ufunc) -> None:
    """What the bits rest on: NumPy's elementary functions treat all lanes and tails of a contiguous buffer alike."""
    whole = np.random.default_rng(0).random(noise.BLOCK + 16)
    expected = function(whole)
    for start, length in itertools.product(range(9), (1, 3, 7, 8, 9, 63, noise.BLOCK)):
        assert np.array_equal(function(whole[start : start + length]), expected[start : start + length])


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
def test_the_normals_are_standard_normal(generator: str) -> None:
    sample = normals(0, 2_000_000, generator)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert stats.kstest(sample**2, stats.chi2(1).cdf).pvalue > 1e-3
    for limit in (2.0, 3.0, 4.0, 4.5):
        for tail in (sample > limit, sample < -limit):
            assert stats.binomtest(int(tail.sum()), len(sample), float(stats.norm.sf(limit))).pvalue > 1e-3


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
def test_elements_are_independent_of_each_other(generator: str) -> None:
    sample = normals(0, 1 << 20, generator)
    for lag in (1, 2, 7, 8, noise.BLOCK // 2, noise.BLOCK, 8 * noise.BLOCK):
        assert_independent(sample[:-lag], sample[lag:])
    signs = sample > 0
    runs, ups = 1 + int((signs[1:] != signs[:-1]).sum()), int(signs.sum())
    downs = len(signs) - ups
    mean = 1 + 2 * ups * downs / len(signs)
    assert abs(runs - mean) < 4 * mean / math.sqrt(len(signs))  # Wald and Wolfowitz 1940


def assert_independent(x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """No correlation of values or of sizes, and a flat table of joint octiles."""
    limit = 4.5 / math.sqrt(len(x))
    assert abs(np.corrcoef(x, y)[0, 1]) < limit
    assert abs(np.corrcoef(x**2, y**2)[0, 1]) < limit
    octiles = stats.norm.ppf(np.arange(1, 8) / 8)
    table = np.bincount(8 * np.digitize(x, octiles) + np.digitize(y, octiles), minlength=64)
    assert stats.chisquare(table).pvalue > 1e-5


def test_other_keys_give_unrelated_noise() -> None:
    first, second = (noise.gaussian(bytes([b] * 32), 0, 200_000).double().numpy() for b in (1, 2))
    assert_independent(first, second)


def test_a_short_key_a_negative_slice_and_an_unknown_generator_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, this one has 5"):
        noise.gaussian(b"short", 0, 1)
    with pytest.raises(ValueError, match="got 0 and -1"):
        noise.gaussian(KEY, 0, -1)
    with pytest.raises(ValueError, match=r"'mt19937'.*chacha20, philox"):
        noise.gaussian(KEY, 0, 1, "mt19937")


def test_a_visitors_error_ends_the_draw(threads: None) -> None:
    torch.set_num_threads(2)

    def fail(start: int, chunk: NDArray[np.float64]) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        noise.visit_gaussian(KEY, 0, 1 << 20, fail)
