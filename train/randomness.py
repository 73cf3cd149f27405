"""What chance a record meets in a step: a function of (seed, stage, step, record), never of an order of draws.

A resumed run needs no saved generator, and a record meets the same timestep and noise on whichever rank it falls.
"""

# B records, K noise draws a record; rows of one record stand together
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Uniforms for the timestep and for label dropout, shape (B*K,), and standard normals, shape (B*K, ...)."""

    timestep: Tensor
    dropout: Tensor
    noise: Tensor


def record_number(digest: str) -> int:
    """What `record_draws` knows a record by, of its digest alone: its place moves where another comes or goes."""
    return int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "little")


def record_draws(
    seed: int, stage: str, step: int, records: Sequence[int], shape: Sequence[int], num_draws: int
) -> Draws:
    """The draws of each record at one step, from Philox keyed by (seed, stage) and counted by (step, record, draw)."""
    stage_word = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:8], "little")
    key = np.array([seed, stage_word], dtype=np.uint64)
    rows = len(records) * num_draws
    uniforms, noise = np.empty((rows, 2)), np.empty((rows, *shape), dtype=np.float32)
    for row in range(rows):
        counter = np.array([0, row % num_draws, records[row // num_draws], step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        uniforms[row] = generator.random(2)
        noise[row] = generator.standard_normal(shape, dtype=np.float32)
    timestep, dropout = torch.from_numpy(uniforms).float().unbind(1)
    return Draws(timestep, dropout, torch.from_numpy(noise))
