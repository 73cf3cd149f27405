"""Attention over every key, or over those a mask of blocks shows: DiT, packed sequences and the unified model's.

`kernels.attention_triton` has the kernels, `kernels.attention_mask` the masks. Without kernels this is
`F.scaled_dot_product_attention`.
"""

# B records, H query heads, G key heads, N queries, M keys, K head width, I blocks of queries
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils import flop_counter

from kernels.attention_mask import BLOCK, AttentionMask, visited_pairs
from kernels.dispatch import use_triton
from kernels.tiles import Tile, tuned

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def attention(
    q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: AttentionMask | None = None, *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k') v over the keys each query sees, (B, H, N, K); heads H / G of q share one of k and v.

    Guarantees, of the kernels: a record's output and gradients depend on that record alone, to the bit, whatever stands
    beside it in the batch, and repeat to the bit; with a mask they do not depend on padding either, that is on more
    queries that see nothing and more keys that nothing sees. A query that sees nothing gets zeros, and gives none of
    the gradients anything. Softmax and sums are fp32; q, k and v are fp16, bf16 or fp32 (exact products, and slow).

    `scale` is 1 / sqrt(K) by default. Rows of q, k and v may have any strides; a last dimension that is not contiguous
    is copied. The output is a view of (B, N, H, K), so that taking the heads together copies nothing. Differentiable
    once. Raises ValueError for shapes, widths, dtypes and devices that the kernels or the mask do not take.
    """
    if not use_triton(q_BHNK):
        return _plain(q_BHNK, k_BGMK, v_BGMK, mask, scale)
    return _by_kernels(q_BHNK, k_BGMK, v_BGMK, mask, scale)[0]


def attention_with_lse(
    q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: AttentionMask | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural logarithm of each row's sum of exponentials, fp32 (B, H, N): -inf of an empty row.

    No gradient flows through the logarithms.
    """
    if use_triton(q_BHNK):
        out_BHNK, lse2_BHN = _by_kernels(q_BHNK, k_BGMK, v_BGMK, mask, scale)
        return out_BHNK, lse2_BHN.detach() * math.log(2)
    scale = _scale(q_BHNK, scale)
    with torch.no_grad():
        k_BHMK = k_BGMK.repeat_interleave(q_BHNK.shape[1] // k_BGMK.shape[1], dim=1)
        scores_BHNM = q_BHNK.float() @ k_BHMK.float().mT * scale
        if mask is not None:
            scores_BHNM = scores_BHNM.masked_fill(~mask.visible_BNM()[:, None], -math.inf)
        lse_BHN = scores_BHNM.logsumexp(-1)
    return _plain(q_BHNK, k_BGMK, v_BGMK, mask, scale), lse_BHN


def attention_flops(q_shape: Sequence[int], k_shape: Sequence[int], pairs: int | None = None) -> int:
    """Of the forward, a multiply-add being two: two products over each pair of a query and a key.

    `pairs` is how many the mask's listed blocks hold over the batch, `AttentionMask.visited_pairs()`; None for all.
    """
    records, heads, queries, width = q_shape
    return 4 * width * heads * (records * queries * k_shape[2] if pairs is None else pairs)


def attention_backward_flops(q_shape: Sequence[int], k_shape: Sequence[int], pairs: int | None = None) -> int:
    """Of the backward: the five products that it takes. That two kernels form two of them again is not counted."""
    return attention_flops(q_shape, k_shape, pairs) // 2 * 5


def attention_bytes(q_shape: Sequence[int], k_shape: Sequence[int], itemsize: int, *, backward: bool = False) -> int:
    """What must be moved, each tensor once: q, k, v, out and lse; in the backward these, dout and the gradients."""
    queries, keys = math.prod(q_shape), math.prod(k_shape)
    tensors = 4 * queries + 4 * keys if backward else 2 * queries + 2 * keys
    return tensors * itemsize + 4 * math.prod(q_shape[:3])


def _plain(q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: AttentionMask | None, scale: float | None) -> Tensor:
    grouped = q_BHNK.shape[1] != k_BGMK.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q_BHNK, k_BGMK, v_BGMK, scale=scale, enable_gqa=grouped)
    visible_B1NM = mask.visible_BNM()[:, None]
    empty_B1N1 = ~visible_B1NM.any(-1, keepdim=True)
    # a row that sees nothing sees everything, and is then taken out: no 0 / 0 in any backend's forward or backward
    out_BHNK = F.scaled_dot_product_attention(
        q_BHNK, k_BGMK, v_BGMK, attn_mask=visible_B1NM | empty_B1N1, scale=scale, enable_gqa=grouped
    )
    return out_BHNK.masked_fill(empty_B1N1, 0)


def _by_kernels(
    q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: AttentionMask | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(q_BHNK.device.type):  # as autocast does with torch's own attention
        dtype = torch.get_autocast_dtype(q_BHNK.device.type)
        q_BHNK, k_BGMK, v_BGMK = q_BHNK.to(dtype), k_BGMK.to(dtype), v_BGMK.to(dtype)
    _check(q_BHNK, k_BGMK, v_BGMK, mask)
    return _attention(q_BHNK, k_BGMK, v_BGMK, [] if mask is None else _vectors(mask), _scale(q_BHNK, scale))


def _scale(q_BHNK: Tensor, scale: float | None) -> float:
    if scale is None:
        return q_BHNK.shape[-1] ** -0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a positive number")
    return scale


def _vectors(mask: AttentionMask) -> list[Tensor]:
    """The mask as the op takes it: bounds, lists forward and transposed and, where there is noise, its two vectors."""
    vectors = [mask.lo_BN, mask.hi_BN, mask.num_full_BI, mask.full_BIJ, mask.num_partial_BI, mask.partial_BIJ,
               mask.num_full_BJ, mask.full_BJI, mask.num_partial_BJ, mask.partial_BJI]  # fmt: skip
    return vectors if mask.seg_BN is None or mask.noise_BM is None else [*vectors, mask.seg_BN, mask.noise_BM]


def _check(q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: AttentionMask | None) -> None:
    from kernels.attention_triton import WIDTHS

    tensors = {"q_BHNK": q_BHNK, "k_BGMK": k_BGMK, "v_BGMK": v_BGMK}
    for name, value in tensors.items():
        if value.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: give (records, heads, tokens, head width)")
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} is {value.dtype}: the kernels take {', '.join(map(str, DTYPES))}")
        if value.dtype != q_BHNK.dtype or value.device != q_BHNK.device:
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}, but q_BHNK {q_BHNK.dtype} on {q_BHNK.device}: "
                "give one dtype and device"
            )
    B, H, N, K = q_BHNK.shape
    G, M = k_BGMK.shape[1:3]
    if K not in WIDTHS:
        raise ValueError(
            f"q_BHNK has head width {K}: the kernels take {', '.join(map(str, WIDTHS))}; others need the reference"
        )
    if k_BGMK.shape != (B, G, M, K) or G == 0 or H % G:
        raise ValueError(
            f"k_BGMK has shape {tuple(k_BGMK.shape)}: with q_BHNK of {tuple(q_BHNK.shape)} give {B} records, "
            f"a number of heads that divides {H}, and width {K}"
        )
    if v_BGMK.shape != k_BGMK.shape:
        raise ValueError(f"v_BGMK has shape {tuple(v_BGMK.shape)}: give that of k_BGMK, {tuple(k_BGMK.shape)}")
    if mask is None:
        return
    if (mask.num_records, mask.num_queries, mask.num_keys) != (B, N, M):
        raise ValueError(
            f"mask is of {mask.num_records} records, {mask.num_queries} queries and {mask.num_keys} keys: "
            f"q_BHNK and k_BGMK have {B}, {N} and {M}"
        )
    if mask.lo_BN.device != q_BHNK.device:
        raise ValueError(f"mask is on {mask.lo_BN.device}, but q_BHNK on {q_BHNK.device}: give them one device")


@torch.library.custom_op("sfumato::attention", mutates_args=())
def _attention(
    q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Returns out and, to base 2, lse: a change of base there and back would move a row's weights by 1e-6 together."""
    from kernels import attention_triton as kernels

    out_BHNK, lse_BHN = _outputs(q_BHNK, k_BGMK, v_BGMK, mask, scale)
    B, H, N, _ = q_BHNK.shape
    M = k_BGMK.shape[2]
    if not q_BHNK.numel() or not M:
        return out_BHNK.zero_(), lse_BHN.fill_(-math.inf)
    launch = _Launch(B, H, k_BGMK.shape[1], N, M, scale, mask, _rows(q=q_BHNK, k=k_BGMK, v=v_BGMK, out=out_BHNK))
    tile = launch.tile("forward")
    if launch.is_short(tile, "q"):
        tile = launch.tile("forward_short")
        launch(kernels.forward_short, B * H, tile, "q", lse=lse_BHN, KEYS=kernels.keys_held(M))
    else:
        lists = dict(zip(_LISTS, mask[2:6], strict=False))
        launch(kernels.forward, B * H * -(-N // tile.constants["QUERIES"]), tile, "k", "v", lse=lse_BHN, **lists)
    return out_BHNK, lse_BHN


@torch.library.custom_op("sfumato::attention_backward", mutates_args=())
def _attention_backward(
    dout_BHNK: Tensor, q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, out_BHNK: Tensor, lse_BHN: Tensor,
    mask: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v."""
    from kernels import attention_triton as kernels

    found = _gradients(dout_BHNK, q_BHNK, k_BGMK, v_BGMK, out_BHNK, lse_BHN, mask, scale)
    B, H, N, _ = q_BHNK.shape
    G, M = k_BGMK.shape[1:3]
    if not q_BHNK.numel() or not M:
        return found[0].zero_(), found[1].zero_(), found[2].zero_()
    dq, dk, dv = found
    launch = _Launch(B, H, G, N, M, scale, mask, {
        **_rows(q=q_BHNK, k=k_BGMK, v=v_BGMK, out=out_BHNK, dout=dout_BHNK), "dq": dq, "dk": dk, "dv": dv,
    })  # fmt: skip
    blocks = -(-N // BLOCK)
    logs, centre = torch.empty((2, B, H, blocks * BLOCK), dtype=torch.float32, device=q_BHNK.device)
    rows = {"logs": logs, "centre": centre}
    launch(kernels.prepare, B * H * blocks, Tile({}, 4, 1), lse=lse_BHN.contiguous(), **rows)
    tile = launch.tile("backward_keys")
    if launch.is_short(tile, "q", "dout"):
        tile = launch.tile("backward_short")
        # dq waits here from one tile of keys to the next
        so_far = torch.empty(q_BHNK.shape if tile.constants["KEYS"] < M else 0, dtype=torch.float32, device=dq.device)
        launch(kernels.backward_short, B * G, tile, "q", "dout", dq_so_far=so_far, **rows)
        return found
    lists = dict(zip(_LISTS, mask[6:10], strict=False))
    launch(kernels.backward_keys, B * G * -(-M // tile.constants["KEYS"]), tile, "q", "dout", **rows, **lists)
    tile = launch.tile("backward_queries")
    lists = dict(zip(_LISTS, mask[2:6], strict=False))
    launch(kernels.backward_queries, B * H * -(-N // tile.constants["QUERIES"]), tile, "k", "v", **rows, **lists)
    return found


@_attention.register_fake
def _outputs(q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return _heads_last(q_BHNK), torch.empty(q_BHNK.shape[:3], dtype=torch.float32, device=q_BHNK.device)


@_attention_backward.register_fake
def _gradients(
    dout_BHNK: Tensor, q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, out_BHNK: Tensor, lse_BHN: Tensor,
    mask: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _heads_last(q_BHNK), _heads_last(k_BGMK), _heads_last(v_BGMK)


def _heads_last(like_BHNK: Tensor) -> Tensor:
    """An empty tensor of that shape, in memory (B, N, H, K)."""
    B, H, N, K = like_BHNK.shape
    return torch.empty((B, N, H, K), dtype=like_BHNK.dtype, device=like_BHNK.device).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHNK, k_BGMK, v_BGMK, mask, scale = inputs
    ctx.save_for_backward(q_BHNK, k_BGMK, v_BGMK, *output, *mask)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = scale


def _differentiate(ctx: Any, dout_BHNK: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q_BHNK, k_BGMK, v_BGMK, out_BHNK, lse_BHN, *mask = ctx.saved_tensors
    gradients = _attention_backward(dout_BHNK, q_BHNK, k_BGMK, v_BGMK, out_BHNK, lse_BHN, mask, ctx.scale)
    return *gradients, [None] * len(mask), None


_attention.register_autograd(_differentiate, setup_context=_keep)

_LISTS = ("num_full", "full", "num_partial", "partial")


@dataclass(frozen=True)
class _Launch:
    """One call of the op: what its kernels share."""

    B: int
    H: int
    G: int
    N: int
    M: int
    scale: float
    mask: list[Tensor]
    tensors: Mapping[str, Tensor]  # of heads: the names of the kernels' arguments

    def __call__(self, kernel: Any, programs: int, tile: Tile, *streamed: str, **others: Tensor | int) -> None:
        """Launch; `streamed` are the tensors the kernel walks over, by tensor descriptors where the tile says so."""
        from kernels.attention_triton import parts

        width = self.tensors["q"].shape[-1]
        head, tail = parts(width)
        strides = {name: x.stride()[:3] for name, x in self.tensors.items()}
        # Triton knows of strides only whether they are multiples of 16, and those of a head of 72 are not
        unit = 8 if all(stride % 8 == 0 for each in strides.values() for stride in each) else 1
        arguments: dict[str, Any] = {
            **self.tensors, **others, **tile.constants, "H": self.H, "N": self.N, "M": self.M, "scale": self.scale,
            "GROUP": self.H // self.G, "WIDTH": width, "HEAD": head, "TAIL": tail, "UNIT": unit,
            "BLOCK": BLOCK, "MASK": 0 if not self.mask else 2 if len(self.mask) > 10 else 1,
        }  # fmt: skip
        for name, each in strides.items():
            axes = "bgm" if name in ("k", "v", "dk", "dv") else "bhn"
            arguments |= {f"{name}_{axis}": stride // unit for axis, stride in zip(axes, each, strict=True)}
        if self.mask:
            lo, hi = self.mask[:2]
            seg, noise = self.mask[10:] or (lo, lo)  # never read without noise
            arguments |= {"lo": lo, "hi": hi, "seg": seg, "noise": noise}
        # the short kernels know nothing else
        by_descriptors = bool(tile.constants.get("DESCRIPTORS", 1)) and self._fit_descriptors(streamed)
        arguments["DESCRIPTORS"] = by_descriptors
        for name in streamed:
            x = self.tensors[name]
            arguments[f"{name}_tail"] = x
            if by_descriptors:
                rows = tile.constants["KEYS" if name in ("k", "v") else "QUERIES"]
                arguments[name] = _descriptor(x, rows, head)
                arguments[f"{name}_tail"] = _descriptor(x, rows, tail or head)
        with torch.cuda.device_of(self.tensors["q"]):
            kernel[(programs,)](
                **{name: arguments.get(name) for name in kernel.arg_names},
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        from kernels import attention_triton

        q = self.tensors["q"]
        # the interpreter, which has no registers to run out of, goes through the tiles of 16 bits in fp32 too
        width, dtype = q.shape[-1], "bf16" if q.device.type == "cpu" else DTYPES[q.dtype]
        keys = min(self.M, attention_triton.SHORT) if kernel.endswith("short") else None
        default = attention_triton.tile(kernel, width, dtype, _capability(q.device), bool(self.mask), keys)
        return tuned(f"attention.{kernel}", attention_triton.shape_class(width, dtype, bool(self.mask), keys), default)

    def is_short(self, tile: Tile, *streamed: str) -> bool:
        """Whether one program does a whole head. With a mask it never does: the result must not depend on padding."""
        return not self.mask and max(self.N, self.M) <= tile.constants["SHORT"] and self._fit_descriptors(streamed)

    def _fit_descriptors(self, names: Sequence[str]) -> bool:
        """Hopper's copy engine wants 16-byte addresses and strides."""
        tensors = [self.tensors[name] for name in names]
        strides = [stride * x.element_size() for x in tensors for stride in x.stride()[:3]]
        return all(x.data_ptr() % 16 == 0 for x in tensors) and all(s > 0 and s % 16 == 0 for s in strides)


def _rows(**tensors: Tensor) -> dict[str, Tensor]:
    """The tensors with rows of one piece, not so far apart that 32 bits cannot count the elements of a tile."""
    return {
        name: x if x.stride(-1) == 1 and x.stride(2) < 2**24 else x.contiguous() for name, x in tensors.items()
    }  # fmt: skip


def _descriptor(x_BHNK: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x_BHNK, list(x_BHNK.shape), list(x_BHNK.stride()), [1, 1, rows, columns])


@functools.cache
def _capability(device: torch.device) -> int:
    """90 where the tiles are Hopper's, in the interpreter too; else 80."""
    return 90 if device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9 else 80


def _count_forward(
    q_BHNK: Any, k_BGMK: Any, v_BGMK: Any, mask: list[Any], *_: Any, out_val: Any = None, **__: Any
) -> int:
    return attention_flops(q_BHNK.shape, k_BGMK.shape, _pairs(q_BHNK, k_BGMK, mask))


def _count_backward(
    dout_BHNK: Any, q_BHNK: Any, k_BGMK: Any, v_BGMK: Any, out_BHNK: Any, lse_BHN: Any, mask: list[Any], *_: Any,
    out_val: Any = None, **__: Any,
) -> int:  # fmt: skip
    return attention_backward_flops(q_BHNK.shape, k_BGMK.shape, _pairs(q_BHNK, k_BGMK, mask))


def _pairs(q_BHNK: Tensor, k_BGMK: Tensor, mask: list[Tensor]) -> int | None:
    """The pairs of the listed blocks; all pairs while a compiler traces, for it has no lists to read."""
    if not mask or is_fake(mask[0]):
        return None
    num_full_BI, full_BIJ, num_partial_BI, partial_BIJ = mask[2:6]
    return visited_pairs(num_full_BI, full_BIJ, num_partial_BI, partial_BIJ, q_BHNK.shape[2], k_BGMK.shape[2])


def _count_plain(q_shape: Sequence[int], k_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return attention_flops(q_shape, k_shape)


def _count_plain_backward(_grad_shape: Any, q_shape: Sequence[int], k_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return attention_backward_flops(q_shape, k_shape)


flop_counter.register_flop_formula(torch.ops.sfumato.attention, get_raw=True)(_count_forward)
flop_counter.register_flop_formula(torch.ops.sfumato.attention_backward, get_raw=True)(_count_backward)
# What attention is on the CPU, PyTorch has no formulas for.
_PLAIN: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_plain,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_plain_backward,
}
for _op in _PLAIN.keys() - flop_counter.flop_registry.keys():
    flop_counter.register_flop_formula(_op)(_PLAIN[_op])
