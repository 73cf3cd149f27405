"""The layers every model is built from: each can tell each record's gradient norm.

Only `Linear` and `Embedding` hold trainable parameters, so that private training sees every gradient:
they go through the ops of `kernels.per_record`, whose first dimension is always the record.
"""

# B records, N tokens, D model width, H heads, K head width, S sinusoid features

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import per_record
from kernels.per_record import PerRecordModule

LAYER_NORM_EPS = 1e-6
SINUSOID_FEATURES = 256
MAX_PERIOD = 10_000


class Linear(PerRecordModule, nn.Linear):
    """`nn.Linear` over [B, ..., in_features], whose backward can report each record's gradient norm."""

    def forward(self, input: Tensor) -> Tensor:
        return per_record.linear(input, self.weight, self.bias, self.norm_row)


class Embedding(PerRecordModule, nn.Embedding):
    """`nn.Embedding` over int64 [B, ...], whose backward can report each record's gradient norm."""

    def forward(self, input: Tensor) -> Tensor:
        return per_record.embedding(input, self.weight, self.norm_row)


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
        out_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
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
    normed_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=LAYER_NORM_EPS)
    return normed_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def sincos_positions(grid_size: int, width: int) -> Tensor:
    """Fixed position features of a square grid, fp32 [grid_size * grid_size, width] on the CPU.

    Rows run over the grid row by row; the first half of the features encodes the column, the second the row, each as
    sines then cosines, as Peebles & Xie have them. Computed in float64, so that every device starts from the same bits.
    """
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * frequencies
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return torch.cat([axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)], dim=-1).float()
