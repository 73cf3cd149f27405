"""Per-record clipping: each record's gradient is bounded before anything is summed.

No engine ever holds a per-record gradient in memory; all of them work on factors (`kernels.ghost_norm`).

    two_pass        flat: one backward for the norms, another for the clip-weighted sum, in about the memory of plain
                    training: the layers nearest the input, as far as a tenth of memory goes, keep what
                    kept_gradients keeps, and the second backward ends where they begin
    kept_gradients  flat: one backward, which keeps every layer's input and output gradient; the weight gradients are
                    formed from these once the norms are known. The same sum as two_pass, for less time and more memory
    group_wise      one backward; each layer is clipped by itself to a bound of its own, the bounds' squares adding up
                    to that of the flat bound, so that the sensitivity is the same

Source: Abadi et al. 2016 (arXiv:1607.00133), Alg. 1; two passes, Lee and Kifer 2021 (arXiv:2009.03106); kept gradients,
Bu et al. 2023 (arXiv:2210.00038, "book-keeping"); group-wise and adaptive bounds, He et al. 2022 (arXiv:2212.01539) and
Andrew et al. 2021 (arXiv:1905.03871, Alg. 1).
"""

# B records, K groups
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from kernels.ghost_norm import PerRecordGradient, RecordWeights, Reuse, at_least_fp32, squared_norms, together
from kernels.per_record import Gradients, Pass, PerRecordModule, Site, Use, activate

EngineName = Literal["two_pass", "kept_gradients", "group_wise"]
Losses = Callable[[nn.Module], Tensor]

# A coefficient is shrunk by this many units of its last place, so that rounding cannot carry a norm over the bound.
_ROUNDING_UNITS = 8
TWO_PASS_KEEPS = 0.27  # of the layers' outputs; measured at under a tenth of peak memory (docs/results/bench_dp.json)


class Backend(Protocol):
    """What clipping needs of a sharding backend (`train.parallel` implements it)."""

    forward_once: bool
    """Whether one forward serves several backwards; otherwise `norm_model` and `model` each run one of their own."""
    loss_scale: float
    """What `backward` multiplies every gradient by on its way (a later division undoes it)."""

    @property
    def norm_model(self) -> nn.Module: ...
    @property
    def model(self) -> nn.Module: ...
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]: ...
    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class PrivateLayer:
    """A layer that can tell per-record gradients, and the full names of its trainable parameters."""

    module: PerRecordModule
    parameters: Mapping[str, str]  # name in the layer -> full name; tied parameters have one full name


def check_model(model: nn.Module) -> dict[str, PrivateLayer]:
    """The layers that train privately, by name; a ValueError names everything that would break the guarantee.

    That is every trainable parameter whose layer cannot tell per-record gradients, and every layer that mixes records.
    """
    layers: dict[str, PrivateLayer] = {}
    full_names: dict[nn.Parameter, str] = {}
    problems: list[str] = []
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for name, module in modules:
        if isinstance(module, _BatchNorm):
            problems.append(f"{name} is a {type(module).__name__}, which mixes records: use a norm within the record")
            continue
        own: list[tuple[str, nn.Parameter]] = list(module.named_parameters(recurse=False))
        trainable = {local: parameter for local, parameter in own if parameter.requires_grad}
        for local, parameter in trainable.items():
            full_name = full_names.setdefault(parameter, f"{name}.{local}".lstrip("."))
            if not isinstance(module, PerRecordModule):
                problems.append(
                    f"{full_name} belongs to a {type(module).__name__}, which tells no per-record gradients: freeze it "
                    "or register a norm rule (kernels.per_record.Rule)"
                )
        if trainable and isinstance(module, PerRecordModule):
            layers[name] = PrivateLayer(module, {local: full_names[p] for local, p in trainable.items()})
    if problems:
        raise ValueError(f"this model cannot be trained privately: {'; '.join(problems)}")
    if not layers:
        raise ValueError("this model has no trainable parameter: unfreeze at least one layer")
    return layers


class Clipper(ABC):
    """Sums clipped per-record gradients over microbatches into the backend's gradients.

    Guarantee: adding or removing one record moves the accumulated sum by at most `bound` in L2, whatever its values: a
    record with a non-finite loss or gradient norm counts as zero. Every use of every trainable parameter must report
    exactly once a microbatch, or the step is refused.
    """

    def __init__(self, model: nn.Module, bound: float) -> None:
        if not 0 < bound < math.inf:
            raise ValueError(f"privacy.max_grad_norm is {bound}: it must be a positive finite number")
        self.layers = check_model(model)
        self.bound = bound

    def accumulate(self, backend: Backend, losses: Losses, present_B: Tensor, *, last: bool) -> Tensor:
        """Add one microbatch's clipped sum to the gradients; returns its per-record losses (B,), detached.

        `losses` maps a model to losses of shape (B,); `present_B` is False for padding, which contributes exactly zero.
        """
        _require_full_precision(present_B.device)
        with backend.microbatch(last=last):
            return self._accumulate(backend, losses, present_B).detach()

    @abstractmethod
    def _accumulate(self, backend: Backend, losses: Losses, present_B: Tensor) -> Tensor: ...

    @contextmanager
    def _sites(self, present_B: Tensor) -> Generator[dict[str, Site]]:
        """A site at every private layer, for the forwards and backwards within the context."""
        anchor = torch.zeros((), device=present_B.device, requires_grad=True)
        sites = {name: Site(name, len(present_B), anchor) for name in self.layers}
        try:
            for name, layer in self.layers.items():
                layer.module.site = sites[name]
            yield sites
        finally:
            for name, layer in self.layers.items():
                layer.module.site = None
                sites[name].uses.clear()  # outputs hold the graph, which holds the site


class FlatClipper(Clipper):
    """Each record's whole gradient clipped at once, by a backward for the norms and another for the weighted sum.

    keep: the share of the layers' outputs, counted in bytes from the input on, whose gradients the first backward
    keeps. At those layers the second one forms the weight gradient and goes no further.
    """

    def __init__(self, model: nn.Module, bound: float, *, keep: float) -> None:
        super().__init__(model, bound)
        self.keep = keep

    def _accumulate(self, backend: Backend, losses: Losses, present_B: Tensor) -> Tensor:
        with self._sites(present_B) as sites:
            losses_B = losses(backend.norm_model)
            kept = self._first_outputs(sites) if backend.forward_once else {}
            squared_B = self._squared_norms(backend, sites, losses_B, kept)
            weights_B = _clip_weights(squared_B, self.bound, _counted(present_B, losses_B))
            if not backend.forward_once:
                for site in sites.values():
                    site.uses.clear()
                losses_B = losses(backend.model)
            root = losses_B.sum()
            if kept:
                _cut(root, kept.values())
            weighted = _WeightedPass(weights_B)
            with activate(weighted):
                backend.backward(root)
            _require_reports(sites, weighted.visited)
        return losses_B

    def _first_outputs(self, sites: Mapping[str, Site]) -> dict[Use, Tensor]:
        """The uses, with their outputs, that come first in the forward and make up at most the share `keep`."""
        all_outputs = [pair for site in sites.values() for pair in site.uses]
        all_outputs.sort(key=lambda pair: _number(pair[1].grad_fn))
        room = self.keep * sum(output.nbytes for _, output in all_outputs)
        filled = accumulate(output.nbytes for _, output in all_outputs)
        return {use: output for (use, output), size in zip(all_outputs, filled, strict=True) if size <= room}

    def _squared_norms(
        self, backend: Backend, sites: Mapping[str, Site], losses_B: Tensor, kept: Collection[Use]
    ) -> Tensor:
        # two_pass is chosen for its memory, kept_gradients for its time
        reuse: Reuse = "later" if self.keep == 1 else "later_in_little"
        norms = _NormPass(self.layers, sites, kept, reuse)
        anchor = next(iter(sites.values())).anchor
        with activate(norms):
            # Scaled as the second backward will be: a scale that is no power of two rounds the gradients otherwise,
            # in bf16 by more than any allowance for rounding.
            root = losses_B.sum() * backend.loss_scale
            torch.autograd.grad(root, anchor, retain_graph=backend.forward_once, allow_unused=True)
        _require_reports(sites, norms.visited)
        return norms.squared_norms() / backend.loss_scale**2


class GroupWiseClipper(Clipper):
    """Each layer clipped by itself, in one backward; layers that share a parameter are one group.

    `bounds` (K,) holds each group's bound; the root of the sum of their squares is `bound`, and is the sensitivity.
    With a `quantile`, each bound follows that quantile of its group's norms by `adapt`, from noised counts: a record
    moves `counts` by at most sqrt(K) / 2 in L2.
    """

    def __init__(self, model: nn.Module, bound: float, quantile: float | None = None, rate: float = 0.2) -> None:
        super().__init__(model, bound)
        self.quantile, self.rate = quantile, rate
        self.groups = _groups(self.layers)
        num_groups = 1 + max(self.groups.values())
        self.bounds = [bound / math.sqrt(num_groups)] * num_groups
        self._counts = torch.zeros(num_groups)

    def _accumulate(self, backend: Backend, losses: Losses, present_B: Tensor) -> Tensor:
        with self._sites(present_B) as sites:
            losses_B = losses(backend.model)
            uses = Counter[int]()
            for name, site in sites.items():
                uses[self.groups[name]] += len(site.uses)
            # Uses of one group may add up in one direction: each gets its share of the group's bound.
            bounds = {name: self.bounds[group] / max(1, uses[group]) for name, group in self.groups.items()}
            each = _GroupPass(bounds, _counted(present_B, losses_B), backend.loss_scale)
            with activate(each):
                backend.backward(losses_B.sum())
            _require_reports(sites, each.visited)
            if self.quantile is not None:
                self._count(each.within, uses, present_B)
        return losses_B

    def take_counts(self) -> Tensor:
        """For each group, the sum over the records since the last call of (1 if within its bound else 0) - 1/2."""
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        return counts

    def adapt(self, noised_counts: Sequence[float], expected_batch_size: int) -> None:
        """Move each bound towards the quantile (Andrew et al. 2021, Alg. 1); the sensitivity stays what it was."""
        assert self.quantile is not None
        within = [min(1.0, max(0.0, count / expected_batch_size + 0.5)) for count in noised_counts]  # it is a share
        moved = [b * math.exp(-self.rate * (w - self.quantile)) for b, w in zip(self.bounds, within, strict=True)]
        self.bounds = [b * self.bound / math.hypot(*moved) for b in moved]

    def _count(self, within: Mapping[str, list[Tensor]], uses: Counter[int], present_B: Tensor) -> None:
        self._counts = self._counts.to(present_B.device)
        self._counts -= 0.5 * present_B.sum()
        for name, of_uses in within.items():
            group = self.groups[name]
            for within_B in of_uses:
                self._counts[group] += within_B.sum() / uses[group]


def make_clipper(engine: EngineName, model: nn.Module, bound: float) -> Clipper:
    """The engine by its name in the configuration."""
    if engine == "group_wise":
        return GroupWiseClipper(model, bound)
    return FlatClipper(model, bound, keep=1.0 if engine == "kept_gradients" else TWO_PASS_KEEPS)


class _NormPass(Pass):
    """Sums squared norms over parameters; those of a parameter used several times once all its uses are there."""

    def __init__(
        self, layers: Mapping[str, PrivateLayer], sites: Mapping[str, Site], kept: Collection[Use], reuse: Reuse
    ) -> None:
        self.visited = set[Use]()
        self._layers, self._kept = layers, kept
        self._reuse: Reuse = reuse
        uses = Counter(layers[name].parameters[local] for name, site in sites.items() for local in _used(site))
        self._several: dict[str, list[PerRecordGradient]] = {name: [] for name, number in uses.items() if number > 1}
        self._squared_B: Tensor | None = None

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.visited.add(use)
        keep = use in self._kept
        used_once = list[PerRecordGradient]()
        for local, gradient in gradients.items():
            self._several.get(self._layers[use.site.name].parameters[local], used_once).append(gradient)
        if used_once:
            self._add(squared_norms(used_once, reuse=self._reuse if keep else None))
        if keep:
            use.kept = gradients
        return {}

    def squared_norms(self) -> Tensor:
        for uses in self._several.values():
            self._add(together(uses).squared_norms())
        assert self._squared_B is not None, "no layer was visited"
        return self._squared_B

    def _add(self, squared_B: Tensor) -> None:
        self._squared_B = squared_B if self._squared_B is None else self._squared_B + squared_B


class _WeightedPass(Pass):
    def __init__(self, weights_B: Tensor) -> None:
        self.visited = set[Use]()
        self._weights = RecordWeights(weights_B)

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.visited.add(use)
        use.kept = None
        return {name: gradient.weighted_sum(self._weights) for name, gradient in gradients.items()}


class _GroupPass(Pass):
    def __init__(self, bounds: Mapping[str, float], counted_B: Tensor, loss_scale: float) -> None:
        self.visited = set[Use]()
        self.within: dict[str, list[Tensor]] = {}
        self._bounds, self._counted_B, self._loss_scale = bounds, counted_B, loss_scale

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.visited.add(use)
        bound = self._bounds[use.site.name]
        squared_B = squared_norms(list(gradients.values()), reuse="at_once") / self._loss_scale**2
        self.within.setdefault(use.site.name, []).append((squared_B <= bound**2) & self._counted_B)
        weights = RecordWeights(_clip_weights(squared_B, bound, self._counted_B))
        return {name: gradient.weighted_sum(weights) for name, gradient in gradients.items()}


def _cut(root: Tensor, kept: Iterable[Tensor]) -> None:
    """Let the backward of `root` go by all that was computed up to the last of `kept` without any gradient.

    Of the uses computed until then all are kept, so that none of them needs one.
    """
    last = max(_number(output.grad_fn) for output in kept)
    to_visit, met = [root.grad_fn], set[Node | None]()
    while to_visit:
        node = to_visit.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if _number(node) > last:
            to_visit += [earlier for earlier, _ in node.next_functions]
        else:
            node.register_prehook(_no_gradients)


def _number(node: Node | None) -> int:
    """Autograd's count of operations up to this one."""
    assert node is not None
    return node._sequence_nr()  # pyright: ignore[reportPrivateUsage]


def _no_gradients(gradients: tuple[Tensor | None, ...]) -> Any:
    return (None,) * len(gradients)


def _require_full_precision(device: torch.device) -> None:
    """Products of fewer bits would carry norms further below the true ones than the rounding guard allows for."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError("autocast is on around the clipper, whose norms are fp32: turn it on within `losses` only")
    backends: Any = torch.backends
    precisions: set[str] = {backend.matmul.fp32_precision for backend in (backends.cuda, backends.mkldnn)}
    if not precisions <= {"none", "ieee"}:
        raise ValueError(
            f"fp32 matrix products are taken in {' and '.join(sorted(precisions))}, too few bits for the clipping "
            "norms: call torch.set_float32_matmul_precision('highest')"
        )


def _counted(present_B: Tensor, losses_B: Tensor) -> Tensor:
    return present_B & torch.isfinite(losses_B.detach())


def _clip_weights(squared_B: Tensor, bound: float, counted_B: Tensor) -> Tensor:
    """min(1, bound / norm) for each record that counts and is finite, zero for the others."""
    squared_B = at_least_fp32(squared_B)
    inside = bound * (1 - _ROUNDING_UNITS * torch.finfo(squared_B.dtype).eps)
    weights_B = (inside / squared_B.sqrt()).clamp(max=1.0)  # norm 0 gives inf, clamped to 1
    return torch.where(counted_B & torch.isfinite(squared_B), weights_B, torch.zeros_like(weights_B))


def _used(site: Site) -> Iterator[str]:
    return (local for use, _ in site.uses for local in use.parameters)


def _require_reports(sites: Mapping[str, Site], visited: set[Use]) -> None:
    """Refuse the step unless every use of every layer, and at least one, was visited by the pass."""
    for name, site in sites.items():
        reports = sum(use in visited for use, _ in site.uses)
        if not site.uses or reports != len(site.uses):
            raise ValueError(  # the model's author must mend it: a restart would only be charged again
                f"layer {name!r} was used {len(site.uses)} times in the forward and reported its per-record gradients "
                f"{reports} times: step refused; freeze a layer that the loss does not depend on"
            )


def _groups(layers: Mapping[str, PrivateLayer]) -> dict[str, int]:
    """A group number, 0.., for each layer; layers that share a parameter, directly or through others, have the same."""
    users: dict[str, list[str]] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters.values():
            users.setdefault(parameter, []).append(name)
    groups = {name: number for number, name in enumerate(layers)}
    for together_now in users.values():
        joined = {groups[name] for name in together_now}
        groups = {name: min(joined) if group in joined else group for name, group in groups.items()}
    dense = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: dense[group] for name, group in groups.items()}
