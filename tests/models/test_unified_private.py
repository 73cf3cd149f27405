"""Private training of the unified model: each row's gradient norm and clipped share, against the row run alone."""

# B rows (units), K noise draws a unit
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.ghost_norm import RecordWeights
from kernels.per_record import Gradients, Pass, Site, Use, activate
from models.packed import Document, Image, Packed
from models.unified import Unified
from models.unified_objective import Totals, UnifiedObjective
from privacy import clipping
from tests.models.documents import KINDS, LAYOUT, config, draws, filled, picture, rows, text
from tests.privacy.clipped_sums import FLAT, OneProcess, clipped_sum, relative_error

TOTALS = Totals(text=20, patches=15, tokens=80)  # expected, not counted
OBJECTIVE = UnifiedObjective(balancing="row", z_weight=0.01)


def units() -> list[list[Document]]:
    """`rows`, and one more with several of everything, so that no two tokens' gradients are alike."""
    busy: Document = [
        text("tied words", learn=True), Image(picture(1, 2, 7)), text("words tied", learn=True),
        Image(picture(2, 2, 8), noised=True),
    ]  # fmt: skip
    return [*rows(), [busy, [text("tied"), Image(picture(2, 1, 9), noised=True)]]]


def losses_of(batch: Packed, noise: Tensor, times: Tensor, model: nn.Module) -> Tensor:
    return OBJECTIVE.weighed(OBJECTIVE.losses(model, batch, noise, times), TOTALS)


def losses_on(batch: Packed, noise: Tensor, times: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: losses_of(batch, noise, times, model)


def gradients_alone(model: Unified, batch: Packed, noise: Tensor, times: Tensor) -> list[dict[str, Tensor]]:
    """Each row's gradient by plain autograd, in a batch of its own."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found: list[dict[str, Tensor]] = []
    for row in range(len(noise)):
        own = torch.tensor([row])
        loss = losses_of(batch.rows(own), noise[own], times[own], model).sum()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        found.append({name: g.double() for name, g in zip(names, gradients, strict=True)})
    return found


def measured_norms(engine: str, model: Unified, losses: Callable[[nn.Module], Tensor], num_units: int) -> Tensor:
    """What the engine takes for each unit's gradient norm, float64 (B,)."""
    measured: list[Tensor] = []
    weights_of = clipping._clip_weights

    def observed(squared_B: Tensor, *rest: Any) -> Tensor:
        measured.append(squared_B.detach().double().sqrt())
        return weights_of(squared_B, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "_clip_weights", observed)
        clipped_sum(engine, model, losses, torch.ones(num_units, dtype=torch.bool))
    (measured_B,) = measured
    return measured_B


def norm(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradients.values()]).norm()


@pytest.mark.parametrize("engine", FLAT)
@pytest.mark.parametrize("kind", KINDS)
def test_each_units_norm_is_that_of_the_unit_run_alone(kind: str, engine: str) -> None:
    model, batch = filled(kind), LAYOUT.pack(units())
    noise, times = draws(batch)
    expected_B = torch.stack([norm(g) for g in gradients_alone(model, batch, noise, times)])
    measured_B = measured_norms(engine, model, losses_on(batch, noise, times), len(expected_B))
    assert expected_B[3] == 0 and measured_B[3] < 1e-12, "a row of nothing has no gradient"
    there = expected_B > 0
    assert (measured_B[there] / expected_B[there] - 1).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("side", [8, 16])
def test_norms_are_as_exact_for_hundreds_of_tokens(side: int) -> None:
    model = Unified(config("both").model_copy(update={"width": 128, "heads": 4}))
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.patch_head.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    told: Document = [Image(picture(side, side, 1)), text("a red circle", learn=True)]
    drawn: Document = [text("a blue square"), Image(picture(side, side, 2), noised=True)]
    batch = LAYOUT.pack([[told, drawn], [told], [drawn]])
    noise, times = draws(batch)
    expected_B = torch.stack([norm(g) for g in gradients_alone(model, batch, noise, times)])
    for engine in ("two_pass", "kept_gradients"):
        measured_B = measured_norms(engine, model, losses_on(batch, noise, times), 3)
        assert (measured_B / expected_B - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("engine", ["two_pass", "kept_gradients", "group_wise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_that_of_units_clipped_alone(kind: str, engine: str) -> None:
    model, batch = filled(kind), LAYOUT.pack(units())
    noise, times = draws(batch)
    alone = gradients_alone(model, batch, noise, times)
    bound = 0.9 * torch.stack([norm(g) for g in alone]).median().item()
    everyone = torch.ones(len(noise), dtype=torch.bool)
    got = clipped_sum(engine, model, losses_on(batch, noise, times), everyone, bound)
    if engine == "group_wise":
        # its bounds are of layers and uses: each unit by itself through the same engine
        parts = [
            clipped_sum(engine, model, losses_on(batch.rows(own), noise[own], times[own]), everyone[:1], bound)
            for own in torch.arange(len(noise))[:, None]
        ]
    else:
        parts = [{name: g * (bound / norm(of_unit)).clamp(max=1) for name, g in of_unit.items()} for of_unit in alone]
    expected = {name: torch.stack([part[name].nan_to_num().double() for part in parts]).sum(0) for name in got}
    assert relative_error(got, expected) <= 1e-5
    assert norm(got) < 0.99 * norm({n: torch.stack([g[n] for g in alone]).sum(0) for n in got}), "the bound binds"


class Collect(Pass):
    """Each use's gradients summed over the units."""

    def __init__(self, num_units: int) -> None:
        self.weights, self.met = RecordWeights(torch.ones(num_units)), list[Tensor]()

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.met.append(gradients["weight"].weighted_sum(self.weights))
        return {}


def test_the_tied_table_reports_both_its_uses_and_their_cross_term_counts() -> None:
    model, (batch, noise, times) = filled(), one_unit()
    model.embed.site = Site("embed", 1, torch.zeros((), requires_grad=True))
    collected = Collect(1)
    loss = losses_of(batch, noise, times, model).sum()
    with activate(collected):
        torch.autograd.grad(loss, model.embed.site.anchor, allow_unused=True)
    assert len(model.embed.site.uses) == len(collected.met) == 2
    model.embed.site = None
    head, embedding = collected.met
    (whole,) = torch.autograd.grad(losses_of(batch, noise, times, model).sum(), model.embed.weight)
    torch.testing.assert_close(head + embedding, whole)
    assert abs(2 * (embedding * head).sum() / whole.square().sum()) > 1e-3, "what a norm without it would be wrong by"


def one_unit() -> tuple[Packed, Tensor, Tensor]:
    batch = LAYOUT.pack(units()[-1:])
    return batch, *draws(batch)


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_several_noise_draws_of_a_unit_are_one_unit(kind: str) -> None:
    model, draws_a_unit = filled(kind), 3
    batch = LAYOUT.pack(units())
    num_units = len(batch.tokens_BN)
    repeated = batch.rows(torch.arange(num_units).repeat_interleave(draws_a_unit))
    noise, times = draws(repeated)

    def losses(network: nn.Module) -> Tensor:
        return losses_of(repeated, noise, times, network).view(num_units, draws_a_unit).mean(1)

    alone = gradients_alone(model, repeated, noise, times)
    means = [
        {name: torch.stack([g[name] for g in alone[unit * draws_a_unit :][:draws_a_unit]]).mean(0) for name in alone[0]}
        for unit in range(num_units)
    ]
    bound = 0.9 * torch.stack([norm(g) for g in means]).median().item()
    got = clipped_sum("two_pass", model, losses, torch.ones(num_units, dtype=torch.bool), bound)
    expected = {
        name: torch.stack([g[name] * (bound / norm(g).clamp(min=1e-30)).clamp(max=1) for g in means]).sum(0)
        for name in got
    }
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_is_not_finite_leaves_no_trace(kind: str) -> None:
    model, batch = filled(kind), LAYOUT.pack(units())
    noise, times = draws(batch)
    without = torch.tensor([True, True, False, True, True])
    expected = clipped_sum("two_pass", model, losses_on(batch, noise, times), without)
    batch.patches_BNF[2] = torch.inf
    got = clipped_sum("two_pass", model, losses_on(batch, noise, times), torch.ones(5, dtype=torch.bool))
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_images_or_without_text_to_learn_is_no_error(kind: str) -> None:
    model = filled(kind)
    for documents in ([text("words", learn=True)], [Image(picture(2, 2), noised=True)], None):
        batch = LAYOUT.pack([[] if documents is None else [documents]])
        noise, times = draws(batch)
        for engine in ("two_pass", "group_wise"):
            clipped_sum(engine, model, losses_on(batch, noise, times), torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_norms_are_near_those_in_fp32(kind: str) -> None:
    model, batch = Unified(config(kind)), LAYOUT.pack(units())
    model.init_weights(torch.Generator().manual_seed(0))
    noise, times = draws(batch)

    def rounded(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(batch, noise, times, network)

    exact_B = measured_norms("two_pass", model, losses_on(batch, noise, times), 5)
    rounded_B = measured_norms("two_pass", model, rounded, 5)
    there = exact_B > 1e-12
    assert (rounded_B[there] / exact_B[there] - 1).abs().max() < 0.05


def test_a_backend_that_needs_two_forwards_gets_the_same_sum() -> None:
    model, batch = filled("both"), LAYOUT.pack(units())
    noise, times = draws(batch)
    everyone = torch.ones(5, dtype=torch.bool)
    once = clipped_sum("two_pass", model, losses_on(batch, noise, times), everyone)
    backend = OneProcess(model, forward_once=False)
    twice = clipped_sum("two_pass", model, losses_on(batch, noise, times), everyone, backend=backend)
    assert relative_error(twice, once) <= 1e-6


def test_balance_that_couples_records_is_refused_in_a_private_step_and_not_elsewhere() -> None:
    model, batch = Unified(config("mixture")), LAYOUT.pack(units())
    model.init_weights(torch.Generator().manual_seed(0))
    noise, times = draws(batch)
    objective = UnifiedObjective(balancing="batch")
    assert objective.losses(model, batch, noise, times).balance_B.sum() > 0

    def losses(network: nn.Module) -> Tensor:
        return objective.weighed(objective.losses(network, batch, noise, times), TOTALS)

    with pytest.raises(
        ValueError, match="balancing is 'batch', which couples records: in a private stage choose 'row'"
    ):
        clipped_sum("two_pass", model, losses, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="couples records"):
        objective.require_private()
    UnifiedObjective(balancing="row").require_private()
