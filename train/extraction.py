"""Did the generator hand out its training images? A nearest-neighbour test of samples against a set of images.

A sample counts as a copy where its nearest training image is unusually near for that neighbourhood: the distance, over
the mean distance to the `neighbours` nearest, is at or below a threshold that was calibrated on held-out images, which
no generator copied. The ratio asks whether one image stands out, where `train.evaluation.copy_rate` asks whether any is
near: smooth samples in a crowded neighbourhood are near many images, and copies of none.
Source: the ratio is that of Carlini et al. 2023, "Extracting Training Data from Diffusion Models" (arXiv:2301.13188),
for CIFAR-10, with 50 neighbours and a constant threshold; that real images are the yardstick, of Somepalli et al. 2023
(arXiv:2212.03860).

Privacy: a function of the images it is given. Of public images the figures are free; of private images they are raw
figures of private data, outside the guarantee, and the caller must mark them so.
"""

# N samples, M training images

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privacy.empirical import proportion_interval
from train.evaluation import Array, distances


@dataclass(frozen=True)
class Share:
    """How many of `num_images` count as copies, and the interval of that share."""

    num_images: int
    copies: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Array, threshold: float, confidence: float) -> "Share":
        copies = int((ratios <= threshold).sum())
        return cls(len(ratios), copies, copies / len(ratios), *proportion_interval(copies, len(ratios), confidence))


@dataclass(frozen=True)
class Extraction:
    """The share of copies among the samples, beside that among held-out real images, which are copies of nothing."""

    samples: Share
    held_out: Share
    num_train_images: int
    neighbours: int
    threshold: float
    confidence: float

    @property
    def found(self) -> bool:
        """Whether the samples hold more copies than chance: the two intervals do not meet."""
        return self.samples.low > self.held_out.high


def find_copies(
    samples: Tensor,
    train_images: Tensor,
    held_out: Tensor,
    *,
    neighbours: int = 50,
    quantile: float = 0.01,
    confidence: float = 0.95,
) -> Extraction:
    """Test `samples` for copies of `train_images`; all [_, C, H, W], distances are Euclidean over pixels.

    Every other held-out image calibrates the threshold, the `quantile` of their ratios; the others are the control.
    """
    if len(held_out) < 2 or len(samples) == 0:
        raise ValueError(f"{len(samples)} samples and {len(held_out)} held-out images: give some, and two or more")
    neighbours = min(neighbours, len(train_images))
    if neighbours < 2:
        raise ValueError(f"{len(train_images)} training images: a neighbourhood needs two or more")
    control = nearness(held_out, train_images, neighbours)
    threshold = float(np.quantile(control[::2], quantile, method="lower"))
    return Extraction(
        Share.of(nearness(samples, train_images, neighbours), threshold, confidence),
        Share.of(control[1::2], threshold, confidence),
        len(train_images),
        neighbours,
        threshold,
        confidence,
    )


def nearness(images: Tensor, train_images: Tensor, neighbours: int) -> Array:
    """Each image's distance to the nearest training image over the mean distance to its `neighbours` nearest: (N,).

    In [0, 1]; 0 for an exact copy, near 1 where no training image stands out.
    """
    rows = distances(images.flatten(1).double(), train_images.flatten(1).double())
    nearest = torch.cat([row.topk(neighbours, dim=1, largest=False).values for row in rows])
    mean = nearest.mean(1)
    return torch.where(mean > 0, nearest[:, 0] / mean, torch.zeros_like(mean)).numpy()
