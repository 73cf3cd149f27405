"""VAE: a convolutional autoencoder whose latents are drawn towards a standard normal, as latent diffusion has it.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G. The layers, and
every tensor's name and shape, are those of `diffusers`' AutoencoderKL, so that its weights load here and ours there.
It is trained on public data alone, hence of plain layers: none of them tells a record's gradient.
"""

# B records, C channels, H x W pixels, c latent channels, h x w latents, N = h w, D width
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import fill_in

GROUP_NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)

Positive = Annotated[int, Field(gt=0)]


class VAEConfig(BaseModel):
    """A VAE's shape. widths: of its levels, from the pixels down; each level after the first halves the side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["vae"] = "vae"
    image_size: Positive
    channels: Positive
    latent_channels: Positive
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    layers: Positive = 1  # residual blocks of a level of the encoder; the decoder has one more
    norm_groups: Positive = 8
    attention: bool = False  # over all places of the lowest level
    quant_conv: bool = False  # 1 x 1 convolutions on both sides of the latents
    post_quant_conv: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.factor}, by which {len(self.widths)} widths "
                "shrink an image: give fewer widths, or another size"
            )
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"width {width} is not a multiple of norm_groups {self.norm_groups}")
        return self

    @property
    def factor(self) -> int:
        """By how much an image's side shrinks."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents."""
        side = self.image_size // self.factor
        return self.latent_channels, side, side

    @property
    def num_tokens(self) -> int:
        """The pixels of an image, which what is kept for the backward is told by."""
        return self.image_size**2

    @property
    def linear_outputs(self) -> int:
        """None that a private stage would count: there is none."""
        return 0

    def kept_elements(self, *, checkpointed: bool = False) -> int:
        """Elements kept for the backward, a pixel, an estimate.

        A residual block keeps 6 D a place: what goes into two norms, SiLUs and convolutions; 3 D' more where it comes
        from a level wider by D'. The ways down and up keep what they convolve, and the last layers 4 D. With activation
        checkpointing a block keeps D for its input, and one block is kept in full.
        """
        blocks, rest = list[float](), 4.0 * self.widths[0]
        for level, width in enumerate(self.widths):
            below = self.widths[level + 1 : level + 2]
            blocks += [width / 4**level] * (2 * self.layers + (1 if below else 5))
            rest += sum(width + wide + 3 * (wide - width) for wide in below) / 4**level
        return math.ceil(rest + (sum(blocks) + 6 * max(blocks) if checkpointed else 6 * sum(blocks)))

    def forward_flops(self, num_records: int = 1) -> int:
        """Floating-point operations of one forward, a multiply-add as two; matrix products only.

        Counted on a model without memory, for what a convolution costs hangs on the level that it is at.
        """
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            image = torch.empty(1, self.channels, self.image_size, self.image_size)
            VAE(self)(image, torch.empty(1, *self.latent_shape))
        return num_records * counter.get_total_flops()

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], image_size: int) -> VAEConfig:
        """The shape that the config.json of an AutoencoderKL describes; ValueError where it is not one we can be."""
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"config.json is of class {config['_class_name']}: give the folder of an AutoencoderKL")
        settings = {**_DIFFUSERS_DEFAULTS, **config}
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if set(settings[key]) != {kind} or len(settings[key]) != len(settings["block_out_channels"]):
                raise ValueError(f"config.json has {key} {settings[key]}: ours is {kind} at each of block_out_channels")
        if settings["act_fn"] != "silu" or settings["in_channels"] != settings["out_channels"]:
            raise ValueError("config.json has an act_fn that is not silu, or out_channels that are not its in_channels")
        return cls(
            image_size=image_size,
            channels=settings["in_channels"],
            latent_channels=settings["latent_channels"],
            widths=tuple(settings["block_out_channels"]),
            layers=settings["layers_per_block"],
            norm_groups=settings["norm_num_groups"],
            attention=settings["mid_block_add_attention"],
            quant_conv=settings["use_quant_conv"],
            post_quant_conv=settings["use_post_quant_conv"],
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The config.json of an AutoencoderKL of this shape."""
        levels = len(self.widths)
        return _DIFFUSERS_DEFAULTS | {
            "_class_name": "AutoencoderKL",
            "in_channels": self.channels,
            "out_channels": self.channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.widths),
            "layers_per_block": self.layers,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_groups,
            "sample_size": self.image_size,
            "mid_block_add_attention": self.attention,
            "use_quant_conv": self.quant_conv,
            "use_post_quant_conv": self.post_quant_conv,
        }


# What a config.json that says nothing means.
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# Weights of before diffusers 0.12 name the layers of an attention otherwise.
_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ResnetBlock(nn.Module):
    """Two convolutions behind norm and SiLU, added to the input, [B, D, H, W] -> [B, D', H, W]."""

    def __init__(self, width_in: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, width_in, GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, width, GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Module):
    """One head of attention over all places of a map, added to it."""

    def __init__(self, width: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, width, GROUP_NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BDhw: Tensor) -> Tensor:
        tokens_BND = self.group_norm(x_BDhw).flatten(2).transpose(1, 2)
        out_BND = F.scaled_dot_product_attention(self.to_q(tokens_BND), self.to_k(tokens_BND), self.to_v(tokens_BND))
        return x_BDhw + self.to_out[0](out_BND).transpose(1, 2).reshape(x_BDhw.shape)


class Downsample(nn.Module):
    """A strided convolution that halves the side; the padding is on the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each place four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, then the way down to the next level or up to it, where there is one."""

    def __init__(self, width_in: int, width: int, num_blocks: int, norm_groups: int, way: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width if number else width_in, width, norm_groups) for number in range(num_blocks)
        )
        if way == "down":
            self.downsamplers = nn.ModuleList([Downsample(width)])
        if way == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part.children():
                x = layer(x)
        return x


class Middle(nn.Module):
    """Two residual blocks, with attention between them where there is any."""

    def __init__(self, width: int, norm_groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, norm_groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(width, norm_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images [B, C, H, W] -> [B, 2 c, h, w], mean and log-variance one after the other."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(above, width, config.layers, groups, "down" if number < len(widths) - 1 else None)
            for number, (above, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = Middle(widths[-1], groups, attention=config.attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, c, h, w] -> images [B, C, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, attention=config.attention)
        self.up_blocks = nn.ModuleList(
            Level(below, width, config.layers + 1, groups, "up" if number < len(widths) - 1 else None)
            for number, (below, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Images in [-1, 1] to latents and back. Nothing couples records: norms are over one record's groups of channels.

    Builds on the meta device; after `to_empty`, call `init_weights`, or load the parameters.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else None

    @property
    def blocks(self) -> list[nn.Module]:
        """What sharding gathers, and checkpointing of activations recomputes, one at a time."""
        return [part for part in self.modules() if isinstance(part, ResnetBlock | SpatialAttention)]

    def forward(self, x_BCHW: Tensor, noise_Bchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, and standard normals of the latents' shape -> the images again; the latents' mean, log-variance."""
        mean, log_variance = self.encode(x_BCHW)
        return self.decode(mean + torch.exp(0.5 * log_variance) * noise_Bchw), mean, log_variance

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of each image's latents: mean and log-variance, fp32 [B, c, h, w]."""
        if x_BCHW.shape[1] != self.config.channels or any(side % self.config.factor for side in x_BCHW.shape[2:]):
            raise ValueError(
                f"the images have shape {tuple(x_BCHW.shape)}, but the VAE takes [B, {self.config.channels}, H, W] "
                f"with H and W multiples of {self.config.factor}"
            )
        moments = self.encoder(x_BCHW)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def decode(self, z_Bchw: Tensor) -> Tensor:
        """Latents, not normalised, to images [B, C, H, W], which may go beyond [-1, 1] a little."""
        return self.decoder(z_Bchw if self.post_quant_conv is None else self.post_quant_conv(z_Bchw))

    def init_buffers(self) -> None:
        """There are none."""

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill in every parameter. Guarantee: that of `models.layers.fill_in`."""
        fill_in(self, self.initial_value, generator)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What `init_weights` puts into one parameter, whole, on the CPU: norms at one, biases at zero."""
        if name.endswith("bias"):
            return torch.zeros(shape, device="cpu")
        if "norm" in name:
            return torch.ones(shape, device="cpu")
        # uniform in +-1 / sqrt(fan-in), as torch has it
        return nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), a=math.sqrt(5), generator=generator)


def vae_losses(network: nn.Module, x_BCHW: Tensor, noise_Bchw: Tensor, kl_weight: float) -> Tensor:
    """Each record's loss, fp32 [B]: mean |x - x'| over its pixels, plus kl_weight times its latents' KL to N(0, 1).

    The KL is in nats, a mean over the latents; `network` is a VAE, or what a backend wraps one in.
    Source: Kingma & Welling 2014, appendix B; L1 for the likelihood, as Rombach et al. have it.
    """
    reconstruction, mean, log_variance = network(x_BCHW, noise_Bchw)
    l1_B = (reconstruction.float() - x_BCHW).abs().mean((1, 2, 3))
    kl_B = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean((1, 2, 3))
    return l1_B + kl_weight * kl_B


def renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """An AutoencoderKL's tensors, in fp32, as the `diffusers` of today, and we, name them."""
    for name, tensor in tensors.items():
        *path, layer, kind = name.split(".")
        if path[-2:-1] == ["attentions"]:
            layer = _DEPRECATED.get(layer, layer)
        yield ".".join([*path, layer, kind]), tensor.float()
