"""Layer operations that can tell each record's share of a gradient.

A layer given a `norm_row` takes part in differentially private training. Its backward does one of two things:

- in a `norm_pass` it hands gradients on to its input and reports, as the gradient of `norm_row`, each record's squared
  gradient norm over the layer's own parameters; it forms no weight gradient;
- in a `clipped_pass` it forms the weight gradients of the *weighted* sum of records, and reports nothing.

Outside both it refuses to run backward, so that no unclipped gradient can come out of a private model by accident.
Without a `norm_row` the operations are the plain ones of torch.

Source: norms by Gram matrices, Goodfellow 2015 (arXiv:1510.01799) and Li et al. 2022 (arXiv:2110.05679, Eq. 3); the
second pass with weights per record, Lee and Kifer 2021 (arXiv:2009.03106).
"""

# B records, K rows a record (noise multiplicity), N tokens, P input features, D output features
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerRecordModule(nn.Module):
    """A layer that reports per-record norms of all its own parameters through `norm_row`.

    `norm_row` has B + 1 entries: B squared norms and a counter of the reports made. It is set before a private forward
    and is None otherwise.
    """

    norm_row: Tensor | None = None


class _NormPass:
    pass


class _ClippedPass:
    def __init__(self, weights_B: Tensor) -> None:
        self.weights_B = weights_B
        # A record of weight zero must leave no trace even where its activations are inf or NaN (0 * inf is NaN).
        self.excluded_B = weights_B == 0
        self.any_excluded = bool(self.excluded_B.any())


# Process-wide, not thread-local: autograd runs CUDA backwards on threads of its own.
_active: _NormPass | _ClippedPass | None = None


@contextmanager
def _activate(new: _NormPass | _ClippedPass) -> Iterator[None]:
    global _active  # noqa: PLW0603
    if _active is not None:
        raise RuntimeError("a per-record pass is already active: passes do not nest")
    _active = new
    try:
        yield
    finally:
        _active = None


def norm_pass():
    """Context in which backward reports squared per-record norms into each layer's `norm_row`."""
    return _activate(_NormPass())


def clipped_pass(weights_B: Tensor):
    """Context in which backward forms weight gradients of sum_b weights_B[b] * loss_b.

    The seed of the backward is the *unweighted* sum of losses; the weights enter where weight gradients are formed, in
    fp32. Guarantee: a record of weight exactly zero contributes exactly zero, whatever its activations.
    """
    return _activate(_ClippedPass(weights_B))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm_row: Tensor | None) -> Tensor:
    """`F.linear` for x of shape (B*K, ..., P); rows of one record stand together. Returns (B*K, ..., D)."""
    if norm_row is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, norm_row)  # type: ignore[return-value]


def embedding(indices: Tensor, weight: Tensor, norm_row: Tensor | None) -> Tensor:
    """`F.embedding` for integer indices of shape (B*K, ...). Returns (B*K, ..., D)."""
    if norm_row is None:
        return F.embedding(indices, weight)
    return _Embedding.apply(indices, weight, norm_row)  # type: ignore[return-value]


def linear_squared_norms(x_BNP: Tensor, g_BND: Tensor) -> Tensor:
    """||sum_n g_n x_n^T||_F^2 of each record, shape (B,), by the cheaper of two exact forms; at least fp32."""
    x_BNP, g_BND = _at_least_fp32(x_BNP), _at_least_fp32(g_BND)
    N, P, D = x_BNP.shape[1], x_BNP.shape[2], g_BND.shape[2]
    if N == 1:
        return x_BNP.square().sum((1, 2)) * g_BND.square().sum((1, 2))
    if N * (P + D) < 2 * P * D:  # two N x N Gram matrices cost less than one P x D gradient
        return (torch.bmm(x_BNP, x_BNP.mT) * torch.bmm(g_BND, g_BND.mT)).sum((1, 2))
    return torch.bmm(g_BND.mT, x_BNP).square().sum((1, 2))


def embedding_squared_norms(indices_BN: Tensor, g_BND: Tensor) -> Tensor:
    """Squared norm of each record's embedding gradient, shape (B,): tokens of one index add up before squaring."""
    g_BND = _at_least_fp32(g_BND)
    same_BNN = indices_BN[:, :, None] == indices_BN[:, None, :]
    return (torch.bmm(g_BND, g_BND.mT) * same_BNN).sum((1, 2))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _report(norm_row: Tensor, squared_B: Tensor) -> Tensor:
    return torch.cat([squared_B, squared_B.new_ones(1)]).to(norm_row.dtype)


def _by_record(x: Tensor, num_records: int) -> Tensor:
    return x.reshape(num_records, -1, x.shape[-1])


def _require_pass() -> _NormPass | _ClippedPass:
    if _active is None:
        raise RuntimeError("backward of a private layer outside its two passes: the gradient would be unclipped")
    return _active


def _included(active: _ClippedPass, x_BND: Tensor) -> Tensor:
    """In fp32, with the rows of excluded records at zero."""
    x_BND = _at_least_fp32(x_BND)
    return x_BND.masked_fill(active.excluded_B[:, None, None], 0.0) if active.any_excluded else x_BND


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, norm_row: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(y.dtype), weight, norm_row)
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        active = _require_pass()
        x, weight, norm_row = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        num_records = norm_row.shape[0] - 1
        grad_x = (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype) if needs_x else None
        x_BNP, g_BND = _by_record(x, num_records), _by_record(grad_y, num_records)
        if isinstance(active, _NormPass):
            squared_B = norm_row.new_zeros(num_records)
            if needs_weight:
                squared_B = squared_B + linear_squared_norms(x_BNP, g_BND)
            if needs_bias:
                squared_B = squared_B + _at_least_fp32(g_BND).sum(1).square().sum(1)
            return grad_x, None, None, _report(norm_row, squared_B)
        x_BNP, g_BND = _included(active, x_BNP), _included(active, g_BND)
        grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = (active.weights_B.to(g_BND.dtype) @ g_BND.sum(1)).to(weight.dtype)
        if needs_weight:
            weights_B11 = active.weights_B[:, None, None]
            if x_BNP.shape[2] < g_BND.shape[2]:  # weigh the smaller factor
                x_BNP = x_BNP * weights_B11
            else:
                g_BND = g_BND * weights_B11
            grad_weight = (g_BND.flatten(0, 1).mT @ x_BNP.flatten(0, 1)).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, norm_row: Tensor) -> Tensor:
        ctx.save_for_backward(indices, norm_row)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        active = _require_pass()
        indices, norm_row = ctx.saved_tensors
        num_records = norm_row.shape[0] - 1
        g_BND = _by_record(grad_y, num_records)
        if isinstance(active, _NormPass):
            return None, None, _report(norm_row, embedding_squared_norms(indices.reshape(num_records, -1), g_BND))
        g_BND = _included(active, g_BND) * active.weights_B[:, None, None]
        grad_weight = g_BND.new_zeros(ctx.weight_shape)
        grad_weight.index_add_(0, indices.reshape(-1), g_BND.flatten(0, 1))
        return None, grad_weight.to(ctx.weight_dtype), None
