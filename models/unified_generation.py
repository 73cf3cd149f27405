"""What the unified model makes of a document begun: the image that comes next, or the text.

What stands before is read once, into a cache of keys and values; a step of the sampler runs the image's own tokens
only, a step of the writer one token. Guarantee: a row's result depends on that row alone, and is that of the model run
on the whole document each time, to rounding. Randomness comes in as an argument.
"""

# B rows, N tokens, F features of a patch, V vocabulary, T tokens to write
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.flow import Sampler, sample
from models.packed import Document, Image, Layout, Packed, Text
from models.unified import Cache, Unified
from models.unified_objective import UnifiedObjective

NO_CAPTION: Document = (Text(()),)


@torch.no_grad()
def draw_images(
    model: Unified,
    layout: Layout,
    objective: UnifiedObjective,
    documents: Sequence[Document],
    noise_BCHW: Tensor,
    *,
    sampler: Sampler = "euler",
    steps: int = 50,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The image that each document goes on with, of the noise's size; fp32 [B, C, H, W], about [-1, 1], unclamped.

    Under `guidance` w the prediction is that of an empty caption + w times the difference that the document makes
    (`models.flow.sample`). Raises ValueError for what `Layout.pack` refuses, a document that has a noised image, and
    another number of documents than of noise.
    """
    if len(documents) != len(noise_BCHW):
        raise ValueError(f"{len(documents)} documents, but noise of {len(noise_BCHW)} images: give each its own")
    image = layout.pack([[[Image(pixels_CHW, noised=True)]] for pixels_CHW in noise_BCHW.cpu()])
    image = image.to(noise_BCHW.device)
    num_patches = int(image.is_patch_BN[0].sum())
    patches = slice(1, 1 + num_patches)
    guided = guidance != 1
    # the last row's is for guidance
    cache, places_B = _read(model, layout, [*documents, NO_CAPTION], num_patches + 2)

    def predict(x_RNF: Tensor, t_R: Tensor, rows_R: Tensor) -> Tensor:
        own = image.rows(rows_R.clamp(max=len(documents) - 1))
        seen_RNF = torch.zeros_like(own.patches_BNF)
        seen_RNF[:, patches] = x_RNF
        own = _moved(replace(own, patches_BNF=seen_RNF), places_B[rows_R])
        return model(own, t_R[:, None], cache.rows(rows_R)).patches_BNF[:, patches]

    drawn_BNF = sample(
        predict, objective.flow, image.patches_BNF[:, patches], torch.arange(len(documents), device=noise_BCHW.device),
        sampler=sampler, steps=steps, guidance=guidance, null_class=len(documents) if guided else None,
        progress=progress,
    )  # fmt: skip
    return layout.unpatchify(drawn_BNF, *noise_BCHW.shape[2:])


@torch.no_grad()
def write_texts(
    model: Unified,
    layout: Layout,
    documents: Sequence[Document],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    uniforms_BT: Tensor | None = None,
) -> list[list[int]]:
    """The text that each document goes on with, its tokens up to its end or `max_tokens`, without delimiters.

    At `temperature` 0 each token is the likeliest one; above it, the one at which the probabilities, taken at that
    temperature and summed in the order of the vocabulary, pass the row's uniform in [0, 1). Special tokens but the end
    are never written. Raises ValueError for what `Layout.pack` refuses, and a document that has a noised image.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: give at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give 0 or more, and finite")
    if temperature > 0 and (uniforms_BT is None or uniforms_BT.shape != (len(documents), max_tokens)):
        raise ValueError(f"temperature is {temperature}, which needs uniforms_BT ({len(documents)}, {max_tokens})")
    end = layout.tokenizer.special("end_text")
    unwritten = [token for token in layout.tokenizer.specials.values() if token != end]
    cache, places_B = _read(model, layout, documents, max_tokens)
    token = layout.pack([[[Text(())]] for _ in documents]).between(0, 1).to(places_B.device)
    no_times_B1, one_B = torch.zeros(len(documents), 1, device=places_B.device), torch.ones_like(places_B)
    written: list[list[int]] = [[] for _ in documents]
    unfinished = set(range(len(documents)))
    for step in range(max_tokens):
        logits_BV = model(_moved(token, places_B + step), no_times_B1, cache).logits_BNV[:, 0].float()
        cache = cache.longer(one_B)
        logits_BV[:, unwritten] = -torch.inf
        if temperature == 0:
            next_B = logits_BV.argmax(1)
        else:
            assert uniforms_BT is not None
            # float64: in fp32 a temperature beyond its range would make the unwritten tokens' -inf a NaN
            chances_BV = ((logits_BV - logits_BV.amax(1, keepdim=True)).double() / temperature).softmax(1)
            passed_BV = chances_BV.cumsum(1) > uniforms_BT[:, step : step + 1].to(chances_BV)
            # a sum that rounding left below 1 may not be passed at all: then the likeliest
            next_B = torch.where(passed_BV.any(1), passed_BV.int().argmax(1), logits_BV.argmax(1))
        for row in sorted(unfinished):
            if (chosen := int(next_B[row])) == end:
                unfinished.remove(row)
            else:
                written[row].append(chosen)
        if not unfinished:
            break
        token = replace(token, tokens_BN=next_B[:, None])
    return written


def _read(model: Unified, layout: Layout, documents: Sequence[Document], room: int) -> tuple[Cache, Tensor]:
    """A cache of the documents, a row each, with `room` for more tokens, and the place at which each goes on."""
    if any(isinstance(part, Image) and part.noised for document in documents for part in document):
        raise ValueError("a document has a noised image, which nothing after it sees: give clean ones")
    device = model.embed.weight.device
    batch = layout.pack([[document] for document in documents]).to(device)
    cache = model.empty_cache(len(documents), batch.tokens_BN.shape[1] + room)
    model(batch, torch.zeros(batch.noised_BI.shape, device=device), cache)
    return cache.longer(batch.present_BN.sum(1, dtype=torch.int32)), batch.positions_BN3[..., 0].amax(1) + 1


def _moved(batch: Packed, places_B: Tensor) -> Packed:
    """The rows' tokens that many places further on."""
    positions_BN3 = batch.positions_BN3.clone()
    positions_BN3[..., 0] += places_B[:, None]
    return replace(batch, positions_BN3=positions_BN3)
