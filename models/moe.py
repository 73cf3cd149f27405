"""Feed-forward networks of which a token uses a part: experts of its modality, or of its router's choice, or both.

Routing is token-choice and dropless (`kernels.moe`): what a token gets depends on that token alone, so that no record
touches another's result. Balancing is the objective's matter (`models.unified_objective`): the layers here only tell,
row by row, what it needs.
"""

# B rows, N tokens, D model width, H hidden width, M modalities, E experts of all modalities, A choices of a token
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import per_record
from kernels.ghost_norm import at_least_fp32
from kernels.moe import Routing, experts_mlp, route, z_loss
from kernels.per_record import PerRecordModule
from models.layers import Linear


class Routed(NamedTuple):
    """What a router did to each row, summed over the row's tokens that are no padding, fp32."""

    probability_BE: Tensor  # the experts' probabilities: differentiable
    chosen_BE: Tensor  # how many choices fell on each expert
    z_B: Tensor  # squared log-sum-exp of the logits: differentiable


class SwiGLU(nn.Module):
    """down(silu(gate) * value) with (gate, value) = up(x), [B, N, D] -> [B, N, D] (Shazeer 2020, Eq. 6)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * hidden_width, bias=False)
        self.down = Linear(hidden_width, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        gate_BNH, value_BNH = self.up(x_BND).chunk(2, dim=-1)
        return self.down(F.silu(gate_BNH) * value_BNH)


class Experts(PerRecordModule):
    """E SwiGLU networks side by side. Each expert of a record reports that record's gradient in private training."""

    def __init__(self, num_experts: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, 2 * hidden_width, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden_width))

    def forward(self, x_BND: Tensor, routing: Routing) -> Tensor:
        """Each token through its experts, weighed; `routing` is of the B * N tokens. [B, N, D] -> [B, N, D]."""
        if self.site is None:
            return experts_mlp(x_BND.flatten(0, 1), self.up, self.down, routing).view(x_BND.shape)
        # the same, choice by choice, through layers that tell each record's gradient
        choices = (x_BND.shape[1], routing.top_k)
        experts_BS = routing.experts_TA.view(len(x_BND), -1)
        weights_BS = routing.weights_TA.view(len(x_BND), -1)
        x_BSD = x_BND.repeat_interleave(routing.top_k, dim=1)
        z_BSF = per_record.experts_linear(x_BSD, experts_BS, self.up, self.site, name="up")
        gate_BSH, value_BSH = z_BSF.chunk(2, dim=-1)
        h_BSH = F.silu(gate_BSH) * value_BSH * weights_BS[..., None]
        y_BSD = per_record.experts_linear(h_BSH, experts_BS, self.down, self.site, name="down")
        return y_BSD.unflatten(1, choices).sum(2).to(x_BND.dtype)


class MixtureOfExperts(nn.Module):
    """`num_experts` experts for each of M modalities; a router picks `top_k` of those of a token's own modality.

    With one expert a modality there is no router, and nothing to balance.
    """

    def __init__(self, width: int, hidden_width: int, num_experts: int, top_k: int, num_modalities: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.num_modalities = num_experts, top_k, num_modalities
        total = num_experts * num_modalities
        self.router = Linear(width, total, bias=False) if num_experts > 1 else None
        self.experts = Experts(total, width, hidden_width)

    def forward(self, x_BND: Tensor, modality_BN: Tensor, present_BN: Tensor) -> tuple[Tensor, Routed | None]:
        """int64 modalities, 0 to M - 1, and bool presence (B, N): padding is routed too, but not told of."""
        if self.router is None:
            modality_T1 = modality_BN.reshape(-1, 1)
            ones_T1 = torch.ones_like(modality_T1, dtype=torch.float32)
            return self.experts(x_BND, Routing.of(modality_T1, ones_T1, self.num_modalities)), None
        with torch.autocast(x_BND.device.type, enabled=False):  # bf16 logits would tie (Switch, section 2.4)
            logits_BNE = at_least_fp32(self.router(x_BND.to(self.router.weight.dtype)))
        if self.num_modalities > 1:
            of_modality_E = torch.arange(logits_BNE.shape[2], device=x_BND.device) // self.num_experts
            logits_BNE = logits_BNE.masked_fill(of_modality_E != modality_BN[..., None], -torch.inf)
        # the only choice's normalised weight would be 1, and teach the router nothing (Switch, Eq. 2)
        routing = route(logits_BNE.flatten(0, 1), self.top_k, normalise=self.top_k > 1)
        return self.experts(x_BND, routing), _routed(logits_BNE, routing, present_BN)


def _routed(logits_BNE: Tensor, routing: Routing, present_BN: Tensor) -> Routed:
    present_BN1 = present_BN[..., None].to(logits_BNE.dtype)
    experts_BS = routing.experts_TA.view(len(logits_BNE), -1)
    chosen_BE = torch.zeros_like(logits_BNE[:, 0]).scatter_add_(
        1, experts_BS, present_BN1.expand(-1, -1, routing.top_k).flatten(1)
    )  # whole numbers: the order in which a GPU adds them does not matter
    probability_BE = (logits_BNE.softmax(2) * present_BN1).sum(1)
    z_BN = z_loss(logits_BNE.flatten(0, 1)).view(present_BN.shape)
    return Routed(probability_BE, chosen_BE, (z_BN * present_BN).sum(1))
