"""Noise, AdamW and average in one pass: the released bits against the CPU's, the update against torch, in Triton."""

# pyright: reportArgumentType=false
# (a kernel takes its constants as plain numbers)

import hmac
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch, reference
from kernels.noise import BLOCK, chacha20_words, visit_gaussian
from kernels.noisy_adamw import (
    Noise,
    _add_noise,
    _noisy_adamw_ema,
    add_noise_,
    add_noise_bytes,
    noisy_adamw_ema_,
    noisy_adamw_ema_bytes,
)
from kernels.noisy_adamw_triton import TILE, builds, chacha20, cosine_and_sine, radius
from kernels.release import COARSENING, GRID_BITS, RELEASED_BITS, grid_spacing, release_
from kernels.tiles import Tile, trial
from privacy import noise as of_privacy

KEY = bytes(range(32))
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.999}
Poisoned = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    dispatch.choose("triton", torch.device("cpu"))
    yield
    dispatch.choose("auto", torch.device("cpu"))


def lanes(number: int) -> AbstractContextManager[Any]:
    """Windows of 16 * `number` elements; the fewer there are, the sooner the interpreter is done."""
    tile = Tile({"L": number}, TILE.num_warps, TILE.num_stages)
    return trial({("noisy_adamw", "add_noise"): tile, ("noisy_adamw", "adamw_ema"): tile})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(bits(x), bits(y))


def on_cpu(gradient: Tensor, std: float, offset: int = 0, key: bytes = KEY) -> Tensor:
    """The release as the CPU makes it."""
    out, spacing = gradient.clone().numpy(), grid_spacing(std)

    def release(start: int, normals: NDArray[np.float64]) -> None:
        release_(out[start : start + len(normals)], np.rint(normals * (std / spacing)), spacing)

    visit_gaussian(key, offset, len(out), release)
    return torch.from_numpy(out)


def in_kernel(gradient: Tensor, std: float, offset: int = 0, key: bytes = KEY) -> Tensor:
    out = gradient.clone()
    assert not add_noise_([out], Noise(std, [key], [offset])).any()
    return out


# The generator


@triton.jit
def keystream(key, counters, out, L: tl.constexpr):
    lane = tl.arange(0, L)
    counter = tl.load(counters)
    k = key
    w0, w1, w2, w3, w4, w5, w6, w7 = chacha20(
        counter.to(tl.uint32) + lane.to(tl.uint32), (counter >> 32).to(tl.uint32),
        tl.load(k), tl.load(k + 1), tl.load(k + 2), tl.load(k + 3),
        tl.load(k + 4), tl.load(k + 5), tl.load(k + 6), tl.load(k + 7),
    )  # fmt: skip
    out += 8 * lane
    tl.store(out, w0)
    tl.store(out + 1, w1)
    tl.store(out + 2, w2)
    tl.store(out + 3, w3)
    tl.store(out + 4, w4)
    tl.store(out + 5, w5)
    tl.store(out + 6, w6)
    tl.store(out + 7, w7)


@triton.jit
def polar(radii, angles, out, L: tl.constexpr):
    lane = tl.arange(0, L)
    r, a = tl.load(radii + lane), tl.load(angles + lane)
    cosine, sine = cosine_and_sine(a)
    size = radius(r, a)
    tl.store(out + lane, size)
    tl.store(out + L + lane, cosine)
    tl.store(out + 2 * L + lane, sine)


def blocks_from(key: bytes, counter: int, number: int) -> bytes:
    words = torch.frombuffer(bytearray(key), dtype=torch.uint32)
    out = torch.zeros(8 * number, dtype=torch.uint64)
    keystream[(1,)](words, torch.tensor([counter]), out, L=number)
    return out.numpy().tobytes()


def polar_of(radii: NDArray[np.uint64], angles: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(3, pairs): radius, cosine, sine."""
    out = torch.full((3, len(radii)), math.nan, dtype=torch.float64)
    polar[(1,)](torch.from_numpy(radii), torch.from_numpy(angles), out, L=len(radii))
    return out.numpy()


@pytest.mark.parametrize(
    "key, counter, block",  # RFC 8439, appendix A.1, vectors 1 to 4
    [
        (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
                       "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"),
        (bytes(32), 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
                       "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"),
        (bytes(31) + b"\1", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
                               "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"),
        (b"\0\xff" + bytes(30), 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
                                   "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"),
    ],
)  # fmt: skip
def test_the_keystream_is_rfc_8439s(key: bytes, counter: int, block: str) -> None:
    assert blocks_from(key, counter, 4)[:64].hex() == block


@pytest.mark.parametrize("counter", [0, (1 << 32) - 4, 1 << 32, (5 << 32) + 12])
def test_the_keystream_is_the_twins_past_the_32_bit_counter_too(counter: int) -> None:
    expected = [
        reference.chacha20_block(KEY, c % 2**32, (c >> 32).to_bytes(12, "little")) for c in range(counter, counter + 4)
    ]
    assert blocks_from(KEY, counter, 4) == b"".join(expected)


def test_radius_cosine_and_sine_are_true_within_four_ulp() -> None:
    words = np.empty(2 * BLOCK, dtype=np.uint64)
    chacha20_words(KEY, 0, words)
    radii, angles = words.reshape(2, -1).copy()
    radii[:8] = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**53, 2**62, 2**63 - 2**10]  # |z| = 10.2 and 0 among them
    turns = [0, 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 3 * 2**61]  # where the quadrants meet
    angles[:8], angles[8:16] = turns, [(turn - 1) % 2**64 for turn in turns]
    size, cosine, sine = polar_of(radii, angles)
    assert np.isfinite(size).all() and size.max() <= math.sqrt(150 * math.log(2)) * (1 + 2**-52)
    with mpmath.workdps(40):
        for place, (r, a) in enumerate(zip(radii.tolist(), angles.tolist(), strict=True)):
            found, turn = [mpmath.mpf(float(x[place])) for x in (size, cosine, sine)], mpmath.mpf(a) / 2**63
            if a % 2**62:  # else one of the two is zero
                assert abs(found[1] / mpmath.cospi(turn) - 1) < 2.0**-51
                assert abs(found[2] / mpmath.sinpi(turn) - 1) < 2.0**-51
            uniform = mpmath.mpf(r % 2**63) / 2**63 + (a % 2048 + mpmath.mpf(0.5)) / 2**74
            bound = 2.0**-52 * size[place] + 2.0**-53 / max(size[place], 2.0**-27)  # near 1 the uniform has 53 bits
            assert abs(found[0] - mpmath.sqrt(-2 * mpmath.log(uniform))) < bound
    assert (cosine[[0, 3]].tolist(), sine[[0, 3]].tolist()) == ([1, 0], [0, 1])


# The release


def test_what_is_released_has_the_cpus_bits_over_a_million_elements() -> None:
    gradient = draw(2**20) * torch.logspace(-6, 3, 2**20)
    with lanes(1 << 14):
        assert same(in_kernel(gradient, 0.7, offset=4099), on_cpu(gradient, 0.7, offset=4099))


@pytest.mark.slow
def test_what_is_released_has_the_cpus_bits_over_sixteen_million_elements() -> None:
    gradient = draw(2**24)
    with lanes(1 << 17):
        assert same(in_kernel(gradient, 1.3), on_cpu(gradient, 1.3))


def test_add_noise_is_what_privacys_own_generator_adds() -> None:
    gradient = draw(5_000)
    expected = gradient.clone()
    of_privacy.GaussianNoise(KEY, "finetune_dp", "chacha20").add_(
        expected, name="blocks.0.weight", offset=77, step=3, attempt=1, std=0.9
    )
    label = "\x1f".join(("noise", "finetune_dp", "3", "1", "blocks.0.weight"))
    key = hmac.new(KEY, label.encode(), "sha256").digest()
    with lanes(512):
        assert same(in_kernel(gradient, 0.9, 77, key), expected)


def test_the_grid_is_privacys() -> None:
    assert (GRID_BITS, RELEASED_BITS) == (of_privacy.GRID_BITS, of_privacy.RELEASED_BITS)
    assert COARSENING == 2.0**28
    for std in (0.3, 1.0, 1.7, 2.0, 5e-7):
        assert grid_spacing(std) == of_privacy.grid_spacing(std) == 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)


def test_what_is_released_is_the_twins() -> None:
    gradient, normals = draw(5_000), np.empty(5_000)

    def keep(start: int, chunk: NDArray[np.float64]) -> None:
        normals[start : start + len(chunk)] = chunk

    visit_gaussian(KEY, 0, 5_000, keep)
    expected = reference.released(gradient.double(), torch.from_numpy(normals), 0.7)
    with lanes(512):
        assert torch.equal(in_kernel(gradient, 0.7), expected.float())


@pytest.mark.parametrize("number", [TILE.constants["L"], 256, 1024])
def test_the_size_of_a_window_does_not_show(number: int) -> None:
    gradient = draw(5_000)
    with lanes(number):
        assert same(in_kernel(gradient, 0.5, offset=3_100), on_cpu(gradient, 0.5, offset=3_100))


@pytest.mark.parametrize(
    "offset, length",
    [(0, 1), (4_095, 1), (4_095, 2), (2_047, 2), (1, 4_096), (4_096, 4_096), (8_191, 4_098), (6_144, 2_049)],
)
def test_unaligned_shards_across_blocks_have_the_cpus_bits(offset: int, length: int) -> None:
    gradient = draw(length)
    with lanes(512):
        assert same(in_kernel(gradient, 0.5, offset), on_cpu(gradient, 0.5, offset))


@pytest.mark.parametrize("offset", [(1 << 35) - 3_000, 1 << 35, (1 << 40) + 5, (1 << 61) + 4_001])
def test_elements_whose_counters_pass_32_bits_have_the_cpus_bits(offset: int) -> None:
    """ChaCha20's counter is the element's index over eight: it passes 2^32 at element 2^35."""
    gradient = draw(6_000)
    split = max(0, min(6_000, (1 << 35) - offset))  # a draw of the CPU's must not cross it
    expected = [on_cpu(gradient[:split], 0.5, offset), on_cpu(gradient[split:], 0.5, offset + split)]
    with lanes(512):
        assert same(in_kernel(gradient, 0.5, offset), torch.cat(expected))


def test_any_sharding_in_any_launch_has_the_bits_of_the_whole() -> None:
    gradient, edges = draw(40_000), [0, 1, 4_096, 4_097, 17_003, 17_003, 32_768, 39_999, 40_000]
    with lanes(1024):
        whole = in_kernel(gradient, 0.3, offset=9)
        parts = [gradient[low:high].clone() for low, high in pairwise(edges)]
        noise = Noise(0.3, [KEY] * len(parts), [9 + low for low in edges[:-1]])
        assert not add_noise_(parts, noise).any()
    assert same(torch.cat(parts), whole)


@pytest.mark.parametrize("std", [1.0, 0.999, 3e-5, 2.0**-80, 7e6])
def test_a_gradient_of_any_size_is_released_as_on_the_cpu(std: float) -> None:
    gradient = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e6, 1e19, 3e38]).repeat_interleave(500)
    gradient[::2] *= -1
    with lanes(256):
        assert same(in_kernel(gradient, std), on_cpu(gradient, std))


def test_zero_keeps_the_sign_that_the_cpu_gives_it() -> None:
    std, cell = 1.0, 2.0**-RELEASED_BITS
    noise = on_cpu(torch.zeros(4_096, dtype=torch.float64), std).float()
    gradient = torch.where(torch.arange(4_096) % 2 == 0, 0.375, -0.375) * cell - noise  # sums that round to zero
    expected = on_cpu(gradient, std)
    assert (expected == 0).sum() > 1_000 and 100 < torch.signbit(expected[expected == 0]).sum() < 4_000
    with lanes(256):
        assert same(in_kernel(gradient, std), expected)


def test_shards_and_their_neighbours_in_memory_do_not_see_each_other() -> None:
    memory = torch.full((30_000,), math.nan)
    lengths, starts, offsets = [5_000, 3, 6_144, 4_096], [4, 6_001, 8_000, 20_001], [0, 12_345, 2_048, 4_096]
    keys = [bytes([n] * 32) for n in range(4)]
    shards = [memory[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    gradients = [draw(length, seed=n) for n, length in enumerate(lengths)]
    for shard, gradient in zip(shards, gradients, strict=True):
        shard.copy_(gradient)
    with lanes(512):
        assert not add_noise_(shards, Noise(2.0, keys, offsets)).any()
    for shard, gradient, key, offset in zip(shards, gradients, keys, offsets, strict=True):
        assert same(shard, on_cpu(gradient, 2.0, offset, key))
        shard.fill_(math.nan)
    assert memory.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_window_that_is_not_finite_is_left_alone_and_its_shard_is_named(value: float) -> None:
    shards = [draw(300), draw(5_000), draw(3)]
    shards[1][4_500] = value
    before = [shard.clone() for shard in shards]
    with lanes(256):  # a window is a block
        refused = add_noise_(shards, Noise(1.0, [KEY] * 3, [0, 0, 0]))
    assert refused.tolist() == [0, 1, 0]
    assert same(shards[1][4_096:], before[1][4_096:])
    assert same(shards[1][:4_096], on_cpu(before[1][:4_096], 1.0))
    assert same(shards[0], on_cpu(before[0], 1.0)) and same(shards[2], on_cpu(before[2], 1.0))


def test_nothing_of_an_update_happens_in_a_window_that_is_not_finite() -> None:
    state = State([5_000], copy=torch.bfloat16)
    state.gradients[0][4_500] = math.nan
    before = state.clone()
    with lanes(256):
        assert state.update(Noise(1.0, [KEY], [0])).tolist() == [1]
    for now, then in zip(state.columns, before.columns, strict=True):
        assert same(now[0][4_096:], then[0][4_096:])
    assert not same(state.parameters[0][:4_096], before.parameters[0][:4_096])


@pytest.mark.slow
def test_a_hundred_repeats_have_the_same_bits() -> None:
    once, repeated = State([300]), State([300] * 100)
    for one, column in zip(once.columns, repeated.columns, strict=True):
        for shard in column:
            shard.copy_(one[0])
    with lanes(256):
        once.update(Noise(1.0, [KEY], [9]))
        repeated.update(Noise(1.0, [KEY] * 100, [9] * 100))
    for one, column in zip(once.columns, repeated.columns, strict=True):
        assert all(same(shard, one[0]) for shard in column)


# The update


class State:
    """Shards as an optimizer keeps them, filled from a seed."""

    def __init__(self, lengths: list[int], copy: torch.dtype | None = None, device: str = "cpu") -> None:
        def make(seed: int, scale: float = 1.0) -> list[Tensor]:
            return [scale * draw(length, seed=100 * seed + n).to(device) for n, length in enumerate(lengths)]

        self.parameters, self.gradients, self.exp_avgs = make(1), make(2, 0.1), make(3, 0.1)
        self.exp_avg_sqs, self.averages = [x.square() for x in make(4, 0.1)], make(5)
        self.copies = [x.to(copy) * math.nan for x in self.parameters] if copy is not None else None

    @property
    def columns(self) -> list[list[Tensor]]:
        states = [self.parameters, self.gradients, self.exp_avgs, self.exp_avg_sqs, self.averages]
        return states if self.copies is None else [*states, self.copies]

    def clone(self) -> "State":
        other = object.__new__(State)
        for name, column in vars(self).items():
            setattr(other, name, column and [x.clone() for x in column])
        return other

    def update(self, noise: Noise | None = None, step: int = 3, **changes: Any) -> Tensor:
        lists: Any = (*self.columns[:5], self.copies)
        return noisy_adamw_ema_(*lists, noise=noise, step=step, **(HYPER | changes))


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max() / y.abs().max())


@pytest.mark.parametrize("step, ema_decay", [(1, 1 / 11), (7, 7 / 17), (1_000, 0.9999)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_the_twins_in_float64(step: int, ema_decay: float, weight_decay: float) -> None:
    state = State([5_001])
    changes: Any = {"ema_decay": ema_decay, "weight_decay": weight_decay}
    wide = [column[0].double() for column in state.columns]
    numbers: Any = HYPER | changes
    expected = reference.adamw_ema(*wide, **numbers, step=step)
    with lanes(512):
        assert not state.update(step=step, **changes).any()
    found = (state.parameters[0], state.exp_avgs[0], state.exp_avg_sqs[0], state.averages[0])
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= 1e-6


def test_ten_updates_are_torchs_adamw_and_train_optims_average() -> None:
    from train.optim import ExponentialMovingAverage  # here: a GPU machine may lack what `train` stands on

    state, lengths = State([4_100, 7]), (4_100, 7)
    parameters = [torch.nn.Parameter(p.clone()) for p in state.parameters]
    optimizer = torch.optim.AdamW(parameters, **{k: v for k, v in HYPER.items() if k != "ema_decay"})
    state.exp_avgs, state.exp_avg_sqs = ([torch.zeros(n) for n in lengths] for _ in range(2))
    shards: Any = [SimpleNamespace(value=p.detach()) for p in parameters]
    average = ExponentialMovingAverage(SimpleNamespace(shards=shards), 0.999)  # type: ignore[arg-type]
    state.averages = [mean.clone() for _, mean in average.averages]
    for step in range(1, 11):
        state.gradients = [draw(n, seed=step) for n in lengths]
        for parameter, gradient in zip(parameters, state.gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        average.update(step)
        with lanes(512):
            state.update(step=step, ema_decay=min(0.999, step / (step + 10.0)))
    for n, parameter in enumerate(parameters):
        assert same(state.exp_avgs[n], optimizer.state[parameter]["exp_avg"])
        assert same(state.exp_avg_sqs[n], optimizer.state[parameter]["exp_avg_sq"])
        assert relative_error(state.parameters[n], parameter.detach()) <= 2e-7
        assert relative_error(state.averages[n], average.averages[n][1]) <= 2e-7


def test_the_average_is_torchs_lerp_bit_for_bit() -> None:
    for ema_decay in (1 / 11, 0.4999, 0.5, 0.999, 1.0):
        state = State([700])
        before = state.averages[0].clone()
        with lanes(256):
            state.update(ema_decay=ema_decay)
        assert same(state.averages[0], before.lerp_(state.parameters[0], 1.0 - ema_decay))


def test_the_update_reads_what_add_noise_releases_times_the_scale() -> None:
    """Moments of zero and beta1 of zero show the gradient that AdamW was given."""
    state = State([4_200])
    state.exp_avgs[0].zero_()
    gradient = state.gradients[0].clone()
    with lanes(512):
        state.update(Noise(0.8, [KEY], [41]), betas=(0.0, 0.999), grad_scale=1 / 37)
    assert same(state.exp_avgs[0], on_cpu(gradient, 0.8, 41) * (1 / 37))
    assert same(state.gradients[0], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_new_parameter_rounded(dtype: torch.dtype) -> None:
    state = State([4_200, 5], copy=dtype)
    with lanes(512):
        state.update(Noise(0.8, [KEY] * 2, [0, 0]))
    assert state.copies is not None
    for copy, parameter in zip(state.copies, state.parameters, strict=True):
        if dtype == torch.float16:
            assert same(copy, parameter.to(dtype))
        else:  # the interpreter cuts the low bits off; the GPU's test asks for the nearest
            assert torch.equal(bits(copy), (bits(parameter) >> 16).short())


def test_a_shard_does_not_depend_on_the_others_or_on_its_place_in_memory() -> None:
    lengths, offsets, keys = [5_000, 64, 4_099], [0, 128, 4_001], [bytes([n] * 32) for n in range(3)]
    together = State(lengths, copy=torch.bfloat16)
    alone = together.clone()
    with lanes(512):
        together.update(Noise(0.8, keys, offsets))
        for n in (0, 1, 2):
            one = object.__new__(State)
            for name, column in vars(alone).items():
                memory = torch.full((lengths[n] + 9,), math.nan, dtype=column[n].dtype)
                shard = memory[3 : 3 + lengths[n]]  # where no vector instruction reaches
                setattr(one, name, [shard.copy_(column[n])])
            one.update(Noise(0.8, [keys[n]], [offsets[n]]))
            for column, expected in zip(one.columns, together.columns, strict=True):
                assert same(column[0], expected[n])


# What goes with them


@pytest.mark.parametrize("noisy", [True, False])
def test_without_triton_the_plain_path_does_the_same(noisy: bool) -> None:
    lengths = [5_000, 3]
    state = State(lengths, copy=torch.bfloat16)
    plain, noise = state.clone(), Noise(0.8, [KEY] * 2, [7, 0]) if noisy else None
    with lanes(512):
        state.update(noise, grad_scale=0.25)
    dispatch.choose("reference", torch.device("cpu"))
    assert not plain.update(noise, grad_scale=0.25).any()
    for found, expected in zip(state.columns, plain.columns, strict=True):
        assert all(
            relative_error(x, y) <= (1e-2 if x.dtype == torch.bfloat16 else 1e-6)
            for x, y in zip(found, expected, strict=True)
        )
    shards = [draw(100), torch.tensor([1.0, math.inf])]
    assert add_noise_(shards, Noise(0.8, [KEY] * 2, [7, 0])).tolist() == [0, 1]
    assert same(shards[0], on_cpu(draw(100), 0.8, 7)) and shards[1].tolist() == [1.0, math.inf]


def test_no_shards_and_empty_shards_are_nothing() -> None:
    assert add_noise_([], Noise(1.0, [], [])).tolist() == []
    assert noisy_adamw_ema_([], [], [], [], [], noise=None, step=1, **HYPER).tolist() == []
    state = State([0, 5])
    with lanes(256):
        assert state.update(Noise(1.0, [KEY] * 2, [0, 0])).tolist() == [0, 0]


def test_the_ops_are_registered_as_torch_wants_them() -> None:
    state, keys = State([40], copy=torch.bfloat16), Noise(1.0, [KEY], [0]).key_words
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    with lanes(256):
        torch.library.opcheck(_add_noise, (state.gradients, keys, [9], 1.0), test_utils=utils)
        numbers = (1.0, 1.0, 1e-3, 0.9, 0.999, 1e-8, 0.0, 3, 0.9)
        torch.library.opcheck(_noisy_adamw_ema, (*state.columns, keys, [9], *numbers), test_utils=utils)


def test_the_bytes_are_those_of_the_tensors() -> None:
    assert add_noise_bytes(1_000) == 2 * draw(1_000).nbytes
    state = State([1_000], copy=torch.bfloat16)
    assert noisy_adamw_ema_bytes(1_000, 2) == 2 * sum(c[0].nbytes for c in state.columns) - 4_000 - 2_000
    assert noisy_adamw_ema_bytes(10) == 360


def test_every_way_to_launch_is_built_ahead_of_time() -> None:
    listed = builds()
    assert len({(build.op, build.case) for build in listed}) == len(listed) == 14
    assert not any(build.fp_fusion for build in listed)


def test_keys_and_offsets_that_make_no_noise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys\[1\] has 5 bytes: a noise key has 32"):
        Noise(1.0, [KEY, b"short"], [0, 0])
    with pytest.raises(ValueError, match=r"offsets\[0\] is -1: give one from 0"):
        Noise(1.0, [KEY], [-1])
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            Noise(std, [KEY], [0])


def test_shards_that_do_not_fit_are_refused_by_name() -> None:
    noise = Noise(1.0, [KEY], [0])
    with pytest.raises(ValueError, match=r"gradients\[0\] is torch.float64: it must be torch.float32"):
        add_noise_([draw(4).double()], noise)
    with pytest.raises(ValueError, match=r"gradients\[0\] has shape \(2, 2\).*must be flat"):
        add_noise_([draw(2, 2)], noise)
    with pytest.raises(ValueError, match=r"gradients\[0\] has shape \(4,\) and strides \(2,\)"):
        add_noise_([draw(8)[::2]], noise)
    with pytest.raises(ValueError, match=r"noise.keys has 1 shards and gradients 2"):
        add_noise_([draw(4), draw(4)], noise)
    state = State([4, 4])
    state.averages.pop()
    with pytest.raises(ValueError, match="averages has 1 shards and gradients 2"):
        state.update()
    state = State([4], copy=torch.float64)
    with pytest.raises(ValueError, match=r"copies\[0\] is torch.float64: it must be torch.bfloat16 or torch.float16"):
        state.update()
    state = State([4])
    state.exp_avgs[0] = draw(5)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has shape \(5,\).*gradient's 4 elements"):
        state.update()
    state.exp_avgs[0] = draw(4).to("meta")
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is on meta and gradients\[0\] on cpu"):
        state.update()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\): each must be in \[0, 1\)"),
        ({"step": 0}, "step is 0: the first update is step 1"),
        ({"ema_decay": 1.5}, r"ema_decay is 1.5: it must be in \[0, 1\]"),
    ],
)
def test_numbers_that_make_no_adamw_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        State([4]).update(**changes)


@pytest.mark.gpu
def test_a_gpu_releases_what_the_cpu_does() -> None:
    dispatch.choose("triton", torch.device("cuda"))
    length = 1 << 24
    gradients = [draw(length), draw(5_001, seed=1)]
    shards = [gradient.cuda() for gradient in gradients]
    assert not add_noise_(shards, Noise(0.7, [KEY, bytes(32)], [12, (1 << 35) - 7])).any()
    different = bits(shards[0].cpu()) != bits(on_cpu(gradients[0], 0.7, 12))
    assert different.sum() <= 1  # 2^24 elements, one in about 2^34
    assert same(shards[1].cpu(), on_cpu(gradients[1], 0.7, (1 << 35) - 7, bytes(32)))


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noisy", [True, False])
def test_a_gpu_updates_as_the_twin_does(copy: torch.dtype | None, noisy: bool) -> None:
    dispatch.choose("triton", torch.device("cuda"))
    lengths = [1 << 20, 4_099, 3]
    state = State(lengths, copy=copy, device="cuda")
    wide = [[shard.double().cpu() for shard in column] for column in state.columns[:5]]
    noise = Noise(0.7, [KEY] * 3, [0, 1, 4_095]) if noisy else None
    assert not state.update(noise).any()
    for n in range(len(lengths)):
        before = [column[n] for column in wide]
        if noise is not None:
            before[1] = on_cpu(before[1].float(), 0.7, noise.offsets[n]).double()
        expected = reference.adamw_ema(*before, **HYPER, step=3)
        found = (state.parameters[n], state.exp_avgs[n], state.exp_avg_sqs[n], state.averages[n])
        assert all(relative_error(x.cpu(), y) <= 1e-6 for x, y in zip(found, expected, strict=True))
        if state.copies is not None and copy is not None:
            assert same(state.copies[n], state.parameters[n].to(copy))


@pytest.mark.gpu
def test_a_gpu_refuses_what_is_not_finite_without_waiting() -> None:
    dispatch.choose("triton", torch.device("cuda"))
    shards = [draw(9_000).cuda(), draw(100).cuda()]
    shards[0][8_999] = math.inf
    assert add_noise_(shards, Noise(1.0, [KEY] * 2, [0, 0])).tolist() == [1, 0]
    assert shards[0].isinf().sum() == 1
