"""adaLN-Zero's step between two layers, in one pass: add the gated branch, normalise, shift and scale by the record.

Source: Peebles & Xie 2022 (arXiv:2212.09748), Fig. 3; layer normalisation, Ba et al. 2016 (arXiv:1607.06450, Eq. 4).
"""

# B records, N tokens, D model width, C chunks of tokens, S sums (gradients of shift, scale and gate)
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import use_triton
from kernels.tiles import Tile, tuned

NARROWEST, WIDEST = 2, 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def adaln(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor,
    branch_BND: Tensor | None = None, gate_BD: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual x + gate * branch (x itself without a branch), and LayerNorm(residual) * (1 + scale) + shift.

    Guarantees: what a record gets depends on that record alone, to the bit, and repeats to the bit. The kernel computes
    in fp32 (fp64 where an input is), keeps for the backward the residual, the branch and 8 bytes a token, and sums the
    gradients of shift, scale and gate over the record's tokens in a fixed order. Without it: the plain arithmetic.

    The residual has the dtype that plain arithmetic gives it; `modulated` too or, where the kernel runs under autocast,
    that of autocast, which the matrix product it goes to would make of it. Any strides will do; rows whose last
    dimension is not contiguous are copied. Differentiable once. Raises ValueError for shapes that do not fit and, of
    the kernel, for dtypes, devices and widths that it does not take.
    """
    _check_shapes(x_BND, shift_BD, scale_BD, branch_BND, gate_BD)
    if not use_triton(x_BND):
        return reference.adaln(x_BND, shift_BD, scale_BD, branch_BND, gate_BD, eps)
    _check_supported(x_BND, shift_BD=shift_BD, scale_BD=scale_BD, branch_BND=branch_BND, gate_BD=gate_BD)
    dtype = _promoted(x_BND, branch_BND, gate_BD, shift_BD, scale_BD)
    if torch.is_autocast_enabled(x_BND.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_BND.device.type)
    residual_BND, modulated_BND, _, _ = _adaln(x_BND, shift_BD, scale_BD, branch_BND, gate_BD, eps, dtype)
    return x_BND if branch_BND is None else residual_BND, modulated_BND


def adaln_bytes(
    num_records: int, num_tokens: int, width: int, itemsize: int, *, branch: bool = True, backward: bool = False
) -> int:
    """What `adaln` must move, each tensor once; its backward with a gradient of the residual where there is a branch.

    (B, N, D): x, branch, residual, modulated, and in the backward the gradients of all four, residual and branch.
    """
    if backward:
        tensors, vectors = (6, 2 * itemsize + 3 * 4) if branch else (3, itemsize + 2 * 4)
    else:
        tensors, vectors = (4, 3 * itemsize) if branch else (2, 2 * itemsize)
    statistics = 2 * 4
    return num_records * (num_tokens * (tensors * width * itemsize + statistics) + width * vectors)


@torch.library.custom_op("sfumato::adaln", mutates_args=())
def _adaln(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns residual (empty without a branch: an op may not return its input), modulated, mean and 1 / deviation."""
    from kernels import adaln_triton

    found = _outputs(x_BND, shift_BD, scale_BD, branch_BND, gate_BD, eps, dtype)
    residual_BND, modulated_BND, mean_BN, rstd_BN = found
    num_records, num_tokens, width = x_BND.shape
    tile = tuned("adaln.forward", _shape_class(width, x_BND), adaln_triton.forward_tile(width))
    x_BND, shift_BD, scale_BD = _rows(x_BND), _rows(shift_BD), _rows(scale_BD)
    branch, gate = (x_BND, scale_BD) if branch_BND is None or gate_BD is None else (_rows(branch_BND), _rows(gate_BD))
    _launch(
        adaln_triton.forward, num_records * -(-num_tokens // tile.constants["TOKENS"]), tile,
        x_BND, branch, shift_BD, scale_BD, gate, residual_BND, modulated_BND, mean_BN, rstd_BN, num_tokens,
        *x_BND.stride()[:2], *branch.stride()[:2], shift_BD.stride(0), scale_BD.stride(0), gate.stride(0),
        **adaln_triton.split(width, tile.num_warps), GATED=branch_BND is not None, EPS=eps,
    )  # fmt: skip
    return found


@torch.library.custom_op("sfumato::adaln_backward", mutates_args=())
def _adaln_backward(
    grad_residual_BND: Tensor | None, grad_modulated_BND: Tensor, residual_BND: Tensor, mean_BN: Tensor,
    rstd_BN: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None, x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the branch (empty without one), and of shift, scale and gate together as (B, S, D)."""
    from kernels import adaln_triton, norms_triton

    found = _gradients(
        grad_residual_BND, grad_modulated_BND, residual_BND, mean_BN, rstd_BN, scale_BD, branch_BND, gate_BD, x_dtype
    )
    grad_x_BND, grad_branch_BND, sums_BSD = found
    num_records, num_tokens, width = residual_BND.shape
    default = adaln_triton.backward_tile(width, residual_BND.element_size())
    tile = tuned("adaln.backward", _shape_class(width, residual_BND), default)
    num_chunks, num_sums = -(-num_tokens // tile.constants["TOKENS"]), sums_BSD.shape[1] * width
    chunks_BCSD = sums_BSD if num_chunks <= 1 else sums_BSD.new_empty(num_records, num_chunks, num_sums)
    if num_chunks == 0:
        sums_BSD.zero_()
    grad, residual, scale = _rows(grad_modulated_BND), _rows(residual_BND), _rows(scale_BD)
    beside = grad if grad_residual_BND is None else _rows(grad_residual_BND)
    branch, gate = (residual, scale) if branch_BND is None or gate_BD is None else (_rows(branch_BND), _rows(gate_BD))
    _launch(
        adaln_triton.backward, num_records * num_chunks, tile,
        beside, grad, residual, mean_BN, rstd_BN, scale, branch, gate, grad_x_BND, grad_branch_BND, chunks_BCSD,
        num_tokens, *beside.stride()[:2], *grad.stride()[:2], *residual.stride()[:2], *branch.stride()[:2],
        scale.stride(0), gate.stride(0), **adaln_triton.split(width, tile.num_warps),
        GATED=branch_BND is not None, RESIDUAL=grad_residual_BND is not None, STAGES=tile.num_stages,
    )  # fmt: skip
    if num_chunks > 1:
        tile = norms_triton.SUM_TILE
        num_programs = num_records * -(-num_sums // tile.constants["COLUMNS"])
        _launch(norms_triton.sum_chunks, num_programs, tile, chunks_BCSD, sums_BSD, num_chunks, num_sums)
    return found


@_adaln.register_fake
def _outputs(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = x_BND.shape if branch_BND is not None else (0,)
    residual_BND = x_BND.new_empty(shape, dtype=_promoted(x_BND, branch_BND, gate_BD))
    precise = torch.promote_types(torch.float32, _promoted(x_BND, shift_BD, scale_BD, branch_BND, gate_BD))
    mean_BN, rstd_BN = (x_BND.new_empty(x_BND.shape[:2], dtype=precise) for _ in range(2))
    return residual_BND, x_BND.new_empty(x_BND.shape, dtype=dtype), mean_BN, rstd_BN


@_adaln_backward.register_fake
def _gradients(
    grad_residual_BND: Tensor | None, grad_modulated_BND: Tensor, residual_BND: Tensor, mean_BN: Tensor,
    rstd_BN: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None, x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_records, _, width = residual_BND.shape
    grad_x_BND = residual_BND.new_empty(residual_BND.shape, dtype=x_dtype)
    if branch_BND is None:
        return grad_x_BND, residual_BND.new_empty(0), mean_BN.new_empty(num_records, 2, width)
    grad_branch_BND = branch_BND.new_empty(branch_BND.shape)
    return grad_x_BND, grad_branch_BND, mean_BN.new_empty(num_records, 3, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BND, shift_BD, scale_BD, branch_BND, gate_BD, _, dtype = inputs
    residual_BND, _, mean_BN, rstd_BN = output
    ctx.set_materialize_grads(False)
    ctx.x_dtype, ctx.shift_dtype, ctx.modulated_dtype = x_BND.dtype, shift_BD.dtype, dtype
    residual_BND = x_BND if branch_BND is None else residual_BND
    ctx.save_for_backward(residual_BND, mean_BN, rstd_BN, scale_BD, branch_BND, gate_BD)


def _backward(
    ctx: Any, grad_residual_BND: Tensor | None, grad_modulated_BND: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    residual_BND, mean_BN, rstd_BN, scale_BD, branch_BND, gate_BD = ctx.saved_tensors
    if branch_BND is None:
        grad_residual_BND = None  # of what is empty
    if grad_residual_BND is None and grad_modulated_BND is None:  # whoever clips cuts a backward off so
        return (None,) * 7
    if grad_modulated_BND is None:
        grad_modulated_BND = torch.zeros_like(residual_BND, dtype=ctx.modulated_dtype)
    grad_x_BND, grad_branch_BND, sums_BSD = _adaln_backward(
        grad_residual_BND, grad_modulated_BND, residual_BND, mean_BN, rstd_BN, scale_BD, branch_BND, gate_BD,
        ctx.x_dtype,
    )  # fmt: skip
    shift, scale = sums_BSD[:, 0].to(ctx.shift_dtype), sums_BSD[:, 1].to(scale_BD.dtype)
    if branch_BND is None:
        return grad_x_BND, shift, scale, None, None, None, None
    return grad_x_BND, shift, scale, grad_branch_BND, sums_BSD[:, 2].to(gate_BD.dtype), None, None


_adaln.register_autograd(_backward, setup_context=_setup_context)


def _launch(kernel: Any, num_programs: int, tile: Tile, *arguments: Any, **constants: Any) -> None:
    if num_programs:  # a batch may be empty
        kernel[(num_programs,)](
            *arguments, **constants, **tile.constants, num_warps=tile.num_warps, num_stages=tile.num_stages
        )


def _rows(tensor: Tensor) -> Tensor:
    """The kernels read along the last dimension, and take any strides of the others."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


def _shape_class(width: int, tensor: Tensor) -> str:
    return f"D={width} {str(tensor.dtype).removeprefix('torch.')}"


def _check_shapes(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BND: Tensor | None, gate_BD: Tensor | None
) -> None:
    if x_BND.dim() != 3:
        raise ValueError(f"x_BND has shape {tuple(x_BND.shape)}: give (records, tokens, width)")
    if (branch_BND is None) != (gate_BD is None):
        missing, given = ("gate_BD", "branch_BND") if gate_BD is None else ("branch_BND", "gate_BD")
        raise ValueError(f"{missing} is None, but {given} is not: give both or neither")
    num_records, _, width = x_BND.shape
    vectors = {"shift_BD": shift_BD, "scale_BD": scale_BD, "gate_BD": gate_BD}
    for name, tensor in vectors.items():
        if tensor is not None and tensor.shape != (num_records, width):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: x_BND takes {(num_records, width)}")
    if branch_BND is not None and branch_BND.shape != x_BND.shape:
        raise ValueError(f"branch_BND has shape {tuple(branch_BND.shape)}, but x_BND has {tuple(x_BND.shape)}")


def _check_supported(x_BND: Tensor, **others: Tensor | None) -> None:
    if not NARROWEST <= x_BND.shape[2] <= WIDEST:
        raise ValueError(f"x_BND has width {x_BND.shape[2]}: the kernel takes {NARROWEST} to {WIDEST}")
    for name, tensor in {"x_BND": x_BND, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: the kernel takes {', '.join(map(str, DTYPES))}")
        if tensor.device != x_BND.device:
            raise ValueError(f"{name} is on {tensor.device}, but x_BND is on {x_BND.device}: give both on one device")
