"""Generation with a cache against the model run on the whole document at every step."""

# B rows, N tokens, F features of a patch, V vocabulary, T tokens to write
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.flow import Objective, sample
from models.packed import Document, Image, Text
from models.unified import Unified
from models.unified_generation import draw_images, write_texts
from models.unified_objective import UnifiedObjective
from tests.models.documents import CHANNELS, KINDS, LAYOUT, PATCH, filled, picture, text

MODELS = {kind: filled(kind, seed=3) for kind in KINDS}
BEGUN: list[Document] = [
    [Image(picture(2, 3, 1))],
    [text("first"), Image(picture(1, 2, 2)), text("then"), Image(picture(2, 2, 3))],
    [text("words")],
]
END = LAYOUT.tokenizer.special("end_text")
OBJECTIVE = UnifiedObjective()


def logits_of_whole(model: Unified, document: Document, written: list[int]) -> Tensor:
    """[V] after the tokens written so far, from the document run anew."""
    batch = LAYOUT.pack([[[*document, Text(written)]]])
    return model(batch, torch.zeros(batch.noised_BI.shape)).logits_BNV[0, -2].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_from_the_cache_are_those_of_the_whole_document(kind: str) -> None:
    model, spelt = MODELS[kind], [*b"abcd"]
    with torch.no_grad():
        for document in BEGUN:
            whole = LAYOUT.pack([[[*document, Text(spelt)]]])
            times = torch.zeros(whole.noised_BI.shape)
            expected = model(whole, times).logits_BNV[0]
            num_tokens = whole.tokens_BN.shape[1]
            cache, found = model.empty_cache(1, num_tokens), []
            start = 0
            for stop in (LAYOUT.length(document), *range(LAYOUT.length(document) + 1, num_tokens + 1)):
                found.append(model(whole.between(start, stop), times, cache).logits_BNV[0])
                cache = cache.longer(torch.tensor([stop - start]))
                start = stop
            torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_the_whole_document_would_write(kind: str) -> None:
    model, max_tokens = MODELS[kind], 6
    uniforms = torch.rand(len(BEGUN), max_tokens, generator=torch.Generator().manual_seed(0))
    greedy = write_texts(model, LAYOUT, BEGUN, max_tokens)
    drawn = write_texts(model, LAYOUT, BEGUN, max_tokens, temperature=0.8, uniforms_BT=uniforms)
    assert greedy != drawn
    for row, document in enumerate(BEGUN):
        for texts, temperature in ((greedy, 0.0), (drawn, 0.8)):
            expected: list[int] = []
            for step in range(max_tokens):
                logits = logits_of_whole(model, document, expected)
                logits[[s for s in LAYOUT.tokenizer.specials.values() if s != END]] = -torch.inf
                chances = (logits / temperature).softmax(0) if temperature else None
                token = logits.argmax() if chances is None else (chances.cumsum(0) > uniforms[row, step]).int().argmax()
                if token == END:
                    break
                expected.append(int(token))
            assert texts[row] == expected


def test_chances_are_even_at_a_temperature_beyond_all_logits_and_the_likeliest_tokens_at_one_near_0() -> None:
    model, tokens = MODELS["dense"], 256 + 1  # bytes, or the end
    uniforms = torch.tensor([[3.5], [99.5], [256.5]], dtype=torch.float64) / tokens
    assert write_texts(model, LAYOUT, BEGUN, 1, temperature=1e300, uniforms_BT=uniforms) == [[3], [99], []]
    likeliest = write_texts(model, LAYOUT, BEGUN, 4)
    # a chance of 0 is not drawn by a uniform of 0, and one that rounding leaves no sum to pass draws the likeliest
    for temperature, uniform in ((1e-300, 0.0), (1e-300, 0.9), (1.0, 1 + 1e-9)):
        uniforms = torch.full((3, 4), uniform, dtype=torch.float64)
        assert write_texts(model, LAYOUT, BEGUN, 4, temperature=temperature, uniforms_BT=uniforms) == likeliest


def test_a_row_is_written_the_same_whatever_is_beside_it() -> None:
    together = write_texts(MODELS["dense"], LAYOUT, BEGUN, 5)
    assert together == [write_texts(MODELS["dense"], LAYOUT, [document], 5)[0] for document in BEGUN]


def test_writing_stops_at_the_end_of_the_text_and_writes_no_other_special_token() -> None:
    model = filled(seed=3)
    with torch.no_grad():
        model.embed.weight[256:] *= 100
    (written,) = write_texts(model, LAYOUT, BEGUN[:1], 40)
    assert len(written) < 40 and max(written, default=0) < 256


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_drawn_with_a_cache_are_those_of_the_whole_document_at_every_step(kind: str, sampler: str) -> None:
    model, guidance, steps = MODELS[kind], 2.0, 3
    noise = torch.randn(len(BEGUN), CHANNELS, 3 * PATCH, 2 * PATCH, generator=torch.Generator().manual_seed(0))
    found = draw_images(
        model, LAYOUT, OBJECTIVE, BEGUN, noise, sampler=sampler, steps=steps, guidance=guidance  # type: ignore[arg-type]
    )  # fmt: skip

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        out: list[Tensor] = []
        for pixels, time, row in zip(x, t, rows.tolist(), strict=True):
            document = [*([Text(())] if row == len(BEGUN) else BEGUN[row]), Image(pixels, noised=True)]
            batch = LAYOUT.pack([[document]])
            patches = model(batch, torch.full(batch.noised_BI.shape, time.item())).patches_BNF[batch.learnt_patches_BN]
            out.append(LAYOUT.unpatchify(patches[None], *pixels.shape[1:])[0])
        return torch.stack(out)

    labels = torch.arange(len(BEGUN))
    expected = sample(
        predict, Objective(), noise, labels, sampler=sampler, steps=steps, guidance=guidance, null_class=len(BEGUN)  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.shape == noise.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_stands_before_and_guidance_change_the_image_and_progress_is_told() -> None:
    model, noise = MODELS["dense"], torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    told: list[tuple[int, int]] = []
    plain = draw_images(model, LAYOUT, OBJECTIVE, BEGUN[:2], noise, steps=2, progress=lambda *x: told.append(x))
    assert told == [(1, 2), (2, 2)]
    assert not torch.allclose(plain, draw_images(model, LAYOUT, OBJECTIVE, BEGUN[1:], noise, steps=2))
    assert not torch.allclose(plain, draw_images(model, LAYOUT, OBJECTIVE, BEGUN[:2], noise, steps=2, guidance=3))
    alone = draw_images(model, LAYOUT, OBJECTIVE, BEGUN[:1], noise[:1], steps=2)
    torch.testing.assert_close(plain[:1], alone)


def test_what_cannot_be_generated_is_refused() -> None:
    model, noise = MODELS["dense"], torch.zeros(1, CHANNELS, 4, 4)
    noised: list[Document] = [[Image(picture(1, 1), noised=True)]]
    with pytest.raises(ValueError, match="a document has a noised image, which nothing after it sees"):
        write_texts(model, LAYOUT, noised, 2)
    with pytest.raises(ValueError, match="a document has a noised image"):
        draw_images(model, LAYOUT, OBJECTIVE, noised, noise)
    with pytest.raises(ValueError, match="3 documents, but noise of 1 images"):
        draw_images(model, LAYOUT, OBJECTIVE, BEGUN, noise)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        write_texts(model, LAYOUT, BEGUN, 0)
    for temperature in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: give 0 or more"):
            write_texts(model, LAYOUT, BEGUN, 2, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature is 1, which needs uniforms_BT \(3, 2\)"):
        write_texts(model, LAYOUT, BEGUN, 2, temperature=1)
