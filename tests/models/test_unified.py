"""The unified model: what a token may not see changes nothing, what it may see counts, and the figures are right."""

from collections.abc import Iterator
from dataclasses import replace
from math import log
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch
from kernels.per_record import PerRecordModule
from models.flow import Objective
from models.layers import fill_in
from models.packed import Document, Image, Packed
from models.unified import SIZES, PackedAttention, Prediction, Unified, UnifiedConfig
from models.unified_objective import Totals, UnifiedObjective
from tests.models.documents import (
    KINDS,
    LAYOUT,
    SMALL,
    config,
    draws,
    filled,
    picture,
    random_rows,
    rows,
    text,
    visible,
)

MODELS = {kind: filled(kind) for kind in KINDS}


def outputs(model: Unified, batch: Packed, times: Tensor) -> Tensor:
    """All that the model says of each token, [B, N, V + F]."""
    with torch.no_grad():
        prediction = model(batch, times)
    return torch.cat([prediction.logits_BNV, prediction.patches_BNF], 2)


# --- who sees whom ---


@pytest.mark.parametrize("kind", ["dense", "modality_experts"])
@settings(max_examples=25, deadline=None)
@given(rows=random_rows(), seed=st.integers(0, 2**31))
def test_a_token_changes_nothing_that_must_not_see_it_by_a_bit(
    kind: str, rows: list[list[Document]], seed: int
) -> None:
    batch, generator = LAYOUT.pack(rows), torch.Generator().manual_seed(seed)
    if not batch.present_BN.any():
        return
    _, times = draws(batch)
    tokens = batch.present_BN.nonzero()
    row, token = tokens[torch.randint(len(tokens), (), generator=generator)].tolist()
    changed = replace(batch, tokens_BN=batch.tokens_BN.clone(), patches_BNF=batch.patches_BNF.clone())
    if batch.is_patch_BN[row, token]:
        changed.patches_BNF[row, token] += 3
    else:
        changed.tokens_BN[row, token] = (changed.tokens_BN[row, token] + 7) % SMALL.vocab_size
    differs_BN = (outputs(MODELS[kind], changed, times) != outputs(MODELS[kind], batch, times)).any(2)
    sees_N = visible(rows[row], batch.tokens_BN.shape[1])[:, token]
    assert not differs_BN[row][~sees_N].any()
    assert not differs_BN[[other for other in range(len(rows)) if other != row]].any()
    assert differs_BN[row, token]
    assert differs_BN[row][sees_N].float().mean() > 0.9, "and those that see it notice"


def test_another_document_changes_nothing_by_a_bit() -> None:
    own: Document = [text("own"), Image(picture(2, 2)), text("words")]
    before: Document = [text("other"), Image(picture(1, 3), noised=True)]
    after: Document = [text("third")]
    other_before: Document = [Image(picture(2, 5, 9))]
    other_after: Document = [Image(picture(1, 5, 9), noised=True)]
    first, second = LAYOUT.pack([[before, own, after]]), LAYOUT.pack([[other_before, own, other_after]])
    own_tokens = (first.document_BN == 1)[0]
    assert torch.equal((second.document_BN == 1)[0], own_tokens)
    found = []
    for batch in (first, second):
        times = torch.rand(batch.noised_BI.shape, generator=torch.Generator().manual_seed(int(batch.noised_BI.sum())))
        found.append(outputs(MODELS["dense"], batch, times)[0, own_tokens])
    assert torch.equal(*found)


def test_a_noised_image_its_time_and_its_noise_change_nothing_after_it() -> None:
    batch = LAYOUT.pack(rows())
    noise, times = draws(batch)
    objective, model = UnifiedObjective(), MODELS["dense"]
    seen, _ = objective.noised(batch, noise, times)
    again, _ = objective.noised(batch, -noise, 1 - times)
    differs_BN = (outputs(model, again, 1 - times) != outputs(model, seen, times)).any(2)
    assert torch.equal(differs_BN, batch.noised_BN), "the tokens of noised images, and no other"


def test_text_does_not_know_the_time() -> None:
    batch = LAYOUT.pack([[[text("a"), Image(picture(2, 2), noised=True), text("b")]]])
    early, late = (outputs(MODELS["dense"], batch, torch.tensor([[t]])) for t in (0.1, 0.9))
    assert torch.equal(early[~batch.noised_BN], late[~batch.noised_BN])
    assert not torch.isclose(early[batch.noised_BN], late[batch.noised_BN]).all(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_packed_with_others_is_the_document_alone(kind: str) -> None:
    batch, model = LAYOUT.pack(rows()), MODELS[kind]
    times = torch.full(batch.noised_BI.shape, 0.7)
    packed = outputs(model, batch, times)
    for row, documents in enumerate(rows()):
        for number, document in enumerate(documents):
            alone = LAYOUT.pack([[document]])
            expected = outputs(model, alone, torch.full(alone.noised_BI.shape, 0.7))[0]
            torch.testing.assert_close(packed[row][batch.document_BN[row] == number], expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_finite_spoils_only_itself() -> None:
    batch = LAYOUT.pack(rows())
    _, times = draws(batch)
    for model in MODELS.values():
        expected = outputs(model, batch, times)
        spoilt = replace(batch, patches_BNF=batch.patches_BNF.clone())
        spoilt.patches_BNF[2] = torch.nan
        found = outputs(model, spoilt, times)
        assert found[2].isnan().any()
        torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_patch_of_noise_knows_where_it_is() -> None:
    """At t = 1 patches are alike, and so is all that rotary positions tell of a grid seen whole, but for its edges."""
    model = filled("dense")
    pixels = torch.zeros_like(picture(4, 4))
    batch = LAYOUT.pack([[[Image(pixels, noised=True)]]])
    patches = outputs(model, batch, torch.ones(1, 1))[0, batch.is_patch_BN[0], SMALL.vocab_size :]
    assert torch.cdist(patches, patches).add(torch.eye(len(patches))).min() > 1e-3


def test_images_know_rows_from_columns_and_text_its_order() -> None:
    model = MODELS["dense"]
    flat, tall = LAYOUT.pack([[[Image(picture(1, 2))]]]), LAYOUT.pack([[[Image(picture(2, 1))]]])
    same = replace(tall, patches_BNF=flat.patches_BNF)
    zero = torch.zeros(1, 1)
    assert not torch.allclose(outputs(model, flat, zero), outputs(model, same, zero))
    forward, backward = (outputs(model, LAYOUT.pack([[[text(t)]]]), zero)[0, -1] for t in ("abc", "bac"))
    assert not torch.allclose(forward, backward)


@pytest.fixture
def kernels() -> Iterator[None]:
    dispatch.choose("triton", torch.device("cpu"))
    yield
    dispatch.choose("auto", torch.device("cpu"))


def one_head(kind: str) -> Unified:
    """Of a head width that the kernels take."""
    model = filled(kind)
    for block in model.blocks:
        block.attention = PackedAttention(SMALL.width, heads=1)
        fill_in(block.attention, model.initial_value, torch.Generator().manual_seed(0))
    return model


@pytest.mark.slow
def test_by_the_kernels_too_another_document_changes_nothing_by_a_bit(kernels: None) -> None:
    model = one_head("dense")  # of experts, tests/kernels/test_moe.py says the same
    own: Document = [text("own"), Image(picture(2, 2)), text("words")]
    others: list[Document] = [[Image(picture(1, 1)), text("ab")], [Image(picture(1, 2, 1), noised=True), text("c")]]
    batches = [LAYOUT.pack([[other, own]]) for other in others]
    own_tokens = (batches[0].document_BN == 1)[0]
    found = [outputs(model, batch, torch.tensor([[t, 0.0]]))[0, own_tokens] for t, batch in enumerate(batches)]
    assert own_tokens.sum() == LAYOUT.length(own)
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_say_what_torch_says(kind: str, kernels: None) -> None:
    model, batch = one_head(kind), LAYOUT.pack(rows())
    _, times = draws(batch)
    found = outputs(model, batch, times)[batch.present_BN]
    dispatch.choose("reference", torch.device("cpu"))
    torch.testing.assert_close(found, outputs(model, batch, times)[batch.present_BN], rtol=1e-4, atol=1e-4)


# --- losses ---


def test_losses_are_sums_over_each_rows_own_tokens() -> None:
    batch, model = LAYOUT.pack(rows()), MODELS["dense"]
    noise, times = draws(batch)
    losses = UnifiedObjective().losses(model, batch, noise, times)
    seen_BNF = batch.patches_BNF.clone()
    text_B, patches_B = torch.zeros(4), torch.zeros(4)
    for row, token in batch.learnt_patches_BN.nonzero().tolist():
        t = times[row, batch.image_BN[row, token]]
        seen_BNF[row, token] = (1 - t) * batch.patches_BNF[row, token] + t * noise[row, token]
    prediction = model(replace(batch, patches_BNF=seen_BNF), times)
    for row, token in batch.learnt_patches_BN.nonzero().tolist():
        error = prediction.patches_BNF[row, token] - (noise - batch.patches_BNF)[row, token]
        patches_B[row] += error.square().mean().detach()
    for row, token in batch.weights_BN.nonzero().tolist():
        text_B[row] += F.cross_entropy(prediction.logits_BNV[row, token], batch.targets_BN[row, token]).detach()
    torch.testing.assert_close(losses.text_B, text_B)
    torch.testing.assert_close(losses.patches_B, patches_B)
    assert (losses.text_B > 0).tolist() == [True, True, False, False]
    assert (losses.patches_B > 0).tolist() == [True, False, True, False]
    assert losses.load_LE is None and not losses.balance_B.any() and not losses.z_B.any()


def test_what_is_predicted_where_nothing_is_to_be_learnt_enters_no_loss_even_if_it_is_not_finite() -> None:
    batch, model = LAYOUT.pack(rows()), MODELS["dense"]

    class Spoilt(nn.Module):
        def forward(self, seen: Packed, times: Tensor) -> Prediction:
            found = model(seen, times)
            return found._replace(
                logits_BNV=found.logits_BNV.masked_fill((batch.weights_BN == 0)[..., None], torch.nan),
                patches_BNF=found.patches_BNF.masked_fill(~batch.learnt_patches_BN[..., None], torch.nan),
            )

    whole, spoilt = (UnifiedObjective().losses(of, batch, *draws(batch)) for of in (model, Spoilt()))
    assert torch.equal(spoilt.text_B, whole.text_B) and torch.equal(spoilt.patches_B, whole.patches_B)


def test_each_modality_is_divided_by_the_whole_batchs_tokens_however_it_is_cut_up() -> None:
    batch, model = LAYOUT.pack(rows()), MODELS["mixture"]
    noise, times = draws(batch)
    objective, totals = UnifiedObjective(patches_weight=3.0, balancing="row"), Totals.of(batch)
    assert (totals.text, totals.patches, totals.tokens) == (6 + 3 + 2 + 11, 6 + 4 + 3 + 4, batch.present_BN.sum())
    whole = objective.losses(model, batch, noise, times)
    loss = objective.weighed(whole, totals).sum()
    cut_up = torch.zeros(())
    for own in (torch.tensor([0]), torch.tensor([3, 1]), torch.tensor([2])):
        part = objective.losses(model, batch.rows(own), noise[own], times[own])
        cut_up += objective.weighed(part, totals).sum()
    torch.testing.assert_close(cut_up, loss)
    by_hand = whole.text_B.sum() / totals.text + 3 * whole.patches_B.sum() / totals.patches
    by_hand += (0.01 * whole.balance_B.sum() + 0.001 * whole.z_B.sum()) / totals.tokens
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("prediction", ["flow", "x0", "epsilon", "v"])
def test_every_prediction_has_the_objectives_own_path_and_target(prediction: str) -> None:
    batch = LAYOUT.pack([[[Image(picture(2, 2), noised=True)]]])
    noise, _ = draws(batch)
    flow = Objective(prediction=prediction)  # type: ignore[arg-type]
    seen, target = UnifiedObjective(flow=flow).noised(batch, noise, torch.tensor([[0.3]]))
    own = batch.is_patch_BN
    expected = flow.noised(batch.patches_BNF[own], noise[own], torch.tensor(0.3))
    torch.testing.assert_close((seen.patches_BNF[own], target[own]), expected)


def test_a_new_model_knows_no_letter_and_predicts_zero_for_every_patch() -> None:
    model = Unified(UnifiedConfig(size="nano", image_size=8, max_caption_tokens=64, channels=2, patch_size=2))
    batch = LAYOUT.pack(rows())
    noise, times = draws(batch)
    nats: list[float] = []
    for seed in range(4):  # one model's few texts scatter by 0.04
        model.init_weights(torch.Generator().manual_seed(seed))
        losses = UnifiedObjective().losses(model, batch, noise, times)
        nats.append(losses.text_B.sum().item() / Totals.of(batch).text)
        assert torch.count_nonzero(model(batch, times).patches_BNF) == 0
    assert fmean(nats) == pytest.approx(log(261), abs=0.1)


@pytest.mark.parametrize("kind", ["modality_experts", "mixture"])
def test_gradients_agree_with_finite_differences_in_float64(kind: str) -> None:
    model, batch = filled(kind).double(), LAYOUT.pack(rows())
    _, times = draws(batch)
    batch = replace(batch, patches_BNF=batch.patches_BNF.double())

    def loss() -> Tensor:
        prediction = model(batch, times.double())
        return prediction.logits_BNV.square().mean() + prediction.patches_BNF.square().mean()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    generator, step = torch.Generator().manual_seed(2), 1e-6
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        measured = (above - below) / (2 * step)
        torch.testing.assert_close(measured, (gradient * direction).sum(), rtol=1e-4, atol=1e-6, msg=name)


# --- shape, weights, work ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_a_per_record_layer(kind: str) -> None:
    layers = [module for module in MODELS[kind].modules() if isinstance(module, PerRecordModule)]
    held = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    assert held == {id(parameter) for parameter in MODELS[kind].parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_a_function_of_the_seed_on_meta_too(kind: str) -> None:
    model = Unified(config(kind))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.device("meta"):
        other = Unified(config(kind))
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device="cpu")
    other.init_weights(torch.Generator().manual_seed(0))
    for (name, value), again in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, again), name
        assert bool(value.any()) != (name.endswith("bias") or name == "patch_head.weight"), name


def test_each_expert_starts_as_a_dense_network_of_its_width_would() -> None:
    model = Unified(
        UnifiedConfig(
            size="nano", image_size=8, max_caption_tokens=64, channels=3, patch_size=2, num_experts=4, top_k=2
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    up = model.get_parameter("blocks.0.mlp.experts.up")
    assert up.shape == (4, 2 * 192, 128)
    for expert in up:
        assert expert.std().item() == pytest.approx((2 / (128 + 384)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("size", "millions"), [("nano", 0.95), ("tiny", 2.8), ("B", 86), ("1B", 1017), ("3B", 2956), ("7B", 6496)]
)
def test_named_sizes_have_the_parameters_they_are_named_for(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = Unified(UnifiedConfig(size=size, image_size=8, max_caption_tokens=64, channels=16, patch_size=2))  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_forward_flops_are_those_the_counter_sees(size: str) -> None:
    width, _, heads = SIZES[size]  # type: ignore[index]
    with torch.device("meta"):
        model = Unified(
            UnifiedConfig(
                width=width, depth=2, heads=heads, image_size=8, max_caption_tokens=64, channels=2, patch_size=2
            )
        )
    batch = LAYOUT.pack(rows()).to("meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, torch.empty(batch.noised_BI.shape, device="meta"))
    expected = model.config.forward_flops(*batch.tokens_BN.shape, num_images=batch.noised_BI.shape[1])
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixtures_flops_are_those_of_the_experts_chosen(kind: str) -> None:
    batch = LAYOUT.pack(rows())
    _, times = draws(batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        MODELS[kind](batch, times)
    expected = MODELS[kind].config.forward_flops(*batch.tokens_BN.shape, num_images=batch.noised_BI.shape[1])
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_the_model_compiles_without_a_graph_break() -> None:
    model, batch = filled(), LAYOUT.pack(rows())
    _, times = draws(batch)
    expected = model(batch, times)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(batch, times)
    torch.testing.assert_close(found.logits_BNV, expected.logits_BNV)
    torch.testing.assert_close(found.patches_BNF, expected.patches_BNF)
    (found.logits_BNV.sum() + found.patches_BNF.sum()).backward()


def test_bf16_weights_take_fp32_patches_and_stay_near_the_fp32_model() -> None:
    batch = LAYOUT.pack(rows())
    _, times = draws(batch)
    for kind in KINDS:
        model = Unified(config(kind))
        model.init_weights(torch.Generator().manual_seed(0))
        exact, present = model(batch, times).logits_BNV, batch.present_BN
        rounded = model.bfloat16()(batch, times).logits_BNV
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact)[present].norm() / exact[present].norm() < 0.1


def test_under_autocast_the_path_and_the_losses_stay_in_fp32() -> None:
    batch = LAYOUT.pack(rows())
    noise, times = draws(batch)
    objective = UnifiedObjective()
    exact, target = objective.noised(batch, noise, times)
    with torch.autocast("cpu", torch.bfloat16):
        seen, same_target = objective.noised(batch, noise, times)
        assert torch.equal(seen.patches_BNF, exact.patches_BNF) and torch.equal(same_target, target)
        for model in MODELS.values():
            losses = objective.losses(model, batch, noise, times)
            assert losses.text_B.dtype == losses.patches_B.dtype == losses.z_B.dtype == torch.float32


# --- what is refused ---


def test_a_config_survives_being_written_and_read() -> None:
    for kind in KINDS:
        assert UnifiedConfig(**config(kind).model_dump()) == config(kind)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "70B"}, "size"),
        ({"size": "nano", "width": 256}, "width is 256, but size nano has 128"),
        ({"width": 128, "heads": 4}, "depth is missing"),
        ({"width": 132, "depth": 2, "heads": 4}, "width 132 over heads 4 must be a multiple of 8"),
        ({"size": "nano", "num_experts": 2, "top_k": 3}, "top_k is 3, but num_experts 2"),
        ({"size": "nano", "num_experts": 8, "top_k": 5}, "top_k is 5, which does not divide the hidden width, 384"),
        ({"size": "nano", "capacity": 1.25}, "capacity"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UnifiedConfig(**{"image_size": 8, "max_caption_tokens": 64, "channels": 3, "patch_size": 2, **fields})  # type: ignore[arg-type]


def test_a_batch_laid_out_for_another_model_is_refused() -> None:
    batch = LAYOUT.pack(rows())
    _, times = draws(batch)
    with pytest.raises(ValueError, match="8 features, but 3 channels in patches of 2 have 12"):
        Unified(SMALL.model_copy(update={"channels": 3}))(batch, times)
    with pytest.raises(ValueError, match=r"times_BI has shape \(5,\): give one for each image, \(4, 5\)"):
        MODELS["dense"](batch, times[0])
