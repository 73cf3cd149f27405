"""Per-record gradients in factored form: norms and weighted sums of what is never formed for a single record.

The gradient of one parameter for one record is nearly always a short sum of outer products, one a token, whose factors
a backward pass has at hand anyway: the layer's input and the gradient of its output. Its norm and its clip-weighted sum
over records follow from the factors alone. One file: kernels and plain products promise the same guarded norms.

Source: norms by Gram matrices, Goodfellow 2015 (arXiv:1510.01799) and Li et al. 2022 (arXiv:2110.05679, Eq. 3); the
cheaper form of the two chosen by layer, Bu et al. 2022 (arXiv:2205.10683, Sec. 4.3).

Rounding guard. Where a record's tokens cancel (huge factors, small sum), a norm computed in floating point can fall
short of the true one by any amount, and so could be made to escape its clipping bound. Its error is small in units of
the *spread*, sum_n ||left_n|| ||right_n||, however much cancels: `squared_norms` therefore adds an allowance for
rounding in those units. Where N tokens of D and P features point in random directions it is about
(N + 1.5 sqrt(D) + 1.5 sqrt(P)) eps / 2 of the norm by Gram matrices and 8 sqrt(N) eps of a formed one; a record whose
tokens cancel is clipped too hard rather than too little.

On a GPU `ghost_norm` and `clipped_weight_grad` form nothing, and add up on tensor cores, which do not round as IEEE
does: they align 8 or 16 products and what was summed so far to the largest of them, cut off the rest and cut off again,
for at most 5 eps of the largest (Fasi et al. 2021, doi:10.7717/peerj-cs.330; Khattak and Mikaitis 2025,
arXiv:2512.07004). All of it may lean one way, so that no allowance found by attack on a CPU would do. The kernels'
allowance is a bound instead. A sum of K products, by tensor cores or by fused multiply-adds, errs by at most u K of the
sum of their magnitudes, where u is 5/8 eps. With L and R the Gram matrices, c for what multiplying and adding up their
entries costs, and Cauchy and Schwarz for the magnitudes,

    magnitude = sum_nm (D + c) ||left_n|| ||left_m|| |R_nm| + P ||right_n|| ||right_m|| |L_nm|
    norm by Gram matrices: the square errs by at most u magnitude + D P (u spread)^2
    a sum over N tokens, 256 at a time: errs by at most u (min(N, 256) + N / 256) spread

and a norm is its measured value with the bounds of both, its own and that of the sum which will be released. Where
tokens point in random directions and D = P = 1152 that is 0.1% of the norm at N = 256, 0.3% at N = 1024.
"""

# B records, G groups, N tokens, T tokens of all records, P right features, D left features
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import use_triton
from kernels.tiles import Tile, tuned

# In eps, found by attack (tests/privacy/test_sensitivity.py). Features all equal round the same way at every addition:
# a sum over P of them errs by sqrt(P) and some. Where inner products are small beside their terms, one eps a token is
# held in reserve. A formed sum of 256 copies of two nearly opposite tokens errs by 7 spread.
_FEATURES_ROUNDING = 1.5
_GRAM_ROUNDING = 1.0
_SUM_ROUNDING = 8.0
_SQUARES_ROUNDING = 0.5  # torch adds up squares several at a time
# Whatever rounding does, no norm is below this share of the spread: in fp32 1 / (4 sqrt(N)) and 1 / 1024.
_GRAM_FLOOR_PER_TOKEN = 2.0**19
_SUM_FLOOR = 2.0**13

# Measured on a CPU (docs/results/bench_dp.json): a symmetric product in this many bands takes (1 + 1/bands) / 2 of the
# time, and a word written and read again takes that of about as many multiply-adds.
_GRAM_BANDS = 4
_LEAST_BAND = 32  # tokens; narrower ones cost more than they save
_MULTIPLY_ADDS_A_WORD = 24
_LIKE_LENGTH = 0.75  # of the longest, for segments to be taken as a batch: padding costs less than batches of one
_MOST_FORMED_BYTES = 1 << 26  # of one layer, kept for later: beyond it, memory is worth more than the time

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels

Reuse = Literal["at_once", "later", "later_in_little"] | None


class RecordWeights:
    """A weight for each record. Guarantee: weight zero leaves no trace, though the record's values be inf or NaN."""

    def __init__(self, weights_B: Tensor) -> None:
        self.weights_B = weights_B
        self._excluded_B = weights_B == 0

    @cached_property
    def _any_excluded(self) -> bool:  # asked for once it matters: a GPU has to be waited for
        return bool(self._excluded_B.any())

    def mask(self, x_B: Tensor) -> Tensor:
        """`x_B` (B, ...) in at least fp32, excluded records at zero: 0 * inf would be NaN."""
        x_B = at_least_fp32(x_B)
        return x_B.masked_fill(_along(self._excluded_B, x_B), 0.0) if self._any_excluded else x_B

    def scale(self, x_B: Tensor) -> Tensor:
        """`mask(x_B)` times each record's weight."""
        x_B = self.mask(x_B)
        return x_B * _along(self.weights_B, x_B).to(x_B.dtype)


class PerRecordGradient(Protocol):
    """Every record's gradient of one parameter."""

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        """Squared L2 norm of each record's gradient, (B,), in at least fp32, not below the rounding guard's floor.

        reuse: when `weighted_sum` will be asked of this object too, in which case gradients that were formed are kept:
        "at_once", or "later", with those of many other layers in memory meanwhile; "later_in_little" only where they
        take no more room than their factors.
        """
        ...

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        """sum_b weights[b] * gradient_b, of the parameter's shape, in at least fp32."""
        ...

    def outer_products(self) -> OuterProducts:
        """The same gradients as outer products, so that several uses of one parameter can be put together.

        A table's, by one-hot rows of its height: beside outer products, `together` does without them.
        """
        ...


@dataclass(eq=False)
class OuterProducts:
    """gradient_b = sum_n left[b, g, n] (x) right[b, g, n] for each group g; stacked over g, of shape `shape`."""

    left_BGND: Tensor
    right_BGNP: Tensor
    shape: torch.Size
    _formed_BGDP: Tensor | None = None  # each record's gradient, where that takes about as little room as its factors

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        if self._on_kernels():
            return self._squared_norms_on_kernels()
        left, right = self._factors()
        _, _, N, D = self.left_BGND.shape
        P = right.shape[2]
        if N == 1:
            # what underflows in one square may meet a large other one
            tiny = torch.finfo(left.dtype).tiny
            squared = (left.square().sum((1, 2)) + D * tiny) * (right.square().sum((1, 2)) + P * tiny)
        elif self._forming_pays(reuse):
            formed = self._form()
            norms = _norms(_norms(formed.flatten(0, 1)))  # two levels: one running sum of D x P squares would lose 1e-5
            if reuse is None:  # otherwise what was measured is itself what is summed
                norms = _allow_for_sum(norms, (_norms(left) * _norms(right)).sum(1))
            else:
                self._formed_BGDP = formed
                self.left_BGND, self.right_BGNP = (_without_tokens(x) for x in (self.left_BGND, self.right_BGNP))
            squared = norms.square()
        else:
            squared = _squared_norms_by_gram(left, right)
        return squared.view(self.left_BGND.shape[:2]).sum(1)

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        if self._on_kernels():
            N = self.left_BGND.shape[2]
            summed_DP = clipped_weight_grad(*self._packed(), weights.weights_B.float(), longest=N)
            return summed_DP.view(self.shape)
        formed_BGDP = self._formed_BGDP
        if formed_BGDP is None and self._forming_pays(None):
            formed_BGDP = self._form()  # as for the norms: a sum over tokens in another order would round otherwise
        if formed_BGDP is not None:
            formed_BGDP = weights.mask(formed_BGDP)
            return (weights.weights_B.to(formed_BGDP.dtype) @ formed_BGDP.flatten(1)).view(self.shape)
        left, right = self.left_BGND, self.right_BGNP
        if left.shape[-1] <= right.shape[-1]:  # weigh the smaller factor
            left, right = weights.scale(left), weights.mask(right)
        else:
            left, right = weights.mask(left), weights.scale(right)
        if left.shape[1] == 1:
            return (left.flatten(0, 2).mT @ right.flatten(0, 2)).view(self.shape)
        return torch.einsum("bgnd,bgnp->gdp", left, right).reshape(self.shape)

    def squared_norms_with(self, bias: TokenSum) -> Tensor:
        """Squared norms of a layer's weight (this) and bias together, cheaper than apart; neither will be reused."""
        if self._on_kernels() and self._shares_left_with(bias):
            return self._squared_norms_on_kernels(ones=True)
        if self.left_BGND.shape[2] == 1 or self._forming_pays(None) or not self._shares_left_with(bias):
            return self.squared_norms() + bias.squared_norms()
        return _squared_norms_by_gram(*self._factors(), ones=True)  # a bias is the weight of a feature that is one

    def _shares_left_with(self, bias: TokenSum) -> bool:
        return self.left_BGND.shape[1] == 1 and self.left_BGND.data_ptr() == bias.left_BND.data_ptr()

    def _on_kernels(self) -> bool:
        """Whether Triton's kernels take these factors, and nothing is ever formed.

        One token is cheaper by the plain formula, and the convolutions in groups are too narrow for matrix units.
        """
        _, G, N, _ = self.left_BGND.shape
        left, right = self.left_BGND, self.right_BGNP
        return G == 1 and N > 1 and left.dtype == right.dtype and left.dtype in _DTYPES and use_triton(left)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        B, _, N, _ = self.left_BGND.shape
        offsets_B1 = torch.arange(0, B * N + 1, N, device=self.left_BGND.device)
        return self.left_BGND.flatten(0, 2), self.right_BGNP.flatten(0, 2), offsets_B1

    def _squared_norms_on_kernels(self, *, ones: bool = False) -> Tensor:
        return ghost_norm(*self._packed(), ones=ones, longest=self.left_BGND.shape[2])

    def _factors(self) -> tuple[Tensor, Tensor]:
        return at_least_fp32(self.left_BGND).flatten(0, 1), at_least_fp32(self.right_BGNP).flatten(0, 1)

    def _forming_pays(self, reuse: Reuse) -> bool:
        """Whether the records' D x P gradients are cheaper to form than their Gram matrices, in multiply-adds."""
        B, G, N, D = self.left_BGND.shape
        P = self.right_BGNP.shape[3]
        gram = (1 + 1 / _GRAM_BANDS) / 2 * N * N * (P + D)
        if reuse is None:
            return N > 1 and gram > N * P * D
        formed_bytes = B * G * D * P * max(4, self.left_BGND.itemsize)
        if reuse == "later" and (formed_bytes > _MOST_FORMED_BYTES or P > 2 * N):
            return False
        if reuse == "later_in_little" and D * P > N * D:
            return False
        return gram > _MULTIPLY_ADDS_A_WORD * P * D  # the product is needed anyway: what counts is to write and read it

    def _form(self) -> Tensor:
        left_BGND, right_BGNP = at_least_fp32(self.left_BGND), at_least_fp32(self.right_BGNP)
        return left_BGND.mT @ right_BGNP

    def outer_products(self) -> OuterProducts:
        return self


@dataclass(eq=False)
class TokenSum:
    """gradient_b = sum_n left[b, n]: a bias, or (with one token) any tensor that has a copy for each record."""

    left_BND: Tensor
    shape: torch.Size

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        if self.left_BND.shape[1] == 1:
            return at_least_fp32(self.left_BND).square().sum((1, 2))
        sums_B1D = _sums(self.left_BND)[:, None]
        norms_B = _norms(sums_B1D).squeeze(1)
        if reuse is None:
            return _allow_for_sum(norms_B, _norms(at_least_fp32(self.left_BND)).sum(1)).square()
        self.left_BND = sums_B1D  # what was measured is itself what is summed
        return norms_B.square()

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        sums_BD = weights.mask(_sums(self.left_BND))
        return (weights.weights_B.to(sums_BD.dtype) @ sums_BD).view(self.shape)

    def outer_products(self) -> OuterProducts:
        ones_B1N1 = self.left_BND.new_ones(1, 1, 1, 1).expand(self.left_BND.shape[0], 1, self.left_BND.shape[1], 1)
        return OuterProducts(ones_B1N1, self.left_BND[:, None], self.shape)


@dataclass(frozen=True, eq=False)
class RowSums:
    """gradient_b adds left[b, n] to row rows[b, n] of a table: an embedding. Rows of -1 (padding) add nothing."""

    rows_BN: Tensor
    left_BND: Tensor
    shape: torch.Size

    @cached_property
    def _added(self) -> Tensor:  # (B, N, D)
        return at_least_fp32(self.left_BND).masked_fill((self.rows_BN < 0)[..., None], 0.0)

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        left_BND = self._added
        if left_BND.shape[1] == 1:
            return left_BND.square().sum((1, 2))
        same_BNN = (self.rows_BN[:, :, None] == self.rows_BN[:, None, :]).to(left_BND.dtype)
        return _squared_norms_of_grams(torch.bmm(left_BND, left_BND.mT), same_BNN, (left_BND.shape[2], 1))

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        weighted_TD = weights.scale(self._added).flatten(0, 1)
        return _rows_summed(weighted_TD, self.rows_BN.clamp(min=0).flatten(), self.shape[0])

    def outer_products(self) -> OuterProducts:
        one_hot_BNV = F.one_hot(self.rows_BN.clamp(min=0), self.shape[0]).to(self._added.dtype)
        return OuterProducts(one_hot_BNV[:, None], self._added[:, None], self.shape)


@dataclass(frozen=True, eq=False)
class ExpertOuterProducts:
    """gradient_b of expert e = sum over the tokens n sent to it of left[b, n] (x) right[b, n]; shape (E, D, P).

    Tokens of different experts never meet: a record's squared norm is the sum over those that it sent tokens to.
    """

    experts_BN: Tensor
    left_BND: Tensor
    right_BNP: Tensor
    shape: torch.Size

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        squared_B = self.left_BND.new_zeros(len(self.experts_BN), dtype=_at_least_fp32_of(self.left_BND))
        for _, records_S, products in self._parts():
            squared_B.index_add_(0, records_S, products.squared_norms())
        return squared_B

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        total_EDP = self.left_BND.new_zeros(self.shape, dtype=_at_least_fp32_of(self.left_BND))
        for expert, records_S, products in self._parts():  # those that were measured: they are summed as they were
            total_EDP[expert] += products.weighted_sum(RecordWeights(weights.weights_B[records_S]))
        return total_EDP

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """All tokens by expert and then by record, and, on the host, how many of each record each expert has."""
        (B, _), E = self.experts_BN.shape, self.shape[0]
        records_B1 = torch.arange(B, device=self.experts_BN.device)[:, None]
        sorted_T, order_T = (self.experts_BN * B + records_B1).flatten().sort(stable=True)
        edges = torch.arange(E * B + 1, device=order_T.device)
        return order_T, torch.searchsorted(sorted_T, edges).diff().view(E, B).cpu()

    def _parts(self) -> Iterator[tuple[int, Tensor, OuterProducts]]:
        """(expert, records, what their tokens of it add up to): together those that sent it about equally many."""
        order_T, counts_EB = self._sorted
        begins_EB = (counts_EB.flatten().cumsum(0) - counts_EB.flatten()).view_as(counts_EB)
        for expert, (counts_B, begins_B) in enumerate(zip(counts_EB, begins_EB, strict=True)):
            lengths_B, records_B = counts_B.sort(descending=True)
            first, num_records = 0, int((lengths_B > 0).sum())
            while first < num_records:
                longest = int(lengths_B[first])
                end = int((lengths_B > _LIKE_LENGTH * longest).sum())
                own_S, places_M = records_B[first:end], torch.arange(longest)
                there_SM = (places_M < counts_B[own_S, None]).to(order_T.device)
                places_SM = (begins_B[own_S, None] + places_M).clamp(max=len(order_T) - 1).to(order_T.device)
                left_S1MD, right_S1MP = (
                    x.flatten(0, 1)[order_T[places_SM]].masked_fill(~there_SM[..., None], 0.0)[:, None]
                    for x in (self.left_BND, self.right_BNP)
                )
                yield expert, own_S.to(order_T.device), OuterProducts(left_S1MD, right_S1MP, self.shape[1:])
                first = end

    def outer_products(self) -> OuterProducts:
        one_hot_BENx1 = F.one_hot(self.experts_BN, self.shape[0]).movedim(2, 1)[..., None]
        left_BEND = at_least_fp32(self.left_BND)[:, None] * one_hot_BENx1
        return OuterProducts(left_BEND, self.right_BNP[:, None].expand(-1, self.shape[0], -1, -1), self.shape)


@dataclass(frozen=True, eq=False)
class TableUses:
    """One table as an embedding and as a linear layer, of shape (V, D): the sum of both gradients, cross terms and all.

    Where the two meet, a row's one-hot vector would pick features of the linear layer's left factor: they are gathered.
    """

    rows: RowSums
    products: OuterProducts  # left of V features and right of D, in one group

    def squared_norms(self, *, reuse: Reuse = None) -> Tensor:
        left_BNV, right_BND = self.products._factors()
        rows_BM, added_BMD = self.rows.rows_BN.clamp(min=0), self.rows._added
        (B, N, V), D = left_BNV.shape, added_BMD.shape[2]
        if left_BNV.device.type == "cpu" and self.products._forming_pays(None):  # and so they are summed
            places_BM = rows_BM + V * torch.arange(B)[:, None]
            rows_BVD = _rows_summed(added_BMD.flatten(0, 1), places_BM.flatten(), B * V).view(B, V, D)
            formed_BVD = left_BNV.mT @ right_BND + rows_BVD
            spread_B = (_norms(left_BNV) * _norms(right_BND)).sum(1) + _norms(added_BMD).sum(1)
            return _allow_for_sum(_norms(_norms(formed_BVD)), spread_B).square()
        met_BNM = left_BNV.gather(2, rows_BM[:, None, :].expand(-1, N, -1))
        same_BMM = (rows_BM[:, :, None] == rows_BM[:, None, :]).to(left_BNV.dtype)
        of_linear_BNT = torch.cat([met_BNM, torch.bmm(left_BNV, left_BNV.mT)], 2)
        left_gram_BTT = torch.cat([torch.cat([same_BMM, met_BNM.mT], 2), of_linear_BNT], 1)
        both_BTD = torch.cat([added_BMD, right_BND], 1)
        return _squared_norms_of_grams(left_gram_BTT, torch.bmm(both_BTD, both_BTD.mT), (V, D))

    def weighted_sum(self, weights: RecordWeights) -> Tensor:
        return self.rows.weighted_sum(weights) + self.products.weighted_sum(weights)

    def outer_products(self) -> OuterProducts:
        return _joined([self.rows.outer_products(), self.products])


def together(uses: Sequence[PerRecordGradient]) -> PerRecordGradient:
    """The gradient of a parameter used several times: the sum over its uses, cross terms and all."""
    if len(uses) == 1:
        return uses[0]
    tables = [use for use in uses if isinstance(use, RowSums)]
    products = [use.outer_products() for use in uses if not isinstance(use, RowSums)]
    if not tables:
        return _joined(products)
    rows_BN, left_BND = torch.cat([t.rows_BN for t in tables], 1), torch.cat([t.left_BND for t in tables], 1)
    rows = RowSums(rows_BN, left_BND, tables[0].shape)
    return TableUses(rows, _joined(products)) if products else rows


def _joined(products: Sequence[OuterProducts]) -> OuterProducts:
    if len(products) == 1:
        return products[0]
    left, right = torch.cat([p.left_BGND for p in products], 2), torch.cat([p.right_BGNP for p in products], 2)
    return OuterProducts(left, right, products[0].shape)


def squared_norms(of_layer: Sequence[PerRecordGradient], *, reuse: Reuse = None) -> Tensor:
    """Squared norms of each record's gradients of several parameters of one layer together, (B,)."""
    match of_layer:
        case [OuterProducts() as weight, TokenSum() as bias] if reuse is None:
            return weight.squared_norms_with(bias)
        case _:
            return torch.stack([gradient.squared_norms(reuse=reuse) for gradient in of_layer]).sum(0)


def ghost_norm(
    left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, *, ones: bool = False, longest: int | None = None
) -> Tensor:
    """Squared norms, (B,) fp32, of sum_n left[n] (x) right[n] over each record's tokens, made as large as rounding may.

    Record b has the tokens offsets[b] up to offsets[b + 1]. With `ones`, every token has one right feature more, of
    value one: a bias. `longest` is the most tokens that any record has (without it the GPU is waited for); a record
    that has more gets NaN, which no clipping counts.

    Guarantee: not below the norm of the record's share of `clipped_weight_grad` under a weight of one, as it is
    computed there. For one `longest`, a record's result has the same bits whatever records are beside it.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    longest = _checked(left_TD, right_TP, offsets_B1, longest)
    if use_triton(left_TD):
        return _ghost_norm(left_TD, right_TP, offsets_B1, ones, longest)[0]
    found = [left_TD.new_zeros(0, dtype=torch.float32)]
    for left_BGND, right_BGNP, shape in _segments(left_TD, right_TP, offsets_B1):
        weight, bias = OuterProducts(left_BGND, right_BGNP, shape), TokenSum(left_BGND[:, 0], shape[:1])
        found.append(weight.squared_norms_with(bias) if ones else weight.squared_norms())
    return torch.cat(found)


def clipped_weight_grad(
    left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, weights_B: Tensor, *, longest: int | None = None
) -> Tensor:
    """sum_b weights[b] sum_{n of b} left[n] (x) right[n], (D, P) fp32; records as in `ghost_norm`.

    Each record's sum is taken in fp32, and in fp32 it is weighed, whatever the factors' precision. A record of weight
    zero leaves no trace, though its values be inf or NaN.
    """
    longest = _checked(left_TD, right_TP, offsets_B1, longest)
    if weights_B.shape != (len(offsets_B1) - 1,) or weights_B.dtype != torch.float32:
        raise ValueError(
            f"weights_B is {_described(weights_B)}: give fp32, one for each of {len(offsets_B1) - 1} records"
        )
    if use_triton(left_TD):
        return _clipped_weight_grad(left_TD, right_TP, offsets_B1, weights_B, longest)
    total_DP = left_TD.new_zeros(left_TD.shape[1], right_TP.shape[1], dtype=torch.float32)
    for record, (left_BGND, right_BGNP, shape) in enumerate(_segments(left_TD, right_TP, offsets_B1)):
        weights = RecordWeights(weights_B[record : record + 1])
        total_DP += OuterProducts(left_BGND, right_BGNP, shape).weighted_sum(weights)
    return total_DP


def gram_pays_up_to(D: int, P: int, block: int) -> int:
    """The most tokens of a record whose Gram matrices, in tiles of `block` tokens, are no dearer than its gradient."""
    return max(0, 2 * D * P // (D + P) - block)


def ghost_norm_flops(num_tokens: int, num_records: int, D: int, P: int) -> int:
    """Of records of equal lengths, by the cheaper form, either half of the Gram matrices counted once."""
    length = num_tokens / max(1, num_records)
    return round(num_tokens * min((length + 1) * (D + P), 2 * D * P))


def ghost_norm_bytes(num_tokens: int, num_records: int, D: int, P: int, itemsize: int) -> int:
    """Both factors read once, the norms written."""
    return num_tokens * (D + P) * itemsize + 4 * num_records


def clipped_weight_grad_flops(num_tokens: int, D: int, P: int) -> int:
    """Those of a plain weight gradient."""
    return 2 * num_tokens * D * P


def clipped_weight_grad_bytes(num_tokens: int, D: int, P: int, itemsize: int) -> int:
    """Both factors read once, the sum written."""
    return num_tokens * (D + P) * itemsize + 4 * D * P


def _checked(left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, longest: int | None) -> int:
    """`longest`, or what it is; raises ValueError where arguments do not fit."""
    if left_TD.dim() != 2 or left_TD.dtype not in _DTYPES:
        raise ValueError(f"left_TD is {_described(left_TD)}: give (tokens, features) of {_named(_DTYPES)}")
    if right_TP.dim() != 2 or len(right_TP) != len(left_TD) or right_TP.dtype != left_TD.dtype:
        wanted = f"give ({len(left_TD)}, features) of {_named([left_TD.dtype])}, as left_TD"
        raise ValueError(f"right_TP is {_described(right_TP)}: {wanted}")
    if offsets_B1.dim() != 1 or not len(offsets_B1) or offsets_B1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets_B1 is {_described(offsets_B1)}: give (records + 1,) of int32 or int64")
    devices = {x.device for x in (left_TD, right_TP, offsets_B1)}
    if len(devices) > 1:
        raise ValueError(f"left_TD, right_TP and offsets_B1 are on {_named(devices)}: give them on one device")
    if longest is None:
        return int(offsets_B1.diff().max()) if len(offsets_B1) > 1 else 0
    if longest < 0:
        raise ValueError(f"longest is {longest}: give the most tokens that any record has")
    return longest


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {_named([x.dtype])}"


def _named(things: Iterable[object]) -> str:
    return ", ".join(sorted(str(thing).removeprefix("torch.") for thing in things))


def _segments(left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor) -> Iterator[tuple[Tensor, Tensor, torch.Size]]:
    """Each record's factors, as a batch of one."""
    shape = torch.Size([left_TD.shape[1], right_TP.shape[1]])
    for start, end in pairwise(offsets_B1.tolist()):
        yield left_TD[None, None, start:end], right_TP[None, None, start:end], shape


@torch.library.custom_op("sfumato::ghost_norm", mutates_args=())
def _ghost_norm(left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, ones: bool, longest: int) -> Tensor:
    """Of each record, (4, B): the guarded squared norm, that which came out, its magnitude and its spread."""
    from kernels import ghost_norm_triton as on_gpu

    left_TD, right_TP = _in_rows(left_TD), _in_rows(right_TP)
    (T, D), P, B = left_TD.shape, right_TP.shape[1], len(offsets_B1) - 1
    norms_2T, out_4B = (left_TD.new_empty(size, dtype=torch.float32) for size in ((2, T), (4, B)))
    diagonal_2BI = below_2BI = norms_2T.new_empty(2, B, 0)
    direct_BI = norms_2T.new_empty(B, 0)
    strides = left_TD.stride(0), right_TP.stride(0)
    tile = on_gpu.gram_tile(left_TD.itemsize, longest, aligned=_aligned(left_TD, right_TP))
    tile = tuned("ghost_norm.gram", f"{_named([left_TD.dtype])} {tile.constants['BLOCK']}", tile)
    most = gram_pays_up_to(D, P + ones, block := tile.constants["BLOCK"])

    if longest > most:
        norm_grid = (-(-T // on_gpu.NORM_TILE.constants["BLOCK"]),)
        _launch(
            on_gpu.token_norms, norm_grid, on_gpu.NORM_TILE, left_TD, right_TP, norms_2T, *strides, D, P, T, ONES=ones
        )
        rights = [right_TP] + [left_TD.new_ones(1, 1).expand(T, 1)] * ones
        tiles = [_product_tile(left_TD, right) for right in rights]
        numbers = [_tiles_of(tile, D, right.shape[1]) for tile, right in zip(tiles, rights, strict=True)]
        direct_BI = norms_2T.new_empty(B, sum(numbers))
        for first, number, of_direct, right in zip((0, numbers[0]), numbers, tiles, rights, strict=False):
            _launch(
                on_gpu.direct, (B * number,), of_direct, left_TD, right, offsets_B1, direct_BI[:, first:],
                left_TD.stride(0), right.stride(0), D, right.shape[1], most, number, direct_BI.shape[1],
                **_whole(of_direct, "BLOCK_D", "BLOCK_P", D, right.shape[1]),
            )  # fmt: skip
    equal = B * longest == T
    if longest <= most or not equal:  # after the above: of a short record, the norms are those of its diagonals
        across = -(-min(longest, most) // block)
        diagonal_2BI = norms_2T.new_empty(2, B, across)
        below_2BI = norms_2T.new_empty(2, B, across * (across - 1) // 2)
        for kernel, parts_2BI in ((on_gpu.gram_diagonal, diagonal_2BI), (on_gpu.gram_below, below_2BI)):
            _launch(
                kernel, (parts_2BI[0].numel(),), tile, left_TD, right_TP, offsets_B1, norms_2T, parts_2BI, *strides,
                D, P, T, most, parts_2BI.shape[2], ONES=ones, **_whole(tile, "BLOCK_K", "BLOCK_K", D, P),
            )  # fmt: skip
    _launch(
        on_gpu.finish, (B,), on_gpu.FINISH_TILE, offsets_B1, norms_2T, diagonal_2BI, below_2BI, direct_BI, out_4B,
        D, P + ones, T, most, longest, *(x.shape[-1] for x in (diagonal_2BI, below_2BI, direct_BI)), BLOCK=block,
    )  # fmt: skip
    return out_4B


@_ghost_norm.register_fake
def _(left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, ones: bool, longest: int) -> Tensor:
    return left_TD.new_empty(4, offsets_B1.shape[0] - 1, dtype=torch.float32)


@torch.library.custom_op("sfumato::clipped_weight_grad", mutates_args=())
def _clipped_weight_grad(
    left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, weights_B: Tensor, longest: int
) -> Tensor:
    from kernels import ghost_norm_triton as on_gpu

    left_TD, right_TP, weights_B = _in_rows(left_TD), _in_rows(right_TP), weights_B.contiguous()
    (T, D), P, B = left_TD.shape, right_TP.shape[1], len(weights_B)
    tile = _product_tile(left_TD, right_TP)
    number = _tiles_of(tile, D, P)
    shares = max(1, min(B, on_gpu.PROGRAMS // max(1, number)))  # of the records, where one weight has too few tiles
    sums_SDP = left_TD.new_empty(shares, D, P, dtype=torch.float32)
    _launch(
        on_gpu.weighted, (number, shares), tile, left_TD, right_TP, offsets_B1, weights_B, sums_SDP,
        left_TD.stride(0), right_TP.stride(0), D, P, B, longest, EQUAL=B * longest == T,
        **_whole(tile, "BLOCK_D", "BLOCK_P", D, P),
    )  # fmt: skip
    return sums_SDP[0] if shares == 1 else sums_SDP.sum(0)


@_clipped_weight_grad.register_fake
def _(left_TD: Tensor, right_TP: Tensor, offsets_B1: Tensor, weights_B: Tensor, longest: int) -> Tensor:
    return left_TD.new_empty(left_TD.shape[1], right_TP.shape[1], dtype=torch.float32)


@register_flop_formula(torch.ops.sfumato.ghost_norm)
def _(left: Sequence[int], right: Sequence[int], offsets: Sequence[int], ones: bool, *_: object, **__: object) -> int:
    return ghost_norm_flops(left[0], offsets[0] - 1, left[1], right[1] + ones)


@register_flop_formula(torch.ops.sfumato.clipped_weight_grad)
def _(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    return clipped_weight_grad_flops(left[0], left[1], right[1])


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *args: object, **constants: object) -> None:
    if math.prod(grid):
        warps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        kernel[grid](*args, **constants, **tile.constants, **warps)


def _product_tile(left_TD: Tensor, right_TP: Tensor) -> Tile:
    from kernels import ghost_norm_triton as on_gpu

    widths = left_TD.shape[1], right_TP.shape[1]
    tile = on_gpu.product_tile(left_TD.itemsize, *widths, aligned=_aligned(left_TD, right_TP))
    tile_class = f"{_named([left_TD.dtype])} {tile.constants['BLOCK_D']}x{tile.constants['BLOCK_P']}"
    return tuned("ghost_norm.product", tile_class, tile)


def _tiles_of(tile: Tile, D: int, P: int) -> int:
    return -(-D // tile.constants["BLOCK_D"]) * -(-P // tile.constants["BLOCK_P"])


def _whole(tile: Tile, of_left: str, of_right: str, D: int, P: int) -> dict[str, bool]:
    """Whether blocks divide the widths, so that no load need be masked."""
    return {"WHOLE_D": D % tile.constants[of_left] == 0, "WHOLE_P": P % tile.constants[of_right] == 0}


def _aligned(*factors: Tensor) -> bool:
    return all(x_TD.stride(0) * x_TD.itemsize % 16 == 0 for x_TD in factors)


def _in_rows(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous()  # tokens may lie apart


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself in fp64, otherwise in fp32: norms and sums over records are never taken in fewer bits."""
    return x if x.dtype == torch.float64 else x.float()


def _at_least_fp32_of(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows_summed(left_TD: Tensor, rows_T: Tensor, num_rows: int) -> Tensor:
    """Each row's sum, (num_rows, D), in one order on a GPU too; in fp64, for a row's tokens are added one by one."""
    return torch.ops.aten.embedding_dense_backward(left_TD.double(), rows_T, num_rows, -1, False).to(left_TD.dtype)


def _sums(left_BND: Tensor) -> Tensor:
    """Over tokens, in at least fp32; on a GPU without a copy in fp32."""
    if left_BND.device.type == "cpu" or left_BND.itemsize > 2:
        return at_least_fp32(left_BND).sum(1)
    return left_BND.sum(1, dtype=torch.float32)


def _without_tokens(factor_BGND: Tensor) -> Tensor:
    B, G, _, D = factor_BGND.shape
    return factor_BGND.new_empty(B, G, 0, D)  # a view of none would keep all of them in memory


def _squared_norms_by_gram(left_BND: Tensor, right_BNP: Tensor, *, ones: bool = False) -> Tensor:
    """<left Gram, right Gram> of each record, guarded; both are symmetric, so little more than half is formed.

    With `ones`, every token has one right feature more, of value one.
    """
    num_tokens, widths = left_BND.shape[1], (left_BND.shape[2], right_BNP.shape[2] + ones)
    bands = max(1, min(_GRAM_BANDS, num_tokens // _LEAST_BAND)) if left_BND.device.type == "cpu" else 1
    height = -(-num_tokens // bands)
    totals_2B, spread_B = left_BND.new_zeros(2, len(left_BND)), left_BND.new_zeros(len(left_BND))
    for start in range(0, num_tokens, height):
        left_BNM, right_BNM = (
            torch.bmm(x[:, start:], x[:, start : start + height].mT) for x in (left_BND, right_BNP)
        )  # fmt: skip
        if ones:
            right_BNM += 1.0
        square = left_BNM.shape[2]
        spread_B += _spread(left_BNM[:, :square], right_BNM[:, :square], widths)
        products_BNM = left_BNM.mul_(right_BNM)
        totals_2B += _totals(products_BNM[:, :square]) + 2 * _totals(products_BNM[:, square:])
    return _allow_for_gram(totals_2B, spread_B, num_tokens, widths)


def _squared_norms_of_grams(left_BNN: Tensor, right_BNN: Tensor, widths: tuple[int, int]) -> Tensor:
    """<left, right> of each record's two whole Gram matrices, guarded."""
    spread_B = _spread(left_BNN, right_BNN, widths)
    return _allow_for_gram(_totals(left_BNN * right_BNN), spread_B, left_BNN.shape[1], widths)


def _totals(products_BNM: Tensor) -> Tensor:
    """Their sum and that of their magnitudes, (2, B); what is given is overwritten."""
    return torch.stack([products_BNM.sum((1, 2)), products_BNM.abs_().sum((1, 2))])


def _spread(left_BNN: Tensor, right_BNN: Tensor, widths: tuple[int, int]) -> Tensor:
    """sum_n ||left_n|| ||right_n||, (B,), from two Gram matrices of so many features."""
    info = torch.finfo(left_BNN.dtype)
    left_norms_BN, right_norms_BN = (
        # what underflowed in one Gram matrix may have met a large entry of the other: no norm is below this
        x_BNN.diagonal(dim1=1, dim2=2).sqrt() + math.sqrt(width * info.tiny / info.eps)
        for x_BNN, width in zip((left_BNN, right_BNN), widths, strict=True)
    )
    return (left_norms_BN * right_norms_BN).sum(1)


def _allow_for_gram(totals_2B: Tensor, spread_B: Tensor, num_tokens: int, widths: tuple[int, int]) -> Tensor:
    """Squared norms from the products of two Gram matrices, made as large as rounding may have made them small."""
    (squared_B, magnitude_B), spread_B = totals_2B, spread_B.square()
    eps = torch.finfo(squared_B.dtype).eps
    rounding_B = _GRAM_ROUNDING * spread_B + _FEATURES_ROUNDING * sum(map(math.sqrt, widths)) * magnitude_B
    return torch.maximum(squared_B + eps * rounding_B, _GRAM_FLOOR_PER_TOKEN * eps / num_tokens * spread_B)


def _allow_for_sum(norms_B: Tensor, spread_B: Tensor) -> Tensor:
    """Norms of sums over tokens, made as large as rounding may have made them small."""
    eps = torch.finfo(norms_B.dtype).eps
    return torch.maximum(norms_B + _SUM_ROUNDING * eps * spread_B, _SUM_FLOOR * eps * spread_B)


def _norms(x: Tensor) -> Tensor:
    """Norms over the last dimension, made as large as rounding may have made them small."""
    rounding = _SQUARES_ROUNDING * math.sqrt(x.shape[-1]) * torch.finfo(x.dtype).eps
    return torch.linalg.vector_norm(x, dim=-1) * (1 + rounding)


def _along(values_B: Tensor, x_B: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (x_B.dim() - 1))
