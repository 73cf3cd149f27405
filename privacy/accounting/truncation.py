"""Truncated Poisson sampling as a mixture of two sampled Gaussians, for the accountants that have no event for it.

Let a unit x be in one of two neighbouring data sets, the larger of N units, and let the draw of the others be seen.

- Fewer than B others: x enters with probability q and moves the sum by 1. A sampled Gaussian, (q, sigma).
- B others or more: without x, B of them are kept, a uniform subset R of them all. With x, the same R, unless x is drawn
  and kept: then x takes the place of a uniform member of R. That has probability
      p = P(x drawn, kept, B others or more) / P(B others or more) = P(Bin(N, q) > B) (B / N) / P(Bin(N - 1, q) >= B),
  for of more than B drawn each is kept alike, and it does not depend on R. For fixed R and member, the sum moves by at
  most 2: a sampled Gaussian, (p, sigma / 2).

The divergences are jointly convex, so the mixture, with the case seen, bounds both neighbours and both directions.
Source: Ganesh 2025 (arXiv 2508.15089), whose accountant, dp-accounting's, has replacement on both sides in the second.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Any, NamedTuple

from privacy.events import Event


class SampledGaussian(NamedTuple):
    """A case of a mixture: with probability `weight`, (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2)."""

    weight: float
    sampling_rate: float
    noise_multiplier: float


def cases(event: Event) -> list[SampledGaussian]:
    """The cases whose mixture bounds the event: one, or two for truncated Poisson."""
    values: dict[str, Any] = dict(event)
    rate, noise = values.get("sampling_rate", 1.0), values["noise_multiplier"]
    if "max_batch_size" not in values:
        return [SampledGaussian(1.0, rate, noise)]
    from scipy.stats import binom

    num_units, cap = values["num_units"], values["max_batch_size"]
    full = float(binom.sf(cap - 1, num_units - 1, rate))
    more = float(binom.sf(cap, num_units, rate))
    if more == 0:  # the cap is never reached
        return [SampledGaussian(1.0, rate, noise)]
    found = [
        SampledGaussian(1 - full, rate, noise),
        SampledGaussian(full, min(more * cap / num_units / full, 1.0), noise / 2),
    ]
    return [case for case in found if case.weight > 0]
