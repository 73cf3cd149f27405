"""Per-record norms and clip-weighted gradients against loops over single records, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import per_record, reference


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 5), N=st.integers(1, 40), P=st.integers(1, 20), D=st.integers(1, 20))
def test_linear_norms_equal_those_of_materialised_gradients(B: int, N: int, P: int, D: int) -> None:
    x_BNP, g_BND = draw(B, N, P), draw(B, N, D, seed=1)
    expected = reference.linear_squared_norms(x_BNP, g_BND)
    torch.testing.assert_close(per_record.linear_squared_norms(x_BNP, g_BND), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("N", [1, 2, 17])
def test_embedding_norms_add_up_tokens_of_one_index(N: int) -> None:
    indices_BN = torch.randint(0, 4, (6, N), generator=torch.Generator().manual_seed(2))
    g_BND = draw(6, N, 5)
    expected = reference.embedding_squared_norms(indices_BN, g_BND, 4)
    torch.testing.assert_close(per_record.embedding_squared_norms(indices_BN, g_BND), expected, rtol=1e-10, atol=1e-12)


def private_linear(x: torch.Tensor, weights_B: torch.Tensor, D: int = 4):
    """Norms and weighted gradients of a linear layer under a nonlinear loss, and the loop over records beside them."""
    num_records = weights_B.shape[0]
    weight = draw(D, x.shape[-1], seed=3).requires_grad_()
    bias = draw(D, seed=4).requires_grad_()
    row = torch.zeros(num_records + 1, dtype=torch.float64, requires_grad=True)

    def losses(y: torch.Tensor) -> torch.Tensor:
        return y.tanh().square().reshape(num_records, -1).sum(1)

    losses_B = losses(per_record.linear(x, weight, bias, row))
    with per_record.norm_pass():
        (report,) = torch.autograd.grad(losses_B.sum(), row, retain_graph=True)
    with per_record.clipped_pass(weights_B):
        losses_B.sum().backward()
    by_record = [
        torch.autograd.grad(loss, (weight, bias), retain_graph=True)
        for loss in losses(torch.nn.functional.linear(x, weight, bias)).unbind()
    ]
    return report, (weight.grad, bias.grad), by_record


@pytest.mark.parametrize("shape", [(5, 3), (5, 7, 3), (5, 2, 4, 3), (10, 7, 3)])
def test_linear_reports_each_record_and_forms_the_weighted_sum(shape: tuple[int, ...]) -> None:
    weights_B = torch.tensor([0.5, 1.0, 0.25, 0.0, 2.0], dtype=torch.float64)  # ten rows: two noise draws a record
    report, (grad_weight, grad_bias), by_record = private_linear(draw(*shape), weights_B)
    expected = torch.stack([gw.square().sum() + gb.square().sum() for gw, gb in by_record])
    torch.testing.assert_close(report[:-1], expected, rtol=1e-10, atol=1e-12)
    assert report[-1] == 1
    for got, index in ((grad_weight, 0), (grad_bias, 1)):
        expected = sum(w * g[index] for w, g in zip(weights_B, by_record, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_record_of_weight_zero_leaves_no_trace_of_its_infinities(poison: float) -> None:
    x = draw(3, 4, 5)
    weights_B = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    _, clean, _ = private_linear(
        x.masked_fill(torch.tensor([0, 1, 0], dtype=torch.bool)[:, None, None], 0.0), weights_B
    )
    poisoned = x.clone()
    poisoned[1] = poison
    _, got, _ = private_linear(poisoned, weights_B)
    for mine, expected in zip(got, clean, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_backward_outside_a_pass_is_refused() -> None:
    row = torch.zeros(3, requires_grad=True)
    y = per_record.linear(torch.randn(2, 3), torch.randn(4, 3, requires_grad=True), None, row)
    with pytest.raises(RuntimeError, match="unclipped"):
        y.sum().backward()


def test_passes_do_not_nest() -> None:
    with per_record.norm_pass(), pytest.raises(RuntimeError, match="do not nest"), per_record.norm_pass():
        pass


def test_frozen_weights_have_no_part_in_the_norm() -> None:
    x, bias = torch.randn(2, 3, 4), torch.randn(5, requires_grad=True)
    row = torch.zeros(3, requires_grad=True)
    y = per_record.linear(x, torch.randn(5, 4), bias, row)
    with per_record.norm_pass():
        (report,) = torch.autograd.grad(y.sum(), row)
    torch.testing.assert_close(
        report[:-1], torch.full((2,), 5 * 9.0)
    )  # each of 5 outputs sums 3 tokens of gradient one
