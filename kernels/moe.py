"""Mixture of experts: dropless token-choice routing, and the experts' two-layer networks on what was routed.

    routing = route(router(x_TP), top_k=2)
    out_TD = experts_mlp(x_TP, up_EFP, down_EDH, routing)

Every token goes to the `top_k` experts of its choice, however many tokens choose the same: no capacity, no drops. A
stable sort of all choices by expert gives each expert a range of rows, and what follows are products of these ranges
with the experts' matrices (as in MegaBlocks, Gale et al. 2022, arXiv:2211.15841, without padding). The first product
gathers the tokens and ends with the activation, the second scatters. A choice's weight multiplies the hidden features
between them: the second product is linear, so this is the same as to weight its output, and then each product's
backward is the other one, transposed, and nothing is kept for it but x and the hidden features before the activation.

Guarantees of the kernels: no atomics and no wait for the device; a token's output and the gradients of x and of its
weights are functions of that token, its routing and the parameters, bit for bit, whatever else is in the batch and
wherever the token stands; a token's choices are added up in their order, and an expert's tokens in theirs into the
gradient of its matrices. The plain form keeps the order too, but torch's products may round a row differently among
others.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

# T tokens, A choices of a token (top-k), S = T * A rows sorted by expert, E experts, P input and D output features,
# H hidden features, F features of the first product: H, or 2H where a gate comes before them
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import use_triton
from kernels.tiles import tuned

Activation = Literal["swiglu", "gelu"]  # silu(gate) * value, of 2H features; or the tanh form of GELU, of H

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to, and with what weights; `Routing.of` makes one from any choice of experts."""

    experts_TA: Tensor  # int64
    weights_TA: Tensor  # differentiable
    order_S: Tensor  # int64: the row sorted s-th is choice `order[s] % A` of token `order[s] // A`
    offsets_E1: Tensor  # int32: expert e has the rows offsets[e] to offsets[e + 1]

    @classmethod
    def of(cls, experts_TA: Tensor, weights_TA: Tensor, num_experts: int) -> Routing:
        """Sort choices that were made elsewhere: by modality, or on another rank. They must lie in 0..E-1.

        Raises ValueError on shapes or dtypes that do not fit; the values of `experts_TA` are not looked at, which
        would make the host wait for the device.
        """
        if experts_TA.ndim != 2 or experts_TA.dtype != torch.int64:
            raise ValueError(f"experts_TA is {_said(experts_TA)}: give int64 of shape (tokens, choices)")
        if weights_TA.shape != experts_TA.shape or not weights_TA.is_floating_point():
            raise ValueError(f"weights_TA is {_said(weights_TA)}: give floats of shape {tuple(experts_TA.shape)}")
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}: give 1 or more")
        if experts_TA.numel() >= 2**31:
            raise ValueError(f"experts_TA has {experts_TA.numel()} choices: fewer than 2^31 are supported")
        sorted_S, order_S = experts_TA.flatten().sort(stable=True)
        edges_E1 = torch.arange(num_experts + 1, device=experts_TA.device)
        return cls(experts_TA, weights_TA, order_S, torch.searchsorted(sorted_S, edges_E1, out_int32=True))

    @property
    def top_k(self) -> int:
        """Choices of a token."""
        return self.experts_TA.shape[1]

    @property
    def num_experts(self) -> int:
        """Experts, chosen or not."""
        return len(self.offsets_E1) - 1


def route(logits_TE: Tensor, top_k: int, *, normalise: bool = True) -> Routing:
    """Each token to the `top_k` experts of the highest logit, the lower expert first among equals.

    Weights are the experts' softmax probabilities, in fp32 at least; with `normalise` those of the chosen ones sum to
    one. Raises ValueError on shapes that do not fit, and where `top_k` is not in 1..E.
    """
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE is {_said(logits_TE)}: give floats of shape (tokens, experts)")
    num_experts = logits_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: give 1 to {num_experts}, the number of experts")
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    experts_TA = _highest(logits_TE.detach(), top_k)
    # normalised by the chosen logits alone: the same as by the sum, and not 0 / 0 where all chosen are improbable
    chosen_TA = logits_TE.gather(1, experts_TA)
    weights_TA = chosen_TA.softmax(1) if normalise else (chosen_TA - logits_TE.logsumexp(1, keepdim=True)).exp()
    return Routing.of(experts_TA, weights_TA, num_experts)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Each token's squared log-sum-exp, (T,), whose mean is the router z-loss: it keeps logits small.

    A token's own, it couples no records. Source: Zoph et al. 2022, ST-MoE (arXiv:2202.08906), Eq. 5.
    """
    return logits_TE.float().logsumexp(1).square()


def load_variation(load_E: Tensor) -> Tensor:
    """Coefficient of variation of the load: standard deviation over mean, 0 where balanced."""
    return load_E.std(correction=0) / load_E.mean().clamp_min(torch.finfo(load_E.dtype).tiny)


def experts_mlp(
    x_TP: Tensor, up_EFP: Tensor, down_EDH: Tensor, routing: Routing, activation: Activation = "swiglu"
) -> Tensor:
    """out[t] = sum over the choices a of token t of weight[t, a] * down[e] activation(up[e] x[t]), e = experts[t, a].

    Of "swiglu", the first H of F = 2H features are the gate. Differentiable by x, up, down and the routing's weights.
    The products are in the dtype of the arguments, or autocast's, which is the output's; sums and weights are in fp32.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(x_TP, up_EFP, down_EDH, routing, activation)
    if not use_triton(x_TP):
        return _plain_mlp(x_TP, up_EFP, down_EDH, routing, activation)
    dtype = x_TP.dtype
    if torch.is_autocast_enabled(x_TP.device.type):
        dtype = torch.get_autocast_dtype(x_TP.device.type)
    if dtype not in _DTYPES:
        raise ValueError(f"x_TP is {_said(x_TP)}: the kernels take fp16, bf16 or fp32")
    weights_TA = routing.weights_TA.float()
    experts = (up_EFP.to(dtype), down_EDH.to(dtype), routing.order_S, routing.offsets_E1)
    return torch.ops.sfumato.experts_mlp(x_TP.to(dtype), weights_TA, *experts, activation)[0]


def experts_mlp_flops(num_rows: int, up_EFP: torch.Size, down_EDH: torch.Size) -> int:
    """Of the forward on S = T * A rows, a multiply-add as two; the backward takes twice as many."""
    return 2 * num_rows * (up_EFP[1] * up_EFP[2] + down_EDH[1] * down_EDH[2])


def experts_mlp_bytes(num_tokens: int, top_k: int, up_EFP: torch.Size, down_EDH: torch.Size, itemsize: int) -> int:
    """That the forward moves at least, all experts in use: parameters, x and out once, and twice what is between."""
    (_, F_, P), (_, D, H) = up_EFP, down_EDH
    rows = num_tokens * top_k
    return itemsize * (up_EFP.numel() + down_EDH.numel() + num_tokens * (P + D) + 2 * rows * (F_ + H + D))


@torch.library.custom_op("sfumato::experts_mlp", mutates_args=())
def _mlp(
    x_TP: Tensor, weights_TA: Tensor, up_EFP: Tensor, down_EDH: Tensor, order_S: Tensor, offsets_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the first product for the backward."""
    top_k = weights_TA.shape[1]
    z_SF, h_SH = x_TP.new_empty(len(order_S), up_EFP.shape[1]), x_TP.new_empty(len(order_S), down_EDH.shape[2])
    _product(x_TP, up_EFP, order_S, offsets_E1, top_k, z_SF, gather=True, hidden=(activation, weights_TA, h_SH))
    return _sum_of_choices(h_SH, down_EDH, order_S, offsets_E1, top_k), z_SF


@_mlp.register_fake
def _(x_TP, weights_TA, up_EFP, down_EDH, order_S, offsets_E1, activation):
    rows, out_width = order_S.shape[0], down_EDH.shape[1]
    return x_TP.new_empty(x_TP.shape[0], out_width), x_TP.new_empty(rows, up_EFP.shape[1])


@torch.library.custom_op("sfumato::experts_gathered", mutates_args=())
def _gathered(x_TP: Tensor, weight_EDP: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int) -> Tensor:
    """(S, D): the token of each sorted row times its expert's matrix. The transpose of `experts_summed`."""
    y_SD = x_TP.new_empty(len(order_S), weight_EDP.shape[1])
    _product(x_TP, weight_EDP, order_S, offsets_E1, top_k, y_SD, gather=True)
    return y_SD


@_gathered.register_fake
def _(x_TP, weight_EDP, order_S, offsets_E1, top_k):
    return x_TP.new_empty(order_S.shape[0], weight_EDP.shape[1])


@torch.library.custom_op("sfumato::experts_summed", mutates_args=())
def _summed(x_SP: Tensor, weight_EDP: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int) -> Tensor:
    """(T, D): each sorted row times its expert's matrix, summed over its token's choices in their order."""
    return _sum_of_choices(x_SP, weight_EDP, order_S, offsets_E1, top_k)


@_summed.register_fake
def _(x_SP, weight_EDP, order_S, offsets_E1, top_k):
    return x_SP.new_empty(order_S.shape[0] // top_k, weight_EDP.shape[1])


@torch.library.custom_op("sfumato::experts_weight_grad", mutates_args=())
def _weight_grad(
    left: Tensor, right: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int, gather_left: bool
) -> Tensor:
    """(E, D, P): each expert's sum of left (x) right; one of them has S sorted rows, the other one for each token."""
    from kernels import moe_triton

    (left, right), num_experts = (_rows_together(y) for y in (left, right)), len(offsets_E1) - 1
    (D, P), dtype = (left.shape[1], right.shape[1]), _DTYPES[left.dtype]
    grad_EDP = left.new_empty(num_experts, D, P)
    default = moe_triton.weight_grad_tile(_capability(left), dtype)
    tile = tuned("moe.weight_grad", f"E={num_experts} D={D} P={P} {dtype}", default)
    grid = (num_experts * -(-D // tile.constants["BLOCK_D"]) * -(-P // tile.constants["BLOCK_P"]),)
    if grad_EDP.numel():
        moe_triton.weight_grad_kernel[grid](
            left, right, grad_EDP, order_S, offsets_E1, top_k, D, P, left.stride(0), right.stride(0),
            gather_left, **tile.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return grad_EDP


@_weight_grad.register_fake
def _(left, right, order_S, offsets_E1, top_k, gather_left):
    return left.new_empty(offsets_E1.shape[0] - 1, left.shape[1], right.shape[1])


@torch.library.custom_op("sfumato::experts_activation_backward", mutates_args=())
def _activation_backward(
    grad_h_SH: Tensor, z_SF: Tensor, weights_TA: Tensor, order_S: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z and of the weights, and the weighted hidden features once more."""
    from kernels import moe_triton

    grad_z_SF, h_SH = torch.empty_like(z_SF), torch.empty_like(grad_h_SH)
    grad_weights_TA = torch.empty_like(weights_TA, memory_format=torch.contiguous_format)
    if z_SF.numel():
        rows, H = h_SH.shape
        block = moe_triton.row_block(H)
        moe_triton.activation_backward_kernel[(-(-rows // block["ROWS"]),)](
            grad_h_SH, z_SF, weights_TA.contiguous(), order_S, grad_z_SF, h_SH, grad_weights_TA, rows, H,
            moe_triton.ACTIVATIONS[activation], **block,
        )  # fmt: skip
    return grad_z_SF, h_SH, grad_weights_TA


@_activation_backward.register_fake
def _(grad_h_SH, z_SF, weights_TA, order_S, activation):
    weights = torch.empty_like(weights_TA, memory_format=torch.contiguous_format)
    return torch.empty_like(z_SF), torch.empty_like(grad_h_SH), weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of z there is none, and zeros would take its memory
    ctx.save_for_backward(*tensors, output[1])


def _mlp_backward(ctx: Any, grad_out_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out_TD is None:
        return (None,) * 7
    x_TP, weights_TA, up_EFP, down_EDH, order_S, offsets_E1, z_SF = ctx.saved_tensors
    rows = (order_S, offsets_E1, weights_TA.shape[1])
    of_x, of_weights, of_up, of_down = ctx.needs_input_grad[:4]
    grad_h_SH = _gathered(grad_out_TD, down_EDH.mT, *rows)
    grad_z_SF, h_SH, grad_weights_TA = _activation_backward(grad_h_SH, z_SF, weights_TA, order_S, ctx.activation)
    return (
        _summed(grad_z_SF, up_EFP.mT, *rows) if of_x else None,
        grad_weights_TA if of_weights else None,
        _weight_grad(grad_z_SF, x_TP, *rows, gather_left=False) if of_up else None,
        _weight_grad(grad_out_TD, h_SH, *rows, gather_left=True) if of_down else None,
        None, None, None,
    )  # fmt: skip


_mlp.register_autograd(_mlp_backward, setup_context=_keep)


@register_flop_formula(torch.ops.sfumato.experts_mlp)
def _mlp_flops(x_TP, weights_TA, up_EFP, down_EDH, order_S, *_, **__) -> int:
    return experts_mlp_flops(order_S[0], up_EFP, down_EDH)


@register_flop_formula([torch.ops.sfumato.experts_gathered, torch.ops.sfumato.experts_summed])
def _product_flops(x, weight_EDP, order_S, *_, **__) -> int:
    return 2 * order_S[0] * weight_EDP[1] * weight_EDP[2]


@register_flop_formula(torch.ops.sfumato.experts_weight_grad)
def _weight_grad_flops(left, right, order_S, *_, **__) -> int:
    return 2 * order_S[0] * left[1] * right[1]


def _product(
    x: Tensor, weight_EDP: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int, y: Tensor, *, gather: bool,
    hidden: tuple[str, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Launch `product_kernel`: x by token and y sorted, or x sorted and y by token and choice.

    `hidden` is an activation, the choices' weights, and where to put the activation's output times these.
    """
    from kernels import moe_triton

    if not y.numel():
        return
    x = _rows_together(x)
    if 1 not in weight_EDP.stride()[1:]:  # otherwise as it is or transposed: both feed the tensor cores
        weight_EDP = weight_EDP.contiguous()
    (num_experts, D, P), transposed = weight_EDP.shape, weight_EDP.stride(2) != 1
    activation, weights_TA, h_SH = hidden or ("none", y, y)
    dtype = _DTYPES[x.dtype]
    op = "moe.summed" if not gather else "moe.gathered" if hidden is None else f"moe.{activation}"
    default = moe_triton.product_tile(_capability(x), dtype)
    tile = tuned(op, f"E={num_experts} D={D} P={P} {dtype}", default)
    described, constants = None, dict(tile.constants)
    if constants["DESCRIPTOR"] and activation != "swiglu":  # whose gates and values no block holds together
        described = _described(weight_EDP, transposed, constants["BLOCK_D"], constants["BLOCK_P"])
    constants["DESCRIPTOR"] = int(described is not None)  # without: the same sums in the same order
    weight = weight_EDP if described is None else described
    num_tiles = len(y) // constants["BLOCK_S"] + num_experts
    moe_triton.product_kernel[(num_tiles * -(-D // constants["BLOCK_D"]),)](
        x, weight, y, h_SH, weights_TA.contiguous(), order_S, offsets_E1, num_tiles, num_experts, top_k, D, P,
        x.stride(0), *weight_EDP.stride(), moe_triton.ACTIVATIONS[activation], gather, P % constants["BLOCK_P"] == 0,
        transposed, moe_triton.expert_block(num_experts), **constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _described(weight_EDP: Tensor, transposed: bool, block_d: int, block_p: int) -> Any:
    """A TensorDescriptor of the experts' matrices below each other; None where the hardware cannot fetch them so."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    stored, block = (weight_EDP.mT, [block_p, block_d]) if transposed else (weight_EDP, [block_d, block_p])
    aligned = stored.data_ptr() % 16 == 0 and stored.shape[2] * stored.element_size() % 16 == 0
    if not (aligned and stored.is_contiguous()) or weight_EDP.shape[2] % block_p:
        return None
    return TensorDescriptor.from_tensor(stored.flatten(0, 1), block)


def _sum_of_choices(
    x_SP: Tensor, weight_EDP: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """(T, D): the product by token and choice in memory, then its sum over the choices."""
    from kernels import moe_triton

    y_SD = x_SP.new_empty(len(order_S), weight_EDP.shape[1])
    _product(x_SP, weight_EDP, order_S, offsets_E1, top_k, y_SD, gather=False)
    if top_k == 1:
        return y_SD
    out_TD = y_SD.new_empty(len(y_SD) // top_k, y_SD.shape[1])
    if out_TD.numel():
        tokens, D = out_TD.shape
        block = moe_triton.row_block(D)
        grid = -(-tokens // block["ROWS"]), -(-D // block["BLOCK"])
        moe_triton.sum_kernel[grid](y_SD, out_TD, tokens, D, top_k, **block)
    return out_TD


def _plain_mlp(x_TP: Tensor, up_EFP: Tensor, down_EDH: Tensor, routing: Routing, activation: Activation) -> Tensor:
    """The same, expert by expert in torch's operations."""
    token_S = routing.order_S // routing.top_k
    counts = routing.offsets_E1.diff().tolist()
    x_SP = x_TP.index_select(0, token_S)
    # unbind: its backward is one stack, where an index for each expert would add up E tensors of all experts' size
    y_SD = torch.cat([
        F.linear(_activate(F.linear(rows_P, up_FP), activation), down_DH)
        for rows_P, up_FP, down_DH in zip(x_SP.split(counts), up_EFP.unbind(), down_EDH.unbind(), strict=True)
        if len(rows_P) or not len(x_SP)
    ])  # fmt: skip
    weighted_SD = y_SD * routing.weights_TA.flatten().index_select(0, routing.order_S)[:, None]
    out_TD = weighted_SD.new_zeros(len(x_TP), down_EDH.shape[1]).index_add(0, token_S, weighted_SD)
    return out_TD.to(y_SD.dtype)


def _activate(z_SF: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return F.gelu(z_SF, approximate="tanh")
    gate_SH, value_SH = z_SF.chunk(2, dim=1)
    return F.silu(gate_SH) * value_SH


def _highest(scores_TE: Tensor, top_k: int) -> Tensor:
    """Where each row's `top_k` highest are, the first among equals first: `topk` does not promise it of equals."""
    num_scores = scores_TE.shape[1]
    bits_TE = (scores_TE.float() + 0.0).view(torch.int32)  # + 0.0: negative zero equals zero
    ascending_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)  # as integers, floats ascend but negative ones descend
    place_E = torch.arange(num_scores - 1, -1, -1, device=scores_TE.device)
    return (ascending_TE.long() * num_scores + place_E).topk(top_k).indices


def _check(x_TP: Tensor, up_EFP: Tensor, down_EDH: Tensor, routing: Routing, activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}: choose one of {', '.join(get_args(Activation))}")
    if x_TP.ndim != 2 or not x_TP.is_floating_point():
        raise ValueError(f"x_TP is {_said(x_TP)}: give floats of shape (tokens, features)")
    if len(routing.experts_TA) != len(x_TP):
        raise ValueError(f"x_TP is {_said(x_TP)}, the routing is of {len(routing.experts_TA)} tokens: they must agree")
    E, P, parts = routing.num_experts, x_TP.shape[1], 2 if activation == "swiglu" else 1
    F_ = up_EFP.shape[1] if up_EFP.ndim == 3 else 0
    if up_EFP.shape != (E, F_, P) or not F_ or F_ % parts:
        raise ValueError(f"up_EFP is {_said(up_EFP)}: give ({E}, {parts} x hidden features, {P}) for {activation}")
    if down_EDH.ndim != 3 or (down_EDH.shape[0], down_EDH.shape[2]) != (E, F_ // parts):
        raise ValueError(f"down_EDH is {_said(down_EDH)}: give ({E}, output features, {F_ // parts})")
    autocast = torch.is_autocast_enabled(x_TP.device.type)
    for name, weight in (("up_EFP", up_EFP), ("down_EDH", down_EDH)):
        if weight.device != x_TP.device:
            raise ValueError(f"{name} is on {weight.device}, x_TP on {x_TP.device}: put both on one device")
        if weight.dtype != x_TP.dtype and not autocast:
            raise ValueError(f"{name} is {weight.dtype}, x_TP {x_TP.dtype}: give one dtype, or use autocast")
    if routing.order_S.device != x_TP.device:
        raise ValueError(f"the routing is on {routing.order_S.device}, x_TP on {x_TP.device}: put both on one device")


def _rows_together(x: Tensor) -> Tensor:
    """`x` with the features of a row side by side; rows may be any distance apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _capability(x: Tensor) -> int:
    """90 for compute capability 9.0; in the interpreter as the oldest."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _said(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
