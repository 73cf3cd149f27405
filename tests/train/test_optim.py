"""An update in one pass by a kernel: the same release, weights, states and average as on the host."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from models.dit import DiT, DiTConfig
from privacy.ledger import Charge
from privacy.mechanism import Release
from privacy.noise import BandedNoise, GaussianNoise
from train.config import Optim, Parallel
from train.optim import ExponentialMovingAverage
from train.parallel import Backend, build_model, join_world
from train.state import initialise

CONFIG = DiTConfig(width=8, depth=1, heads=2, image_size=8, channels=1, num_classes=10)
CHARGE = Charge(seq=1, stage="finetune", step=3, attempt=0, event={}, hash="")
NOISE = GaussianNoise(b"\x01" * 32, "finetune", "chacha20")


@pytest.fixture(autouse=True)
def _auto_again() -> Iterator[None]:
    yield
    dispatch.choose("auto", torch.device("cpu"))


def backend_with_gradients() -> tuple[Backend, ExponentialMovingAverage]:
    optim = Optim(learning_rate=1e-2, weight_decay=0.1)
    single = Parallel(backend="single")
    backend = build_model(lambda: DiT(CONFIG), join_world(), single, optim, microbatch_size=4, bf16=False)
    initialise(backend, 5)
    backend.shards = backend.shards[::3]  # interpreted, the noise of each takes a second
    generator = torch.Generator().manual_seed(7)
    for shard in backend.shards:
        shard.holder.grad = torch.randn(shard.holder.shape, generator=generator)
    return backend, ExponentialMovingAverage(backend, 0.9)


def updated(kernels: dispatch.Choice, release: Release | None) -> dict[str, Tensor]:
    dispatch.choose(kernels, torch.device("cpu"))
    backend, average = backend_with_gradients()
    backend.update(1e-2, release, average)
    backend.check_released(CHARGE.step)
    assert backend.num_updates == 1
    assert all(float(backend.optimizer.state[shard.holder]["step"]) == 1 for shard in backend.shards)
    assert all(shard.holder.grad is None for shard in backend.shards)
    found = {f"{kind}.{shard.name}": state for kind, shard, state in backend.optimizer_tensors()}
    found |= {f"param.{shard.name}": shard.value for shard in backend.shards}
    return found | {f"average.{shard.name}": mean for shard, mean in average.averages}


@pytest.mark.parametrize(
    "release",
    [lambda: None, lambda: Release(CHARGE, 0.7, 16, NOISE), lambda: Release(CHARGE, 0.7, 16, BandedNoise(NOISE, 1))],
    ids=["public", "private", "banded"],
)
def test_the_kernels_update_is_the_hosts(release: Callable[[], Release | None]) -> None:
    expected, got = updated("reference", release()), updated("triton", release())
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=2e-6, atol=1e-8), name


def test_the_noise_that_a_kernel_adds_is_the_hosts_to_the_bit() -> None:
    """With beta1 = 0 the first moment is the released gradient over the divisor, here a power of two."""
    moments = []
    for kernels in ("reference", "triton"):
        dispatch.choose(kernels, torch.device("cpu"))
        backend, average = backend_with_gradients()
        backend.optimizer.param_groups[0]["betas"] = (0.0, 0.999)
        backend.update(1e-2, Release(CHARGE, 0.7, 16, NOISE), average)
        moments.append([state for kind, _, state in backend.optimizer_tensors() if kind == "exp_avg"])
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_sum_that_is_not_finite_is_refused_by_name(kernels: dispatch.Choice) -> None:
    dispatch.choose(kernels, torch.device("cpu"))
    backend, average = backend_with_gradients()
    shard = backend.shards[3]
    assert shard.holder.grad is not None
    shard.holder.grad.view(-1)[1] = math.inf
    with pytest.raises(ValueError, match=f"the sum of {shard.name} at step {CHARGE.step} is not finite"):
        backend.update(1e-2, Release(CHARGE, 0.7, 16, NOISE), average)
        backend.check_released(CHARGE.step)
