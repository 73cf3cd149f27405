"""Expert parallelism: which ranks hold which experts, and who sums their gradients.

W ranks are a mesh of W / N replicas by N parts: N ranks that follow each other hold a model's experts among them, each
an N-th of every layer's, and every N-th rank holds the same. All W ranks have records of their own, and all other
weights: expert parallelism costs no data parallelism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from models.moe import Experts


@dataclass(frozen=True, eq=False)
class ExpertParallel:
    """This rank's place in the mesh, and what was cut up along it."""

    replicas: DeviceMesh  # the ranks that hold the same experts as this one
    parts: DeviceMesh  # the ranks that hold all experts among them
    shapes: dict[str, tuple[int, ...]]  # of each parameter that was cut, by name, as it was

    def offset(self, name: str) -> int:
        """The first of the whole flattened parameter's elements that this rank has; 0 for one that was not cut."""
        if name not in self.shapes:
            return 0
        return math.prod(self.shapes[name]) // self.parts.size() * self.parts.get_local_rank()

    def sum_over_replicas(self, module: nn.Module) -> None:
        """Sum the gradients of the experts over the ranks that hold the same ones."""
        if self.replicas.size() == 1:
            return
        group, pending = self.replicas.get_group(), list[dist.Work | None]()
        for layer in spread_layers(module).values():
            for parameter in layer.parameters():
                assert parameter.grad is not None, "every expert's matrix is part of every forward"
                pending.append(dist.all_reduce(parameter.grad, group=group, async_op=True))
        for work in pending:
            assert work is not None
            work.wait()


def spread_layers(module: nn.Module) -> dict[str, Experts]:
    """The layers that hold experts, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Experts)}


def spread_experts(module: nn.Module, device: str, num_parts: int) -> ExpertParallel:
    """Leave this rank its part of the experts of `module`, which may be on the meta device. A collective of all ranks.

    Raises ValueError where the model has no experts, or where experts or ranks do not fall evenly on `num_parts`.
    """
    world_size = dist.get_world_size()
    require_shared(world_size, num_parts)
    layers = spread_layers(module)
    for layer in list(layers.values()) or [None]:
        require_even(0 if layer is None else len(layer.up), num_parts)
    mesh = init_device_mesh(device, (world_size // num_parts, num_parts), mesh_dim_names=("replicas", "parts"))
    replicas, parts = mesh["replicas"], mesh["parts"]
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, layer in layers.items():
        shapes |= {f"{prefix}.{name}": tuple(weight.shape) for name, weight in layer.named_parameters()}
        layer.spread(parts.get_group())
    return ExpertParallel(replicas, parts, shapes)


def require_shared(world_size: int, num_parts: int) -> None:
    """Refuse so many parts that the ranks do not fall evenly on them."""
    if world_size % num_parts:
        raise ValueError(
            f"parallel.expert_parallel is {num_parts}, which does not divide the {world_size} ranks: "
            f"choose {_divisors(world_size)}, or start another number of ranks"
        )


def require_even(num_experts: int, num_parts: int) -> None:
    """Refuse to cut a layer of `num_experts`, those of all modalities together, into `num_parts`; 0: a dense layer."""
    if num_experts == 0:
        raise ValueError(
            f"parallel.expert_parallel is {num_parts}, but the model has no experts to spread: set it to 1, or "
            "give the model num_experts or modality_experts"
        )
    if num_experts % num_parts:
        raise ValueError(
            f"parallel.expert_parallel is {num_parts}, which does not divide a layer's {num_experts} experts "
            f"(model.num_experts, times two with modality_experts): choose {_divisors(num_experts)}"
        )


def _divisors(number: int) -> str:
    *others, last = (str(n) for n in range(1, number + 1) if number % n == 0)
    return f"{', '.join(others)} or {last}" if others else last
