"""What the clipping engines are held to: per-record gradients by `torch.func`, clipped and summed in plain sight."""

# B records, K noise draws a record
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from privacy.clipping import Clipper, FlatClipper, make_clipper

ENGINES = ["two_pass", "kept_gradients", "group_wise", "keep_0", "keep_half"]
FLAT = [engine for engine in ENGINES if engine != "group_wise"]
Gradients = Mapping[str, Tensor]


class OneProcess:
    """The smallest backend: plain autograd."""

    def __init__(self, model: nn.Module, *, forward_once: bool = True, loss_scale: float = 1.0) -> None:
        self.model = self.norm_model = model
        self.forward_once, self.loss_scale = forward_once, loss_scale

    def microbatch(self, *, last: bool) -> nullcontext[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()


def clipper_of(engine: str, model: nn.Module, bound: float) -> Clipper:
    """The three engines of a configuration, and the two-pass engine keeping nothing and keeping half."""
    if engine.startswith("keep_"):
        return FlatClipper(model, bound, keep=0.0 if engine == "keep_0" else 0.5)
    return make_clipper(engine, model, bound)  # type: ignore[arg-type]


def losses_of(y: Tensor, num_records: int) -> Tensor:
    """A loss a record, (B,), without symmetry that would hide an error; K rows a record are averaged."""
    weights = torch.linspace(0.5, 1.5, y[0].numel(), dtype=y.dtype, device=y.device).view(y.shape[1:])
    return ((y + 0.3).tanh().square() * weights).view(num_records, -1, y[0].numel()).sum(2).mean(1)


def clipped_sum(
    engine: str | Clipper, model: nn.Module, losses: Callable[[nn.Module], Tensor], present_B: Tensor,
    bound: float = 1.0, backend: OneProcess | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What one microbatch leaves in the gradients, by parameter."""
    clipper = clipper_of(engine, model, bound) if isinstance(engine, str) else engine
    model.zero_grad()
    clipper.accumulate(backend or OneProcess(model), losses, present_B, last=True)  # type: ignore[arg-type]
    return gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            found[name] = parameter.grad.clone()
    return found


def per_record_gradients(plain: nn.Module, inputs: tuple[Tensor, ...], num_records: int) -> dict[str, Tensor]:
    """Each record's gradient of `losses_of(plain(*inputs))`, by vmap(grad) over the records."""
    trainable = {name: p.detach() for name, p in plain.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in plain.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        return losses_of(functional_call(plain, {**frozen, **parameters}, rows), 1).sum()

    by_record = [x.view(num_records, -1, *x.shape[1:]) for x in inputs]
    return vmap(grad(loss), (None, *[0] * len(inputs)))(trainable, *by_record)


def flat_sum(gradients: Gradients, uses: Mapping[str, str], bound: float) -> dict[str, Tensor]:
    """Each record's whole gradient clipped to `bound`, and the sum over records.

    uses: for a parameter of the plain model, the one it stands for, where several uses of one are kept apart.
    """
    totals: dict[str, Tensor] = {}
    for name, value in gradients.items():
        owner = uses.get(name, name)
        totals[owner] = totals[owner] + value if owner in totals else value
    weight_B = (bound / norms(totals)).clamp(max=1.0)
    return {name: torch.tensordot(weight_B, g, dims=1) for name, g in totals.items()}


def norms(gradients: Gradients) -> Tensor:
    """Each record's norm over all parameters, (B,)."""
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def group_wise_sum(gradients: Gradients, uses: Mapping[str, str], bound: float) -> dict[str, Tensor]:
    """Each use of each layer clipped by itself: K layers have bound / sqrt(K) each, shared evenly among their uses."""
    layers: dict[str, list[list[str]]] = {}  # for each layer, the names of each use
    met = Counter[str]()
    for name in gradients:
        owner = uses.get(name, name)
        of_layer = layers.setdefault(owner.rpartition(".")[0], [])
        if met[owner] == len(of_layer):
            of_layer.append([])
        of_layer[met[owner]].append(name)
        met[owner] += 1
    totals: dict[str, Tensor] = {}
    for of_layer in layers.values():
        for names in of_layer:
            share = flat_sum({n: gradients[n] for n in names}, uses, bound / math.sqrt(len(layers)) / len(of_layer))
            for name, part in share.items():
                totals[name] = totals[name] + part if name in totals else part
    return totals


def relative_error(got: Gradients, expected: Gradients) -> float:
    assert set(got) == set(expected)
    difference = torch.stack([(got[n].double() - expected[n].double()).norm() for n in got]).norm()
    return (difference / torch.stack([g.double().norm() for g in expected.values()]).norm()).item()


def norm_of(gradients: Gradients) -> float:
    return torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
