"""Layer operations that can tell each record's share of a gradient.

A layer with a `site` takes part in differentially private training. In its forward it is an ordinary layer; in its
backward it forms the factors of each record's gradient (`kernels.ghost_norm`) and hands them to the `Pass` that is
active, which alone decides what becomes of them: norms, a clip-weighted sum, or nothing yet. Outside a pass its
backward refuses to run, so that no unclipped gradient can come out of a private model by accident. Without a `site` the
operations are the plain ones of torch.

A new kind of layer is a `Rule`: its forward, the gradient of its input, and the factors of its parameters' gradients.
"""

# B records, K rows a record (noise multiplicity), N tokens, P input features, D output features, G convolution groups
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.ghost_norm import ExpertOuterProducts, OuterProducts, PerRecordGradient, RowSums, TokenSum

Gradients = Mapping[str, PerRecordGradient]  # by the parameter's name in the layer
Shapes = Mapping[str, torch.Size]


@dataclass(eq=False)
class Use:
    """One use of a layer's parameters in one forward."""

    site: Site
    parameters: tuple[str, ...]  # the trainable ones, by their names in the layer
    kept: Gradients | None = None  # once a pass has kept them, later passes need no gradient of the output


@dataclass(eq=False)
class Site:
    """A layer's place in the step under way; whoever clips gives it to the layer before a forward."""

    name: str
    num_records: int
    anchor: Tensor  # a scalar that requires grad: autograd then visits the layer, whatever its input
    uses: list[tuple[Use, Tensor]] = field(default_factory=list["tuple[Use, Tensor]"])  # each with its output

    def by_record(self, x: Tensor) -> Tensor:
        """Rows of shape (B*K, ..., F) as (B, tokens of the record, F): the K rows of a record stand together."""
        return x.reshape(self.num_records, -1, x.shape[-1])


class PerRecordModule(nn.Module):
    """A layer that uses its own parameters through the operations of this file only, and gives them its `site`."""

    site: Site | None = None


class Pass(ABC):
    """What a backward does at each use of a private layer's parameters."""

    @abstractmethod
    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        """What autograd is to accumulate into each parameter of `use`; nothing for those left out."""


# Process-wide, not thread-local: autograd runs CUDA backwards on threads of its own.
_active: Pass | None = None


@contextmanager
def activate(new: Pass) -> Iterator[None]:
    """Let `new` see every private layer's backward within the context."""
    global _active  # noqa: PLW0603
    if _active is not None:
        raise RuntimeError("a per-record pass is already active: passes do not nest")
    _active = new
    try:
        yield
    finally:
        _active = None


class Rule(ABC):
    """How one kind of layer computes, and how its parameters' gradients fall apart into records."""

    @abstractmethod
    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The layer's output."""

    @abstractmethod
    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor | None:
        """The gradient of x; None where x has none."""

    @abstractmethod
    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        """The PerRecordGradient of each parameter named in `shapes`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: Site | None) -> Tensor:
    """`F.linear` for x of shape (B*K, ..., P); rows of one record stand together. Returns (B*K, ..., D)."""
    if site is None:
        return F.linear(x, weight, bias)
    return apply(_LINEAR, site, x, weight=weight, bias=bias)


def embedding(indices: Tensor, weight: Tensor, site: Site | None, padding_idx: int | None = None) -> Tensor:
    """`F.embedding` for integer indices of shape (B*K, ...). Returns (B*K, ..., D)."""
    if site is None:
        return F.embedding(indices, weight, padding_idx)
    return apply(_Embedding(padding_idx), site, indices, weight=weight)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, site: Site | None,
    *, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int,
) -> Tensor:  # fmt: skip
    """`F.conv2d` for x of shape (B*K, C, H, W). Returns (B*K, D, H', W')."""
    if site is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return apply(_Conv2d(stride, padding, dilation, groups), site, x, weight=weight, bias=bias)


def copies(weight: Tensor, num_rows: int, site: Site | None) -> Tensor:
    """`weight` once for each of B*K rows, (B*K, *weight.shape), without memory of its own.

    What makes any tensor a per-record layer: a positional table, register tokens, the scale of a norm, a scalar.
    """
    if site is None:
        return weight.expand(num_rows, *weight.shape)
    return apply(_Copies(num_rows), site, weight.new_empty(0), weight=weight)


def experts_linear(x: Tensor, experts: Tensor, weight: Tensor, site: Site | None, *, name: str = "weight") -> Tensor:
    """Each token through the matrix of its own expert: x (B*K, N, P), experts (B*K, N), weight (E, D, P).

    `name` is the weight's in its layer. Gradients are summed within record and expert before the norm is taken.
    Returns (B*K, N, D).
    """
    rule = _ExpertsLinear(experts, len(weight), name)
    return rule.forward(x, weight) if site is None else apply(rule, site, x, **{name: weight})


def _apply(rule: Rule, site: Site, x: Tensor, **parameters: Tensor | None) -> Tensor:
    """One private use of `parameters`, named as in the layer, under `rule`."""
    use = Use(site, tuple(name for name, value in parameters.items() if value is not None and value.requires_grad))
    y: Tensor = _Use.apply(rule, use, tuple(parameters), site.anchor, x, *parameters.values())  # type: ignore
    if _active is None:  # otherwise activation checkpointing is repeating a forward that was counted
        site.uses.append((use, y))
    return y


# Never traced: what a backward does is decided when it runs.
apply: Callable[..., Tensor] = torch.compiler.disable(_apply)  # type: ignore[assignment]


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, use: Use, names: tuple[str, ...], anchor: Tensor, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        y = rule.forward(x, *parameters)
        ctx.rule, ctx.use, ctx.names = rule, use, names
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x.to(y.dtype) if x.is_floating_point() else x, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if _active is None:
            raise RuntimeError("backward of a private layer outside its passes: the gradient would be unclipped")
        use, grad_x = ctx.use, None
        gradients = use.kept
        if gradients is None:
            if grad_y is None:  # the pass is not told of this use, and whoever clips refuses the step
                return (None,) * (5 + len(ctx.names))
            x, *parameters = ctx.saved_tensors
            if ctx.needs_input_grad[4]:
                grad_x = ctx.rule.input_gradient(grad_y, x, *parameters)
                grad_x = None if grad_x is None else grad_x.to(ctx.x_dtype)
            shapes = {n: p.shape for n, p in zip(ctx.names, parameters, strict=True) if n in use.parameters}
            gradients = ctx.rule.gradients(use.site, grad_y, x, shapes)
        given = _active.visit(use, gradients)
        return None, None, None, None, grad_x, *(given.get(name) for name in ctx.names)


class _Linear(Rule):
    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight, bias = parameters
        assert weight is not None
        return F.linear(x, weight, bias)

    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight = parameters[0]
        assert weight is not None
        return grad_y @ weight.to(grad_y.dtype)

    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        left_BND, found = site.by_record(grad_y), dict[str, PerRecordGradient]()
        if "weight" in shapes:
            found["weight"] = OuterProducts(left_BND[:, None], site.by_record(x)[:, None], shapes["weight"])
        if "bias" in shapes:
            found["bias"] = TokenSum(left_BND, shapes["bias"])
        return found


_LINEAR = _Linear()


@dataclass(frozen=True)
class _Embedding(Rule):
    padding_idx: int | None

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        (weight,) = parameters
        assert weight is not None
        return F.embedding(x, weight, self.padding_idx)

    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> None:
        return None

    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        rows_BN = x.reshape(site.num_records, -1)
        if self.padding_idx is not None:
            rows_BN = rows_BN.masked_fill(rows_BN == self.padding_idx, -1)
        return {"weight": RowSums(rows_BN, site.by_record(grad_y), shapes["weight"])}


@dataclass(frozen=True)
class _Conv2d(Rule):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight, bias = parameters
        assert weight is not None
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight = parameters[0]
        assert weight is not None
        geometry = (self.stride, self.padding, self.dilation)
        return torch.ops.aten.convolution_backward(
            grad_y, x, weight.to(grad_y.dtype), None, *geometry, False, [0, 0], self.groups, [True, False, False]
        )[0]

    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        left_RND = grad_y.flatten(2).mT  # a token is a place of the output
        found = dict[str, PerRecordGradient]()
        if "weight" in shapes:
            shape = shapes["weight"]
            patches_RPN = F.unfold(x, tuple(shape[2:]), self.dilation, self.padding, self.stride)
            left_BGND, right_BGNP = (
                site.by_record(y).unflatten(-1, (self.groups, -1)).transpose(1, 2)
                for y in (left_RND, patches_RPN.mT)
            )  # fmt: skip
            found["weight"] = OuterProducts(left_BGND, right_BGNP, shape)
        if "bias" in shapes:
            found["bias"] = TokenSum(site.by_record(left_RND), shapes["bias"])
        return found


@dataclass(frozen=True)
class _Copies(Rule):
    num_rows: int

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        (weight,) = parameters
        assert weight is not None
        return weight.expand(self.num_rows, *weight.shape)

    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> None:
        return None

    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        return {"weight": TokenSum(site.by_record(grad_y.reshape(self.num_rows, -1)), shapes["weight"])}


@dataclass(frozen=True, eq=False)
class _ExpertsLinear(Rule):
    experts: Tensor
    num_experts: int
    name: str

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        (weight,) = parameters
        assert weight is not None
        return self._through(x, weight.mT)

    def input_gradient(self, grad_y: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
        (weight,) = parameters
        assert weight is not None
        return self._through(grad_y, weight.to(grad_y.dtype))

    def gradients(self, site: Site, grad_y: Tensor, x: Tensor, shapes: Shapes) -> Gradients:
        experts_BN = self.experts.reshape(site.num_records, -1)
        found = ExpertOuterProducts(experts_BN, site.by_record(grad_y), site.by_record(x), shapes[self.name])
        return {self.name: found}

    def _through(self, x: Tensor, matrices_EPD: Tensor) -> Tensor:
        order_T, counts_E = self._sorted
        rows = x.flatten(0, -2).index_select(0, order_T).split(counts_E)
        y_TD = torch.cat([own @ matrix_PD for own, matrix_PD in zip(rows, matrices_EPD, strict=True)])
        return y_TD.index_select(0, order_T.argsort()).view(*x.shape[:-1], -1)

    @cached_property
    def _sorted(self) -> tuple[Tensor, list[int]]:
        """All tokens by expert, and how many each expert has."""
        sorted_T, order_T = self.experts.flatten().sort(stable=True)
        edges = torch.arange(self.num_experts + 1, device=order_T.device)
        return order_T, torch.searchsorted(sorted_T, edges).diff().tolist()
