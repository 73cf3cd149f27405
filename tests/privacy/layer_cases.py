"""Small models of every kind of layer, each beside a plain twin written with torch's own operations only."""

# B records, K noise draws a record, N tokens, H heads, D width
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels import per_record
from kernels.per_record import PerRecordModule
from models.layers import Conv2d, Embedding, LayerNorm, LearnedTensor, Linear, LoRALinear, RMSNorm, modulated_norm
from tests.privacy.clipped_sums import losses_of

RECORDS, WIDTH, VOCABULARY, PADDING = 5, 6, 7, 2


@dataclass(frozen=True)
class Case:
    """`plain` computes what `private` does; `uses` maps its parameters' names to those of `private` where they differ.

    A parameter used several times is several parameters of `plain`, all mapped to the one.
    """

    private: nn.Module
    plain: nn.Module
    inputs: tuple[Tensor, ...]
    uses: Mapping[str, str] = field(default_factory=dict)

    def losses(self, model: nn.Module) -> Tensor:
        """Each record's loss (B,) under either model."""
        return losses_of(model(*self.inputs), RECORDS)

    def to(self, dtype: torch.dtype) -> Case:
        """The case in `dtype`, with random weights, the same in both models."""
        generator = torch.Generator().manual_seed(1)
        self.private.to(dtype)
        self.plain.to(dtype)
        values = {n: p for n, p in self.private.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            for parameter in self.private.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
            for name, parameter in self.plain.named_parameters():
                parameter.copy_(values[self.uses.get(name, name)])
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        return Case(self.private, self.plain, inputs, self.uses)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indices(*shape: int, high: int = VOCABULARY) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def linear(*middle: int, bias: bool = True, rows: int = RECORDS) -> Case:
    def model(kind: type[nn.Linear]) -> nn.Module:
        return nn.Sequential(kind(4, 5, bias=bias), nn.Tanh(), kind(5, 3, bias=bias))

    return Case(model(Linear), model(nn.Linear), (draw(rows, *middle, 4),))


def conv(side: int, kernel: int, *, channels: int = 4, width: int = 6, bias: bool = True, **geometry: int) -> Case:
    def model(kind: type[nn.Conv2d]) -> nn.Module:
        first = kind(channels, width, kernel, bias=bias, **geometry)  # type: ignore[arg-type]
        return nn.Sequential(first, nn.Tanh(), kind(width, 2, 1, bias=bias))

    return Case(model(Conv2d), model(nn.Conv2d), (draw(RECORDS, channels, side, side),))


def embedding(num_tokens: int, padding_idx: int | None, rows: int = RECORDS) -> Case:
    def model(kind: type[nn.Embedding]) -> nn.Module:
        return kind(VOCABULARY, WIDTH, padding_idx=padding_idx)

    return Case(
        nn.Sequential(model(Embedding), Linear(WIDTH, 3)),
        nn.Sequential(model(nn.Embedding), nn.Linear(WIDTH, 3)),
        (indices(rows, num_tokens),),
    )


def layer_norm(num_tokens: int, *, bias: bool) -> Case:
    return Case(
        nn.Sequential(Linear(4, WIDTH), LayerNorm(WIDTH, bias=bias), Linear(WIDTH, 3)),
        nn.Sequential(nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH, eps=1e-6, bias=bias), nn.Linear(WIDTH, 3)),
        (draw(RECORDS, num_tokens, 4),),
        {"1.weight": "1.scale.weight", "1.bias": "1.shift.weight"},
    )


def rms_norm(*middle: int) -> Case:
    return Case(
        nn.Sequential(Linear(4, WIDTH), RMSNorm(WIDTH), Linear(WIDTH, 3)),
        nn.Sequential(nn.Linear(4, WIDTH), nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 3)),
        (draw(RECORDS, *middle, 4),),
        {"1.weight": "1.scale.weight"},
    )


class QKNorm(nn.Module):
    """Attention with a norm over each head's queries and keys, of shape [B, H, N, K]."""

    def __init__(self, linear_kind: type[nn.Linear], q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.qkv, self.q_norm, self.k_norm = linear_kind(4, 3 * 8), q_norm, k_norm

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(self.q_norm(q) @ self.k_norm(k).mT / 2, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def qk_norm(num_tokens: int, *, bias: bool) -> Case:
    if bias:
        private, plain = [LayerNorm(4) for _ in "qk"], [nn.LayerNorm(4, eps=1e-6) for _ in "qk"]
    else:
        private, plain = [RMSNorm(4) for _ in "qk"], [nn.RMSNorm(4, eps=1e-6) for _ in "qk"]
    uses = {f"{part}_norm.weight": f"{part}_norm.scale.weight" for part in "qk"}
    uses |= {f"{part}_norm.bias": f"{part}_norm.shift.weight" for part in "qk"}
    return Case(QKNorm(Linear, *private), QKNorm(nn.Linear, *plain), (draw(RECORDS, num_tokens, 4),), uses)


class AdaLN(nn.Module):
    def __init__(self, linear_kind: type[nn.Linear], modulate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.modulation, self.proj, self.modulate = linear_kind(3, 8), linear_kind(4, 3), modulate

    def forward(self, x_BND: Tensor, condition_BC: Tensor) -> Tensor:
        shift_BD, scale_BD = self.modulation(condition_BC).chunk(2, dim=-1)
        return self.proj(self.modulate(x_BND, shift_BD, scale_BD))


def plain_modulated_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    centred = x_BND - x_BND.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def ada_ln(num_tokens: int) -> Case:
    inputs = (draw(RECORDS, num_tokens, 4), draw(RECORDS, 3, seed=1))
    return Case(AdaLN(Linear, modulated_norm), AdaLN(nn.Linear, plain_modulated_norm), inputs)


class Learned(nn.Module):
    """Positions added to the tokens, two register tokens put before them, a scalar over all."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.positions, self.registers = LearnedTensor(num_tokens, 4), LearnedTensor(2, 4)
        self.scalar, self.proj = LearnedTensor(), Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers(len(x)), x + self.positions(len(x))], dim=1)
        return self.proj(x) * self.scalar(len(x))[:, None, None]


class PlainLearned(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.positions, self.registers = nn.Parameter(torch.zeros(num_tokens, 4)), nn.Parameter(torch.zeros(2, 4))
        self.scalar, self.proj = nn.Parameter(torch.zeros(())), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(len(x), 2, 4), x + self.positions], dim=1)
        return self.proj(x) * self.scalar


def learned(num_tokens: int, rows: int = RECORDS) -> Case:
    uses = {name: f"{name}.weight" for name in ("positions", "registers", "scalar")}
    return Case(Learned(num_tokens), PlainLearned(num_tokens), (draw(rows, num_tokens, 4),), uses)


def tied(num_tokens: int) -> Case:
    """An embedding whose table is the head's weight as well."""
    private, plain = nn.Sequential(Embedding(VOCABULARY, WIDTH), nn.Tanh()), nn.Sequential()
    private.append(Linear(WIDTH, VOCABULARY, bias=False))
    private[2].weight = private[0].weight
    plain = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY, bias=False))
    return Case(private, plain, (indices(RECORDS, num_tokens),), {"2.weight": "0.weight"})


def shared(num_tokens: int) -> Case:
    """One block applied three times."""
    block = Linear(4, 4)
    private = nn.Sequential(block, nn.Tanh(), block, nn.Tanh(), block)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    uses = {f"{use}.{name}": f"0.{name}" for use in (2, 4) for name in ("weight", "bias")}
    return Case(private, plain, (draw(RECORDS, num_tokens, 4),), uses)


class PlainLoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + 8 / 2 * (x @ self.down.weight.mT @ self.up.weight.mT)


def lora(num_tokens: int) -> Case:
    return Case(LoRALinear(nn.Linear(4, 5), 2, 8), PlainLoRA(), (draw(RECORDS, num_tokens, 4),))


class Experts(PerRecordModule):
    def __init__(self, num_experts: int, num_inputs: int = 4, num_outputs: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, num_outputs, num_inputs))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return per_record.experts_linear(x, experts, self.weight, self.site)


class PlainExperts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, 3, 4))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return torch.einsum("bnp,bndp->bnd", x, self.weight[experts])


def experts(num_tokens: int) -> Case:
    """Four experts: the last has no token at all, the first none of record 0."""
    chosen = indices(RECORDS, num_tokens, high=3)
    chosen[0] = chosen[0].clamp(min=1)
    return Case(Experts(4), PlainExperts(4), (draw(RECORDS, num_tokens, 4), chosen))


# Each for few tokens and for many: 40 is enough for the Gram matrices to be taken in bands on the CPU.
CASES: dict[str, Callable[[int], Case]] = {
    "linear_2d": lambda n: linear(),
    "linear_2d_without_bias": lambda n: linear(bias=False),
    "linear_3d": linear,
    "linear_3d_without_bias": lambda n: linear(n, bias=False),
    "linear_4d": lambda n: linear(2, n // 2 + 1),
    "conv_padded": lambda n: conv(4 if n < 9 else 6, 3, padding=1),
    "conv_patchify": lambda n: conv(4 if n < 9 else 12, 2, stride=2),
    "conv_patchify_without_bias": lambda n: conv(4 if n < 9 else 12, 2, stride=2, bias=False),
    "conv_dilated": lambda n: conv(7 if n < 9 else 13, 3, stride=2, padding=2, dilation=2),
    "conv_in_groups": lambda n: conv(4 if n < 9 else 7, 3, padding=1, groups=2),
    "conv_depthwise": lambda n: conv(4 if n < 9 else 7, 3, width=4, padding=1, groups=4),
    "embedding": lambda n: embedding(n, None),
    "embedding_with_padding": lambda n: embedding(n, PADDING),
    "layer_norm": lambda n: layer_norm(n, bias=True),
    "layer_norm_without_bias": lambda n: layer_norm(n, bias=False),
    "rms_norm_2d": lambda n: rms_norm(),
    "rms_norm_3d": rms_norm,
    "qk_norm": lambda n: qk_norm(n, bias=True),
    "qk_norm_without_bias": lambda n: qk_norm(n, bias=False),
    "ada_ln": ada_ln,
    "learned_tensors": learned,
    "tied_embedding_and_head": tied,
    "shared_block": shared,
    "lora": lora,
    "experts": experts,
}
# Three rows to a record: 15 rows are 5 records.
SEVERAL_ROWS: dict[str, Callable[[int], Case]] = {
    "linear_2d": lambda n: linear(rows=3 * RECORDS),
    "linear_3d": lambda n: linear(n, rows=3 * RECORDS),
    "embedding": lambda n: embedding(n, None, rows=3 * RECORDS),
    "learned_tensors": lambda n: learned(n, rows=3 * RECORDS),
}
