"""adaLN: the kernels in the interpreter against the twin in float64, and the plain path against what models had."""

# B records, N tokens, D model width
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch, reference
from kernels.adaln import _adaln, _adaln_backward, adaln, adaln_bytes
from kernels.adaln_triton import backward_tile
from kernels.tiles import Key, Tile, trial
from models.layers import Linear
from tests.privacy.clipped_sums import ENGINES, clipped_sum, flat_sum, group_wise_sum, per_record_gradients
from tests.privacy.clipped_sums import relative_error as distance
from tests.privacy.layer_cases import RECORDS, Case, draw

CPU = torch.device("cpu")
EPS = 1e-6
Op = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def triton() -> Iterator[None]:
    dispatch.choose("triton", CPU)
    yield
    dispatch.choose("auto", CPU)


@dataclass(frozen=True)
class Inputs:
    """What `adaln` and its backward are given; a branch makes the gate one of the modulation's chunks."""

    x: Tensor
    modulation: Tensor  # (B, 6D), of which shift, scale and gate are chunks, as in a DiT block
    branch: Tensor | None
    grad_residual: Tensor | None
    grad_modulated: Tensor | None

    def run(self, op: Op, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Both outputs and every gradient of `op`, with inputs converted to `dtype`."""

        def leaf(tensor: Tensor) -> Tensor:
            # a view of a leaf keeps its strides and its place in memory, also after a conversion
            detached = tensor.detach()
            return (detached if dtype is None else detached.to(dtype)).requires_grad_()

        x, modulation = leaf(self.x), leaf(self.modulation)
        leaves = {"x": x, "modulation": modulation}
        shift, scale, gate = modulation.chunk(6, dim=-1)[:3]
        if self.branch is None:
            residual, modulated = op(x, shift, scale, None, None, EPS)
        else:
            leaves["branch"] = leaf(self.branch)
            residual, modulated = op(x, shift, scale, leaves["branch"], gate, EPS)
        given = [(residual, self.grad_residual), (modulated, self.grad_modulated)]
        outputs = [output for output, grad in given if grad is not None]
        grads = [grad.to(output.dtype) for output, grad in given if grad is not None]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        gradients = {f"d{name}": grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
        return {"residual": residual.detach(), "modulated": modulated.detach(), **gradients}


def inputs(
    B: int, N: int, D: int, *, branch: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(N + 1000 * D)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # an x off its mean: a norm that forgets to centre it shows
    return Inputs(
        made(B, N, D) * 2 + 0.5, made(B, 6 * D) / 2, made(B, N, D) if branch else None, made(B, N, D), made(B, N, D)
    )


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest deviation of each, relative to the largest entry."""
    assert found.keys() == exact.keys()
    return {name: float((found[name].double() - x).abs().max() / x.abs().max()) for name, x in exact.items()}


def in_chunks(D: int) -> AbstractContextManager[Mapping[Key, Tile]]:
    """Chunks of four tokens, so that few tokens make several."""
    default = backward_tile(D, 4)
    tile = replace(default, constants={**default.constants, "TOKENS": 4})
    return trial({("adaln.backward", f"D={D} float32"): tile})


def compare(case: Inputs) -> None:
    found, exact = case.run(adaln), case.run(reference.adaln, torch.float64)
    if case.x.dtype == torch.float32:
        assert max(errors(found, exact).values()) < 1e-6
        return
    allowed = errors(case.run(reference.adaln), exact)
    rounding = torch.finfo(case.x.dtype).eps / 2
    for name, error in errors(found, exact).items():
        assert error <= max(2 * allowed[name], rounding), (name, error, allowed[name])


def test_without_the_kernel_values_and_gradients_are_to_the_bit_those_of_the_plain_code() -> None:
    def plain(x: Tensor, shift: Tensor, scale: Tensor, branch: Any, gate: Any, eps: float) -> tuple[Tensor, Tensor]:
        if branch is not None:
            x = x + gate[:, None] * branch
        return x, F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    for dtype in (torch.float32, torch.bfloat16):
        for branch in (True, False):
            case = inputs(3, 17, 96, branch=branch, dtype=dtype)
            with Operations() as expected:
                want = case.run(plain)
            with Operations() as done:
                got = case.run(adaln)
            assert all(torch.equal(got[name], value) for name, value in want.items())
            assert done.names == expected.names  # so that it costs nothing more either


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no_branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("B", "N", "D"), [(2, 1, 128), (3, 33, 192), (1, 70, 384), (2, 9, 1000), (2, 35, 1152)])
def test_outputs_and_every_gradient_are_the_twins(B: int, N: int, D: int, dtype: torch.dtype, branch: bool) -> None:
    compare(inputs(B, N, D, dtype=dtype, branch=branch))


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no_branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("N", [1, 8, 63, 111, 256])
@pytest.mark.parametrize("D", [17, 65, 128, 192, 384, 768, 1024, 1152, 1153, 1536, 2048, 4096, 5120, 8192])
def test_outputs_and_every_gradient_are_the_twins_at_any_size(D: int, N: int, dtype: torch.dtype, branch: bool) -> None:
    # no width below 17: a row of two or three that lie close together has no gradient to speak of but its rounding
    compare(inputs(2 if N < 100 else 1, N, D, dtype=dtype, branch=branch))


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no_branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("N", [1, 63, 256, 1000])
@pytest.mark.parametrize("D", [128, 384, 768, 1000, 1152, 1153, 2048, 4096, 8192])
def test_outputs_and_every_gradient_are_the_twins_on_a_gpu(D: int, N: int, dtype: torch.dtype, branch: bool) -> None:
    compare(inputs(3, N, D, dtype=dtype, branch=branch, device="cuda"))


@pytest.mark.gpu
def test_a_hundred_repeats_on_a_gpu_are_equal() -> None:
    case = inputs(8, 300, 1152, dtype=torch.bfloat16, device="cuda")
    first = case.run(adaln)
    for _ in range(100):
        again = case.run(adaln)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("unused", ["grad_residual", "grad_modulated"])
def test_an_output_that_nothing_uses_has_no_gradient(unused: str) -> None:
    compare(replace(inputs(2, 9, 96), **{unused: None}))


@pytest.mark.usefixtures("triton")
def test_without_a_branch_the_residual_is_x_itself() -> None:
    case = inputs(2, 3, 64, branch=False)
    shift, scale = case.modulation.chunk(6, dim=-1)[:2]
    assert adaln(case.x, shift, scale)[0] is case.x


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_any_strides_will_do(dtype: torch.dtype) -> None:
    large = inputs(3, 7, 100, dtype=dtype)

    def views(part: Callable[[Tensor], Tensor]) -> Inputs:
        tensors = (large.x, large.branch, large.grad_residual, large.grad_modulated)
        x, branch, grad_residual, grad_modulated = (part(tensor) for tensor in tensors if tensor is not None)
        modulation = large.modulation[: len(x), : 6 * x.shape[2]]
        return Inputs(x, modulation, branch, grad_residual, grad_modulated)

    compare(views(lambda tensor: tensor[::2, 1::2]))  # rows apart
    compare(views(lambda tensor: tensor[:, :, 3:75]))  # not aligned to 16 bytes
    compare(views(lambda tensor: tensor.transpose(0, 1)[:3]))  # tokens before records
    compare(views(lambda tensor: tensor[:, :, :6].transpose(1, 2)))  # the last dimension not contiguous
    compare(views(lambda tensor: tensor[:1].expand(3, 7, 100)))  # one record, three times
    everywhere = torch.ones((), dtype=dtype).expand(3, 7, 100)
    compare(replace(large, grad_residual=everywhere, grad_modulated=everywhere))


@pytest.mark.usefixtures("triton")
def test_one_modulation_for_all_records_has_the_gradient_summed_over_them() -> None:
    case = inputs(3, 9, 96)

    def of_all(op: Op) -> Op:
        return lambda x, shift, scale, branch, gate, eps: op(
            x, *(v[:1].expand(3, 96) for v in (shift, scale)), branch, gate[:1].expand(3, 96), eps
        )

    found, exact = case.run(of_all(adaln)), case.run(of_all(reference.adaln), torch.float64)
    assert max(errors(found, exact).values()) < 1e-6


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("branch", [True, False])
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, branch: bool) -> None:
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return new_empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for B, N, D in ((2, 37, 100), (1, 8, 128), (2, 32, 72)):
        assert all(value.isfinite().all() for value in inputs(B, N, D, branch=branch).run(adaln).values())


@pytest.mark.usefixtures("triton")
def test_an_empty_batch_and_records_without_tokens_have_empty_results_and_zero_gradients() -> None:
    for B, N in ((0, 5), (0, 50), (2, 0)):
        found = inputs(B, N, 64).run(adaln)
        assert found["residual"].shape == found["modulated"].shape == found["dx"].shape == (B, N, 64)
        assert torch.equal(found["dmodulation"], torch.zeros(B, 6 * 64))


@pytest.mark.usefixtures("triton")
def test_repeats_are_equal(repeats: int) -> None:
    case = inputs(1, 5, 80)
    with in_chunks(80):
        first = case.run(adaln)
        for _ in range(repeats):
            again = case.run(adaln)
            assert all(torch.equal(again[name], value) for name, value in first.items())


def records_of(case: Inputs, part: Callable[[Tensor], Tensor]) -> Inputs:
    tensors = (case.x, case.modulation, case.branch, case.grad_residual, case.grad_modulated)
    return Inputs(*(None if tensor is None else part(tensor) for tensor in tensors))  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton")
def test_a_record_depends_on_no_other_whatever_their_values_and_places() -> None:
    case = inputs(3, 9, 100)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([torch.full_like(tensor[1:], float("nan")), tensor[:1], tensor[1:] * 1e30])

    with in_chunks(100):
        alone, among = records_of(case, lambda tensor: tensor[:1]).run(adaln), records_of(case, moved).run(adaln)
    assert all(torch.equal(among[name][2:3], value) for name, value in alone.items())


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("num_tokens", [3, 5, 8])
def test_padding_after_a_record_changes_none_of_its_bits(num_tokens: int) -> None:
    case = inputs(2, 11, 100)
    assert case.branch is not None
    assert case.grad_residual is not None
    assert case.grad_modulated is not None
    for grad in (case.grad_residual, case.grad_modulated):
        grad[:, num_tokens:] = 0
    without = records_of(case, lambda tensor: tensor[:, :num_tokens] if tensor.dim() == 3 else tensor)
    with in_chunks(100):
        padded, short = case.run(adaln), without.run(adaln)
    for name, value in short.items():
        assert torch.equal(padded[name] if name == "dmodulation" else padded[name][:, :num_tokens], value)


@pytest.mark.usefixtures("triton")
def test_a_tuned_tile_gives_the_same_results() -> None:
    tiles = {
        ("adaln.forward", "D=192 float32"): Tile({"TOKENS": 5}, num_warps=4, num_stages=1),
        ("adaln.backward", "D=192 float32"): Tile({"TOKENS": 3, "KEEP": 0}, num_warps=8, num_stages=1),
    }
    with trial(tiles) as given:
        compare(inputs(2, 17, 192))
    assert given == tiles


@pytest.mark.usefixtures("triton")
def test_the_gradients_are_those_of_finite_differences() -> None:
    case = inputs(2, 3, 5, dtype=torch.float64)
    shift, scale, gate = (v.contiguous().requires_grad_() for v in case.modulation.chunk(6, dim=-1)[:3])
    assert case.branch is not None
    x, branch = case.x.requires_grad_(), case.branch.requires_grad_()
    assert torch.autograd.gradcheck(adaln, (x, shift, scale, branch, gate), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *tensors: adaln(*tensors)[1], (x, shift, scale), fast_mode=True)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("branch", [True, False])
def test_the_operators_are_registered_as_pytorch_asks(branch: bool) -> None:
    case = inputs(2, 5, 24, branch=branch)
    shift, scale, gate = (v.contiguous().requires_grad_() for v in case.modulation.chunk(6, dim=-1)[:3])
    added = (case.branch.requires_grad_(), gate) if case.branch is not None else (None, None)
    torch.library.opcheck(_adaln, (case.x.requires_grad_(), shift, scale, *added, EPS, torch.float32))
    with torch.no_grad():
        residual, _, mean, rstd = _adaln(case.x, shift, scale, *added, EPS, torch.float32)
        residual = residual if branch else case.x.detach()
        beside = case.grad_residual if branch else None
        saved = (residual, mean, rstd, scale, *added)
        torch.library.opcheck(_adaln_backward, (beside, case.grad_modulated, *saved, torch.float32))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_a_compiled_block_has_no_graph_break_and_the_same_bits(choice: dispatch.Choice) -> None:
    case = inputs(2, 5, 24)

    def block(x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor, gate: Tensor, eps: float) -> Any:
        residual, modulated = adaln(x, shift, scale, branch, gate, eps)
        return residual.sin(), adaln(modulated, shift, scale, eps=eps)[1]

    dispatch.choose(choice, CPU)
    try:
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        want, got = case.run(block), case.run(compiled)
    finally:
        dispatch.choose("auto", CPU)
        torch._dynamo.reset()
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.usefixtures("triton")
def test_dtypes_are_those_of_plain_arithmetic_and_under_autocast_of_what_follows() -> None:
    case = inputs(2, 3, 64)
    half = replace(
        case, modulation=case.modulation.half(), branch=case.branch.half() if case.branch is not None else None
    )
    for mixed in (half, replace(half, x=case.x.half()), replace(half, x=case.x.bfloat16())):
        found, plain = mixed.run(adaln), mixed.run(reference.adaln)
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in plain.items()}
    for x, residual_dtype in ((case.x, torch.float32), (case.x.half(), torch.float16)):
        with torch.autocast("cpu", torch.float16):
            found = replace(half, x=x).run(adaln)
        assert (found["residual"].dtype, found["modulated"].dtype) == (residual_dtype, torch.float16)
        assert (found["dx"].dtype, found["dbranch"].dtype) == (x.dtype, torch.float16)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("branch", [True, False])
def test_the_backward_keeps_the_residual_and_the_branch_and_eight_bytes_a_token(branch: bool) -> None:
    case, kept = inputs(2, 9, 64, branch=branch), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.run(adaln)
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in kept.values() if tensor.dim() != 2)
    assert sizes == sorted([case.x.nbytes] * (1 + branch))
    statistics = [tensor for tensor in kept.values() if tensor.shape == (2, 9)]
    assert sum(tensor.nbytes for tensor in statistics) == 2 * 9 * 8


@pytest.mark.parametrize("branch", [True, False])
def test_the_bytes_are_those_of_each_tensor_once(branch: bool) -> None:
    case = inputs(2, 9, 64, branch=branch, dtype=torch.bfloat16)
    vectors = [v.contiguous() for v in case.modulation.chunk(6, dim=-1)[: 2 + branch]]
    statistics = [torch.empty(2, 9), torch.empty(2, 9)]
    rows = [tensor for tensor in (case.x, case.branch) if tensor is not None]
    read_and_written = [*rows, *rows, *vectors, *statistics]  # residual, where there is one, and modulated
    assert adaln_bytes(2, 9, 64, 2, branch=branch) == sum(tensor.nbytes for tensor in read_and_written)
    read = [*rows, case.grad_modulated, *([case.grad_residual] if branch else []), *vectors[1:], *statistics]
    written = [*rows, *(torch.empty(2, 64) for _ in vectors)]
    moved = sum(tensor.nbytes for tensor in [*read, *written] if tensor is not None)
    assert adaln_bytes(2, 9, 64, 2, branch=branch, backward=True) == moved


class Block(nn.Module):
    """A branch gated into the stream, normed and modulated, as between attention and MLP."""

    def __init__(self, linear_kind: type[nn.Linear], op: Op) -> None:
        super().__init__()
        self.modulation, self.branch, self.proj, self.op = linear_kind(3, 12), linear_kind(4, 4), linear_kind(4, 4), op

    def forward(self, x_BND: Tensor, condition_BC: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition_BC).chunk(3, dim=-1)
        x_BND, modulated_BND = self.op(x_BND, shift, scale, None, None, EPS)
        x_BND, modulated_BND = self.op(x_BND, shift, scale, self.branch(modulated_BND), gate, EPS)
        return x_BND + self.proj(modulated_BND)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("engine", ENGINES)
def test_private_training_clips_the_same_per_record_gradients(engine: str, choice: dispatch.Choice) -> None:
    tokens, condition = draw(RECORDS, 5, 4), draw(RECORDS, 3, seed=1)
    case = Case(Block(Linear, adaln), Block(nn.Linear, reference.adaln), (tokens, condition)).to(torch.float64)
    gradients = per_record_gradients(case.plain, case.inputs, RECORDS)
    expected = (group_wise_sum if engine == "group_wise" else flat_sum)(gradients, case.uses, 1.0)
    assert distance(expected, flat_sum(gradients, case.uses, 1e30)) > 0.01, "the bound did not bind"
    dispatch.choose(choice, CPU)
    try:
        got = clipped_sum(engine, case.private, case.losses, torch.ones(RECORDS, dtype=torch.bool), 1.0)
    finally:
        dispatch.choose("auto", CPU)
    assert distance(got, expected) < 1e-10


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x_BND has shape \(2, 8\): give \(records, tokens, width\)"),
        ({"shift": torch.zeros(3, 8)}, r"shift_BD has shape \(3, 8\): x_BND takes \(2, 8\)"),
        ({"scale": torch.zeros(2, 1)}, r"scale_BD has shape \(2, 1\): x_BND takes \(2, 8\)"),
        ({"gate": torch.zeros(8)}, r"gate_BD has shape \(8,\): x_BND takes \(2, 8\)"),
        ({"branch": torch.zeros(2, 1, 8)}, r"branch_BND has shape \(2, 1, 8\), but x_BND has \(2, 3, 8\)"),
        ({"gate": None}, "gate_BD is None, but branch_BND is not: give both or neither"),
        ({"branch": None}, "branch_BND is None, but gate_BD is not: give both or neither"),
        ({"scale": torch.zeros(2, 8, dtype=torch.int32)}, r"scale_BD is torch\.int32: the kernel takes .*float32"),
        ({"gate": torch.zeros(2, 8, device="meta")}, "gate_BD is on meta, but x_BND is on cpu"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    given |= {"branch": torch.zeros(2, 3, 8), "gate": torch.zeros(2, 8)}
    with pytest.raises(ValueError, match=message):
        adaln(*(given | changes).values())  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("width", [1, 8193])
def test_widths_that_the_kernel_does_not_take_are_named(width: int) -> None:
    with pytest.raises(ValueError, match=f"x_BND has width {width}: the kernel takes 2 to 8192"):
        adaln(torch.zeros(1, 1, width), torch.zeros(1, width), torch.zeros(1, width))
