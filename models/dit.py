"""DiT: the diffusion transformer with adaLN-Zero blocks.

Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers". Without a learned sigma: the output has the
input's channels. Nothing couples records: there are no batch statistics, and each output depends on its record alone.
"""

# B records, C channels, H x W pixels or latents, P patch side, N tokens, F features of a patch, D model width

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.adaln import adaln
from models.layers import (
    LAYER_NORM_EPS,
    MLP,
    SINUSOID_FEATURES,
    Attention,
    Embedding,
    Linear,
    TimestepEmbedding,
    fill_in,
    modulated_norm,
    sincos_positions,
)
from models.sizes import Sized

SizeName = Literal["nano", "tiny", "S", "B", "L", "XL"]

# width, depth, heads; S to XL as in the paper's Table 1
SIZES: Mapping[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (192, 6, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class DiTConfig(Sized):
    """A DiT's shape: a named `size`, or `width`, `depth` and `heads`; after validation all four are set and agree."""

    SIZES: ClassVar = SIZES

    name: Literal["dit"] = "dit"
    size: SizeName | None = None
    image_size: int = Field(gt=0)
    channels: int = Field(gt=0)
    patch_size: int = Field(default=2, gt=0)
    num_classes: int = Field(gt=0)
    mlp_ratio: int = Field(default=4, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the position features need")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def patch_features(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def linear_outputs(self) -> int:
        """Elements that the blocks' linear layers put out for a token: D (5 + r) each, r being the MLP's ratio."""
        return self.depth * self.width * (5 + self.mlp_ratio)

    def kept_elements(self, *, checkpointed: bool = False) -> int:
        """Elements kept for the backward, a token, an estimate.

        A block keeps D (13 + 2 r): norms' inputs and outputs 4, linears' inputs 2 + r, q k v 3, attention's output
        twice, gates' 2, GELU's input r. With activation checkpointing D for each block's input, and one block in full.
        """
        block = self.width * (13 + 2 * self.mlp_ratio)
        return self.depth * self.width + block if checkpointed else self.depth * block

    def forward_flops(self, num_records: int = 1) -> int:
        """Floating-point operations of one forward, a multiply-add as two; matrix products only."""
        width, tokens = self.width, self.num_tokens
        token_weights = (4 + 2 * self.mlp_ratio) * width**2
        block = 2 * tokens * token_weights + 4 * tokens**2 * width + 2 * 6 * width**2
        ends = 2 * (2 * tokens * self.patch_features * width)
        conditioning = 2 * (SINUSOID_FEATURES * width + width**2) + 2 * 2 * width**2
        return num_records * (self.depth * block + ends + conditioning)


class DiTBlock(nn.Module):
    """Attention and MLP, each normed, shifted, scaled and gated by the record's conditioning.

    Conditioning stays [B, D] into `modulation`: one row a record makes its per-record gradient norm cheap.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, mlp_ratio * width)

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BD).chunk(6, dim=-1)
        attended_BND = self.attention(modulated_norm(x_BND, shift1, scale1))
        x_BND, modulated_BND = adaln(x_BND, shift2, scale2, attended_BND, gate1, LAYER_NORM_EPS)
        return x_BND + gate2[:, None] * self.mlp(modulated_BND)


class FinalLayer(nn.Module):
    """Norm and modulate, then one linear layer to each token's patch, [B, N, D] -> [B, N, F]."""

    def __init__(self, width: int, patch_features: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 2 * width)
        self.proj = Linear(width, patch_features)

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_BD).chunk(2, dim=-1)
        return self.proj(modulated_norm(x_BND, shift, scale))


class DiT(nn.Module):
    """Predict from x_t, its time and its class what the objective asks for, at x_t's shape.

    Guarantee: output i depends on record i alone. Builds on the meta device; after `to_empty`, call `init_weights`,
    or `init_buffers` and then load the parameters.
    """

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = Linear(config.patch_features, width)
        self.time_embed = TimestepEmbedding(width)
        self.class_embed = Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final = FinalLayer(width, config.patch_features)
        self.register_buffer("positions", torch.empty(config.num_tokens, width), persistent=False)
        self.init_buffers()

    @property
    def null_class(self) -> int:
        """The label that stands for "no class" in label dropout and classifier-free guidance."""
        return self.config.num_classes

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """x_t [B, C, H, W], t in [0, 1] [B], int64 labels in 0..num_classes [B] -> the prediction [B, C, H, W]."""
        tokens_BND = self.patch_embed(self._patchify(x_BCHW).to(self.patch_embed.weight.dtype))
        tokens_BND = tokens_BND + self.positions.to(tokens_BND.dtype)
        condition_BD = F.silu(self.time_embed(t_B) + self.class_embed(y_B))
        for block in self.blocks:
            tokens_BND = block(tokens_BND, condition_BD)
        return self._unpatchify(self.final(tokens_BND, condition_BD))

    def init_buffers(self) -> None:
        """Fill in the position features, which no checkpoint holds."""
        self.positions.copy_(sincos_positions(self.config.grid_size, self.config.width))

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill in every parameter and buffer as the paper does: Xavier, with the gates and the output at zero.

        Guarantee: that of `models.layers.fill_in`.
        """
        self.init_buffers()
        fill_in(self, self.initial_value, generator)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What `init_weights` puts into one parameter, whole, on the CPU, asked for in the order of the parameters."""
        value = torch.zeros(shape, device="cpu")
        if name.startswith(("time_embed", "class_embed")) and name.endswith("weight"):
            nn.init.normal_(value, std=0.02, generator=generator)
        elif name.endswith("weight") and "modulation" not in name and name != "final.proj.weight":
            nn.init.xavier_uniform_(value, generator=generator)
        return value

    def _patchify(self, x_BCHW: Tensor) -> Tensor:
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if x_BCHW.shape[1:] != expected:
            raise ValueError(f"the input has shape {tuple(x_BCHW.shape)}, but the model takes [B, *{expected}]")
        grid, patch = config.grid_size, config.patch_size
        x_BChpwq = x_BCHW.reshape(-1, config.channels, grid, patch, grid, patch)
        # features in the order (channel, row, column), that of a convolution's weight
        return x_BChpwq.permute(0, 2, 4, 1, 3, 5).reshape(-1, config.num_tokens, config.patch_features)

    def _unpatchify(self, x_BNF: Tensor) -> Tensor:
        config = self.config
        grid, patch = config.grid_size, config.patch_size
        # features in the order (row, column, channel), that of Peebles & Xie's last layer
        x_BhwpqC = x_BNF.reshape(-1, grid, grid, patch, patch, config.channels)
        return x_BhwpqC.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.channels, config.image_size, config.image_size)
