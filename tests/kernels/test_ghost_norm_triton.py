"""Ghost norms and clipped sums by Triton's kernels, in its interpreter: against float64, and against attacks.

The interpreter adds up as IEEE does. `TensorCores` makes it add up as an A100 or an H100 does, in bf16 too.
"""

# B records, N tokens, T tokens of all records, P right features, D left features
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch, ghost_norm, reference
from kernels.ghost_norm import OuterProducts, RecordWeights, TokenSum, clipped_weight_grad, squared_norms, together
from kernels.tiles import Tile, trial
from models.layers import Linear
from privacy.clipping import _clip_weights
from tests.privacy.clipped_sums import ENGINES, clipped_sum, flat_sum, per_record_gradients, relative_error
from tests.privacy.layer_cases import CASES, RECORDS
from tests.privacy.test_sensitivity import BOUND, HARMFUL, MOST, all_equal, nearly_cancelling, random, share_of

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps
HALVES = [torch.float16, torch.bfloat16]
ROWS = ("guarded", "squared", "magnitude", "spread")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def by_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    dispatch.choose("triton", torch.device("cuda") if request.node.get_closest_marker("gpu") else CPU)
    yield
    dispatch.choose("auto", CPU)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def factors(lengths: list[int], D: int, P: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = sum(lengths)
    return draw(num_tokens, D, dtype=dtype), draw(num_tokens, P, seed=1, dtype=dtype), offsets_of(lengths)


def norms(
    left: Tensor, right: Tensor, offsets: Tensor, ones: bool = False, longest: int | None = None
) -> dict[str, Tensor]:
    """All that the op gives back, by name; the offsets may be those of a pack."""
    most = int(offsets.diff().max()) if longest is None else longest
    return dict(zip(ROWS, torch.ops.sfumato.ghost_norm(left, right, offsets, ones, most), strict=True))


def gradients(left: Tensor, right: Tensor, offsets: Tensor, ones: bool = False) -> Tensor:
    """Each record's gradient in float64, (B, D, P) or with the bias as its last column."""
    left, right = left.double(), right.double()
    if ones:
        right = torch.cat([right, right.new_ones(len(right), 1)], dim=1)
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return torch.stack(
        [reference.outer_products(left[None, None, a:b], right[None, None, a:b])[0, 0] for a, b in bounds]
    )


def check(left: Tensor, right: Tensor, offsets: Tensor, ones: bool, longest: int | None = None) -> None:
    true = gradients(left, right, offsets, ones)
    true_B = true.square().sum((1, 2))
    found = norms(left, right, offsets, ones, longest)
    torch.testing.assert_close(found["squared"].double(), true_B, rtol=1e-6, atol=0)
    assert (found["guarded"] >= true_B).all()
    weights_B = torch.linspace(0, 2, len(true))
    total = clipped_weight_grad(left, right, offsets, weights_B, longest=longest)
    expected = torch.tensordot(weights_B.double(), gradients(left, right, offsets), dims=1)
    assert (total - expected).abs().max() <= 1e-6 * expected.abs().max()


# lengths, D, P: by Gram matrices of one tile and of several, by direct products, and some of each
PACKS: dict[str, tuple[list[int], int, int]] = {
    "small": ([5, 3, 7], 6, 5),
    "one_tile": ([64, 64], 136, 200),
    "tiles": ([190, 130], 260, 270),
    "direct": ([300, 300], 40, 70),
    "some_of_each": ([1, 70, 0, 140, 33], 130, 96),
}


@pytest.mark.parametrize(("dtype", "ones"), [(torch.float32, True), (torch.float16, False), slow(torch.float16, True)])
@pytest.mark.parametrize("pack", PACKS)
def test_norms_and_sums_equal_those_of_the_gradients_themselves(pack: str, dtype: torch.dtype, ones: bool) -> None:
    check(*factors(*PACKS[pack], dtype=dtype), ones)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4), D=st.integers(1, 300), P=st.integers(1, 300),
    ones=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]), more=st.integers(0, 100),
)  # fmt: skip
def test_norms_and_sums_of_any_pack(
    lengths: list[int], D: int, P: int, ones: bool, dtype: torch.dtype, more: int
) -> None:
    check(*factors(lengths, D, P, dtype), ones, max(lengths) + more)


def test_norms_are_those_of_looped_per_record_autograd() -> None:
    x, layer = draw(4, 9, 7), nn.Linear(7, 5)

    def loss(record: Tensor) -> Tensor:
        return layer(record).tanh().square().sum()

    looped = [torch.autograd.grad(loss(record), list(layer.parameters())) for record in x]
    y = layer(x)
    (grad_y,) = torch.autograd.grad(y.tanh().square().sum(), y)
    offsets = torch.arange(0, 37, 9)
    squared_B = norms(grad_y.flatten(0, 1), x.flatten(0, 1), offsets, ones=True)["squared"]
    expected_B = torch.stack([torch.stack([g.square().sum() for g in own]).sum() for own in looped])
    torch.testing.assert_close(squared_B, expected_B, rtol=1e-5, atol=0)


def test_nothing_that_was_not_written_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *size: Any, **how: Any) -> Tensor:
        empty = new_empty(x, *size, **how)
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for pack in ("small", "direct", "some_of_each"):
        check(*factors(*PACKS[pack]), ones=True, longest=301)


@pytest.mark.parametrize("pack", [slow("tiles"), "direct"])
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "transposed", "other_type_of_offsets"])
def test_any_layout_gives_the_same(layout: str, pack: str) -> None:
    left, right, offsets = factors(*PACKS[pack], dtype=torch.float16)
    T, D = left.shape
    if layout == "sliced":
        left = torch.cat([left, left], dim=1)[:, 3 : D + 3].copy_(left)
    elif layout == "misaligned":
        left = torch.zeros(T * D + 1, dtype=left.dtype)[1:].view(T, D).copy_(left)
    elif layout == "transposed":
        left = left.mT.contiguous().mT
    else:
        offsets = offsets.int()
    check(left, right, offsets, ones=True)


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16])
def test_a_records_norm_has_the_same_bits_in_any_company_and_any_place(dtype: torch.dtype) -> None:
    for alone in ([5], [130]):
        left, right, offsets = factors(alone, 130, 96, dtype)
        own = torch.ops.sfumato.ghost_norm(left, right, offsets, True, 300)
        for before, after in (([], [300, 3]), ([7], [0, 190])):
            (left_0, right_0, _), (left_1, right_1, _) = factors(before, 130, 96, dtype), factors(after, 130, 96, dtype)
            pack = torch.cat([left_0, left, left_1]), torch.cat([right_0, right, right_1])
            found = torch.ops.sfumato.ghost_norm(*pack, offsets_of(before + alone + after), True, 300)
            assert torch.equal(found[:, len(before)], own[:, 0])


def test_a_record_of_nan_or_inf_harms_no_other() -> None:
    left, right, offsets = factors([70, 40, 260], 100, 80, torch.float16)
    own, weights_B = norms(left, right, offsets), torch.tensor([0.5, 0.0, 1.0])
    total = clipped_weight_grad(left, right, offsets, weights_B)
    for poison in (torch.nan, torch.inf):
        left[70:110], right[75] = poison, poison
        found = norms(left, right, offsets)
        assert not torch.isfinite(found["guarded"][1])
        assert torch.equal(found["guarded"][[0, 2]], own["guarded"][[0, 2]])
        assert torch.equal(clipped_weight_grad(left, right, offsets, weights_B), total)


def test_repeats_are_equal(repeats: int) -> None:
    pack = factors([9, 2], 80, 72)
    weights_B = torch.tensor([0.3, 0.7])
    first, total = torch.ops.sfumato.ghost_norm(*pack, True, 9), clipped_weight_grad(*pack, weights_B)
    for _ in range(repeats):
        assert torch.equal(torch.ops.sfumato.ghost_norm(*pack, True, 9), first)
        assert torch.equal(clipped_weight_grad(*pack, weights_B), total)


def test_a_record_longer_than_was_said_counts_nowhere() -> None:
    left, right, offsets = factors([3, 1], 20, 12)  # as many tokens as two records of two
    found = ghost_norm.ghost_norm(left, right, offsets, longest=2)
    assert found[0].isnan() and found[1].isfinite()
    assert clipped_weight_grad(left, right, offsets, torch.tensor([0.0, 1.0]), longest=2).isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    left, right, offsets = factors([3, 4], 5, 6)
    for arguments, message in (
        (
            (left[None], right, offsets),
            r"left_TD is \(1, 7, 5\) of float32: give \(tokens, features\) of bfloat16, flo",
        ),
        ((left.double(), right, offsets), r"left_TD is \(7, 5\) of float64"),
        ((left, right[1:], offsets), r"right_TP is \(6, 6\) of float32: give \(7, features\) of float32"),
        ((left, right.half(), offsets), r"right_TP is \(7, 6\) of float16"),
        ((left, right, offsets.float()), r"offsets_B1 is \(3,\) of float32: give \(records \+ 1,\) of int32 or int64"),
        ((left, right, offsets.to("meta")), "offsets_B1 are on cpu, meta: give them on one device"),
    ):
        with pytest.raises(ValueError, match=message):
            ghost_norm.ghost_norm(*arguments)
    with pytest.raises(ValueError, match="longest is -1"):
        ghost_norm.ghost_norm(left, right, offsets, longest=-1)
    with pytest.raises(ValueError, match=r"weights_B is \(3,\) of float32: give fp32, one for each of 2 records"):
        clipped_weight_grad(left, right, offsets, torch.ones(3))


def test_the_plain_path_gives_the_same_within_its_guard() -> None:
    left, right, offsets = factors([70, 1, 9], 20, 12)
    weights_B = torch.tensor([0.5, 0.0, 2.0])
    found, total = (
        ghost_norm.ghost_norm(left, right, offsets, ones=True),
        clipped_weight_grad(left, right, offsets, weights_B),
    )
    dispatch.choose("reference", CPU)
    torch.testing.assert_close(ghost_norm.ghost_norm(left, right, offsets, ones=True), found, rtol=1e-3, atol=0)
    torch.testing.assert_close(clipped_weight_grad(left, right, offsets, weights_B), total, rtol=1e-6, atol=1e-6)


def test_the_ops_are_registered_as_torch_wants_them_and_compile_whole() -> None:
    left, right, offsets = factors([40, 9], 20, 12)
    weights_B = torch.tensor([0.5, 1.0])
    torch.library.opcheck(torch.ops.sfumato.ghost_norm, (left, right, offsets, True, 40))
    torch.library.opcheck(torch.ops.sfumato.clipped_weight_grad, (left, right, offsets, weights_B, 40))

    def both(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        norms_B = ghost_norm.ghost_norm(left, right, offsets, longest=40)
        return norms_B, clipped_weight_grad(left, right, offsets, norms_B.rsqrt(), longest=40)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(left, right), both(left, right), strict=True):
        assert torch.equal(got, expected)


def test_flops_and_bytes_are_counted() -> None:
    left, right, offsets = factors([8, 8], 20, 12)
    with FlopCounterMode(display=False) as counter:
        ghost_norm.ghost_norm(left, right, offsets, ones=True)
        clipped_weight_grad(left, right, offsets, torch.ones(2))
    products, whole = 2 * 2 * 8 * 9 // 2 * (20 + 13), 2 * 16 * 20 * 12
    assert counter.get_total_flops() == products + whole
    assert ghost_norm.ghost_norm_flops(1000, 1, 20, 12) == 2 * 1000 * 20 * 12  # cheaper than 1000 x 1000
    assert ghost_norm.ghost_norm_bytes(16, 2, 20, 12, 2) == 16 * 32 * 2 + 8
    assert ghost_norm.clipped_weight_grad_bytes(16, 20, 12, 2) == 16 * 32 * 2 + 4 * 240


@pytest.mark.parametrize(("D", "P", "block"), [(1152, 1152, 128), (4608, 1152, 128), (1152, 16, 64), (6, 5, 64)])
def test_the_cheaper_form_is_taken(D: int, P: int, block: int) -> None:
    most = ghost_norm.gram_pays_up_to(D, P, block)
    for length in (most, most + 1):
        in_tiles = length * (length + block) * (D + P)  # half of them and half a tile more
        assert (in_tiles <= 2 * length * D * P) == (length <= most) or most == 0


# Per-record gradients as layers hand them over


def products(B: int, N: int, P: int, D: int, dtype: torch.dtype = torch.float32) -> OuterProducts:
    return OuterProducts(draw(B, 1, N, D, dtype=dtype), draw(B, 1, N, P, seed=1, dtype=dtype), torch.Size([D, P]))


@pytest.mark.parametrize("reuse", [None, "at_once", "later", "later_in_little"])
@pytest.mark.parametrize(("N", "P", "D"), [(8, 64, 96), (70, 9, 9), (40, 81, 4)])
def test_no_gradient_is_formed_for_a_record(
    N: int, P: int, D: int, reuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bmm", "einsum", "matmul"):
        monkeypatch.setattr(torch, name, None)
    monkeypatch.setattr(OuterProducts, "_form", None)
    found = products(3, N, P, D)
    true = reference.outer_products(found.left_BGND.double(), found.right_BGNP.double())[:, 0]
    torch.testing.assert_close(found.squared_norms(reuse=reuse).double(), true.square().sum((1, 2)), rtol=3e-3, atol=0)
    weights_B = torch.tensor([0.0, 0.5, 2.0])
    total = found.weighted_sum(RecordWeights(weights_B)).double()
    torch.testing.assert_close(total, torch.tensordot(weights_B.double(), true, dims=1), rtol=1e-5, atol=1e-5)


def test_one_token_groups_and_fp64_stay_with_the_plain_formulas() -> None:
    for plain in (products(3, 1, 9, 9), products(3, 8, 9, 9, torch.float64)):
        assert not plain._on_kernels()
    assert not OuterProducts(draw(3, 2, 8, 4), draw(3, 2, 8, 5), torch.Size([8, 5]))._on_kernels()
    assert products(3, 8, 9, 9)._on_kernels()
    dispatch.choose("auto", CPU)
    assert not products(3, 8, 9, 9)._on_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [5, 70])
def test_a_layers_weight_and_bias_and_several_uses_of_one(N: int, dtype: torch.dtype) -> None:
    weight = products(3, N, 12, 20, dtype)
    true = reference.outer_products(weight.left_BGND.double(), weight.right_BGNP.double())[:, 0]
    bias = weight.left_BGND[:, 0].double().sum(1)
    found = squared_norms([weight, TokenSum(weight.left_BGND[:, 0], torch.Size([20]))])
    expected = true.square().sum((1, 2)) + bias.square().sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=3e-3, atol=0)
    twice = together([weight, weight]).squared_norms()
    torch.testing.assert_close(twice.double(), (2 * true).square().sum((1, 2)), rtol=3e-3, atol=0)


@pytest.mark.parametrize("engine", ["two_pass", slow("kept_gradients"), "keep_half"])
@pytest.mark.parametrize("layer", ["linear_3d", slow("linear_4d"), "conv_patchify", "shared_block", slow("lora")])
def test_clipped_sums_are_those_of_per_record_autograd(layer: str, engine: str) -> None:
    case = CASES[layer](12).to(torch.float32)
    present = torch.ones(RECORDS, dtype=torch.bool)
    got = clipped_sum(engine, case.private, case.losses, present, 0.05)
    exact = per_record_gradients(case.plain.double(), tuple(x.double() for x in case.inputs), RECORDS)
    assert relative_error(got, flat_sum(exact, case.uses, 0.05)) <= 5e-5


# Sensitivity: what one record can add, whatever its values


@pytest.mark.parametrize("engine", ["two_pass", *map(slow, ENGINES[1:])])
@pytest.mark.parametrize("layer", ["linear_3d", "conv_patchify", slow("shared_block"), slow("lora")])
def test_no_value_in_a_record_carries_its_share_over_the_bound(layer: str, engine: str) -> None:
    case = CASES[layer](12).to(torch.float32)
    rows = len(case.inputs[0]) // RECORDS
    for value in HARMFUL[::2]:
        inputs = tuple(x[:rows].clone() for x in case.inputs)
        inputs[0][:, :1] = value
        with torch.no_grad():
            shape = case.private(*inputs).shape
        for gradient in (random(*shape, seed=5), torch.full(shape, value)):
            assert share_of(engine, case.private, inputs, gradient) <= MOST


@pytest.mark.parametrize("engine", ["two_pass", slow("kept_gradients"), slow("group_wise")])
@pytest.mark.parametrize(("num_tokens", "P", "D"), [(2, 3, 3), slow(64, 4, 4), (64, 200, 96), (300, 8, 16)])
@pytest.mark.parametrize("scale", [1.0, slow(1e15)])
def test_tokens_that_nearly_cancel_do_not_escape_the_bound(
    num_tokens: int, P: int, D: int, scale: float, engine: str
) -> None:
    for seed, rest in enumerate((0.3, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)):
        x, gradient = nearly_cancelling(num_tokens, P, D, rest, scale, seed)
        assert share_of(engine, Linear(P, D), (x,), gradient) <= MOST


@pytest.mark.parametrize(("num_tokens", "P", "D"), [(4, 1536, 96), slow(64, 384, 384), slow(256, 384, 64)])
def test_features_all_equal_gain_nothing_by_rounding_the_same_way(num_tokens: int, P: int, D: int) -> None:
    for rest in (None, 1.0, 0.1, 1e-2):
        x, gradient = all_equal(num_tokens, P, D, rest, 1.3, 1.7)
        assert share_of("two_pass", Linear(P, D), (x,), gradient) <= MOST


@pytest.mark.parametrize("small", [2e-23, 3e-22, 1e-16])
def test_factors_that_underflow_do_not_hide_a_gradient(small: float) -> None:
    for num_tokens, P, D in ((64, 200, 200), (100, 16, 64)):
        model, large = Linear(P, D, bias=False), 1.8e19 / P**0.5
        for of_x, of_y in ((large, small), (small, large), (1e-3 * large, small)):
            x, gradient = torch.full((1, num_tokens, P), of_x), torch.full((1, num_tokens, D), of_y)
            assert share_of("two_pass", model, (x,), gradient, bound=1e-3) <= 1e-3 * (1 + 1e-6)


def test_padding_contributes_exactly_nothing() -> None:
    case = CASES["linear_3d"](12).to(torch.float32)
    present = torch.tensor([True, False, True, True, False])
    whole = clipped_sum("two_pass", case.private, case.losses, present, BOUND)
    for value in HARMFUL[::3]:
        case.inputs[0][~present] = value
        got = clipped_sum("two_pass", case.private, case.losses, present, BOUND)
        assert all(torch.equal(got[name], whole[name]) for name in whole)


# Tensor cores


@dataclass(frozen=True)
class TensorCores:
    """How a chip adds up: `terms` products at a time and the sum so far, aligned to the largest with `bits` bits more
    than fp32 has, everything cut off towards zero (Khattak and Mikaitis 2025)."""

    terms: int
    bits: int

    def dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        """In place of the interpreter's own."""
        left, right, total = exact(a), exact(b), d.data.astype(np.float64)
        for first in range(0, left.shape[1], self.terms):
            block = slice(first, first + self.terms)
            addends = np.concatenate([left[:, None, block] * right.T[None, :, block], total[:, :, None]], axis=2)
            _, exponents = np.frexp(np.abs(addends).max(2))
            unit = np.ldexp(1.0, exponents - 1 - 23 - self.bits)
            total = towards_zero((np.trunc(addends / unit[:, :, None]) * unit[:, :, None]).sum(2))
        return type(d)(total.astype(np.float32), d.dtype.scalar)


def exact(factor: Any) -> Any:
    if factor.dtype.name == "bf16":  # the interpreter holds its bits
        return (factor.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return factor.data.astype(np.float64)


def towards_zero(x: Any) -> Any:
    """The fp32 next to x, not beyond it."""
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


CHIPS = {"A100": TensorCores(terms=8, bits=1), "H100": TensorCores(terms=16, bits=2)}


@pytest.fixture(params=CHIPS)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorCores]:
    from triton.runtime.interpreter import InterpreterBuilder

    found = CHIPS[request.param]
    monkeypatch.setattr(InterpreterBuilder, "create_dot", found.dot)
    with trial(SMALL):  # the simulation's time goes by tokens squared
        yield found


SMALL = {
    ("ghost_norm.gram", f"{dtype} {block}"): Tile({"BLOCK": 16, "BLOCK_K": 64}, 4, 3)
    for dtype in ("float16", "bfloat16")
    for block in (64, 128)
} | {
    ("ghost_norm.product", f"{dtype} {of_left}x{of_right}"): Tile({"BLOCK_D": 32, "BLOCK_P": 32, "BLOCK_T": 32}, 4, 3)
    for dtype in ("float16", "bfloat16")
    for of_left in (64, 128)
    for of_right in (16, 32, 64, 128)
}


def cancelling(N: int, P: int, D: int, rest: float) -> tuple[Tensor, Tensor]:
    x, gradient = nearly_cancelling(N, P, D, rest, 1.0, seed=3)
    return gradient[0], x[0]


def rising_and_falling(N: int, P: int, D: int, rest: float) -> tuple[Tensor, Tensor]:
    """Features that first add up and then cancel, so that every token's inner products round at their greatest."""
    x, gradient = all_equal(N, P, D, rest, 1.37, 1.21)
    x[:, : N // 2, int(P * 0.52) :] *= -1
    return gradient[0], x[0]


def constant(N: int, P: int, D: int, rest: float) -> tuple[Tensor, Tensor]:
    x, gradient = all_equal(N, P, D, None if rest > 0.5 else rest, 1.37, 1.21)
    return gradient[0], x[0]


ATTACKS: dict[str, Callable[[int, int, int, float], tuple[Tensor, Tensor]]] = {
    "cancelling": cancelling,
    "rising_and_falling": rising_and_falling,
    "constant": constant,
}


def share(left: Tensor, right: Tensor, norm: Tensor, bound: float) -> float:
    """The norm of a record's share of the clipped sum, were `norm` its norm."""
    weights_B = _clip_weights(norm.square()[None], bound, torch.ones(1, dtype=torch.bool, device=norm.device))
    offsets = torch.tensor([0, len(left)], device=norm.device)
    return clipped_weight_grad(left, right, offsets, weights_B).double().norm().item() / bound


@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16])
@pytest.mark.parametrize(("N", "P", "D"), [(16, 1152, 32), slow(16, 4608, 64), slow(64, 256, 256), (300, 16, 32)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_tensor_cores_carry_no_share_over_the_bound(
    attack: str, N: int, P: int, D: int, dtype: torch.dtype, chip: TensorCores
) -> None:
    for rest in (1.0, 0.03):
        left, right = (x.to(dtype) for x in ATTACKS[attack](N, P, D, rest))
        found = norms(left, right, torch.tensor([0, N]))
        norm = found["guarded"][0].sqrt()
        assert share(left, right, norm, 1e-3 * norm.item()) <= 1 + 1e-6
        true = (left.double().mT @ right.double()).norm().item()
        assert norm.item() >= true


@pytest.mark.parametrize("chip", ["A100"], indirect=True)
def test_what_was_found_by_attack_on_a_cpu_would_not_do(chip: TensorCores) -> None:
    N, P, D = 16, 4608, 64
    left, right = (x.bfloat16() for x in constant(N, P, D, 1.0))
    found = norms(left, right, torch.tensor([0, N]))
    magnitude_B = ((left.float() @ left.float().mT) * (right.float() @ right.float().mT)).abs().sum()[None]
    totals_2B = torch.stack([found["squared"], magnitude_B])
    norm = ghost_norm._allow_for_gram(totals_2B, found["spread"], N, (D, P))[0].sqrt()
    assert share(left, right, norm, 1e-3 * norm.item()) > MOST / BOUND


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_multiply_exactly_and_add_up_in_fp32(dtype: torch.dtype, chip: TensorCores) -> None:
    left, right, offsets = factors([70, 20], 40, 30, dtype)
    true_B = gradients(left, right, offsets).square().sum((1, 2))
    torch.testing.assert_close(norms(left, right, offsets)["squared"].double(), true_B, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("N", "P", "D"), [(16, 384, 384), slow(256, 1152, 1152), (1024, 96, 64)])
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16])
def test_the_rounding_guard_hardly_shows_on_honest_data(N: int, P: int, D: int, dtype: torch.dtype) -> None:
    left, right = draw(N, D, dtype=dtype), draw(N, P, seed=1, dtype=dtype)
    true = (left.double().mT @ right.double()).norm().item()
    norm = norms(left, right, torch.tensor([0, N]))["guarded"][0].sqrt().item()
    assert true <= norm <= 1.005 * true


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("pack", [*PACKS.values(), ([256] * 4, 1152, 1152), ([1024] * 2, 96, 4608)])
def test_on_a_gpu_norms_and_sums_are_within_their_bounds(
    pack: tuple[list[int], int, int], ones: bool, dtype: torch.dtype
) -> None:
    left, right, offsets = (x.cuda() for x in factors(*pack, dtype=dtype))
    true_B = gradients(left, right, offsets, ones).square().sum((1, 2))
    found = norms(left, right, offsets, ones)
    assert ((found["squared"] - true_B).abs() <= (found["guarded"] - true_B).clamp(min=0)).all()
    assert (found["guarded"] <= 1.01 * true_B).all()
    weights_B = torch.linspace(0, 2, len(true_B), device="cuda")
    total = clipped_weight_grad(left, right, offsets, weights_B)
    expected = torch.tensordot(weights_B.double(), gradients(left, right, offsets), dims=1)
    assert (total - expected).norm() <= (2 * 0.64 * EPS * 300 * found["spread"].sum()).double()
    for _ in range(100):
        assert torch.equal(torch.stack([*norms(left, right, offsets, ones).values()]), torch.stack([*found.values()]))
        assert torch.equal(clipped_weight_grad(left, right, offsets, weights_B), total)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("N", "P", "D"), [(16, 4608, 64), (256, 1152, 1152), (1024, 96, 64), (2048, 384, 384)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_on_a_gpu_no_share_is_carried_over_the_bound(attack: str, N: int, P: int, D: int, dtype: torch.dtype) -> None:
    for rest in (1.0, 0.3, 0.1, 1e-2, 1e-3, 0.0):
        left, right = (x.to("cuda", dtype) for x in ATTACKS[attack](N, P, D, rest))
        norm = norms(left, right, torch.tensor([0, N], device="cuda"))["guarded"][0].sqrt()
        assert share(left, right, norm, 1e-3 * norm.item()) <= 1 + 1e-6
