"""Experts against a dense loop over tokens and choices, gradients included; what routers tell, what balances them."""

# B rows, N tokens, D width, E experts, A choices
from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import load_variation
from kernels.per_record import Site
from models.moe import MixtureOfExperts, Routed, Router
from models.unified_objective import UnifiedObjective
from train.parallel import join_world

WIDTH, HIDDEN = 8, 6
SHAPES = [(1, 1, 2), (3, 1, 1), (4, 2, 1), (3, 3, 1), (2, 1, 2), (3, 2, 2)]  # experts a modality, top_k, modalities


def mixture(num_experts: int, top_k: int, num_modalities: int, seed: int = 0) -> MixtureOfExperts:
    model = MixtureOfExperts(WIDTH, HIDDEN, num_experts, top_k, num_modalities).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def inputs(num_modalities: int, shape: tuple[int, int] = (3, 7), seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    modality = torch.randint(num_modalities, shape, generator=generator)
    return x, modality, torch.rand(shape, generator=generator) < 0.8


def one_by_one(model: MixtureOfExperts, x: Tensor, modality: Tensor, present: Tensor) -> tuple[Tensor, Routed]:
    """The same, token by token and choice by choice."""
    out, total = torch.zeros_like(x), model.num_experts * model.num_modalities
    probability, chosen = x.new_zeros(len(x), total), x.new_zeros(len(x), total)
    z = [x.new_zeros(()) for _ in x]
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            first = int(modality[row, token]) * model.num_experts
            own = range(first, first + model.num_experts)
            if model.router is None:
                weight_of = {first: x.new_ones(())}
            else:
                logits = {e: model.router.weight[e] @ x[row, token] for e in own}
                best = sorted(own, key=lambda e, logits=logits: (-logits[e].item(), e))[: model.top_k]
                among = own if model.top_k == 1 else best
                whole = torch.stack([logits[e].exp() for e in among]).sum()
                weight_of = {e: logits[e].exp() / whole for e in best}
                if present[row, token]:
                    everything = torch.stack([logits[e].exp() for e in own]).sum()
                    z[row] = z[row] + everything.log() ** 2
                    for e in own:
                        probability[row, e] = probability[row, e] + logits[e].exp() / everything
                    for e in best:
                        chosen[row, e] += 1
            for e, weight in weight_of.items():
                gate, value = (model.experts.up[e] @ x[row, token]).chunk(2)
                out[row, token] = out[row, token] + weight * (model.experts.down[e] @ (F.silu(gate) * value))
    return out, Routed(probability, chosen, torch.stack(z))


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_a_loop_over_tokens_and_choices(shape: tuple[int, int, int]) -> None:
    model, (x, modality, present) = mixture(*shape), inputs(shape[2])
    x.requires_grad_()
    out, routed = model(x, modality, present)
    expected, told = one_by_one(model, x, modality, present)
    torch.testing.assert_close(out, expected)
    loss, expected_loss = out.square().sum(), expected.square().sum()
    if shape[0] > 1:
        torch.testing.assert_close(routed.probability_BE, told.probability_BE)
        torch.testing.assert_close(routed.chosen_BE, told.chosen_BE)
        torch.testing.assert_close(routed.z_B, told.z_B.float(), rtol=1e-5, atol=1e-5)
        slope = torch.linspace(0, 1, told.probability_BE.numel(), dtype=x.dtype).view(told.probability_BE.shape)
        loss = loss + (routed.probability_BE * slope).sum() + routed.z_B.sum()
        expected_loss = expected_loss + (told.probability_BE * slope).sum() + told.z_B.sum()
    else:
        assert routed is None
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(loss, leaves)
    for got, wanted in zip(found, torch.autograd.grad(expected_loss, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_logits_are_in_fp32_under_autocast_and_of_bf16_weights() -> None:
    """As fsdp2 hands them out in a public bf16 step."""
    torch.manual_seed(0)
    router, x = Router(16, 4, bias=False), torch.randn(2, 50, 16)
    halved = copy.deepcopy(router).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (router(x), halved(x.bfloat16())):
            assert logits.dtype == torch.float32
            assert (logits != logits.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_a_private_step_computes_the_same(shape: tuple[int, int, int]) -> None:
    model, (x, modality, present) = mixture(*shape), inputs(shape[2])
    expected = model(x, modality, present)[0]
    model.experts.site = Site("experts", len(x), torch.zeros((), requires_grad=True))
    torch.testing.assert_close(model(x, modality, present)[0], expected)
    assert len(model.experts.site.uses) == 2, "of up and of down"


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_that_are_sent_their_tokens_give_the_same(shape: tuple[int, int, int]) -> None:
    """By a rank to itself; tests/integration/test_expert_parallel.py has more ranks."""
    model, (x, modality, present) = mixture(*shape), inputs(shape[2])
    expected = model(x, modality, present)[0]
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    join_world()
    assert dist.group.WORLD is not None
    model.experts.spread(dist.group.WORLD)
    out = model(x, modality, present)[0]
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted)
    model.experts.site = Site("experts", len(x), torch.zeros((), requires_grad=True))
    with pytest.raises(ValueError, match="experts are spread over ranks"):
        model(x, modality, present)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**31))
def test_a_row_is_routed_the_same_whatever_is_beside_it(shape: tuple[int, int, int], seed: int) -> None:
    model, (x, modality, present) = mixture(*shape), inputs(shape[2], seed=seed)
    out, routed = model(x, modality, present)
    for row in range(len(x)):
        alone, told = model(x[row : row + 1], modality[row : row + 1], present[row : row + 1])
        torch.testing.assert_close(alone[0], out[row])
        if routed is not None:
            for of_row, of_all in zip(told, routed, strict=True):
                torch.testing.assert_close(of_row[0], of_all[row])


def test_an_expert_that_nobody_chooses_and_a_row_without_tokens_are_no_error() -> None:
    model = mixture(4, 1, 1)
    with torch.no_grad():
        model.router.weight[2] = 0  # type: ignore[union-attr]
        model.router.weight[:2], model.router.weight[3] = 5, 5  # type: ignore[union-attr]
    x = torch.rand(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True] * 5, [False] * 5])
    out, routed = model(x, torch.zeros(2, 5, dtype=torch.int64), present)
    assert routed.chosen_BE.tolist() == [[5, 0, 0, 0], [0, 0, 0, 0]], "the lower expert of equals"
    gradient = torch.autograd.grad(out.sum(), model.experts.up)[0]
    assert gradient[0].any() and not gradient[1:].any()


# --- balance ---


def routed_with(chosen: list[list[float]], probability: list[list[float]]) -> Routed:
    """Of one layer."""
    return Routed(torch.tensor(probability)[:, None], torch.tensor(chosen)[:, None], torch.zeros(len(chosen), 1))


def test_balance_is_one_a_token_where_even_and_the_number_of_experts_where_all_choose_one() -> None:
    even = routed_with([[2, 2, 2, 2]], [[2, 2, 2, 2]])
    one = routed_with([[8, 0, 0, 0]], [[8, 0, 0, 0]])
    for balancing in ("row", "batch"):
        objective = UnifiedObjective(balancing=balancing)  # type: ignore[arg-type]
        assert objective._balance(even).tolist() == [8.0]
        assert objective._balance(one).tolist() == [4 * 8.0]
    assert UnifiedObjective()._balance(one).tolist() == [0.0]


def test_balance_by_row_couples_no_rows_and_by_batch_does() -> None:
    both = routed_with([[4, 0], [0, 4]], [[3, 1], [1, 3]])
    by_row, by_batch = (UnifiedObjective(balancing=b)._balance(both) for b in ("row", "batch"))  # type: ignore[arg-type]
    assert by_row.tolist() == [6.0, 6.0], "each row chose one expert only"
    assert by_batch.tolist() == [4.0, 4.0], "together they are even"
    alone = routed_with([[4, 0]], [[3, 1]])
    assert UnifiedObjective(balancing="row")._balance(alone).tolist() == [6.0]
    assert UnifiedObjective(balancing="batch")._balance(alone).tolist() == [6.0]


@pytest.mark.parametrize("balancing", ["row", "batch"])
def test_balancing_evens_out_a_skewed_router(balancing: str) -> None:
    torch.manual_seed(0)
    model = MixtureOfExperts(16, 8, num_experts=4, top_k=1, num_modalities=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.router.weight[0] += 0.2  # type: ignore[union-attr]
    objective = UnifiedObjective(balancing=balancing, z_weight=0)  # type: ignore[arg-type]
    x, present = torch.randn(4, 64, 16) + 1, torch.ones(4, 64, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.01)  # type: ignore[union-attr]
    variation: list[float] = []
    for _ in range(60):
        routed = model(x, torch.zeros(4, 64, dtype=torch.int64), present)[1]
        variation.append(load_variation(routed.chosen_BE.sum(0)).item())
        balance = objective._balance(Routed(*(each[:, None] for each in routed))).sum() / 256
        optimizer.zero_grad()
        balance.backward()
        optimizer.step()
    assert variation[0] > 0.5
    assert variation[-1] < 0.2
