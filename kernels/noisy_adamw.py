"""Noise, AdamW, the weights' average and a low-precision copy in one pass over a GPU's flat fp32 shards.

All shards of a step go in one launch, whatever their number. Noise is made in the kernel, from ChaCha20's keystream
(RFC 8439) by Box-Muller, and added on the grid of `kernels.release`: element i of a shard gets the normal that
`kernels.noise` gives it, at any sharding. (Where the noise need not be cryptographic it may be Philox, which is there
because it is cheaper on a CPU; here it would save nothing that memory does not hide, and there is none.)

Guarantee on the released bits: they are one function of key, element, std and gradient on every GPU and in the
interpreter. `kernels.noise` takes NumPy's logarithm and tangent instead, which differ in float64's last bits: of 2^21
noises 1 in 200 was another multiple of the grid's spacing, the next, and of releases, 2^28 spacings apart, 1 in about
2^36 is then the next; all others have the CPU's bits.

A gradient that is not finite was made by no sum of clipped terms, and noise would not hide it: its window, 1024 of the
shard's elements, draws nothing and stays as it was, in all tensors. So that no device waits for its host, this is only
told: whoever calls must look at what is returned before anything of the step is saved, shown or built upon, and give
the step up where any of it is set.

What it takes per element, as the machine code for sm_90 has it (arithmetic, not a measurement): 38 bytes with a copy,
and 237 instructions, 38 of them the update's, 118 ChaCha20's and 37 float64. 114 are for the pipe of logic and shifts,
which takes half a warp a clock on each of an H200's 528 quarters: 229 clocks for 32 elements, where memory at 4.8 TB/s
takes 235 at 1.755 GHz and 265 at 1.98 GHz. Noise hides behind memory only while enough warps keep both busy.
"""

# N shards
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from kernels.dispatch import use_triton
from kernels.noise import BLOCK, visit_gaussian
from kernels.release import grid_spacing, release_
from kernels.tiles import tuned

_COPY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Noise:
    """N(0, std^2) for each of N shards: of the sequence that its 32-byte key names, the part from its offset on."""

    std: float
    keys: Sequence[bytes]
    offsets: Sequence[int]

    def __post_init__(self) -> None:
        grid_spacing(self.std)
        for shard, (key, offset) in enumerate(zip(self.keys, self.offsets, strict=True)):
            if len(key) != 32:
                raise ValueError(f"keys[{shard}] has {len(key)} bytes: a noise key has 32")
            if not 0 <= offset < 2**62:
                raise ValueError(f"offsets[{shard}] is {offset}: give one from 0 to 2^62 - 1")

    @property
    def key_words(self) -> Tensor:
        """The keys, int64 (N, 4), on the CPU."""
        return torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.int64).view(-1, 4)


@torch.no_grad()
def add_noise_(gradients: Sequence[Tensor], noise: Noise) -> Tensor:
    """Add each shard's noise to it, in place, and round to the grid: what an optimizer that is not ours then reads.

    `gradients` are flat, contiguous and fp32, on one device. Returns which shards were refused, wholly or in part,
    because they are not finite: int32 (N,), on their device, 0 where all is well. See the module for what to do.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check({"gradients": gradients}, noise)
    if not gradients:
        return torch.zeros(0, dtype=torch.int32)
    if use_triton(gradients[0]):
        return _add_noise(list(gradients), noise.key_words, list(noise.offsets), noise.std)
    refused = [_release_plainly(gradient, noise, shard) for shard, gradient in enumerate(gradients)]
    return torch.tensor(refused, dtype=torch.int32, device=gradients[0].device)


@torch.no_grad()
def noisy_adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor] | None = None,
    *,
    noise: Noise | None,
    grad_scale: float = 1.0,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
) -> Tensor:
    """Update `step` (from 1) of AdamW on released gradient * grad_scale, and of the average, in place; see the module.

        released         = `add_noise_`'s, or the gradient itself without noise; `gradients` is only read
        parameter        : torch.optim.AdamW, its operations in its order, in fp32
        average          = lerp(average, parameter, 1 - ema_decay), of the new parameter
        copy             = the new parameter, rounded to the copy's dtype (bf16 or fp16)

    All are N lists of flat, contiguous shards, fp32 but for the copies, on one device. Against torch the moments and
    the average are the same bits, given the same gradient and parameter; the parameter's change is within 5 ulp, for
    division and square root are the GPU's fast ones.
    Returns which shards were refused, as `add_noise_` does; without noise none is.
    Raises ValueError where shapes, dtypes, devices or AdamW's numbers do not fit. Source: Loshchilov and Hutter 2019
    (arXiv:1711.05101), Algorithm 2; noise as in Abadi et al. 2016, Algorithm 1.
    """
    names = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages")
    shards = (parameters, gradients, exp_avgs, exp_avg_sqs, averages)
    columns: dict[str, Sequence[Tensor]] = dict(zip(names, shards, strict=True))
    _check(columns, noise, copies)
    _check_numbers(betas, step, ema_decay)
    if not parameters:
        return torch.zeros(0, dtype=torch.int32)
    if use_triton(parameters[0]):
        keys, offsets, std = (None, None, 0.0) if noise is None else (noise.key_words, list(noise.offsets), noise.std)
        return _noisy_adamw_ema(
            *map(list, shards), list(copies or ()), keys, offsets, std,
            grad_scale, lr, *betas, eps, weight_decay, step, ema_decay,
        )  # fmt: skip
    refused = list[bool]()
    for shard, (parameter, gradient, exp_avg, exp_avg_sq, average) in enumerate(zip(*shards, strict=True)):
        released = gradient.clone()
        refused.append(noise is not None and _release_plainly(released, noise, shard))
        if refused[-1]:
            continue
        adamw(
            [parameter], [released.mul_(grad_scale)], [exp_avg], [exp_avg_sq], [], [torch.tensor(step - 1.0)],
            foreach=False, amsgrad=False, maximize=False,
            lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        average.lerp_(parameter, 1.0 - ema_decay)
        if copies is not None:
            copies[shard].copy_(parameter)
    return torch.tensor(refused, dtype=torch.int32, device=parameters[0].device)


def add_noise_bytes(num_elements: int) -> int:
    """Bytes that have to move: each gradient in and out."""
    return 8 * num_elements


def noisy_adamw_ema_bytes(num_elements: int, copy_bytes: int = 0) -> int:
    """Bytes that have to move: parameter, both moments and average in and out, the gradient in, the copy out.

    copy_bytes: of one element of the low-precision copy, 0 without one.
    """
    return (4 * 8 + 4 + copy_bytes) * num_elements


def _release_plainly(gradient: Tensor, noise: Noise, shard: int) -> bool:
    """`kernels.release` on the CPU, wherever the shard lies; whether it was refused, and left as it was."""
    values: NDArray[np.float32] = gradient.cpu().numpy()
    if not np.isfinite(values).all():
        return True
    spacing = grid_spacing(noise.std)

    def release(start: int, normals: NDArray[np.float64]) -> None:
        normals *= noise.std / spacing
        release_(values[start : start + len(normals)], np.rint(normals, out=normals), spacing)

    visit_gaussian(noise.keys[shard], noise.offsets[shard], len(values), release)
    if gradient.device.type != "cpu":
        gradient.copy_(torch.from_numpy(values))
    return False


@torch.library.custom_op("sfumato::add_noise", mutates_args=("gradients",))
def _add_noise(gradients: list[Tensor], keys: Tensor, offsets: list[int], std: float) -> Tensor:
    from kernels import noisy_adamw_triton as kernels

    return _launch(kernels.add_noise, {kernels.GRADIENT: gradients}, keys, offsets, std, (), {})


@_add_noise.register_fake
def _(gradients: list[Tensor], keys: Tensor, offsets: list[int], std: float) -> Tensor:
    return gradients[0].new_empty(len(gradients), dtype=torch.int32)


@torch.library.custom_op(
    "sfumato::noisy_adamw_ema", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "averages", "copies")
)
def _noisy_adamw_ema(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], keys: Tensor | None, offsets: list[int] | None, std: float,
    grad_scale: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    ema_decay: float,
) -> Tensor:  # fmt: skip
    import triton.language as tl

    from kernels import noisy_adamw_triton as kernels

    columns = {
        kernels.PARAMETER: parameters, kernels.GRADIENT: gradients, kernels.EXP_AVG: exp_avgs,
        kernels.EXP_AVG_SQ: exp_avg_sqs, kernels.AVERAGE: averages,
    }  # fmt: skip
    copy_dtype = None
    if copies:
        columns[kernels.COPY] = copies
        copy_dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[copies[0].dtype]
    if keys is None or offsets is None:
        keys, offsets = torch.zeros(len(parameters), 4, dtype=torch.int64), [0] * len(parameters)
    scalars = (
        grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, -lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), eps, 1 - ema_decay,
    )  # fmt: skip
    rounded = tuple(np.array(scalars, np.float32).tolist())  # as torch does, and a launch, but not the interpreter
    constants = {"NOISE": std > 0, "COPY_DTYPE": copy_dtype}
    return _launch(kernels.adamw_ema, columns, keys, offsets, std, rounded, constants)


@_noisy_adamw_ema.register_fake
def _(parameters: list[Tensor], *_: Any) -> Tensor:
    return parameters[0].new_empty(len(parameters), dtype=torch.int32)


def _launch(
    kernel: Any, columns: dict[int, list[Tensor]], keys: Tensor, offsets: list[int], std: float,
    scalars: tuple[float, ...], constants: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One launch over all shards that vector instructions reach, and one over the others; which shards were refused."""
    from kernels import noisy_adamw_triton as kernels

    tile = tuned("noisy_adamw", kernel.__name__, kernels.TILE)
    device = columns[kernels.GRADIENT][0].device
    rows = np.zeros((len(offsets), kernels.ROW), np.int64)
    for column, tensors in columns.items():
        rows[:, column] = [tensor.data_ptr() for tensor in tensors]
    rows[:, kernels.OFFSET] = offsets
    rows[:, kernels.NUMEL] = [tensor.numel() for tensor in columns[kernels.GRADIENT]]
    rows[:, kernels.KEY : kernels.KEY + 4] = keys.numpy()
    aligned = (rows[:, : kernels.OFFSET] % 16 == 0).all(1) & (rows[:, [kernels.OFFSET, kernels.NUMEL]] % 4 == 0).all(1)
    refused = torch.zeros(len(rows), dtype=torch.int32, device=device)
    for reach in (True, False):
        (chosen,) = np.nonzero((aligned == reach) & (rows[:, kernels.NUMEL] > 0))
        if not len(chosen):
            continue
        table = np.concatenate([_header(std), rows[chosen]])
        num_programs = _lay_out_windows(table[1:], tile.constants["L"])
        told = refused if len(chosen) == len(rows) else torch.zeros_like(refused)
        on_device = torch.from_numpy(table)
        if device.type != "cpu":
            on_device = on_device.pin_memory().to(device, non_blocking=True)
        owners = torch.repeat_interleave(on_device[1:, kernels.NUM_WINDOWS], output_size=num_programs)
        with torch.cuda.device_of(refused):
            kernel[(num_programs,)](
                on_device, owners, told, *scalars, **tile.constants, **constants, ALIGNED=reach,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
            )  # fmt: skip
        on_device.zero_()  # keys do not stay in memory that the allocator will hand to others
        if told is not refused:
            refused[torch.from_numpy(chosen).to(device)] = told[: len(chosen)]
    return refused


def _header(std: float) -> NDArray[np.int64]:
    """The table's first row, (1, ROW)."""
    from kernels.noisy_adamw_triton import ROW

    header = np.zeros((1, ROW))
    if std > 0:
        spacing = grid_spacing(std)
        header[0, :3] = std / spacing, 1.0 / spacing, spacing
    return header.view(np.int64)


def _lay_out_windows(rows: NDArray[np.int64], lanes: int) -> int:
    """Fill in which programs make which windows of each shard; returns the number of programs."""
    from kernels import noisy_adamw_triton as kernels

    lanes_a_block = BLOCK // 16
    offsets, ends = rows[:, kernels.OFFSET], rows[:, kernels.OFFSET] + rows[:, kernels.NUMEL]
    first = offsets // BLOCK * lanes_a_block // lanes
    last = -(-(-(-ends // BLOCK) * lanes_a_block) // lanes)
    programs_before = np.cumsum(last - first) - (last - first)
    rows[:, kernels.WINDOW], rows[:, kernels.NUM_WINDOWS] = first - programs_before, last - first
    return int((last - first).sum())


def _check(columns: dict[str, Sequence[Tensor]], noise: Noise | None, copies: Sequence[Tensor] | None = None) -> None:
    gradients = columns["gradients"]
    of_each: dict[str, tuple[Sequence[Tensor], Sequence[torch.dtype]]]
    of_each = {name: (tensors, (torch.float32,)) for name, tensors in columns.items()}
    if copies is not None:
        dtypes = [copy.dtype for copy in copies[:1] if copy.dtype in _COPY_DTYPES]  # of the first; all have one
        of_each["copies"] = copies, dtypes or _COPY_DTYPES
    counts = {name: len(tensors) for name, (tensors, _) in of_each.items()}
    if noise is not None:
        counts["noise.keys"] = len(noise.keys)
    for name, count in counts.items():
        if count != len(gradients):
            raise ValueError(f"{name} has {count} shards and gradients {len(gradients)}: give one of each to a shard")
    for name, (tensors, dtypes) in of_each.items():
        for shard, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
            if tensor.dtype not in dtypes:
                wanted = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"{name}[{shard}] is {tensor.dtype}: it must be {wanted}")
            if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != gradient.numel():
                raise ValueError(
                    f"{name}[{shard}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}: it must be flat, "
                    f"contiguous and of its gradient's {gradient.numel()} elements"
                )
            if tensor.device != gradients[0].device:
                raise ValueError(f"{name}[{shard}] is on {tensor.device} and gradients[0] on {gradients[0].device}")


def _check_numbers(betas: tuple[float, float], step: int, ema_decay: float) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas}: each must be in [0, 1)")
    if step < 1:
        raise ValueError(f"step is {step}: the first update is step 1")
    if not 0.0 <= ema_decay <= 1.0:
        raise ValueError(f"ema_decay is {ema_decay}: it must be in [0, 1]")
