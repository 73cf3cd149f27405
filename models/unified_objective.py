"""What the unified model is trained for: cross-entropy on text, flow matching on patches, balance of the experts.

    losses = objective.losses(model, batch, noise_BNF, times_BI)       # sums over each row's tokens
    loss_B = objective.weighed(losses, totals)                         # `totals` counts tokens over all rows and ranks

Both modalities' losses come of one forward. Each is a sum over its own tokens, which the caller divides by the number
of such tokens in the whole batch, over all rows, microbatches and ranks: how the batch was cut up then changes nothing
(but for `balancing: batch`, which takes the rows of one forward together).
"""

# B rows, N tokens, T = B * N, F features of a patch, V vocabulary, I images, L layers, E experts
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kernels.per_record import PerRecordModule
from models.flow import Objective
from models.packed import Packed
from models.unified import Routed


@dataclass(frozen=True)
class Totals:
    """How many tokens losses are divided by.

    In public training the whole batch's, summed over rows, microbatches and ranks. In a private stage they must be
    numbers that do not depend on the batch, such as the tokens that it is expected to have: a unit's loss would
    otherwise depend on the others'.
    """

    text: float  # tokens to be predicted, by their weights
    patches: float  # noised patches
    tokens: float  # all but padding

    @classmethod
    def of(cls, batch: Packed) -> Totals:
        """Those of one batch; a kind that it has none of counts one, and its loss is zero."""
        counts = (batch.weights_BN, batch.learnt_patches_BN, batch.present_BN)
        return cls(*(max(1.0, float(each.sum())) for each in counts))


@dataclass(frozen=True, eq=False)
class Losses:
    """Each row's sums over its tokens, fp32 (B,)."""

    text_B: Tensor  # cross-entropy in nats, by the tokens' weights
    patches_B: Tensor  # squared error, a patch's mean over its features
    balance_B: Tensor  # experts' balance: 1 a token where even, up to E; zero without routers
    z_B: Tensor  # routers' squared log-sum-exp
    load_LE: Tensor | None  # choices of each expert in each layer, over the rows here; its logging is the caller's


class UnifiedObjective(BaseModel):
    """The losses and their weights.

    balancing: what keeps a mixture's experts even. `batch` multiplies each expert's share of all choices of the forward
    by its mean probability (Fedus et al. 2021, Eq. 4); `row` takes each row's own share (DeepSeek-V3,
    arXiv:2412.19437, Eq. 17), and couples no rows. Balancing by a bias on the choice is not offered: the bias would be
    a state beside the weights, and in a private stage an unnoised release of the load.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flow: Objective = Objective()
    patches_weight: float = Field(default=1.0, ge=0)
    balancing: Literal["none", "row", "batch"] = "none"
    balance_weight: float = Field(default=0.01, ge=0)
    z_weight: float = Field(default=0.001, ge=0)

    def require_private(self) -> None:
        """Raise ValueError where a row's loss depends on another row's, which no clipping can bound."""
        if self.balancing == "batch":
            raise ValueError(
                "objective.balancing is 'batch', which couples records: in a private stage choose 'row' or 'none'"
            )

    def noised(self, batch: Packed, noise_BNF: Tensor, times_BI: Tensor) -> tuple[Packed, Tensor]:
        """The batch as the model is to see it, and each patch's target; clean images stay as they are.

        noise_BNF is standard normal, times_BI in [0, 1] (`Objective.sample_timesteps`), both fp32, as is the result.
        """
        t_BN1 = batch.by_image(torch.where(batch.noised_BI, times_BI, 0.0))[..., None]
        x_t_BNF, target_BNF = self.flow.noised(batch.patches_BNF, noise_BNF, t_BN1)
        learnt_BN1 = batch.learnt_patches_BN[..., None]
        return replace(batch, patches_BNF=torch.where(learnt_BN1, x_t_BNF, batch.patches_BNF)), target_BNF

    def losses(self, model: nn.Module, batch: Packed, noise_BNF: Tensor, times_BI: Tensor) -> Losses:
        """One forward. Guarantee: but for balance by `batch`, a row's losses depend on that row alone.

        Raises ValueError for a balance that couples rows where the model is in a private step.
        """
        if self.balancing == "batch" and _is_private(model):
            self.require_private()
        seen, target_BNF = self.noised(batch, noise_BNF, times_BI)
        prediction = model(seen, times_BI)
        # fp32 even where the model computes in bf16; `where`, for a product would pass on what padding has
        logits_TV = prediction.logits_BNV.flatten(0, 1).float()
        entropy_T = F.cross_entropy(logits_TV, batch.targets_BN.flatten(), reduction="none")
        entropy_BN = batch.weights_BN * entropy_T.view(batch.weights_BN.shape)
        entropy_BN = torch.where(batch.weights_BN > 0, entropy_BN, 0.0)
        error_BN = (prediction.patches_BNF.float() - target_BNF).square().mean(-1)
        error_BN = torch.where(batch.learnt_patches_BN, error_BN, 0.0)
        routed: Routed | None = prediction.routed
        none_B = error_BN.new_zeros(len(error_BN))
        return Losses(
            entropy_BN.sum(1),
            error_BN.sum(1),
            none_B if routed is None else self._balance(routed),
            none_B if routed is None else routed.z_B.mean(1),
            None if routed is None else routed.chosen_BE.sum(0),
        )

    def weighed(self, losses: Losses, totals: Totals) -> Tensor:
        """Each row's part of the loss, (B,): their sum over all rows of the batch is the loss."""
        routers_B = self.balance_weight * losses.balance_B + self.z_weight * losses.z_B
        of_patches_B = self.patches_weight * losses.patches_B / totals.patches
        return losses.text_B / totals.text + of_patches_B + routers_B / totals.tokens

    def _balance(self, routed: Routed) -> Tensor:
        """E * sum_e share of the choices * probability, a mean over layers, summed over the row's tokens."""
        chosen_BLE = routed.chosen_BE
        if self.balancing == "none":
            return torch.zeros_like(routed.z_B[:, 0])
        if self.balancing == "batch":
            chosen_BLE = chosen_BLE.sum(0, keepdim=True)
        share_BLE = chosen_BLE / chosen_BLE.sum(2, keepdim=True).clamp(min=1)
        return chosen_BLE.shape[2] * (share_BLE * routed.probability_BE).sum(2).mean(1)


def _is_private(model: nn.Module) -> bool:
    return any(isinstance(layer, PerRecordModule) and layer.site is not None for layer in model.modules())
