"""Two-pass clipping on a real DiT: against a loop over single records, and for records that mean harm."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from kernels.per_record import PerRecordModule
from models.dit import DiT, DiTConfig
from models.flow import Objective
from models.layers import Embedding, Linear
from privacy.clipping import check_model, make_clipper

BOUND = 0.7


class OneProcess:
    """The smallest backend: plain autograd."""

    forward_once = True
    loss_scale = 1.0

    def __init__(self, model: nn.Module) -> None:
        self.model = self.norm_model = model

    def microbatch(self, *, last: bool):
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def small_dit() -> DiT:
    model = DiT(DiTConfig(width=32, depth=2, heads=2, image_size=8, channels=1, patch_size=2, num_classes=10))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # adaLN-Zero starts with zero gates, which would hide most layers
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(size: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(size, 1, 8, 8, generator=generator) for _ in range(2))
    return images, torch.randint(0, 10, (size,), generator=generator), torch.rand(size, generator=generator), noise


def clipped_sum(model: DiT, records, present: Tensor) -> Tensor:
    model.zero_grad()
    images, labels, t, noise = records
    make_clipper("two_pass", model, BOUND).accumulate(
        OneProcess(model), lambda m: Objective().losses(m, images, labels, t, noise), present, last=True
    )
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def looped_sum(model: DiT, records, bound: float = BOUND) -> Tensor:
    total = 0.0
    for i in range(len(records[0])):
        loss = Objective().losses(model, *(part[i : i + 1] for part in records)).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + gradient * min(1.0, bound / gradient.norm().item())
    return total


def test_the_clipped_sum_equals_a_loop_over_records() -> None:
    model, records = small_dit(), batch(9)
    expected = looped_sum(model, records)
    got = clipped_sum(model, records, torch.ones(9, dtype=torch.bool))
    assert (got - expected).norm() / expected.norm() < 1e-5
    unclipped = looped_sum(model, records, bound=float("inf"))
    assert (got - unclipped).norm() / unclipped.norm() > 0.1, "the bound did not bind, so this compared nothing"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e18, 1e-42, 300.0])
def test_one_record_moves_the_sum_by_at_most_the_bound(value: float) -> None:
    model, records = small_dit(), batch(5)
    without = torch.tensor([True, True, False, True, True])
    base = clipped_sum(model, records, without)
    records[0][2] = value
    moved = clipped_sum(model, records, torch.ones(5, dtype=torch.bool))
    assert torch.isfinite(moved).all()
    assert (moved.double() - base.double()).norm() <= BOUND * (1 + 1e-6) + 1e-6 * base.norm()


def test_padding_contributes_exactly_nothing() -> None:
    model, records = small_dit(), batch(4)
    present = torch.tensor([True, True, False, False])
    whole = clipped_sum(model, records, present)
    records[0][2:] = float("nan")
    assert torch.equal(clipped_sum(model, records, present), whole)


def test_no_gradient_is_left_of_a_step_of_padding() -> None:
    model = small_dit()
    assert clipped_sum(model, batch(2), torch.zeros(2, dtype=torch.bool)).abs().max() == 0


class Shared(nn.Module):
    """Uses one layer twice: its norms would miss the cross term."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_layer_that_reports_twice_refuses_the_step() -> None:
    model, x = Shared(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="'layer' reported its per-record norms 2 times"):
        make_clipper("two_pass", model, 1.0).accumulate(
            OneProcess(model), lambda m: m(x).square().sum(1), torch.ones(3, dtype=torch.bool), last=True
        )
    assert model.layer.norm_row is None


def test_a_layer_that_never_runs_refuses_the_step() -> None:
    model = nn.ModuleDict({"used": Linear(4, 4), "idle": Linear(4, 4)})
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="'idle' reported its per-record norms 0 times"):
        make_clipper("two_pass", model, 1.0).accumulate(
            OneProcess(model), lambda m: m["used"](x).square().sum(1), torch.ones(3, dtype=torch.bool), last=True
        )


def test_layers_without_a_norm_rule_are_refused_by_name() -> None:
    model = nn.Sequential(Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"1\.weight belongs to a BatchNorm1d.*2\.weight.*freeze it or register"):
        check_model(model)


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"embed": Embedding(10, 4), "head": Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"tied to embed\.weight"):
        check_model(model)


def test_a_model_with_everything_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        check_model(Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        make_clipper("two_pass", small_dit(), bound)


def test_every_layer_of_the_model_reports() -> None:
    layers = check_model(small_dit())
    assert all(isinstance(layer, PerRecordModule) for layer in layers.values())
    named = {name.rsplit(".", 1)[0] for name, _ in small_dit().named_parameters()}
    assert set(layers) == named
