"""Noise as a function of key and element: the keystream against RFC 8439, the normals against their law."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels import noise, reference

KEY = bytes(range(32))


def test_the_keystream_is_rfc_8439s() -> None:
    for counter in (0, 1, 77, (1 << 32) - 1):
        block = noise.chacha20_words(KEY, 8 * counter, 8).tobytes()
        assert block == reference.chacha20_block(KEY, counter, bytes(12))


def test_the_keystream_goes_on_past_the_32_bit_counter() -> None:
    words = noise.chacha20_words(KEY, 8 << 32, 8).tobytes()
    assert words == reference.chacha20_block(KEY, 0, (1).to_bytes(12, "little"))


def test_the_reference_block_is_the_rfcs_own_vector() -> None:
    block = reference.chacha20_block(KEY, 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")  # RFC 8439, section 2.3.2


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 200_000), length=st.integers(0, 9_000))
def test_any_slice_has_the_bits_of_the_whole(generator: str, offset: int, length: int) -> None:
    whole = noise.gaussian(KEY, 0, 210_000, generator)
    assert torch.equal(noise.gaussian(KEY, offset, length, generator), whole[offset : offset + length])


@pytest.mark.parametrize("generator", noise.KEYSTREAMS)
def test_the_normals_are_standard_normal(generator: str) -> None:
    sample = noise.gaussian(KEY, 0, 1_000_000, generator).double().numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 4e-3
    assert abs(np.corrcoef(sample[0::2], sample[1::2])[0, 1]) < 6e-3  # the two of one Box-Muller pair


def test_other_keys_give_unrelated_noise() -> None:
    first, second = (noise.gaussian(bytes([b] * 32), 0, 100_000).double().numpy() for b in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 1e-2


def test_a_short_key_and_an_unknown_generator_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, this one has 5"):
        noise.gaussian(b"short", 0, 1)
    with pytest.raises(ValueError, match=r"'mt19937'.*chacha20, philox"):
        noise.gaussian(KEY, 0, 1, "mt19937")
