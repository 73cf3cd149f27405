"""The unified model: one transformer that reads and writes text and images, packed into rows of tokens.

A token sees what `kernels.attention_mask.text_and_images` shows it: text what precedes it, an image all of itself, and
nobody a noised image but itself. Text is predicted by the embedding's own table (Press & Wolf 2017), patches by a
linear layer. Source: Zhou et al. 2024, "Transfusion" (arXiv:2408.11039); separate norms and feed-forward networks for
text and images, Liang et al. 2024, "Mixture-of-Transformers" (arXiv:2411.04996) and Deng et al. 2025, "BAGEL"
(arXiv:2505.14683); QK-norm and rotary positions as in `kernels.qk_norm_rope`.

Time enters by an embedding added to the tokens of a noised or clean image at the input, as in Transfusion and BAGEL.
adaLN would give every token of a row a shift, scale and gate of its own, six vectors a layer: text would have to be
given neutral ones, and rows with several images would pay for B * N of them. An added embedding is exactly absent from
text, costs one product a row, and leaves every block the same for both modalities.

A patch's row and column enter twice: turned into queries and keys, which tells patches how far apart they are, and as
fixed sines and cosines at the input (as in BAGEL), which tells where in the image each is.

Only a `PerRecordModule` holds parameters, and its first dimension is the row: in private stages that is the unit.
"""

# B rows, N tokens, D model width, H heads, K head width, F features of a patch, V vocabulary, I images, M keys of a
# cache, L layers, E experts
from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.attention import attention
from kernels.attention_mask import AttentionMask, attention_mask, text_and_images
from kernels.norms import rms_norm
from kernels.qk_norm_rope import qk_norm_rope, rotary_angles
from models.layers import (
    MAX_PERIOD,
    SINUSOID_FEATURES,
    LearnedTensor,
    Linear,
    TiedEmbedding,
    TimestepEmbedding,
    fill_in,
)
from models.moe import MixtureOfExperts, Routed, SwiGLU
from models.packed import Packed
from models.sizes import Sized
from models.tokenizer import open_tokenizer

SizeName = Literal["nano", "tiny", "S", "B", "L", "1B", "3B", "7B"]

# width, depth, heads: up to L those of the DiT, 7B that of LLaMA
SIZES: Mapping[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (192, 6, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "1B": (2048, 20, 16),
    "3B": (3072, 26, 24),
    "7B": (4096, 32, 32),
}
HIDDEN_MULTIPLE = 128


class UnifiedConfig(Sized):
    """A unified model's shape: a named `size`, or `width`, `depth` and `heads`; after validation all four agree.

    tokenizer: "bytes", or the path of a `tokenizers` file. tokenizer_sha256 and vocab_size follow from it; where they
    are given, as in what is written of a trained model, the file must have them.
    image_size, max_caption_tokens: of the square images and the captions that the model is for; images of other forms
    may have as many patches.
    modality_experts: norms and feed-forward networks of their own for text tokens and for patches.
    num_experts, top_k: of a mixture of experts (for each modality, where they have their own); an expert's hidden width
    is the dense network's divided by top_k, so that a token costs the same.
    """

    SIZES: ClassVar = SIZES

    name: Literal["unified"] = "unified"
    size: SizeName | None = None
    tokenizer: str = "bytes"
    tokenizer_sha256: str | None = None
    vocab_size: int = Field(default=0, ge=0)
    image_size: int = Field(gt=0)
    channels: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    max_caption_tokens: int = Field(gt=0)
    modality_experts: bool = False
    num_experts: int = Field(default=1, ge=1)
    top_k: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _read_tokenizer(cls, values: Any) -> Any:
        name = values.get("tokenizer", "bytes") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        found: dict[str, Any] = {"vocab_size": open_tokenizer(name).vocab_size, "tokenizer_sha256": None}
        if name != "bytes":
            found["tokenizer_sha256"] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for key, value in found.items():
            if values.get(key) not in (None, 0, value):
                raise ValueError(f"{key} is {values[key]}, but tokenizer {name} has {value}: restore that file")
        return {**values, **found}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.width // self.heads % 8:
            raise ValueError(
                f"width {self.width} over heads {self.heads} must be a multiple of 8, for rotary positions"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but num_experts {self.num_experts}: choose no more than there are"
            )
        if self.hidden_width % self.top_k:
            raise ValueError(f"top_k is {self.top_k}, which does not divide the hidden width, {self.hidden_width}")
        return self

    @property
    def hidden_width(self) -> int:
        """Of SwiGLU: 8/3 of the width, so that its three matrices have the parameters of two with 4, rounded up."""
        return -(-8 * self.width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE

    @property
    def num_modalities(self) -> int:
        return 2 if self.modality_experts else 1

    @property
    def experts_a_layer(self) -> int:
        """Of all modalities together; 0 where the layers are dense."""
        experts = self.num_experts * self.num_modalities
        return 0 if experts == 1 else experts

    @property
    def patch_features(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Of the longest document of a caption and an image, each with its delimiters."""
        return self.max_caption_tokens + 2 + self.num_patches + 2

    @property
    def linear_outputs(self) -> int:
        """Elements that the linear layers put out for a token: 5 D and two hidden widths a block, and the logits."""
        return self.depth * (5 * self.width + 2 * self.hidden_width) + self.vocab_size

    def kept_elements(self, *, checkpointed: bool = False) -> int:
        """Elements kept for the backward, a token, an estimate.

        A block keeps 16 D and 4 H, H being the hidden width: two norms' inputs, normed inputs and outputs 6, q k v
        before and after their norms 5, attention's output, its copy and both residuals 5, and of the SwiGLU gate,
        value, silu and product. Norms by modality 3 D more, and a router 3 D for each choice. With activation
        checkpointing D for each block's input, and one block in full. Then logits and their softmax.
        """
        routed = 3 * self.top_k if self.num_experts > 1 else 0
        block = (16 + 3 * (self.num_modalities - 1) + routed) * self.width + 4 * self.hidden_width
        return (self.depth * self.width + block if checkpointed else self.depth * block) + 3 * self.vocab_size

    def forward_flops(self, num_rows: int, num_tokens: int, num_images: int = 1, pairs: int | None = None) -> int:
        """Floating-point operations of one forward of rows of so many tokens and images, a multiply-add as two.

        Matrix products only. `pairs` is the mask's `visited_pairs()`; None for all pairs, as attention on the CPU.
        """
        tokens, width, experts = num_rows * num_tokens, self.width, self.num_experts * self.num_modalities
        router = experts * width if self.num_experts > 1 else 0
        block = 2 * tokens * (4 * width**2 + 3 * width * self.hidden_width + router)
        attended = 4 * width * (tokens * num_tokens if pairs is None else pairs)
        ends = 2 * tokens * width * (self.vocab_size + 2 * self.patch_features + num_images)
        conditioning = 2 * num_rows * num_images * (SINUSOID_FEATURES * width + width**2)
        return self.depth * (block + attended) + ends + conditioning

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Pairs of a head's features turned by the place in the document, by the row and by the column."""
        pairs = self.width // self.heads // 2
        return pairs - 2 * (pairs // 4), pairs // 4, pairs // 4


class Norm(nn.Module):
    """RMSNorm with a scale for all tokens, or one for those of each modality."""

    def __init__(self, width: int, num_modalities: int) -> None:
        super().__init__()
        self.scale = LearnedTensor(num_modalities, width)

    def forward(self, x_BND: Tensor, modality_BN: Tensor) -> Tensor:
        scale_BMD = self.scale(len(x_BND))
        if scale_BMD.shape[1] == 1:
            return rms_norm(x_BND, scale_BMD[:, 0])
        scale_BND = torch.where(modality_BN[..., None] == 1, scale_BMD[:, 1:], scale_BMD[:, :1])
        return rms_norm(x_BND, torch.ones_like(x_BND[:, 0])) * scale_BND.to(x_BND.dtype)


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of the tokens that a generation has seen, one document a row, with room for more."""

    keys_LBMHK: Tensor
    values_LBMHK: Tensor
    lengths_B: Tensor  # int32: tokens that count; what stands behind them is overwritten and never seen

    def rows(self, rows_R: Tensor) -> Cache:
        """A copy of these rows, int64 (R,), in this order."""
        return Cache(self.keys_LBMHK[:, rows_R], self.values_LBMHK[:, rows_R], self.lengths_B[rows_R])

    def longer(self, by_B: Tensor) -> Cache:
        """The same memory with so many tokens more that count."""
        return Cache(self.keys_LBMHK, self.values_LBMHK, self.lengths_B + by_B.to(self.lengths_B.dtype))

    def mask(self, local: AttentionMask) -> AttentionMask:
        """Queries that see all that is cached, and of the tokens that come next what `local` shows them.

        A row is one document, and a noised image may stand only last: what noise hides from later tokens is not kept.
        """
        hi_BN = torch.where(local.hi_BN > 0, local.hi_BN + self.lengths_B[:, None], 0)
        return attention_mask(torch.zeros_like(hi_BN), hi_BN, num_keys=self.keys_LBMHK.shape[2])

    def put(self, layer: int, k_BNHK: Tensor, v_BNHK: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind what counts; returns the layer's keys and values, (B, M, H, K)."""
        rows_B1 = torch.arange(len(k_BNHK), device=k_BNHK.device)[:, None]
        slots_BN = self.lengths_B[:, None] + torch.arange(k_BNHK.shape[1], device=k_BNHK.device)
        for cached_LBMHK, new_BNHK in ((self.keys_LBMHK, k_BNHK), (self.values_LBMHK, v_BNHK)):
            cached_LBMHK[layer, rows_B1, slots_BN] = new_BNHK.to(cached_LBMHK.dtype)
        return self.keys_LBMHK[layer], self.values_LBMHK[layer]


class PackedAttention(nn.Module):
    """Self-attention of both modalities under the batch's mask, with QK-norm and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_scale, self.k_scale = LearnedTensor(width // heads), LearnedTensor(width // heads)
        self.proj = Linear(width, width, bias=False)

    def forward(
        self, x_BND: Tensor, angles: Tensor, mask: AttentionMask, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        q_BNHK, k_BNHK, v_BNHK = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_BNHK, k_BNHK = qk_norm_rope(q_BNHK, k_BNHK, self.q_scale(len(x_BND)), self.k_scale(len(x_BND)), angles)
        if cache is not None:
            k_BNHK, v_BNHK = cache.put(layer, k_BNHK, v_BNHK)
        out_BHNK = attention(q_BNHK.transpose(1, 2), k_BNHK.transpose(1, 2), v_BNHK.transpose(1, 2), mask)
        return self.proj(out_BHNK.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward network or a mixture of them, each on a norm of the residual stream."""

    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        width, modalities = config.width, config.num_modalities
        self.attention_norm, self.mlp_norm = Norm(width, modalities), Norm(width, modalities)
        self.attention = PackedAttention(width, config.heads)
        expert_width = config.hidden_width // config.top_k
        if config.experts_a_layer == 0:
            self.mlp = SwiGLU(width, expert_width)
        else:
            self.mlp = MixtureOfExperts(width, expert_width, config.num_experts, config.top_k, modalities)

    def forward(
        self, x_BND: Tensor, angles: Tensor, mask: AttentionMask, modality_BN: Tensor, present_BN: Tensor,
        cache: Cache | None = None, layer: int = 0,
    ) -> tuple[Tensor, Routed | None]:  # fmt: skip
        attended_BND = self.attention(self.attention_norm(x_BND, modality_BN), angles, mask, cache, layer)
        x_BND = x_BND + attended_BND
        normed_BND, routed = self.mlp_norm(x_BND, modality_BN), None
        if isinstance(self.mlp, MixtureOfExperts):
            out_BND, routed = self.mlp(normed_BND, modality_BN, present_BN)
        else:
            out_BND = self.mlp(normed_BND)
        return x_BND + out_BND, routed


class Prediction(NamedTuple):
    """What the model says of a batch; at tokens of the other modality, and of padding, it means nothing."""

    logits_BNV: Tensor  # of the token that follows
    patches_BNF: Tensor  # of a noised patch, what the objective asks for
    routed: Routed | None  # by layer, (B, L, E) and (B, L); None without routers


class Unified(nn.Module):
    """Predict each text token's successor and each noised patch's target, from one stream.

    Guarantee: what a token gets depends on the tokens that it sees, on their positions and images' times, and on
    nothing else; a row on nothing of another row. Every layer runs whatever modalities a batch has, so that each of
    them reports in a private step. Builds on the meta device, as `DiT`.
    """

    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = TiedEmbedding(config.vocab_size, width)
        self.patch_embed = Linear(config.patch_features, width)
        self.time_embed = TimestepEmbedding(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = Norm(width, config.num_modalities)
        self.patch_head = Linear(width, config.patch_features)

    def forward(self, batch: Packed, times_BI: Tensor, cache: Cache | None = None) -> Prediction:
        """The batch, its patches noised as far as `times_BI`, fp32 in [0, 1], says; a clean image's time is taken as 0.

        With a `cache` the batch's rows go on where it ends: they see all of it, and are written behind it; positions
        are the caller's matter. Raises ValueError where shapes do not fit.
        """
        self._check(batch, times_BI)
        x_BND = self._embed(batch, torch.where(batch.noised_BI, times_BI, 0.0))
        mask = text_and_images(batch.document_BN, batch.image_BN, batch.noised_BN)
        if cache is not None:
            mask = cache.mask(mask)
        angles = rotary_angles(batch.positions_BN3, self.config.rotary_widths)
        modality_BN, present_BN = batch.is_patch_BN.long(), batch.present_BN
        routed: list[Routed] = []
        for layer, block in enumerate(self.blocks):
            x_BND, of_layer = block(x_BND, angles, mask, modality_BN, present_BN, cache, layer)
            routed += [] if of_layer is None else [of_layer]
        x_BND = self.final_norm(x_BND, modality_BN)
        stacked = Routed(*(torch.stack(each, 1) for each in zip(*routed, strict=True))) if routed else None
        return Prediction(self.embed(x_BND), self.patch_head(x_BND), stacked)

    def empty_cache(self, num_rows: int, num_tokens: int) -> Cache:
        """Room for the keys and values of `num_tokens` tokens in each row."""
        config, like = self.config, self.embed.weight
        shape = (config.depth, num_rows, num_tokens, config.heads, config.width // config.heads)
        lengths_B = torch.zeros(num_rows, dtype=torch.int32, device=like.device)
        return Cache(like.new_zeros(shape), like.new_zeros(shape), lengths_B)

    def init_buffers(self) -> None:
        """There are none: positions are the batch's."""

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill in every parameter. Guarantee: that of `models.layers.fill_in`."""
        fill_in(self, self.initial_value, generator)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What `init_weights` puts into one parameter, whole, on the CPU, asked for in the order of the parameters.

        Xavier, with what writes to the residual stream smaller by sqrt(2 depth) (Radford et al. 2019) and the patch
        head at zero; scales are ones, biases zeros.
        """
        value = torch.zeros(shape, device="cpu")
        if "scale" in name:
            value += 1
        elif name.startswith(("embed", "time_embed")) and name.endswith("weight"):
            nn.init.normal_(value, std=0.02, generator=generator)
        elif not name.endswith("bias") and name != "patch_head.weight":
            for matrix in value if value.dim() == 3 else [value]:  # each expert's by itself
                nn.init.xavier_uniform_(matrix, generator=generator)
            if name.endswith(("proj.weight", "down.weight", "experts.down")):
                value /= math.sqrt(2 * self.config.depth)
        return value

    def _embed(self, batch: Packed, times_BI: Tensor) -> Tensor:
        times_BID = self.time_embed(times_BI.flatten()).unflatten(0, times_BI.shape)
        patches_BND = self.patch_embed(batch.patches_BNF.to(self.patch_embed.weight.dtype))
        patches_BND = patches_BND + _places(batch.positions_BN3[..., 1:], self.config.width).to(patches_BND.dtype)
        x_BND = torch.where(batch.is_patch_BN[..., None], patches_BND, self.embed(batch.tokens_BN))
        # by a product with zeros and ones: on a GPU the backward of an index adds up in no fixed order
        images_I = torch.arange(times_BI.shape[1], device=times_BI.device)
        own_BNI = (batch.image_BN[..., None] == images_I).to(times_BID.dtype)
        return x_BND + own_BNI @ times_BID

    def _check(self, batch: Packed, times_BI: Tensor) -> None:
        if batch.patches_BNF.shape[-1] != self.config.patch_features:
            raise ValueError(
                f"patches_BNF has {batch.patches_BNF.shape[-1]} features, but {self.config.channels} channels in "
                f"patches of {self.config.patch_size} have {self.config.patch_features}: lay it out for this model"
            )
        if times_BI.shape != batch.noised_BI.shape:
            raise ValueError(
                f"times_BI has shape {tuple(times_BI.shape)}: give one for each image, {tuple(batch.noised_BI.shape)}"
            )


def _places(rows_columns_BN2: Tensor, width: int) -> Tensor:
    """Fixed features of each token's row and column, fp32 (B, N, D): of either sines, then cosines."""
    exponents = -math.log(MAX_PERIOD) * torch.arange(width // 4, device=rows_columns_BN2.device) / (width // 4)
    angles = rows_columns_BN2[..., None].float() * torch.exp(exponents)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
