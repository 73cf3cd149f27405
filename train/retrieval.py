"""Does a caption find its picture? A small dual encoder, trained on public pairs, looks for generated images.

    encoder = train_encoder(public_images, public_captions, seed=0)
    encoder.recall(generated, captions)     # {"recall_at_1": 0.21, "recall_at_1_chance": 0.007, ...}
    encoder.recall(real, captions)          # the ceiling: what it finds where nothing was generated

Two towers put images and captions on one sphere, each pair nearer to each other than to the rest of its batch. Source:
Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (InfoNCE, both ways).

Privacy: nothing here opens a data set, and the encoder's weights are neither private nor charged: give it public pairs
only. Of images that are not samples, public or held out, its figures are raw ones, outside the guarantee.
"""

# N images, M captions, B batch, C channels, H, W height and width, D features
from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.evaluation import augment, image_network, one_thread, weights_sha256

_BATCH, _FEATURES, _WIDTH, _BUCKETS = 128, 64, 128, 8192
_PIECES = (3, 4)  # characters
_MOST_SHARPNESS = 100.0  # 1 / temperature, as in the paper


class CaptionTower(nn.Module):
    """Each caption is the mean of learnt vectors, one for each word and each piece of one, chosen by their hashes.

    So any language will do, and a word that was never met has the pieces of words that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.EmbeddingBag(_BUCKETS, _WIDTH, mode="mean")
        self.out = nn.Linear(_WIDTH, _FEATURES)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Features [M, D] of length 1."""
        bags = [_buckets(caption) for caption in captions]
        starts = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
        return F.normalize(self.out(self.vectors(torch.tensor([b for bag in bags for b in bag]), starts)), dim=1)


class ImageTower(nn.Module):
    """Images [N, C, H, W] in [-1, 1] as features [N, D] of length 1."""

    def __init__(self, image_shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.network = image_network(image_shape, _FEATURES, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, D] of length 1."""
        return F.normalize(self.network(images), dim=1)


class DualEncoder(nn.Module):
    """Both towers; images are fp32 [N, C, H, W] in [-1, 1] of the size that it was trained on."""

    def __init__(self, image_shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.images, self.captions = ImageTower(image_shape, seed), CaptionTower()
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def sha256(self) -> str:
        """What tells one encoder from another."""
        return weights_sha256(self)

    def loss(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cross-entropy, both ways, of who belongs to whom; of one caption's several images each is right."""
        logits_BB = (
            self.log_sharpness.exp().clamp(max=_MOST_SHARPNESS) * self.images(images) @ self.captions(captions).T
        )
        same_BB = _same(captions, captions)
        target_BB = same_BB / same_BB.sum(1, keepdim=True)
        return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2

    @torch.no_grad()
    @one_thread()
    def recall(self, images: Tensor, captions: Sequence[str], at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """For each k of `at`: the share of captions, each counted once, that find an image of theirs among the first k.

        captions [N] are the images' own; a caption may have several images. Another caption's image that is as near
        comes first, so that a generator of one image for all gets 0. Beside `recall_at_k` stands
        `recall_at_k_chance`, what a random order of the images would reach: it grows with k / N, so compare only
        figures of equally many images. Raises ValueError for images of another shape, none, or another number of
        captions.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"images are {tuple(images.shape[1:])}, and the encoder knows {self.image_shape}")
        _check_pairs(images, captions)
        asked = list(dict.fromkeys(captions))
        features_ND = torch.cat([self.images(batch) for batch in images.float().cpu().split(_BATCH)])
        nearness_MN, own_MN = self.captions(asked) @ features_ND.T, _same(asked, captions) > 0
        best_M = nearness_MN.masked_fill(~own_MN, -math.inf).max(1).values
        before_M = ((nearness_MN >= best_M[:, None]) & ~own_MN).sum(1)
        figures: dict[str, float] = {}
        for k in at:
            first = min(k, len(captions))
            draws = math.comb(len(captions), first)
            misses = [math.comb(len(captions) - own, first) / draws for own in own_MN.sum(1).tolist()]
            figures[f"recall_at_{k}"] = float((before_M < k).double().mean())
            figures[f"recall_at_{k}_chance"] = 1 - sum(misses) / len(misses)
        return figures


@one_thread()
def train_encoder(
    images: Tensor,
    captions: Sequence[str],
    seed: int,
    progress: Callable[[int, int | None], None] | None = None,
    steps: int = 400,
) -> DualEncoder:
    """An encoder of public images [N, C, H, W] in [-1, 1] (H, W from 8 to 64) and their captions [N].

    The same weights for the same seed on the same machine; the global random state is left as it was. `progress` is
    told (step, steps). Raises ValueError for no images, and for another number of captions.
    """
    _check_pairs(images, captions)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = DualEncoder(tuple(images.shape[1:]), seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        chosen: list[int] = torch.randperm(len(images), generator=generator)[:_BATCH].tolist()
        optimizer.zero_grad()
        encoder.loss(augment(images[chosen].float(), generator), [captions[n] for n in chosen]).backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return encoder.eval()


def _check_pairs(images: Tensor, captions: Sequence[str]) -> None:
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give one caption an image, and some")


def _buckets(caption: str) -> list[int]:
    """Of the caption's words, in any case, and of their pieces; one bucket at least."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())
    marked = [f"<{word}>" for word in words]
    pieces = [word[at : at + size] for word in marked for size in _PIECES for at in range(len(word) - size + 1)]
    return [crc32(piece.encode()) % _BUCKETS for piece in (*words, *pieces)] or [0]


def _same(captions: Sequence[str], others: Sequence[str]) -> Tensor:
    """fp32 [M, N]: 1 where a caption is the other, else 0."""
    places = {caption: place for place, caption in enumerate(dict.fromkeys([*captions, *others]))}
    mine, theirs = (torch.tensor([places[caption] for caption in of]) for of in (captions, others))
    return (mine[:, None] == theirs).float()
