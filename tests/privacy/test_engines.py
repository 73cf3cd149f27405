"""Every layer under every engine, against per-record gradients by `torch.func`, clipped and summed in plain sight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels import ghost_norm
from kernels.ghost_norm import OuterProducts, TokenSum
from models.layers import Linear
from tests.privacy.clipped_sums import (
    ENGINES,
    OneProcess,
    clipped_sum,
    flat_sum,
    group_wise_sum,
    losses_of,
    norms,
    per_record_gradients,
    relative_error,
)
from tests.privacy.layer_cases import CASES, RECORDS, SEVERAL_ROWS, Case, draw

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def error_of(case: Case, engine: str, backend: OneProcess | None = None) -> float:
    """The clipped sum's relative distance from the oracle's, under a bound that binds for most records."""
    gradients = per_record_gradients(case.plain, case.inputs, RECORDS)
    bound = 0.9 * norms(gradients).median().item()
    oracle = group_wise_sum if engine == "group_wise" else flat_sum
    expected = oracle(gradients, case.uses, bound)
    assert relative_error(expected, flat_sum(gradients, case.uses, 1e30)) > 0.01, "the bound did not bind"
    got = clipped_sum(engine, case.private, case.losses, torch.ones(RECORDS, dtype=torch.bool), bound, backend)
    scale = 1.0 if backend is None else backend.loss_scale
    return relative_error({name: g / scale for name, g in got.items()}, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("layer", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_the_sum_equals_that_of_clipped_per_record_gradients(
    dtype: torch.dtype, tolerance: float, layer: str, num_tokens: int, engine: str
) -> None:
    assert error_of(CASES[layer](num_tokens).to(dtype), engine) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("layer", SEVERAL_ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_several_rows_of_a_record_are_one_unit(
    dtype: torch.dtype, tolerance: float, layer: str, num_tokens: int, engine: str
) -> None:
    assert error_of(SEVERAL_ROWS[layer](num_tokens).to(dtype), engine) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["linear_3d", "embedding", "shared_block", "tied_embedding_and_head", "qk_norm"])
@pytest.mark.parametrize(("forward_once", "loss_scale"), [(True, 3.0), (False, 3.0)], ids=["zero_1_2", "zero_3"])
def test_a_backend_that_scales_the_loss_or_needs_two_forwards_gets_the_same_sum(
    forward_once: bool, loss_scale: float, layer: str, engine: str
) -> None:
    case = CASES[layer](12).to(torch.float64)
    backend = OneProcess(case.private, forward_once=forward_once, loss_scale=loss_scale)
    assert error_of(case, engine, backend) < 1e-10


def test_these_cases_take_every_path_to_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set[str]()
    squared_norms, squared_norms_with = OuterProducts.squared_norms, OuterProducts.squared_norms_with

    def observed(self: OuterProducts, *, reuse: ghost_norm.Reuse = None) -> Tensor:
        num_tokens, gram = self.left_BGND.shape[2], len(grams)
        found = squared_norms(self, reuse=reuse)
        if len(grams) > gram:
            taken.add("gram_in_bands" if num_tokens >= 32 else "gram")
        else:
            taken.add("direct" if num_tokens == 1 else f"formed_{reuse}")
        return found

    def observed_with(self: OuterProducts, bias: TokenSum) -> Tensor:
        gram = len(grams)
        found = squared_norms_with(self, bias)
        if len(grams) > gram:
            taken.add("gram_with_bias")
        return found

    grams: list[None] = []
    by_gram = ghost_norm._squared_norms_by_gram
    monkeypatch.setattr(OuterProducts, "squared_norms", observed)
    monkeypatch.setattr(OuterProducts, "squared_norms_with", observed_with)
    monkeypatch.setattr(ghost_norm, "_squared_norms_by_gram", lambda *x, **kw: grams.append(None) or by_gram(*x, **kw))
    for engine in ENGINES:
        for layer, num_tokens in (("linear_2d", 1), ("linear_3d", 3), ("linear_3d", 40), ("wide", 40)):
            case = wide_linear(num_tokens) if layer == "wide" else CASES[layer](num_tokens)
            assert error_of(case.to(torch.float64), engine) < 1e-10
    formed = {f"formed_{reuse}" for reuse in ("None", "later", "later_in_little", "at_once")}
    assert taken == {"direct", "gram", "gram_in_bands", "gram_with_bias", *formed}


def wide_linear(num_tokens: int) -> Case:
    """Wide enough that Gram matrices pay even for 40 tokens."""

    def model(kind: type[nn.Linear]) -> nn.Module:
        return nn.Sequential(kind(4, 90), nn.Tanh(), kind(90, 90), nn.Tanh(), kind(90, 3))

    return Case(model(Linear), model(nn.Linear), (draw(RECORDS, num_tokens, 4),))


# What Opacus 1.6 supports: it fails on a LayerNorm without bias, and knows neither LearnedTensor nor tied weights.
OPACUS = ["linear_2d", "linear_3d", "linear_4d", "conv_padded", "conv_patchify", "conv_dilated", "conv_in_groups"]
OPACUS += ["conv_depthwise", "embedding", "layer_norm", "rms_norm_3d", "qk_norm", "ada_ln", "shared_block"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("layer", OPACUS)
def test_opacus_finds_the_same_per_record_gradients(layer: str, num_tokens: int) -> None:
    from opacus import GradSampleModule

    case = CASES[layer](num_tokens).to(torch.float64)
    theirs = GradSampleModule(case.plain, loss_reduction="sum")
    losses_of(theirs(*case.inputs), RECORDS).sum().backward()
    gradients = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    bound = 0.9 * norms(gradients).median().item()
    for engine in ENGINES:
        expected = (group_wise_sum if engine == "group_wise" else flat_sum)(gradients, case.uses, bound)
        got = clipped_sum(engine, case.private, case.losses, torch.ones(RECORDS, dtype=torch.bool), bound)
        assert relative_error(got, expected) < 1e-10
