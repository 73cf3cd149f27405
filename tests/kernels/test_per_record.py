"""What a private layer's operations compute, and what their backward hands to the pass that is active."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import per_record
from kernels.ghost_norm import RecordWeights
from kernels.per_record import Gradients, Pass, Site, Use, activate

RECORDS, ROWS = 4, 8  # two rows a record
Operation = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_site() -> Site:
    return Site("layer", RECORDS, torch.zeros((), requires_grad=True))


class Collect(Pass):
    """Keeps what each use hands over; gives autograd the sum under the given weights."""

    def __init__(self, weights_B: Tensor | None = None) -> None:
        self.weights_B, self.met = weights_B, list[tuple[Use, Gradients]]()

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.met.append((use, gradients))
        if self.weights_B is None:
            return {}
        return {name: gradient.weighted_sum(RecordWeights(self.weights_B)) for name, gradient in gradients.items()}


EXPERTS = torch.randint(0, 2, (ROWS, 6), generator=torch.Generator().manual_seed(2))
GEOMETRIES = {
    "plain": {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
    "patchify": {"stride": (3, 3), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
    "all_at_once": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
}


def experts_by_gather(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("rnp,rndp->rnd", x, weight[EXPERTS])


# (ours with a site, torch's own, inputs, parameters)
OPERATIONS: dict[str, tuple[Operation, Operation, Tensor, tuple[Tensor, ...]]] = {
    "linear_2d": (per_record.linear, F.linear, draw(ROWS, 3), (draw(5, 3), draw(5, seed=1))),
    "linear_3d": (per_record.linear, F.linear, draw(ROWS, 7, 3), (draw(5, 3), draw(5, seed=1))),
    "linear_5d": (per_record.linear, F.linear, draw(ROWS, 2, 1, 4, 3), (draw(5, 3), draw(5, seed=1))),
    "embedding": (
        partial(per_record.embedding, padding_idx=1), partial(F.embedding, padding_idx=1),
        torch.randint(0, 4, (ROWS, 9), generator=torch.Generator().manual_seed(3)), (draw(4, 5),),
    ),
    **{
        f"conv2d_{name}": (
            partial(per_record.conv2d, **geometry), partial(F.conv2d, **geometry), draw(ROWS, 4, 9, 9),
            (draw(6, 4 // geometry["groups"], 3, 3, seed=1), draw(6, seed=2)),  # type: ignore[operator]
        )
        for name, geometry in GEOMETRIES.items()
    },
    "experts_linear": (
        lambda x, weight, site: per_record.experts_linear(x, EXPERTS, weight, site), experts_by_gather,
        draw(ROWS, 6, 3), (draw(2, 5, 3),),
    ),
    "copies": (
        lambda x, weight, site: x * per_record.copies(weight, ROWS, site), lambda x, weight: x * weight,
        draw(ROWS, 3, 5), (draw(3, 5, seed=1),),
    ),
}  # fmt: skip


def losses(y: Tensor) -> Tensor:
    """One a record, (B,): nonlinear, so that no two tokens have the same gradient."""
    return y.tanh().square().reshape(RECORDS, -1).sum(1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_a_site_the_operations_are_torchs_own(operation: str) -> None:
    ours, plain, x, parameters = OPERATIONS[operation]
    torch.testing.assert_close(ours(x, *parameters, site=None), plain(x, *parameters), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_output_input_gradient_and_each_records_gradients_are_torchs(operation: str) -> None:
    ours, plain, x, parameters = OPERATIONS[operation]
    x = x.clone().requires_grad_(x.is_floating_point())
    trainable = [p.clone().requires_grad_() for p in parameters]
    weights_B, site = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64), a_site()
    y = ours(x, *trainable, site=site)
    torch.testing.assert_close(y, plain(x, *trainable), rtol=1e-12, atol=1e-14)
    expected = [torch.autograd.grad(loss, trainable, retain_graph=True) for loss in losses(plain(x, *trainable))]
    norms = Collect()
    with activate(norms):
        torch.autograd.grad(losses(y).sum(), site.anchor, retain_graph=True, allow_unused=True)
    ((use, gradients),) = norms.met
    assert [use] == [u for u, _ in site.uses]
    assert set(gradients) == {"weight", "bias"} if len(parameters) == 2 else {"weight"}
    squared_B = torch.stack([g.squared_norms() for g in gradients.values()]).sum(0)
    norms_B = torch.stack([torch.stack([g.square().sum() for g in own]).sum() for own in expected])
    torch.testing.assert_close(squared_B, norms_B, rtol=1e-10, atol=1e-12)
    with activate(Collect(weights_B)):
        losses(y).sum().backward()
    for index, parameter in enumerate(trainable):
        weighted = sum(w * own[index] for w, own in zip(weights_B, expected, strict=True))
        torch.testing.assert_close(parameter.grad, weighted, rtol=1e-10, atol=1e-12)
    if x.requires_grad:
        (of_input,) = torch.autograd.grad(losses(plain(x, *trainable)).sum(), x)
        torch.testing.assert_close(x.grad, of_input, rtol=1e-10, atol=1e-12)


def test_backward_outside_a_pass_is_refused() -> None:
    y = per_record.linear(draw(4, 3), draw(5, 3).requires_grad_(), None, a_site())
    with pytest.raises(RuntimeError, match="unclipped"):
        y.sum().backward()


def test_passes_do_not_nest_and_end_with_an_error_inside() -> None:
    with activate(Collect()), pytest.raises(RuntimeError, match="do not nest"), activate(Collect()):
        pass
    with pytest.raises(KeyError), activate(Collect()):
        raise KeyError
    with activate(Collect()):
        pass


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_has_no_part(frozen: str) -> None:
    parameters = {"weight": draw(5, 3), "bias": draw(5)}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name != frozen)
    site, collected = a_site(), Collect()
    y = per_record.linear(draw(4, 6, 3), parameters["weight"], parameters["bias"], site)
    with activate(collected):
        torch.autograd.grad(y.sum(), site.anchor, allow_unused=True)
    ((use, gradients),) = collected.met
    assert set(use.parameters) == set(gradients) == {"weight", "bias"} - {frozen}


def test_a_layer_is_visited_though_its_input_needs_no_gradient_and_though_it_does() -> None:
    site, collected = a_site(), Collect()
    weight = draw(3, 3).requires_grad_()
    y = per_record.linear(per_record.linear(draw(4, 3), weight, None, site).tanh(), weight, None, site)
    with activate(collected):
        torch.autograd.grad(y.sum(), site.anchor, allow_unused=True)
    assert [use for use, _ in collected.met] == [use for use, _ in reversed(site.uses)]


def test_what_was_kept_is_handed_over_again_and_the_input_gets_no_gradient() -> None:
    site, first, second = a_site(), Collect(), Collect()
    x, weight = draw(4, 3).requires_grad_(), draw(5, 3).requires_grad_()
    y = per_record.linear(x, weight, None, site)
    with activate(first):
        torch.autograd.grad(y.sum(), site.anchor, retain_graph=True, allow_unused=True)
    use, gradients = first.met[0]
    use.kept = gradients
    with activate(second):
        (0 * y).sum().backward()
    assert second.met == [(use, gradients)]
    assert x.grad is None


def test_a_use_that_no_gradient_reaches_is_not_visited() -> None:
    site, collected, weight = a_site(), Collect(torch.ones(RECORDS)), draw(3, 3).requires_grad_()
    x = draw(4, 3).requires_grad_()
    y = per_record.linear(x, weight, None, site)
    y.grad_fn.register_prehook(lambda gradients: (None,) * len(gradients))  # type: ignore[union-attr]
    with activate(collected):
        y.sum().backward()
    assert collected.met == []
    assert x.grad is None and weight.grad is None


def test_a_forward_repeated_by_activation_checkpointing_counts_once() -> None:
    site, collected, weight = a_site(), Collect(), draw(3, 3).requires_grad_()
    x = draw(4, 3).requires_grad_()
    y = checkpoint(lambda x: per_record.linear(x.tanh(), weight, None, site), x, use_reentrant=False)
    assert len(site.uses) == 1
    with activate(collected):
        torch.autograd.grad(y.sum(), site.anchor, allow_unused=True)
    assert len(site.uses) == len(collected.met) == 1


def test_under_autocast_the_factors_are_half_as_wide_and_the_gradients_fp32() -> None:
    site, collected = a_site(), Collect(torch.ones(RECORDS))
    x, weight = draw(4, 6, 3).float().requires_grad_(), draw(5, 3).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = per_record.linear(x, weight, None, site)
    assert y.dtype == torch.bfloat16
    with activate(collected):
        y.float().square().sum().backward()
    assert collected.met[0][1]["weight"].squared_norms().dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32
