"""The layers every model is built from: each can tell each record's gradient norm.

Only a `PerRecordModule` holds trainable parameters, so that private training sees every gradient: it uses them through
the operations of `kernels.per_record`, whose first dimension is always the record.
"""

# B records, N tokens, D model width, H heads, K head width, S sinusoid features, V entries of a table

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels import per_record
from kernels.adaln import adaln
from kernels.attention import attention
from kernels.norms import layer_norm, rms_norm
from kernels.per_record import PerRecordModule

LAYER_NORM_EPS = 1e-6
SINUSOID_FEATURES = 256
MAX_PERIOD = 10_000


class Linear(PerRecordModule, nn.Linear):
    """`nn.Linear` over [B, ..., in_features] that can tell each record's gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return per_record.linear(input, self.weight, self.bias, self.site)


class Conv2d(PerRecordModule, nn.Conv2d):
    """`nn.Conv2d` over [B, C, H, W], zero-padded by whole numbers, that can tell each record's gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"padding is {self.padding!r} ({self.padding_mode}): give numbers, filled with zeros")
        stride, padding, dilation = self.stride, self.padding, self.dilation
        return per_record.conv2d(
            input, self.weight, self.bias, self.site,
            stride=stride, padding=padding, dilation=dilation, groups=self.groups,  # type: ignore[arg-type]
        )  # fmt: skip


class Embedding(PerRecordModule, nn.Embedding):
    """`nn.Embedding` over int64 [B, ...] that can tell each record's gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or self.scale_grad_by_freq:
            raise ValueError("max_norm and scale_grad_by_freq couple records: leave them unset")
        return per_record.embedding(input, self.weight, self.site, self.padding_idx)


class TiedEmbedding(Embedding):
    """One table, used as the text's embedding and as its head: each use reports its per-record gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """int64 tokens [B, N] -> [B, N, D]; floats [B, N, D] -> logits [B, N, V]. One method: wrappers hook forward."""
        if input.is_floating_point():
            return per_record.linear(input, self.weight, None, self.site)
        return super().forward(input)


class LearnedTensor(PerRecordModule):
    """A raw parameter: a positional table, register tokens, a scale, a scalar. Returns a copy for each record.

    `forward(num_rows)` is [num_rows, *shape], a view without memory of its own.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, num_rows: int) -> Tensor:
        return per_record.copies(self.weight, num_rows, self.site)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with a learned scale and, where `bias`, a learned shift."""

    def __init__(self, width: int, *, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.scale = LearnedTensor(width)
        self.shift = LearnedTensor(width) if bias else None
        nn.init.ones_(self.scale.weight)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.scale(len(x)), None if self.shift is None else self.shift(len(x)), self.eps)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned scale: over a model's width, or over a head's (QK-norm)."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = LearnedTensor(width)
        nn.init.ones_(self.scale.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale(len(x)), self.eps)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of low rank: W x + b + (alpha / rank) B A x.

    Source: Hu et al. 2021 (arXiv:2106.09685, Eq. 3). B starts at zero, so the layer starts as the frozen one.
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        if not 0 < rank <= min(frozen.in_features, frozen.out_features):
            raise ValueError(f"LoRA rank is {rank}: a {frozen.in_features} x {frozen.out_features} layer takes less")
        self.frozen = frozen.requires_grad_(False)
        self.down = Linear(frozen.in_features, rank, bias=False)
        self.up = Linear(rank, frozen.out_features, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


class TimestepEmbedding(nn.Module):
    """Embed times in [0, 1] as [B, D]: sinusoids of 1000 t in fp32, then two linear layers.

    The frequencies are those of `diffusers`' DiT, MAX_PERIOD ** (-i / 127) for i = 0..127, so that exports load there.
    Peebles & Xie divide by 128: the same range but for the last octave's fraction, yet no weights map one to the other.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(SINUSOID_FEATURES, width)
        self.fc2 = Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        half = SINUSOID_FEATURES // 2
        # fp32: bf16 holds 1000 t to 8 bits, which merges neighbouring times; in this order of operations, for at 1000
        # radians another rounding of the frequencies turns the angles by 1e-4 from those of diffusers
        exponents = -math.log(MAX_PERIOD) * torch.arange(half, device=t_B.device, dtype=torch.float32) / (half - 1)
        angles = 1000 * t_B.float()[:, None] * torch.exp(exponents)
        sinusoid_BS = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.fc2(F.silu(self.fc1(sinusoid_BS.to(self.fc1.weight.dtype))))


class Attention(nn.Module):
    """Bidirectional self-attention of one record's tokens, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv_BN3HK = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        q_BHNK, k_BHNK, v_BHNK = qkv_BN3HK.permute(2, 0, 3, 1, 4)
        out_BHNK = attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(out_BHNK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the tanh form of GELU, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh"))


def modulated_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then each record's (1 + scale) and shift."""
    return adaln(x_BND, shift_BD, scale_BD, eps=LAYER_NORM_EPS)[1]


def sincos_positions(grid_size: int, width: int) -> Tensor:
    """Fixed position features of a square grid, fp32 [grid_size * grid_size, width] on the CPU.

    Rows run over the grid row by row; the first half of the features encodes the column, the second the row, each as
    sines then cosines, as Peebles & Xie have them. Computed in float64, so that every device starts from the same bits.
    """
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * frequencies
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return torch.cat([axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)], dim=-1).float()


@torch.no_grad()
def fill_in(
    model: nn.Module,
    initial_value: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
    generator: torch.Generator,
) -> None:
    """Give every parameter its `initial_value(name, shape, generator)`, in the order of the parameters.

    Guarantee: the weights are a function of the generator's seed and the model, whatever the device or sharding: each
    tensor is drawn whole on the CPU, and a sharded parameter (DTensor) keeps its own part.
    """
    for name, parameter in model.named_parameters():
        value = initial_value(name, tuple(parameter.shape), generator)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
