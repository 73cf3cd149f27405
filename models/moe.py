"""Feed-forward networks of which a token uses a part: experts of its modality, or of its router's choice, or both.

Routing is token-choice and dropless (`kernels.moe`): what a token gets depends on that token alone, so that no record
touches another's result. Balancing is the objective's matter (`models.unified_objective`): the layers here only tell,
row by row, what it needs.

Experts may be spread over ranks: each then holds some of a layer's, and a token's row goes to whichever rank holds the
expert of its choice, and comes back, by two exchanges of as many rows as there are choices (GShard, Lepikhin et al.
2020, arXiv:2006.16668, section 3.2, without its capacity).
"""

# B rows, N tokens, D model width, H hidden width, M modalities, E experts of all modalities, A choices of a token,
# T = B * N, S = T * A choices sorted by expert, R choices that fell on this rank's experts
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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

    peers: dist.ProcessGroup | None = None  # whose ranks hold the experts, each an equal part, in order

    def __init__(self, num_experts: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, 2 * hidden_width, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden_width))

    def forward(self, x_BND: Tensor, routing: Routing) -> Tensor:
        """Each token through its experts, weighed; `routing` is of the B * N tokens. [B, N, D] -> [B, N, D]."""
        if self.peers is not None:
            out_TD: Tensor = self._among_peers(x_BND.flatten(0, 1), routing)  # type: ignore[call-arg]
            return out_TD.view(x_BND.shape)
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

    def spread(self, peers: dist.ProcessGroup) -> None:
        """Keep this rank's equal part of the experts; every forward and backward is then a collective of `peers`.

        Guarantee: a rank's result is that of all experts in one place, whoever chooses which. The gradients of the
        experts here are sums over the tokens of all peers; what sums them over other ranks is the caller's matter.
        """
        rank, size = dist.get_rank(peers), dist.get_world_size(peers)
        assert len(self.up) % size == 0, f"{len(self.up)} experts do not fall evenly on {size} ranks"
        # clones: a view would keep the memory of all
        self.up, self.down = (nn.Parameter(w.detach().chunk(size)[rank].clone()) for w in (self.up, self.down))
        self.peers = peers

    @torch.compiler.disable  # how many rows come is known only when they do
    def _among_peers(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Each choice's row to the rank that holds its expert, and what the expert makes of it back."""
        if self.site is not None:
            raise ValueError("experts are spread over ranks: none sees a record whole, and its gradient has no norm")
        peers, num_own = self.peers, len(self.up)
        assert peers is not None
        chosen_E = routing.offsets_E1.diff().long()
        own_E = torch.empty_like(chosen_E)  # of our experts, as each peer in turn chose them
        dist.all_to_all_single(own_E, chosen_E, group=peers)
        sent, received = (counts_E.view(-1, num_own).sum(1).tolist() for counts_E in (chosen_E, own_E))
        # a permutation of copies: on a GPU its backward, unlike that of a gather, adds up in a fixed order
        x_SD = x_TD.repeat_interleave(routing.top_k, 0).index_select(0, routing.order_S)
        if torch.is_autocast_enabled(x_TD.device.type):
            x_SD = x_SD.to(torch.get_autocast_dtype(x_TD.device.type))  # as the products would, and less to send
        x_RD = _exchange(x_SD, sent, received, peers)
        experts_R = torch.arange(num_own, device=own_E.device).repeat(len(sent))
        experts_R1 = experts_R.repeat_interleave(own_E, output_size=len(x_RD))[:, None]
        ones_R1 = torch.ones_like(experts_R1, dtype=torch.float32)
        y_RD = experts_mlp(x_RD, self.up, self.down, Routing.of(experts_R1, ones_R1, num_own))
        y_SD = _exchange(y_RD, received, sent, peers)
        y_TAD = y_SD.index_select(0, routing.order_S.argsort()).unflatten(0, (-1, routing.top_k))
        return (y_TAD * routing.weights_TA[..., None]).sum(1).to(y_SD.dtype)


class Router(Linear):
    """Logits of the experts, [B, N, D] -> [B, N, E], in at least fp32, whatever autocast says and the weights are in.

    In bf16 they would tie (Fedus et al. 2021, section 2.4): fsdp2 hands a public step its weights in bf16.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = at_least_fp32(self.weight)
        with torch.autocast(input.device.type, enabled=False):
            return per_record.linear(input.to(weight.dtype), weight, None, self.site)


class MixtureOfExperts(nn.Module):
    """`num_experts` experts for each of M modalities; a router picks `top_k` of those of a token's own modality.

    With one expert a modality there is no router, and nothing to balance.
    """

    def __init__(self, width: int, hidden_width: int, num_experts: int, top_k: int, num_modalities: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.num_modalities = num_experts, top_k, num_modalities
        total = num_experts * num_modalities
        self.router = Router(width, total, bias=False) if num_experts > 1 else None
        self.experts = Experts(total, width, hidden_width)

    def forward(self, x_BND: Tensor, modality_BN: Tensor, present_BN: Tensor) -> tuple[Tensor, Routed | None]:
        """int64 modalities, 0 to M - 1, and bool presence (B, N): padding is routed too, but not told of."""
        if self.router is None:
            modality_T1 = modality_BN.reshape(-1, 1)
            ones_T1 = torch.ones_like(modality_T1, dtype=torch.float32)
            return self.experts(x_BND, Routing.of(modality_T1, ones_T1, self.num_modalities)), None
        logits_BNE = self.router(x_BND)
        if self.num_modalities > 1:
            of_modality_E = torch.arange(logits_BNE.shape[2], device=x_BND.device) // self.num_experts
            logits_BNE = logits_BNE.masked_fill(of_modality_E != modality_BN[..., None], -torch.inf)
        # the only choice's normalised weight would be 1, and teach the router nothing (Switch, Eq. 2)
        routing = route(logits_BNE.flatten(0, 1), self.top_k, normalise=self.top_k > 1)
        return self.experts(x_BND, routing), _routed(logits_BNE, routing, present_BN)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, sent: list[int], received: list[int], peers: dist.ProcessGroup) -> Tensor:
        ctx.back = received, sent, peers
        y_RD = x_SD.new_empty(sum(received), x_SD.shape[1])
        dist.all_to_all_single(y_RD, x_SD.contiguous(), received, sent, group=peers)
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_y_RD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _exchange(grad_y_RD, *ctx.back), None, None, None


def _exchange(x_SD: Tensor, sent: list[int], received: list[int], peers: dist.ProcessGroup) -> Tensor:
    """`sent[r]` rows to the r-th peer, for each in turn; returns those that came, peer by peer. Differentiable."""
    y_RD: Tensor = _Exchange.apply(x_SD, sent, received, peers)  # type: ignore[assignment]
    return y_RD


def _routed(logits_BNE: Tensor, routing: Routing, present_BN: Tensor) -> Routed:
    present_BN1 = present_BN[..., None].to(logits_BNE.dtype)
    experts_BS = routing.experts_TA.view(len(logits_BNE), -1)
    chosen_BE = torch.zeros_like(logits_BNE[:, 0]).scatter_add_(
        1, experts_BS, present_BN1.expand(-1, -1, routing.top_k).flatten(1)
    )  # whole numbers: the order in which a GPU adds them does not matter
    probability_BE = (logits_BNE.softmax(2) * present_BN1).sum(1)
    z_BN = z_loss(logits_BNE.flatten(0, 1)).view(present_BN.shape)
    return Routed(probability_BE, chosen_BE, (z_BN * present_BN).sum(1))
