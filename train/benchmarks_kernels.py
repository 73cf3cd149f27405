"""The kernels beside their rivals: on a GPU against what the chip reaches, on a CPU against PyTorch's own operations.

FLOPs and bytes are each op's own formulas, and stand beside every figure. On a GPU all is bf16, and a backward is timed
without its forward. Imports torch and `kernels` only: the machine with the GPU may have little else.
"""

# one file: what each op is measured against reads as one list
# B records, N tokens, D model width; of experts T tokens, S rows sorted by expert, E experts, F and H features
from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference
from kernels.adaln import adaln, adaln_bytes
from kernels.attention import attention, attention_backward_flops, attention_bytes, attention_flops
from kernels.attention_mask import AttentionMask, text_and_images
from kernels.ghost_norm import OuterProducts, ghost_norm_flops
from kernels.moe import Routing, experts_mlp, experts_mlp_bytes, experts_mlp_flops, route
from kernels.noisy_adamw import Noise, noisy_adamw_ema_, noisy_adamw_ema_bytes
from kernels.norms import norm_bytes, rms_norm
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_bytes, rotary_angles
from kernels.tiles import tile_file
from train.benchmarks_gpu import (
    Contest,
    Goal,
    Inputs,
    Work,
    compete,
    copy_bandwidth,
    cost_over,
    faster_than,
    gradients_of,
    matmul_rate,
    not_measured,
    tflops,
    tune,
)
from train.measurements import Row

DEVICE = "cuda"
CPU_TARGET = 1.03  # times what PyTorch's own operation takes
CPU_ROUNDS = 31
CPU_SECONDS = 0.1  # of calls in a round: a call of a small model takes microseconds


def kernels(deadline: float = math.inf) -> list[Row]:
    """All rows. On a GPU contests that would begin past `deadline` (of time.monotonic) are left empty."""
    if torch.cuda.is_available():
        return [*compete(contests(), deadline), *_cpu_rows(measure=False)]
    return [*not_measured(contests()), *_cpu_rows(measure=True)]


def tune_kernels() -> Path:
    """Find the fastest tiles of this GPU and write its file, which is returned. Long: every tile tried is compiled.

    Raises ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--tune measures tiles on a GPU, and torch sees none: leave it out")
    path = tile_file(torch.cuda.get_device_name(), importlib.metadata.version("triton"))
    tune(contests(), path)
    return path


def contests() -> Iterator[Contest]:
    """What the issue asks for first, in case the time does not suffice for all."""
    for (width, heads), forward, backward in zip(
        ((64, 16), (72, 16), (128, 8)), (400, 380, 470), (260, 240, 320), strict=True
    ):
        yield _attention_forward(width, heads, 4, 4096, [tflops(forward)])
        yield _attention_backward(width, heads, 4, 4096, [tflops(backward), faster_than("sdpa_deterministic", 1.5)])
    yield _attention_unified(64, 16, 2, 8192)
    yield from _adaln(256, 256, 1152)
    yield from _moe(8, 2, 2048, 4096, 16384, [matmul_rate(80), faster_than("grouped_mm", 1.2)])
    yield from _moe(128, 8, 2048, 768, 16384, [matmul_rate(65), faster_than("grouped_mm", 1.2)])
    yield _ghost_norm(64, 256, 10)
    yield _ghost_norm(16, 1024, 30)
    yield _noisy_adamw_ema(4, 1 << 24)
    yield _attention_forward(72, 16, 128, 256, [])  # a DiT-XL at 256 pixels: the short path
    yield _attention_backward(72, 16, 128, 256, [])
    yield from _qk_norm_rope(128, 256, 16, 72)
    yield from _rms_norm(128, 1024, 1152)


def _normal(*shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def _like(*shape: int) -> Tensor:
    """What a formula of bytes asks of a tensor, without one."""
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    functorch_config.donated_buffer = False  # or a backward could not be timed twice
    return torch.compile(function, dynamic=False)


# attention


def _attention_inputs(width: int, heads: int, records: int, tokens: int, *, grad: bool) -> Inputs:
    return {name: _normal(records, heads, tokens, width, grad=grad) for name in "qkv"}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


@contextmanager
def _deterministic() -> Iterator[None]:
    """As `torch.use_deterministic_algorithms`, but without filling fresh memory, which would cost it time."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


_ATTENTION: Mapping[str, Callable[..., Tensor]] = {
    "ours": attention,
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
}


def _attention_forward(width: int, heads: int, records: int, tokens: int, goals: Sequence[Goal]) -> Contest:
    shape = (records, heads, tokens, width)

    def contestant(op: Callable[..., Tensor]) -> Callable[[Inputs], Work]:
        return lambda inputs: lambda: op(inputs["q"], inputs["k"], inputs["v"])

    return Contest(
        name=f"attention.forward.d{width}_n{tokens}",
        flops=attention_flops(shape, shape),
        num_bytes=attention_bytes(shape, shape, 2),
        inputs=lambda: _attention_inputs(width, heads, records, tokens, grad=False),
        contestants={name: contestant(op) for name, op in _ATTENTION.items()},
        goals=goals,
    )


def _attention_backward(width: int, heads: int, records: int, tokens: int, goals: Sequence[Goal]) -> Contest:
    shape = (records, heads, tokens, width)

    def contestant(op: Callable[..., Tensor], *, deterministic: bool = False) -> Callable[[Inputs], Work]:
        def prepare(inputs: Inputs) -> Work:
            q, k, v = (inputs[name] for name in "qkv")
            backward = gradients_of(lambda: op(q, k, v), (q, k, v))
            if not deterministic:
                return backward

            def work() -> object:
                with _deterministic():
                    return backward()

            return work

        return prepare

    return Contest(
        name=f"attention.backward.d{width}_n{tokens}",
        flops=attention_backward_flops(shape, shape),
        num_bytes=attention_bytes(shape, shape, 2, backward=True),
        inputs=lambda: _attention_inputs(width, heads, records, tokens, grad=True),
        contestants={
            **{name: contestant(op) for name, op in _ATTENTION.items()},
            "sdpa_deterministic": contestant(_ATTENTION["sdpa_flash"], deterministic=True),
        },
        goals=goals,
    )


def _attention_unified(width: int, heads: int, records: int, tokens: int) -> Contest:
    """Forward and backward under the unified model's mask: four documents, each half text and half a noised image."""
    shape = (records, heads, tokens, width)

    def mask(device: str) -> AttentionMask:
        place_BN = torch.arange(tokens, device=device, dtype=torch.int32).expand(records, -1)
        document_BN, place_BN = place_BN // (tokens // 4), place_BN % (tokens // 4)
        is_image_BN = place_BN >= tokens // 8
        return text_and_images(document_BN, torch.where(is_image_BN, document_BN, -1), is_image_BN)

    def inputs() -> Inputs:
        return {**_attention_inputs(width, heads, records, tokens, grad=True), "mask": mask(DEVICE)}

    def both(forward: Callable[..., Tensor]) -> Callable[[Inputs], Work]:
        def prepare(made: Inputs) -> Work:
            wanted = [made[name] for name in "qkv"]
            grad = torch.randn_like(wanted[0])
            given = _flex_mask(made["mask"]) if forward is _flex else made["mask"]
            return lambda: torch.autograd.grad(forward(*wanted, given), wanted, grad)

        return prepare

    pairs = mask("cpu").visited_pairs()
    return Contest(
        name=f"attention.unified_mask.d{width}_n{tokens}",
        flops=attention_flops(shape, shape, pairs) + attention_backward_flops(shape, shape, pairs),
        num_bytes=sum(attention_bytes(shape, shape, 2, backward=backward) for backward in (False, True)),
        inputs=inputs,
        contestants={"ours": both(attention), "flex_attention": both(_flex)},
        goals=[faster_than("flex_attention", 1.3)],
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention)(q, k, v, block_mask=block_mask)


def _flex_mask(mask: AttentionMask) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lo_BN, hi_BN, seg_BN, noise_BM = mask.lo_BN, mask.hi_BN, mask.seg_BN, mask.noise_BM
    assert seg_BN is not None and noise_BM is not None

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        within = (k >= lo_BN[b, q]) & (k < hi_BN[b, q])
        return within & ((noise_BM[b, k] < 0) | (noise_BM[b, k] == seg_BN[b, q]))

    return create_block_mask(visible, mask.num_records, None, mask.num_queries, mask.num_keys, device=DEVICE)


def _forward_and_backward(
    name: str,
    inputs: Callable[..., Inputs],
    ops: Mapping[str, Callable[..., Any]],
    *,
    num_bytes: Callable[[bool], int],
    flops: Callable[[bool], int] = lambda backward: 0,
    goals: tuple[Sequence[Goal], Sequence[Goal]] = ((), ()),
) -> Iterator[Contest]:
    """Contests of the ops' calls on `inputs()`, "wanted" then "others", and of the gradients of all that is wanted."""

    def forward(op: Callable[..., Any]) -> Callable[[Inputs], Work]:
        return lambda made: lambda: op(*made["wanted"], *made.get("others", ()))

    def backward(op: Callable[..., Any]) -> Callable[[Inputs], Work]:
        return lambda made: gradients_of(forward(op)(made), made["wanted"])

    for is_backward, prepare in enumerate((forward, backward)):
        yield Contest(
            name=name.format(prepare.__name__),
            flops=flops(bool(is_backward)),
            num_bytes=num_bytes(bool(is_backward)),
            inputs=functools.partial(inputs, grad=bool(is_backward)),
            contestants={contestant: prepare(op) for contestant, op in ops.items()},
            goals=goals[is_backward],
        )


# what is bound by memory


def _adaln(records: int, tokens: int, width: int) -> Iterator[Contest]:
    def inputs(*, grad: bool) -> Inputs:
        shift, scale, gate = _normal(records, 3 * width, grad=grad).chunk(3, dim=-1)
        x, branch = (_normal(records, tokens, width, grad=grad) for _ in range(2))
        return {"wanted": (x, shift, scale, branch, gate), "others": (1e-6,)}

    return _forward_and_backward(
        f"adaln.{{}}.d{width}",
        inputs,
        {"ours": adaln, "compiled": _compiled(reference.adaln)},
        num_bytes=lambda backward: adaln_bytes(records, tokens, width, 2, backward=backward),
        goals=([copy_bandwidth(92)], [copy_bandwidth(85), faster_than("compiled", 1.3)]),
    )


def _qk_norm_rope(records: int, tokens: int, heads: int, width: int) -> Iterator[Contest]:
    shape = _like(records, tokens, heads, width)
    places = torch.cartesian_prod(*[torch.arange(math.isqrt(tokens))] * 2)
    angles = rotary_angles(places, [width // 4, width // 4])

    def inputs(*, grad: bool) -> Inputs:
        q, k, _ = _normal(records, tokens, 3, heads, width, grad=grad).unbind(2)
        weights = (_normal(records, width, grad=grad, dtype=torch.float32) for _ in range(2))
        return {"wanted": (q, k, *weights), "others": (angles.to(DEVICE), 1e-6)}

    return _forward_and_backward(
        f"qk_norm_rope.{{}}.k{width}",
        inputs,
        {"ours": qk_norm_rope, "compiled": _compiled(reference.qk_norm_rope)},
        num_bytes=lambda backward: qk_norm_rope_bytes(shape, shape, angles, backward=backward),
    )


def _rms_norm(records: int, tokens: int, width: int) -> Iterator[Contest]:
    def inputs(*, grad: bool) -> Inputs:
        x, weight = _normal(records, tokens, width, grad=grad), _normal(records, width, grad=grad, dtype=torch.float32)
        return {"wanted": (x, weight), "others": (1e-6,)}

    return _forward_and_backward(
        f"rms_norm.{{}}.d{width}",
        inputs,
        {"ours": rms_norm, "compiled": _compiled(reference.rms_norm)},
        num_bytes=lambda backward: norm_bytes(records * tokens, width, 2, backward=backward),
    )


# experts


def _moe(experts: int, top_k: int, width: int, hidden: int, tokens: int, goals: Sequence[Goal]) -> Iterator[Contest]:
    """Against cuBLAS on dense products of as many FLOPs, which know nothing of routing or of an activation."""
    up, down, rows = _like(experts, 2 * hidden, width), _like(experts, width, hidden), tokens * top_k

    def inputs(*, grad: bool) -> Inputs:
        shapes = ((tokens, width), (experts, 2 * hidden, width), (experts, width, hidden))
        wanted = [(_normal(*shape) * shape[-1] ** -0.5).requires_grad_(grad) for shape in shapes]
        return {"wanted": wanted, "others": (route(_normal(tokens, experts, dtype=torch.float32), top_k),)}

    def dense(made: Inputs, *, backward: bool) -> Work:
        lefts = [_normal(rows, n, grad=backward) for n in (width, hidden)]
        rights = [_normal(*shape, grad=backward) for shape in ((2 * hidden, width), (width, hidden))]

        def products() -> list[Tensor]:
            return [left @ right.mT for left, right in zip(lefts, rights, strict=True)]

        return gradients_of(products, [*lefts, *rights]) if backward else products

    for contest in _forward_and_backward(
        f"moe.{{}}.e{experts}_a{top_k}",
        inputs,
        {"ours": experts_mlp, "grouped_mm": _compiled(_grouped_mm)},
        num_bytes=lambda backward: (1 + backward) * experts_mlp_bytes(tokens, top_k, up.shape, down.shape, 2),
        flops=lambda backward: (1 + backward) * experts_mlp_flops(rows, up.shape, down.shape),
        goals=(goals, goals),
    ):
        cublas = functools.partial(dense, backward=".backward." in contest.name)
        yield replace(contest, contestants={**contest.contestants, "cublas": cublas})


def _grouped_mm(x_TP: Tensor, up_EFP: Tensor, down_EDH: Tensor, routing: Routing) -> Tensor:
    """What `experts_mlp` computes, by PyTorch's grouped products."""
    order_S, ends_E = routing.order_S, routing.offsets_E1[1:]
    features_SF = torch._grouped_mm(x_TP[order_S // routing.top_k], up_EFP.mT, offs=ends_E)
    gate_SH, value_SH = features_SF.chunk(2, dim=-1)
    y_SD = torch._grouped_mm(F.silu(gate_SH) * value_SH, down_EDH.mT, offs=ends_E)
    y_TAD = torch.empty_like(y_SD).index_copy(0, order_S, y_SD).unflatten(0, routing.weights_TA.shape)
    return (y_TAD * routing.weights_TA[..., None].to(y_TAD.dtype)).sum(1)


# privacy


def _ghost_norm(records: int, tokens: int, target_percent: float) -> Contest:
    """The backward of a DiT-XL block, with and without the norms of each record's gradients of its four products."""
    width, heads = 1152, 16
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))

    def inputs() -> Inputs:
        x, modulation = _normal(records, tokens, width, grad=True), _normal(records, 6 * width, grad=True)
        weights = [(0.02 * _normal(*shape)).requires_grad_() for shape in shapes]
        out, products = _block(x, modulation, weights, heads)
        wanted = [x, modulation, *weights, *(output for _, output in products)]
        return {"backward": gradients_of(lambda: out, wanted), "factors": [factor.detach() for factor, _ in products]}

    def with_norms(made: Inputs) -> Work:
        def work() -> list[Tensor]:
            gradients = made["backward"]()
            pairs = zip(gradients[-4:], made["factors"], shapes, strict=True)
            return [
                OuterProducts(left[:, None], right[:, None], torch.Size(shape)).squared_norms()
                for left, right, shape in pairs
            ]

        return work

    parameters = sum(math.prod(shape) for shape in shapes)
    activations = records * tokens * sum(map(sum, shapes))
    attended = (records, heads, tokens, width // heads)
    return Contest(
        name=f"ghost_norm.dit_xl_block.t{tokens}",
        flops=4 * records * tokens * parameters + attention_backward_flops(attended, attended)
        + sum(ghost_norm_flops(records * tokens, records, *shape) for shape in shapes),
        num_bytes=2 * (2 * parameters + 2 * activations),
        inputs=inputs,
        contestants={"ours": with_norms, "backward": lambda made: made["backward"]},
        goals=[cost_over("backward", target_percent)],
    )  # fmt: skip


def _block(
    x_BND: Tensor, modulation: Tensor, weights: Sequence[Tensor], heads: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`models.dit.DiTBlock` after its modulation, and each product's input and output."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    x_BND, normed1 = adaln(x_BND, shift1, scale1)
    qkv = F.linear(normed1, weights[0])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = attention(q, k, v).transpose(1, 2).flatten(2)
    projected = F.linear(attended, weights[1])
    x_BND, normed2 = adaln(x_BND, shift2, scale2, projected, gate1)
    hidden = F.linear(normed2, weights[2])
    activated = F.gelu(hidden, approximate="tanh")
    out = F.linear(activated, weights[3])
    made = [(normed1, qkv), (attended, projected), (normed2, hidden), (activated, out)]
    return x_BND + gate2[:, None] * out, made


def _noisy_adamw_ema(shards: int, elements: int) -> Contest:
    """The whole update of fp32 shards with a bf16 copy, beside the same without noise, and beside PyTorch's own."""
    noise = Noise(std=1.0, keys=[bytes([shard] * 32) for shard in range(shards)], offsets=[0] * shards)
    betas, eps, weight_decay, lr, ema_decay = (0.9, 0.999), 1e-8, 0.01, 1e-4, 0.999

    def inputs() -> Inputs:
        shapes = [(elements,)] * shards
        parameters, gradients, exp_avgs, averages = (
            [_normal(*shape, dtype=torch.float32) for shape in shapes] for _ in range(4)
        )
        exp_avg_sqs = [exp_avg.square() for exp_avg in exp_avgs]
        copies = [parameter.bfloat16() for parameter in parameters]
        return {"shards": (parameters, gradients, exp_avgs, exp_avg_sqs, averages, copies)}

    def ours(noise: Noise | None) -> Callable[[Inputs], Work]:
        return lambda made: lambda: noisy_adamw_ema_(
            *made["shards"], noise=noise, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            step=10, ema_decay=ema_decay,
        )  # fmt: skip

    def torch_fused(made: Inputs) -> Work:
        parameters, gradients, exp_avgs, exp_avg_sqs, averages, copies = made["shards"]
        steps = [torch.tensor(10.0, device=DEVICE) for _ in parameters]

        def work() -> None:
            torch._fused_adamw_(
                parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
                weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay)
            torch._foreach_copy_(copies, parameters)

        return work

    return Contest(
        name="noisy_adamw_ema",
        flops=0,
        num_bytes=noisy_adamw_ema_bytes(shards * elements, 2),
        inputs=inputs,
        contestants={"ours": ours(noise), "noise_free": ours(None), "torch_fused": torch_fused},
        goals=[copy_bandwidth(85), cost_over("noise_free", 5)],
        graphed=False,  # keys and addresses come from the host at each step
    )


# on the CPU


def _cpu_rows(*, measure: bool) -> list[Row]:
    """What the ops cost where there is no kernel: their forward and backward over PyTorch's own operations."""
    rows = list[Row]()
    for name, prepare in _CPU.items():
        value = _cpu_ratio(*prepare()) if measure else None
        met = None if value is None else value <= CPU_TARGET
        rows.append(Row(name=f"kernels.cpu.{name}", value=value, unit="x PyTorch", target=CPU_TARGET, ok=met))
    return rows


def _cpu_ratio(ours: Work, plain: Work) -> float:
    from train.benchmarks import interleaved, ratio, seconds  # not on top: these import all of `train`

    for work in (ours, plain):
        work()
    calls = max(1, int(CPU_SECONDS / seconds(plain)))

    def repeated(work: Work) -> Work:
        return lambda: [work() for _ in range(calls)]

    return ratio(interleaved({"ours": repeated(ours), "plain": repeated(plain)}, CPU_ROUNDS), "ours", "plain")


def _both_ways(op: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Work:
    grad = torch.randn_like(op(*arguments))
    return lambda: torch.autograd.grad(op(*arguments), arguments, grad)


def _cpu_attention(records: int, heads: int, tokens: int, width: int) -> tuple[Work, Work]:
    arguments = [torch.randn(records, heads, tokens, width, requires_grad=True) for _ in range(3)]
    return _both_ways(attention, arguments), _both_ways(F.scaled_dot_product_attention, arguments)


def _cpu_adaln(records: int, tokens: int, width: int) -> tuple[Work, Work]:
    shapes = ((tokens, width), (width,), (width,), (tokens, width), (width,))
    arguments = [torch.randn(records, *shape, requires_grad=True) for shape in shapes]

    def plain(x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        residual = x + gate[:, None] * branch
        return F.layer_norm(residual, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    return _both_ways(lambda *given: adaln(*given)[1], arguments), _both_ways(plain, arguments)


def _cpu_rms_norm(records: int, tokens: int, width: int) -> tuple[Work, Work]:
    arguments = [torch.randn(records, *shape, requires_grad=True) for shape in ((tokens, width), (width,))]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), eps=1e-6) * weight[:, None]

    return _both_ways(functools.partial(rms_norm, eps=1e-6), arguments), _both_ways(plain, arguments)


_CPU: Mapping[str, Callable[[], tuple[Work, Work]]] = {
    "attention.digits": lambda: _cpu_attention(64, 4, 16, 32),
    "attention.fashion": lambda: _cpu_attention(32, 3, 196, 64),
    "attention.dit_xl": lambda: _cpu_attention(2, 16, 256, 72),
    "adaln.digits": lambda: _cpu_adaln(64, 16, 128),
    "adaln.dit_xl": lambda: _cpu_adaln(4, 256, 1152),
    "rms_norm.dit_xl": lambda: _cpu_rms_norm(4, 256, 1152),
}
