"""Per-record clipping: each record's gradient is bounded before anything is summed.

Flat clipping in two passes: the first backward asks every layer for each record's squared gradient norm, the second
forms the gradient of the clip-weighted sum. No per-record gradient is ever in memory.
Source: Abadi et al. 2016 (arXiv:1607.00133), Alg. 1; two passes as in Lee and Kifer 2021 (arXiv:2009.03106).
"""

# B records
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels import per_record
from kernels.per_record import PerRecordModule

# The coefficient is shrunk by this much, so that rounding in fp32 cannot carry a clipped norm over the bound.
_ROUNDING_MARGIN = 1e-6


class Backend(Protocol):
    """What clipping needs of a sharding backend (`train.parallel` implements it)."""

    forward_once: bool
    """Whether one forward serves both passes; otherwise `norm_model` and `model` each run a forward of their own."""

    @property
    def norm_model(self) -> nn.Module: ...
    @property
    def model(self) -> nn.Module: ...
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]: ...
    def backward(self, loss: Tensor) -> None: ...


def check_model(model: nn.Module) -> dict[str, PerRecordModule]:
    """The layers that report norms, by name; a ValueError names every trainable parameter that none accounts for."""
    layers: dict[str, PerRecordModule] = {}
    owners: dict[nn.Parameter, str] = {}
    problems: list[str] = []
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for module_name, module in modules:
        own: list[tuple[str, nn.Parameter]] = list(module.named_parameters(recurse=False))
        for parameter_name, parameter in own:
            name = f"{module_name}.{parameter_name}".lstrip(".")
            if not parameter.requires_grad:
                continue
            if not isinstance(module, PerRecordModule):
                problems.append(f"{name} belongs to a {type(module).__name__}, which reports no per-record norm")
            elif parameter in owners:
                problems.append(f"{name} is tied to {owners[parameter]}: norms of tied weights are not additive")
            else:
                owners[parameter] = name
                layers[module_name] = module
    if problems:
        listed = "; ".join(problems)
        raise ValueError(f"this model cannot be trained privately: {listed}: freeze it or register a norm rule")
    if not layers:
        raise ValueError("this model has no trainable parameter: unfreeze at least one layer")
    return layers


class TwoPassClipper:
    """Sums clipped per-record gradients over microbatches into the backend's gradients.

    Guarantee: adding or removing one record moves the accumulated sum by at most `bound` in L2, whatever its values: a
    record with a non-finite loss or gradient norm counts as zero. Every reporting layer must report exactly once a
    microbatch, or the step is refused.
    """

    def __init__(self, model: nn.Module, bound: float) -> None:
        if not bound > 0 or bound == float("inf"):
            raise ValueError(f"privacy.max_grad_norm is {bound}: it must be a positive finite number")
        self.layers = check_model(model)
        self.bound = bound

    def accumulate(
        self, backend: Backend, losses: Callable[[nn.Module], Tensor], present_B: Tensor, *, last: bool
    ) -> Tensor:
        """Add one microbatch's clipped sum to the gradients; returns its per-record losses (B,), detached.

        `losses` maps a model to losses of shape (B,); `present_B` is False for padding, which contributes exactly zero.
        """
        rows = self._attach_rows(present_B)
        try:
            with backend.microbatch(last=last):
                losses_B = losses(backend.norm_model)
                with per_record.norm_pass():
                    reports = torch.autograd.grad(
                        losses_B.sum(), list(rows.values()), retain_graph=backend.forward_once, allow_unused=True
                    )
                weights_B = self._weights(dict(zip(rows, reports, strict=True)), losses_B.detach(), present_B)
                if not backend.forward_once:
                    losses_B = losses(backend.model)
                with per_record.clipped_pass(weights_B):
                    backend.backward(losses_B.sum())
        finally:
            for layer in self.layers.values():
                layer.norm_row = None
        return losses_B.detach()

    def _attach_rows(self, present_B: Tensor) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            row = torch.zeros(present_B.shape[0] + 1, device=present_B.device, requires_grad=True)
            layer.norm_row = rows[name] = row
        return rows

    def _weights(self, reports: dict[str, Tensor | None], losses_B: Tensor, present_B: Tensor) -> Tensor:
        """min(1, bound / norm) for each record, in fp32; zero for padding and for whatever is not finite."""
        squared_B = torch.zeros_like(losses_B, dtype=torch.float32)
        for name, report in reports.items():
            if report is None or report[-1] != 1:
                times = 0 if report is None else int(report[-1])
                raise RuntimeError(
                    f"layer {name!r} reported its per-record norms {times} times in one pass, not once: step refused"
                )
            squared_B += report[:-1]
        counts_B = present_B & torch.isfinite(squared_B) & torch.isfinite(losses_B)
        norms_B = squared_B.sqrt()
        weights_B = (self.bound * (1 - _ROUNDING_MARGIN) / norms_B).clamp(max=1.0)  # norm 0 gives inf, clamped to 1
        return torch.where(counts_B, weights_B, torch.zeros_like(weights_B))
