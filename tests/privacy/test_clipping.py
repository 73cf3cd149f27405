"""The clipping engines on a whole DiT, on what they refuse, and on what they leave behind."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.per_record import PerRecordModule
from models.dit import DiT, DiTConfig
from models.layers import Embedding, Linear
from privacy.clipping import FlatClipper, GroupWiseClipper, check_model, make_clipper
from tests.privacy.clipped_sums import (
    ENGINES,
    FLAT,
    OneProcess,
    clipped_sum,
    clipper_of,
    flat_sum,
    gradients_of,
    group_wise_sum,
    losses_of,
    norm_of,
    norms,
    per_record_gradients,
    relative_error,
)

# vmap has no rule of its own for scaled dot product attention on the CPU; it loops, which is right and slow.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

RECORDS = 7
ALL = torch.ones(RECORDS, dtype=torch.bool)
Inputs = tuple[Tensor, Tensor, Tensor]


def small_dit(dtype: torch.dtype = torch.float32) -> DiT:
    model = DiT(DiTConfig(width=32, depth=2, heads=2, image_size=8, channels=1, patch_size=2, num_classes=10))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # adaLN-Zero starts with zero gates, which would hide most layers
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch(num_draws: int = 1, dtype: torch.dtype = torch.float32) -> Inputs:
    """x_t, t and labels of each row; the rows of a record have its label."""
    generator = torch.Generator().manual_seed(1)
    rows = RECORDS * num_draws
    x = torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 10, (RECORDS,), generator=generator).repeat_interleave(num_draws)
    return x, torch.rand(rows, generator=generator), labels


def losses_on(inputs: Inputs, records: slice = slice(None)) -> Callable[[nn.Module], Tensor]:
    num_draws = len(inputs[0]) // RECORDS
    chosen = [x.view(RECORDS, num_draws, *x.shape[1:])[records].flatten(0, 1) for x in inputs]
    return lambda model: losses_of(model(*chosen).to(inputs[0].dtype), len(chosen[0]) // num_draws)


def expected_sum(engine: str, model: DiT, inputs: Inputs) -> tuple[dict[str, Tensor], float]:
    """The oracle's sum, and the bound, which binds for most records."""
    gradients = per_record_gradients(model, inputs, RECORDS)
    bound = 0.9 * norms(gradients).median().item()
    expected = (group_wise_sum if engine == "group_wise" else flat_sum)(gradients, {}, bound)
    assert relative_error(expected, flat_sum(gradients, {}, 1e30)) > 0.05, "the bound did not bind"
    return expected, bound


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_dits_sum_equals_that_of_clipped_per_record_gradients(
    dtype: torch.dtype, tolerance: float, checkpointing: bool, num_draws: int, engine: str
) -> None:
    model, inputs = small_dit(dtype), batch(num_draws, dtype)
    expected, bound = expected_sum(engine, model, inputs)
    if checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    got = clipped_sum(engine, model, losses_on(inputs), ALL, bound)
    assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_activations_cost_bf16_precision_and_the_bound_holds_in_fp32(engine: str) -> None:
    model, inputs = small_dit(), batch()
    expected, bound = expected_sum(engine, model, inputs)

    def losses(network: nn.Module, records: slice = slice(None)) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_on(inputs, records)(network)

    got = clipped_sum(engine, model, losses, ALL, bound)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert relative_error(got, expected) < 1e-2
    for record, loss_scale in product(range(RECORDS), (1.0, 3.0)):  # a scale of 3 rounds bf16 gradients otherwise
        alone = partial(losses, records=slice(record, record + 1))
        backend = OneProcess(model, loss_scale=loss_scale)
        norm = norm_of(clipped_sum(engine, model, alone, ALL[:1], bound, backend)) / loss_scale
        assert norm <= bound * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_blocks_give_the_same_sum(engine: str) -> None:
    model, inputs = small_dit(torch.float64), batch(dtype=torch.float64)
    expected, bound = expected_sum(engine, model, inputs)
    for block in model.blocks:
        block.compile()
    assert relative_error(clipped_sum(engine, model, losses_on(inputs), ALL, bound), expected) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cuts", [[], [1], [3], [1, 2, 3, 4, 5, 6], [2, 2, 5]])
def test_any_split_into_microbatches_gives_the_same_sum(cuts: list[int], engine: str) -> None:
    model, inputs = small_dit(torch.float64), batch(2, torch.float64)
    expected, bound = expected_sum(engine, model, inputs)
    clipper, backend = clipper_of(engine, model, bound), OneProcess(model)
    edges = [0, *cuts, RECORDS]
    losses: list[Tensor] = []
    for start, stop in pairwise(edges):
        records = slice(start, stop)
        if start == stop:  # an empty draw is one microbatch of padding
            clipper.accumulate(backend, losses_on(inputs, slice(0, 1)), ~ALL[:1], last=False)  # type: ignore[arg-type]
            continue
        part = losses_on(inputs, records)
        losses += [clipper.accumulate(backend, part, ALL[records], last=stop == RECORDS)]  # type: ignore[arg-type]
    assert relative_error(gradients_of(model), expected) < 1e-10
    torch.testing.assert_close(torch.cat(losses), losses_on(inputs)(model).detach())
    assert not any(x.requires_grad for x in losses)


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_leaves_the_sum_of_the_records_that_are_there(engine: str) -> None:
    model, inputs = small_dit(torch.float64), batch(dtype=torch.float64)
    present = torch.tensor([True, True, True, False, False, False, False])
    alone = clipped_sum(engine, model, losses_on(inputs, slice(0, 3)), present[:3])
    inputs[0][3:] = math.nan
    assert relative_error(clipped_sum(engine, model, losses_on(inputs), present), alone) < 1e-12
    nothing = clipped_sum(engine, model, losses_on(inputs), ~ALL)
    assert all((g == 0).all() for g in nothing.values()), "a step of padding has gradients, and they are zero"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, 1e18, 1e-42, 300.0])
def test_one_record_of_a_dit_moves_the_sum_by_at_most_the_bound(value: float, engine: str) -> None:
    model, inputs = small_dit(torch.float64), batch(dtype=torch.float64)
    present = ALL.index_fill(0, torch.tensor([2]), False)
    without = clipped_sum(engine, model, losses_on(inputs), present)
    inputs[0][2] = value
    with_it = clipped_sum(engine, model, losses_on(inputs), ALL)
    assert norm_of({name: with_it[name] - without[name] for name in without}) <= 1 + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_frozen_is_neither_clipped_nor_given_a_gradient(engine: str) -> None:
    model, inputs = small_dit(torch.float64), batch(dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or name == "patch_embed.bias")
    expected, bound = expected_sum(engine, model, inputs)
    assert relative_error(clipped_sum(engine, model, losses_on(inputs), ALL, bound), expected) < 1e-10
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_use_whose_output_the_loss_ignores_refuses_the_step(engine: str) -> None:
    model, x = Shared(), torch.randn(3, 4)

    def losses(model: nn.Module) -> Tensor:
        model(x)
        return model(x).square().sum(1)

    with pytest.raises(ValueError, match=r"'layer' was used 4 times in the forward and reported .* 2 times"):
        clipped_sum(engine, model, losses, ALL[:3])
    assert model.layer.site is None


class Probe(torch.autograd.Function):
    """The identity; notes whether each backward has a gradient for it."""

    had_gradient: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:  # type: ignore[override]
        Probe.had_gradient.append(grad is not None)
        return grad


def test_the_second_backward_computes_nothing_before_what_was_kept() -> None:
    """Nor along a residual connection, by which the layers after it have a gradient for the layers before it."""
    model = nn.ModuleList(Linear(4, 4) for _ in range(3))
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))

    def losses(model: nn.Module) -> Tensor:
        first, second, third = model  # type: ignore[misc]
        y = Probe.apply(first(x))
        return losses_of(third(y + second(y)), 3)

    expected = clipped_sum("keep_0", model, losses, ALL[:3], 0.1)
    Probe.had_gradient.clear()
    got = clipped_sum(FlatClipper(model, 0.1, keep=0.7), model, losses, ALL[:3])
    assert relative_error(got, expected) < 1e-6
    assert Probe.had_gradient == [True, False]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_layers_need_not_run_in_the_order_in_which_the_model_names_them(keep: float) -> None:
    model = nn.ModuleDict({name: Linear(4, 4) for name in ("last", "shared", "first")}).double()
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(model: nn.Module) -> Tensor:
        last, shared, first = model.values()  # type: ignore[operator]
        y = shared(first(shared(x).tanh()).tanh()).tanh() + x
        return losses_of(last(y), 3)

    expected = clipped_sum("keep_0", model, losses, ALL[:3], 0.1)
    got = clipped_sum(FlatClipper(model, 0.1, keep=keep), model, losses, ALL[:3])
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_never_runs_refuses_the_step(engine: str) -> None:
    model = nn.ModuleDict({"used": Linear(4, 4), "idle": Linear(4, 4)})
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"'idle' was used 0 times .* freeze a layer that the loss does not depend"):
        clipped_sum(engine, model, lambda m: m["used"](x).square().sum(1), ALL[:3])
    assert all(layer.site is None for layer in model.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_a_step_stays_in_the_model(engine: str) -> None:
    model, seen = Shared(), list[weakref.ref[Tensor]]()

    def losses(model: nn.Module) -> Tensor:
        y = model(torch.randn(3, 4))
        seen.append(weakref.ref(y))
        return y.square().sum(1)

    clipped_sum(engine, model, losses, ALL[:3])
    assert model.layer.site is None
    model.zero_grad()
    gc.collect()
    assert all(output() is None for output in seen)

    def fails(model: nn.Module) -> Tensor:
        model(torch.randn(3, 4))
        raise KeyError

    with pytest.raises(KeyError):
        clipped_sum(engine, model, fails, ALL[:3])
    assert model.layer.site is None
    clipped_sum(engine, model, losses, ALL[:3])


@pytest.mark.parametrize("engine", ENGINES)
def test_products_of_few_bits_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Shared(), torch.randn(3, 4)
    losses: Callable[[nn.Module], Tensor] = lambda m: m(x).square().sum(1)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="turn it on within `losses` only"):
        clipped_sum(engine, model, losses, ALL[:3])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=r"tf32.*set_float32_matmul_precision\('highest'\)"):
            clipped_sum(engine, model, losses, ALL[:3])
    finally:
        torch.set_float32_matmul_precision(before)
    clipped_sum(engine, model, losses, ALL[:3])


def test_layers_that_tell_no_records_apart_are_refused_by_name() -> None:
    model = nn.Sequential(Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(ValueError) as refused:
        check_model(model)
    message = str(refused.value)
    assert "1 is a BatchNorm1d, which mixes records: use a norm within the record" in message
    assert "3 is a BatchNorm1d, which mixes records" in message
    for name in ("2.weight", "2.bias"):
        assert f"{name} belongs to a Linear, which tells no per-record gradients: freeze it or register" in message


def test_a_raw_parameter_of_a_model_is_refused_by_name() -> None:
    model = nn.Sequential(Linear(4, 4))
    model.register_parameter("temperature", nn.Parameter(torch.zeros(())))
    with pytest.raises(ValueError, match="temperature belongs to a Sequential"):
        check_model(model)


def test_a_frozen_layer_of_any_kind_is_let_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), Linear(4, 4))
    assert set(check_model(model)) == {"1"}


def test_a_model_with_everything_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter: unfreeze"):
        check_model(Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound: float, engine: str) -> None:
    with pytest.raises(ValueError, match=f"max_grad_norm is {bound}"):
        clipper_of(engine, Shared(), bound)


def test_every_layer_of_the_model_takes_part_and_tied_weights_once() -> None:
    layers = check_model(small_dit())
    assert all(isinstance(layer.module, PerRecordModule) for layer in layers.values())
    names = [name for layer in layers.values() for name in layer.parameters.values()]
    assert sorted(names) == sorted(name for name, _ in small_dit().named_parameters())
    tied = nn.ModuleDict({"embed": Embedding(10, 4), "head": Linear(4, 10)})
    tied["head"].weight = tied["embed"].weight
    assert check_model(tied)["head"].parameters == {"weight": "embed.weight", "bias": "head.bias"}


# Group-wise: what its bounds and counts promise.


def chain(num_layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(num_layers) for layer in (Linear(4, 4), nn.Tanh())])


def test_layers_that_share_a_parameter_are_one_group() -> None:
    model = nn.ModuleDict({name: Linear(4, 4) for name in "abcde"})
    model["c"].weight = model["a"].weight
    model["e"].weight, model["e"].bias = model["c"].weight, model["d"].bias  # joins {a, c} and {d}
    clipper = GroupWiseClipper(model, 2.0)
    assert clipper.groups == {"a": 0, "b": 1, "c": 0, "d": 0, "e": 0}
    assert clipper.bounds == [2 / math.sqrt(2)] * 2


@pytest.mark.parametrize("engine", FLAT)
def test_a_flat_engine_gives_every_parameter_one_weight(engine: str) -> None:
    model, x = chain(3), torch.randn(1, 5, 4)
    loss: Callable[[nn.Module], Tensor] = lambda m: m(x).square().flatten(1).sum(1)  # noqa: E731
    clipped = clipped_sum(engine, model, loss, ALL[:1], 1e-3)
    whole = clipped_sum(engine, model, loss, ALL[:1], 1e6)
    ratios = torch.cat([(clipped[n] / whole[n]).flatten() for n in clipped])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    num_layers=st.integers(1, 6), bound=st.floats(1e-3, 1e3), quantile=st.floats(0, 1),
    counts=st.lists(st.floats(-100, 100), min_size=6, max_size=6),
)  # fmt: skip
def test_the_squares_of_the_groups_bounds_add_up_to_the_bounds(
    num_layers: int, bound: float, quantile: float, counts: list[float]
) -> None:
    clipper = GroupWiseClipper(chain(num_layers), bound, quantile)
    for _ in range(3):
        assert len(clipper.bounds) == num_layers
        assert all(b > 0 for b in clipper.bounds)
        assert math.hypot(*clipper.bounds) <= bound * (1 + 1e-12)
        assert math.hypot(*clipper.bounds) >= bound * (1 - 1e-12)
        clipper.adapt(counts[:num_layers], 50)


def test_adaptive_bounds_move_towards_the_quantile_of_each_groups_norms() -> None:
    model, generator = chain(3), torch.Generator().manual_seed(0)
    clipper = GroupWiseClipper(model, 1.0, quantile=0.5, rate=0.5)
    shares: list[list[float]] = []
    for _ in range(40):
        x = torch.randn(64, 4, generator=generator)
        losses: Callable[[nn.Module], Tensor] = lambda m, x=x: m(x).square().sum(1)  # noqa: E731
        clipped_sum(clipper, model, losses, torch.ones(64, dtype=torch.bool))
        counts = clipper.take_counts()
        shares.append((counts / 64 + 0.5).tolist())
        clipper.adapt(counts.tolist(), 64)
    spread = [max(share) - min(share) for share in (shares[0], shares[-1])]
    assert spread[1] < spread[0] / 2, "the groups' shares within their bounds draw together"
    assert shares[0] == sorted(shares[0], reverse=True)
    assert clipper.bounds == sorted(clipper.bounds), "the group least often within its bound has the largest"
    assert clipper.take_counts().tolist() == [0, 0, 0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1e18, math.inf, math.nan])
def test_one_record_moves_the_counts_by_at_most_half_the_root_of_their_number(value: float, shared: bool) -> None:
    model = nn.Sequential(Linear(4, 4), Linear(4, 4), Linear(4, 4))
    if shared:
        model.append(model[0])
    clipper = GroupWiseClipper(model, 1.0, quantile=0.5)
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    counts: list[Tensor] = []
    for present in (torch.tensor([True, True, False, True, True]), torch.ones(5, dtype=torch.bool)):
        x[2] = value
        clipped_sum(clipper, model, lambda m: losses_of(m(x), 5), present)
        counts.append(clipper.take_counts())
    moved = counts[1] - counts[0]
    assert moved.norm() <= math.sqrt(3) / 2 * (1 + 1e-6)
    if value == 0.0 or not math.isfinite(value):
        assert moved.norm() == pytest.approx(math.sqrt(3) / 2)


def test_the_configurations_names_give_their_engines() -> None:
    kept = {name: make_clipper(name, Shared(), 1.0) for name in ("two_pass", "kept_gradients", "group_wise")}  # type: ignore[arg-type]
    assert isinstance(kept["group_wise"], GroupWiseClipper)
    assert vars(kept["two_pass"])["keep"] < vars(kept["kept_gradients"])["keep"] == 1.0
