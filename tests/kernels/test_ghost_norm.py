"""Norms and weighted sums of factored per-record gradients, against the gradients themselves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import ghost_norm, reference
from kernels.ghost_norm import (
    ExpertOuterProducts,
    OuterProducts,
    PerRecordGradient,
    RecordWeights,
    Reuse,
    RowSums,
    TokenSum,
    squared_norms,
    together,
)

REUSES: list[Reuse] = [None, "at_once", "later"]
Pair = tuple[PerRecordGradient, Tensor]  # the factored form, and the gradients themselves, (B, *shape)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def indices(*shape: int, high: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(2))


def outer_products(B: int, N: int, P: int, D: int, G: int = 1) -> Pair:
    left, right = draw(B, G, N, D), draw(B, G, N, P, seed=1)
    return OuterProducts(left, right, torch.Size([G * D, P])), reference.outer_products(left, right).flatten(1, 2)


def token_sum(B: int, N: int, P: int, D: int) -> Pair:
    left = draw(B, N, D)
    return TokenSum(left, torch.Size([D])), left.sum(1)


def row_sums(B: int, N: int, P: int, D: int) -> Pair:
    rows, left = indices(B, N, low=-1, high=P), draw(B, N, D)
    return RowSums(rows, left, torch.Size([P, D])), reference.row_sums(rows, left, P)


def experts(B: int, N: int, P: int, D: int) -> Pair:
    chosen, left, right = indices(B, N, high=3), draw(B, N, D), draw(B, N, P, seed=1)
    found = ExpertOuterProducts(chosen, left, right, torch.Size([4, D, P]))
    return found, reference.expert_outer_products(chosen, left, right, 4)


KINDS: dict[str, Callable[[int, int, int, int], Pair]] = {
    "outer_products": outer_products,
    "outer_products_in_groups": lambda B, N, P, D: outer_products(B, N, P, D, G=3),
    "token_sum": token_sum,
    "row_sums": row_sums,
    "experts": experts,
}


def check(found: PerRecordGradient, gradients: Tensor, reuse: Reuse) -> None:
    squared_B = found.squared_norms(reuse=reuse)
    torch.testing.assert_close(squared_B, gradients.flatten(1).square().sum(1), rtol=1e-10, atol=1e-20)
    weights_B = torch.linspace(0, 2, len(gradients), dtype=torch.float64)
    got = found.weighted_sum(RecordWeights(weights_B))
    torch.testing.assert_close(got, torch.tensordot(weights_B, gradients, dims=1), rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 4), N=st.integers(1, 70), P=st.integers(1, 40), D=st.integers(1, 40), data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_sums_equal_those_of_the_gradients_themselves(
    kind: str, B: int, N: int, P: int, D: int, data: st.DataObject
) -> None:
    check(*KINDS[kind](B, N, P, D), data.draw(st.sampled_from(REUSES)))


@pytest.mark.parametrize("N", [1, 5, 33])
@pytest.mark.parametrize("kind", ["outer_products", "token_sum", "row_sums", "experts"])
def test_as_outer_products_they_are_the_same_gradients(kind: str, N: int) -> None:
    found, gradients = KINDS[kind](4, N, 6, 5)
    check(found.outer_products(), gradients, None)


@pytest.mark.parametrize(("N", "V", "D"), [(1, 6, 5), (5, 6, 5), (33, 6, 5), (2, 60, 50), (12, 200, 100)])
def test_several_uses_together_have_their_cross_terms(N: int, V: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table without its one-hot rows, whether its gradient is formed or not."""
    monkeypatch.setattr(F, "one_hot", lambda *_: pytest.fail("one-hot rows of the table's height"))
    (products, first), (rows, second) = outer_products(4, N, D, V), row_sums(4, N, V, D)
    check(together([products, rows, products]), 2 * first + second, None)
    check(together([rows, products]), first + second, None)
    check(together([rows, rows]), 2 * second, None)
    check(together([products, products]), 2 * first, None)


@pytest.mark.parametrize(("N", "V", "D"), [(5, 6, 5), (2, 60, 50)])
def test_a_tables_uses_that_cancel_have_a_norm_above_what_is_left_and_infinities_stay_alone(
    N: int, V: int, D: int
) -> None:
    rows, values, shape = indices(3, N, high=V), draw(3, N, D, dtype=torch.float32), torch.Size([V, D])

    def both() -> PerRecordGradient:
        one_hot = F.one_hot(rows, V).float()[:, None]
        return together([RowSums(rows, values, shape), OuterProducts(one_hot, -values[:, None], shape)])

    uses = both()
    norms_B, total = uses.squared_norms().sqrt(), uses.weighted_sum(RecordWeights(torch.tensor([0.0, 0.0, 1.0])))
    assert total.norm() <= norms_B[2]
    assert (norms_B >= 9e-4 * values.norm(dim=2).sum(1)).all()
    values[1] = torch.nan
    assert torch.isfinite(both().squared_norms()).tolist() == [True, False, True]
    assert torch.isfinite(both().weighted_sum(RecordWeights(torch.tensor([1.0, 0.0, 1.0])))).all()


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 4), N=st.integers(1, 140), P=st.integers(1, 40), D=st.integers(1, 40), data=st.data())
def test_a_layers_weight_and_bias_together_have_the_sum_of_their_squared_norms(
    B: int, N: int, P: int, D: int, data: st.DataObject
) -> None:
    (weight, of_weight), reuse = outer_products(B, N, P, D), data.draw(st.sampled_from(REUSES))
    assert isinstance(weight, OuterProducts)
    lefts = {"the same": weight.left_BGND[:, 0], "another": draw(B, N, D, seed=2)}
    left = lefts[data.draw(st.sampled_from(list(lefts)))]
    expected = of_weight.square().sum((1, 2)) + left.sum(1).square().sum(1)
    found = squared_norms([weight, TokenSum(left, torch.Size([D]))], reuse=reuse)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize(
    ("N", "P", "D", "reuse", "formed", "bands"),
    [
        (1, 9, 9, None, False, 0),
        (8, 64, 64, None, False, 1),
        (40, 96, 96, None, False, 1),
        (70, 160, 160, None, False, 2),
        (130, 300, 300, None, False, 4),
        (40, 9, 9, None, True, 0),
        (40, 9, 9, "at_once", True, 0),
        (40, 9, 9, "later", True, 0),
        (40, 81, 4, "later", False, 1),  # more features than twice the tokens: not worth its memory
        (8, 64, 64, "at_once", False, 1),
    ],
)
def test_the_cheaper_path_is_taken(
    N: int, P: int, D: int, reuse: Reuse, formed: bool, bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = list[torch.Size]()
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: products.append(x.shape) or bmm(x, y))
    found, gradients = outer_products(3, N, P, D)
    assert isinstance(found, OuterProducts)
    assert found._forming_pays(reuse) == formed
    check(found, gradients, reuse)
    assert len(products) == 2 * bands  # a left and a right product for each band
    assert (found._formed_BGDP is not None) == (formed and reuse is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 7, 40])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_record_of_weight_zero_leaves_no_trace_of_its_infinities(poison: float, N: int, kind: str) -> None:
    weights = RecordWeights(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    for reuse in REUSES:
        found, gradients = KINDS[kind](3, N, 6, 5)
        for name in ("left_BGND", "right_BGNP", "left_BND", "right_BNP"):
            if hasattr(found, name):
                getattr(found, name)[1] = poison
        squared_B = found.squared_norms(reuse=reuse)
        # what is not finite is seen; an embedding's record may be all padding
        assert not torch.isfinite(squared_B[1]) or (kind == "row_sums" and bool((found.rows_BN[1] < 0).all()))  # type: ignore[attr-defined]
        expected = gradients[0] + 0.5 * gradients[2]
        torch.testing.assert_close(found.weighted_sum(weights), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_factors_are_multiplied_and_summed_in_fp32(dtype: torch.dtype, kind: str) -> None:
    found, _ = KINDS[kind](3, 12, 6, 5)
    names = [n for n in ("left_BGND", "right_BGNP", "left_BND", "right_BNP") if hasattr(found, n)]
    half = type(found)(**{**vars(found), **{n: getattr(found, n).to(dtype) for n in names}})  # type: ignore[arg-type]
    exact = type(found)(**{**vars(found), **{n: getattr(found, n).to(dtype).double() for n in names}})  # type: ignore[arg-type]
    squared_B = half.squared_norms()
    assert squared_B.dtype == torch.float32
    torch.testing.assert_close(squared_B.double(), exact.squared_norms(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("N", "P", "D"), [(1, 384, 384), (16, 384, 384), (64, 384, 1536), (256, 384, 384), (1024, 96, 64), (4096, 48, 48)]
)
@pytest.mark.parametrize("reuse", REUSES)
def test_the_rounding_guard_hardly_shows_on_honest_data(N: int, P: int, D: int, reuse: Reuse) -> None:
    left, right = draw(2, 1, N, D, dtype=torch.float32), draw(2, 1, N, P, seed=1, dtype=torch.float32)
    true_B = (left.double().mT @ right.double()).flatten(1).norm(dim=1)
    norm_B = OuterProducts(left, right, torch.Size([D, P])).squared_norms(reuse=reuse).sqrt().double()
    eps = torch.finfo(torch.float32).eps
    assert (norm_B >= true_B * (1 - 4 * eps)).all()
    assert (norm_B <= true_B * (1 + (0.6 * N + 8 * N**0.5 + 2 * (P**0.5 + D**0.5)) * eps)).all()


def test_the_rounding_guard_hardly_shows_on_4096_tokens_by_gram_matrices() -> None:
    left, right = draw(1, 4096, 24, dtype=torch.float32), draw(1, 4096, 24, seed=1, dtype=torch.float32)
    true = (left.double().mT @ right.double()).norm().item()
    norm = ghost_norm._squared_norms_by_gram(left, right).sqrt().item()
    assert true <= norm <= 1.0004 * true


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reuse", REUSES)
def test_no_norm_of_a_cancelling_sum_is_below_the_floor(kind: str, reuse: Reuse) -> None:
    """Tokens in pairs that cancel exactly: what is left is clipped as if rounding had hidden something."""
    x = draw(1, 6, 5, dtype=torch.float32)
    left, right = torch.cat([x, -x], dim=1), torch.ones(1, 12, 4)
    rows = torch.zeros(1, 12, dtype=torch.int64)
    found: dict[str, PerRecordGradient] = {
        "outer_products": OuterProducts(left[:, None], right[:, None], torch.Size([5, 4])),
        "outer_products_in_groups": OuterProducts(
            torch.stack([left, left], 1), torch.stack([right, right], 1), torch.Size([10, 4])
        ),
        "token_sum": TokenSum(left, torch.Size([5])),
        "row_sums": RowSums(rows, left, torch.Size([2, 5])),
        "experts": ExpertOuterProducts(rows, left, right, torch.Size([2, 5, 4])),
    }
    norm = found[kind].squared_norms(reuse=reuse).sqrt().item()
    total = found[kind].weighted_sum(RecordWeights(torch.ones(1))).norm().item()
    assert total <= norm
    if reuse is None:
        assert norm >= 9e-4 * left.norm(dim=-1).sum().item()
