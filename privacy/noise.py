"""Gaussian noise on gradient shards: once per element, on whoever owns it, the same bits at any sharding."""

from __future__ import annotations

import hashlib
import hmac

from torch import Tensor

from kernels.noise import KEYSTREAMS, gaussian


class GaussianNoise:
    """Noise that is a function of (secret, stage, step, attempt, name, element index).

    Guarantee: two draws share bits only if all of these agree, so a replayed step (a new attempt) never meets the noise
    of the step it replays. The caller must have a durable charge for (stage, step, attempt) before it draws.
    """

    def __init__(self, secret: bytes, stage: str, generator: str) -> None:
        if generator not in KEYSTREAMS:
            raise ValueError(f"noise generator is {generator!r}: choose one of {', '.join(KEYSTREAMS)}")
        self._secret, self._stage, self.generator = secret, stage, generator

    def add_(self, shard: Tensor, *, name: str, offset: int, step: int, attempt: int, std: float) -> None:
        """Add N(0, std^2), in place, to a flat shard that holds elements [offset, offset + numel) of tensor `name`."""
        if not std > 0:
            raise ValueError(f"noise on {name} at step {step} has standard deviation {std}: it must be positive")
        label = "\x1f".join(("noise", self._stage, str(step), str(attempt), name))
        key = hmac.new(self._secret, label.encode(), hashlib.sha256).digest()
        normals = gaussian(key, offset, shard.numel(), self.generator)
        shard.add_(normals.to(shard.device, shard.dtype), alpha=std)
