"""Adding or removing one unit moves the released sum by at most the bound, whatever the unit's values.

In fp32 the sum over the other records rounds as well, and their rounding may change with the company they are in. Two
comparisons keep that apart from the unit's own share: the unit alone in its batch, where the released sum is its share
as computed in fp32; and neighbouring batches in float64, where everyone's rounding lies far below the tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.layers import Conv2d, Embedding, LearnedTensor, Linear, TiedEmbedding
from tests.privacy.clipped_sums import ENGINES, clipped_sum, norm_of
from tests.privacy.layer_cases import CASES, RECORDS, Experts

BOUND = 0.7
MOST = BOUND * (1 + 1e-6)
HARMFUL = [math.inf, -math.inf, math.nan, 1e38, 1e30, 1e18, 1e9, 1e-20, 1e-38, 1e-42, -0.0]
ONE = torch.ones(1, dtype=torch.bool)
FLOAT_LAYERS = [name for name in CASES if "embedding" not in name]


class GivenGradient(torch.autograd.Function):
    """Losses of zero whose gradient is whatever the adversary wants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return y.new_zeros(len(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient, None


def share_of(engine: str, model: nn.Module, inputs: tuple[Any, ...], gradient: Tensor, bound: float = BOUND) -> float:
    """The L2 norm of one record's share of the released sum, where it is alone in its batch."""
    got = clipped_sum(engine, model, lambda m: GivenGradient.apply(m(*inputs), gradient), ONE, bound)
    assert all(torch.isfinite(g).all() for g in got.values())
    return norm_of(got)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearly_cancelling(num_tokens: int, P: int, D: int, rest: float, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Many copies of two tokens whose outer products all but cancel: rounding errors add up, and little else is left.

    Returns the layer's input (1, N, P) and the gradient of its output (1, N, D).
    """
    one, other = random(1, 1, P, seed=seed), random(1, 1, P, seed=seed + 1)
    half = num_tokens // 2
    x = torch.cat([one.expand(1, half, P), (one + rest * other).expand(1, num_tokens - half, P)], dim=1)
    sign = torch.ones(1, num_tokens, 1).index_fill(1, torch.arange(half), -1.0)
    return x * scale, sign * random(1, 1, D, seed=seed + 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", CASES)
def test_no_value_in_a_record_carries_its_share_over_the_bound(layer: str, engine: str) -> None:
    case = CASES[layer](12).to(torch.float32)
    rows = len(case.inputs[0]) // RECORDS
    for value in HARMFUL:
        for tokens in (slice(None), slice(0, 1)):
            inputs = tuple(x[:rows].clone() for x in case.inputs)
            for x in inputs:
                if x.is_floating_point():
                    x[:, tokens] = value
            with torch.no_grad():
                shape = case.private(*inputs).shape
            for gradient in (random(*shape, seed=5), torch.full(shape, value)):
                assert share_of(engine, case.private, inputs, gradient) <= MOST


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", FLOAT_LAYERS)
def test_neighbouring_batches_differ_by_at_most_the_bound(layer: str, engine: str) -> None:
    case = CASES[layer](12).to(torch.float64)
    others = torch.tensor([True, True, False, True, True])
    without = clipped_sum(engine, case.private, case.losses, others, BOUND)
    for value in [*HARMFUL, 3.0]:
        case.inputs[0][2] = value
        with_it = clipped_sum(engine, case.private, case.losses, torch.ones(RECORDS, dtype=torch.bool), BOUND)
        assert norm_of({name: with_it[name] - without[name] for name in without}) <= MOST


@settings(max_examples=150, deadline=None)
@given(data=st.data(), engine=st.sampled_from(ENGINES), N=st.integers(1, 6), P=st.integers(1, 3), D=st.integers(1, 3))
def test_no_floats_in_a_linear_layer_carry_a_share_over_the_bound(
    data: st.DataObject, engine: str, N: int, P: int, D: int
) -> None:
    def floats(*shape: int) -> Tensor:
        values = st.floats(width=32)
        return torch.tensor(data.draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))).view(
            shape
        )

    assert share_of(engine, Linear(P, D), (floats(1, N, P),), floats(1, N, D)) <= MOST


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("num_tokens", "P", "D"),
    [(2, 3, 3), (2, 64, 64), (64, 4, 4), (64, 64, 64), (64, 384, 96), (256, 96, 96), (1024, 8, 16), (4096, 16, 2)],
)
@pytest.mark.parametrize("scale", [1.0, 1e15])
def test_tokens_that_nearly_cancel_do_not_escape_the_bound(
    num_tokens: int, P: int, D: int, scale: float, engine: str
) -> None:
    model = Linear(P, D)
    for seed, rest in enumerate((0.3, 0.03, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6, 0.0)):
        x, gradient = nearly_cancelling(num_tokens, P, D, rest, scale, seed)
        assert share_of(engine, model, (x,), gradient) <= MOST


@settings(max_examples=150, deadline=None)
@given(
    engine=st.sampled_from(ENGINES), num_tokens=st.integers(2, 600), P=st.integers(1, 400), D=st.integers(1, 200),
    rest=st.floats(1e-7, 1.0), scale=st.sampled_from([1e-12, 1.0, 1e15]), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_no_near_cancellation_escapes_the_bound(
    engine: str, num_tokens: int, P: int, D: int, rest: float, scale: float, seed: int
) -> None:
    x, gradient = nearly_cancelling(num_tokens, P, D, rest, scale, seed)
    assert share_of(engine, Linear(P, D), (x,), gradient) <= MOST


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("num_tokens", "P", "D"), [(1, 384, 384), (64, 384, 384), (256, 64, 256)])
@pytest.mark.parametrize("small", [2e-23, 3e-22, 1e-20, 1e-16])
def test_factors_that_underflow_do_not_hide_a_gradient(
    num_tokens: int, P: int, D: int, small: float, engine: str
) -> None:
    """Squares of 2e-23 underflow to nothing, and yet meet an input near the largest whose square is finite."""
    model, large = Linear(P, D, bias=False), 1.8e19 / math.sqrt(P)
    for shrunk in (1.0, 1e-3):
        x, gradient = torch.full((1, num_tokens, P), shrunk * large), torch.full((1, num_tokens, D), small)
        assert share_of(engine, model, (x,), gradient, bound=1e-3) <= 1e-3 * (1 + 1e-6)
        x, gradient = torch.full((1, num_tokens, P), small), torch.full((1, num_tokens, D), shrunk * large)
        assert share_of(engine, model, (x,), gradient, bound=1e-3) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 1e15])
def test_near_cancellation_does_not_escape_in_any_other_layer(scale: float, engine: str) -> None:
    D = 5
    for seed, rest in enumerate((0.3, 1e-2, 1e-3, 1e-5, 0.0)):
        x, gradient = nearly_cancelling(64, D, D, rest, scale, seed)
        sign = gradient / gradient.abs()
        ones, zeros = torch.ones(1, 64, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64)
        table, experts, learned = Embedding(3, D), Experts(2), LearnedTensor(D)
        assert share_of(engine, table, (ones,), x * sign) <= MOST
        assert share_of(engine, experts, (x[..., :4], zeros), gradient[..., :3]) <= MOST
        conv, image = Conv2d(D, D, 1), x.mT.reshape(1, D, 8, 8)
        assert share_of(engine, conv, (image,), gradient.mT.reshape(1, D, 8, 8)) <= MOST
        rows = nn.Sequential(learned)  # 64 rows of one record
        got = clipped_sum(
            engine, rows, lambda m, g=(x * sign)[0]: GivenGradient.apply(m(64), g).sum()[None], ONE, BOUND
        )
        assert norm_of(got) <= MOST


class Twice(nn.Module):
    """One layer whose two uses nearly cancel each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([self.layer(x[:, :half]), self.layer(x[:, half:])], dim=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_tokens", [2, 8, 64])
def test_uses_that_nearly_cancel_do_not_escape_the_bound(num_tokens: int, engine: str) -> None:
    for seed, rest in enumerate((0.3, 1e-2, 1e-3, 1e-5, 0.0)):
        x, gradient = nearly_cancelling(num_tokens, 24, 24, rest, 1.0, seed)
        assert share_of(engine, Twice(24), (x,), gradient) <= MOST


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", HARMFUL)
def test_padding_contributes_exactly_nothing(value: float, engine: str) -> None:
    case = CASES["linear_3d"](12).to(torch.float32)
    present = torch.tensor([True, False, True, True, False])
    whole = clipped_sum(engine, case.private, case.losses, present, BOUND)
    case.inputs[0][~present] = value
    got = clipped_sum(engine, case.private, case.losses, present, BOUND)
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    nothing = clipped_sum(engine, case.private, case.losses, torch.zeros_like(present), BOUND)
    assert all((g == 0).all() for g in nothing.values())


def all_equal(num_tokens: int, P: int, D: int, rest: float | None, of_x: float, of_y: float) -> tuple[Tensor, Tensor]:
    """Features all equal: every addition of a product may round the same way. Half the tokens oppose the others."""
    x, gradient = torch.full((1, num_tokens, P), of_x), torch.full((1, num_tokens, D), of_y)
    if rest is not None:
        x[:, : num_tokens // 2] *= 1 + rest
        gradient[:, : num_tokens // 2] *= -1
    return x, gradient


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("num_tokens", "P", "D"), [(2, 1536, 384), (4, 4608, 96), (64, 384, 384), (256, 384, 64)])
def test_features_all_equal_gain_nothing_by_rounding_the_same_way(num_tokens: int, P: int, D: int, engine: str) -> None:
    model, generator = Linear(P, D), torch.Generator().manual_seed(0)
    for rest in (None, 1.0, 0.3, 0.1, 1e-2):
        x, gradient = all_equal(num_tokens, P, D, rest, *(1 + torch.rand(2, generator=generator)).tolist())
        assert share_of(engine, model, (x,), gradient) <= MOST


class Tied(nn.Module):
    """A table's rows for tokens beside its logits for features, all of one record."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = TiedEmbedding(vocabulary, width)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        return torch.cat([self.table(tokens).flatten(1), self.table(x).flatten(1)], 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_hundreds_of_like_tokens_of_one_row_or_one_expert_do_not_escape_the_bound(engine: str) -> None:
    """Added up one by one, or in another order than they were measured in, they round the same way every time."""
    ones = torch.ones(1, 1000, dtype=torch.int64)
    for rest in (None, 0.5, 0.1, 1e-2):
        x, gradient = all_equal(2000, 64, 1, rest, 1.3, 1.7)
        assert share_of(engine, Experts(2, 64, 1), (x, ones.repeat(1, 2)), gradient) <= MOST
        x, gradient = all_equal(1000, 8, 1, rest, 1.3, 1.7)
        assert share_of(engine, Embedding(8, 8), (ones,), gradient * x) <= MOST
        x, logits = torch.full((1, 1000, 64), 1.3), 1.7 * F.one_hot(ones, 8)
        rows = -1.7 * x * (1 + (rest or 0.0))  # all but cancels what the table's use as a head has
        assert share_of(engine, Tied(8, 64), (ones, x), torch.cat([rows.flatten(1), logits.flatten(1)], 1)) <= MOST


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    engine=st.sampled_from(ENGINES), num_tokens=st.sampled_from([2, 3, 4, 16, 64, 256]),
    P=st.sampled_from([96, 384, 1536, 4608]), D=st.sampled_from([8, 96, 384, 1152]),
    rest=st.none() | st.floats(1e-4, 2), of_x=st.floats(1, 2), of_y=st.floats(1, 2),
)  # fmt: skip
def test_no_constants_carry_a_share_over_the_bound(
    engine: str, num_tokens: int, P: int, D: int, rest: float | None, of_x: float, of_y: float
) -> None:
    assume(num_tokens * P * D <= 1 << 26)
    x, gradient = all_equal(num_tokens, P, D, rest, of_x, of_y)
    assert share_of(engine, Linear(P, D), (x,), gradient) <= MOST
