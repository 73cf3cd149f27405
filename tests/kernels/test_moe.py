"""Routing, and the experts' networks in Triton and in plain form: against the twin, bit by bit, and at the edges."""

# T tokens, A choices of a token (top-k), E experts, P input features, D output features, H hidden features
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch, moe, reference, tiles
from kernels.moe import Activation, Routing, experts_mlp, route

CPU = torch.device("cpu")
SMALL = {"BLOCK_S": 16, "BLOCK_D": 16, "BLOCK_P": 16, "GROUP": 3}

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp:RuntimeWarning"
)  # the interpreter's sigmoid


@pytest.fixture
def in_triton() -> Iterator[None]:
    if not torch.cuda.is_available():
        dispatch.choose("triton", CPU)
    yield
    dispatch.choose("auto", CPU)


@dataclass(frozen=True)
class Case:
    """Sizes, and how tokens choose: "spread" over all experts, "few" of them (most get nothing), or "one" for all."""

    T: int = 67
    A: int = 2
    E: int = 8
    P: int = 40
    H: int = 24
    D: int = 36
    activation: Activation = "swiglu"
    choice: str = "spread"

    def draw(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU, seed: int = 0) -> Drawn:
        generator = torch.Generator().manual_seed(self.T + self.E + 1000 * seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        f = 2 * self.H if self.activation == "swiglu" else self.H
        lean = {
            "spread": torch.zeros(self.E),
            "few": torch.where(torch.arange(self.E) % 5 == 3, 50.0, 0.0),
            "one": torch.arange(self.E) * 50.0,
        }[self.choice]
        x, up, down = normal(self.T, self.P), normal(self.E, f, self.P), normal(self.E, self.D, self.H)
        inputs = (x, up * self.P**-0.5, down * self.H**-0.5)
        experts = reference.highest_experts(normal(self.T, self.E) + lean, self.A).to(device)
        weights = normal(self.T, self.A).softmax(1).to(device)
        grad = normal(self.T, self.D).to(device, dtype)
        return Drawn(tuple(y.to(device, dtype) for y in inputs), experts, weights, grad)


class Drawn(NamedTuple):
    """What a case multiplies: x, up and down; each token's experts and their weights; a gradient of the output."""

    parameters: tuple[Tensor, ...]
    experts_TA: Tensor
    weights_TA: Tensor
    grad_TD: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return *self.parameters, self.weights_TA

    def double(self) -> Drawn:
        parameters = tuple(y.double() for y in self.parameters)
        return Drawn(parameters, self.experts_TA, self.weights_TA.double(), self.grad_TD.double())

    def of(self, tokens: Tensor) -> Drawn:
        """The same with these tokens alone, in this order."""
        x, up, down = self.parameters
        return Drawn((x[tokens], up, down), self.experts_TA[tokens], self.weights_TA[tokens], self.grad_TD[tokens])


QUICK = [
    Case(),
    Case(T=1, A=1),
    Case(T=150, A=1, activation="gelu", choice="one"),
    Case(T=70, A=8, P=33, H=17, D=129, activation="gelu"),
    Case(T=63, A=3, E=31, P=16, H=31),
    Case(T=90, A=2, E=128, H=8, choice="few"),
    Case(T=40, A=1, E=1, P=17, H=9, D=11),
]
SIZES = [(1, 1, 7, 3, 5), (63, 2, 64, 96, 64), (111, 3, 40, 130, 72), (256, 2, 72, 64, 72)]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
FULL = [
    Case(T, A, E, P, H, D, ACTIVATIONS[(index + E) % 2], choice)
    for T, A, P, H, D in SIZES
    for E in (8, 31, 128)
    for index, choice in enumerate(("spread", "few", "one"))
] + [Case(T=1000, P=64, H=64, D=64), Case(T=1000, A=4, E=128, P=32, H=16, D=32, activation="gelu")]


def name(case: Case) -> str:
    return f"{case.T}x{case.A}-E{case.E}-{case.P}.{case.H}.{case.D}-{case.activation}-{case.choice}"


def grads(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The output and the gradient of every input, whose strides are kept."""
    leaves = [y.detach().requires_grad_() for y in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def ours(case: Case, drawn: Drawn) -> Callable[..., Tensor]:
    def function(x: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return experts_mlp(x, up, down, Routing.of(drawn.experts_TA, weights, case.E), case.activation)

    return function


def twin(case: Case, drawn: Drawn) -> Callable[..., Tensor]:
    def function(x: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return reference.experts_mlp(x, up, down, drawn.experts_TA, weights, case.activation)

    return function


def run(which: Callable[[Case, Drawn], Callable[..., Tensor]], case: Case, drawn: Drawn) -> list[Tensor]:
    """The output, and the gradients of x, up, down and the weights."""
    return grads(which(case, drawn), drawn.inputs, drawn.grad_TD)


def errors(got: list[Tensor], true: list[Tensor], order: float = torch.inf) -> list[float]:
    """Each one's norm of the difference, in units of the true one's norm; infinite order: the largest element."""
    norms = ((torch.linalg.vector_norm(x.double(), order) for x in (a - b, b)) for a, b in zip(got, true, strict=True))
    return [float(difference / norm.clamp_min(1e-30)) for difference, norm in norms]


MANY = 32  # tokens


def compare(case: Case, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """In fp32 every element; below, where single elements have lucky errors, in mean square over many of them."""
    if dtype == torch.float32:
        drawn = case.draw(dtype, device)
        assert max(errors(run(ours, case, drawn), run(twin, case, drawn.double()))) <= 1e-6
        return
    squares = torch.zeros(2, 5, dtype=torch.float64)  # of the kernels' errors and of the twin's, of each result
    for seed in range(-(-MANY // case.T)):
        drawn = case.draw(dtype, device, seed)
        true = run(twin, case, drawn.double())
        squares += torch.tensor([errors(run(which, case, drawn), true, 2) for which in (ours, twin)]).square()
    found, own = squares.sqrt()
    assert (found <= 2 * own).all(), (found, own)


@pytest.fixture
def uniform_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter every element of a dot is summed alike, as by tensor cores; its BLAS rounds by the place."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(_: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: object) -> TensorHandle:
        left, right, total = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data
        for k in range(left.shape[1]):
            total = total + left[:, k : k + 1] * right[k : k + 1]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("in_triton")
class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("case", QUICK, ids=name)
    def test_output_and_gradients_are_the_twins(self, case: Case, dtype: torch.dtype) -> None:
        compare(case, dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("case", FULL, ids=name)
    def test_output_and_gradients_are_the_twins_at_every_size(self, case: Case, dtype: torch.dtype) -> None:
        compare(case, dtype)

    def test_every_width_may_be_one(self) -> None:
        compare(Case(T=40, E=2, P=1, H=1, D=1), torch.float32)

    def test_every_element_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        new_empty, empty_like = Tensor.new_empty, torch.empty_like

        def poison(y: Tensor) -> Tensor:
            return y.fill_(torch.nan) if y.is_floating_point() else y

        monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
        for case in (Case(choice="few"), Case(T=35, A=3, E=19, D=130, choice="one"), Case(A=1, activation="gelu")):
            compare(case, torch.float32)

    def test_tiles_of_any_size_give_the_same_within_rounding(self) -> None:
        case = Case(T=61, A=3, E=11, choice="few")
        with tiles.trial(small_tiles(case)) as given:
            compare(case, torch.float32)
        assert given.keys() <= small_tiles(case).keys()

    @pytest.mark.parametrize(("P", "D", "fetched"), [(32, 48, 4), (32, 44, 3), (33, 50, 1)])
    def test_descriptors_change_no_bit(self, P: int, D: int, fetched: int, monkeypatch: pytest.MonkeyPatch) -> None:
        case, described = Case(T=33, P=P, H=16, D=D, activation="gelu"), list[object]()
        drawn, describe = case.draw(), moe._described
        monkeypatch.setattr(moe, "_described", lambda *a: described.append(describe(*a)) or described[-1])
        with tiles.trial(small_tiles(case, descriptor=0)):
            plain = run(ours, case, drawn)
        with tiles.trial(small_tiles(case)):
            assert all(map(torch.equal, plain, run(ours, case, drawn)))
        assert sum(found is not None for found in described) == fetched  # of two products and their transposes

    def test_inputs_may_be_slices_transposed_and_misaligned(self) -> None:
        case = Case()
        drawn = case.draw()
        (x, up, down, weights), grad = drawn.inputs, drawn.grad_TD
        true = run(ours, case, drawn)

        def misaligned(y: Tensor) -> Tensor:
            return torch.cat([y.new_zeros(1), y.flatten()])[1:].view_as(y)

        def transposed(y: Tensor) -> Tensor:
            return y.mT.contiguous().mT

        x_wide, grad_wide = torch.randn(case.T, 3 * case.P), torch.randn(2 * case.T, case.D)
        x_wide[:, 5 : 5 + case.P], grad_wide[::2] = x, grad
        views = [
            (x_wide[:, 5 : 5 + case.P], transposed(up), transposed(down), transposed(weights), grad_wide[::2]),
            tuple(map(misaligned, (x, up, down, weights, grad))),
            (transposed(x), up.transpose(0, 1).contiguous().transpose(0, 1), down, weights, transposed(grad)),
            (x, torch.stack([up, up], -1)[..., 0], torch.stack([down, down], -1)[..., 1], weights, grad),
        ]
        for *inputs, grad_view in views:
            assert all(map(torch.equal, true, grads(ours(case, drawn), inputs, grad_view)))

    def test_the_gradient_of_a_sum_has_no_strides(self) -> None:
        case = Case()
        drawn = case.draw()
        ones = torch.ones(1).expand(case.T, case.D)
        true = run(ours, case, drawn._replace(grad_TD=ones.contiguous()))
        assert all(map(torch.equal, true, run(ours, case, drawn._replace(grad_TD=ones))))

    @pytest.mark.usefixtures("uniform_dot")
    @pytest.mark.parametrize(("tokens", "small"), [(170, False), (40, True)])
    def test_a_token_does_not_know_its_neighbours_nor_its_place(self, tokens: int, small: bool) -> None:
        case = Case(T=tokens, E=4, H=16, P=24, D=16)
        drawn = case.draw()
        shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
        with tiles.trial(small_tiles(case) if small else {}):
            everyone = run(ours, case, drawn)
            for some in (shuffled, shuffled[:30], shuffled[30:31], shuffled.sort().values[7:]):
                alone = run(ours, case, drawn.of(some))
                for index in (0, 1, 4):  # out, and the gradients of x and of the weights
                    assert torch.equal(everyone[index][some], alone[index])

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_a_token_of_nans_stays_alone(self) -> None:
        case = Case()
        drawn = case.draw()
        out = ours(case, drawn)(*drawn.inputs)
        x_TP = drawn.inputs[0]
        x_TP[5], x_TP[6, 0] = torch.nan, torch.inf
        sick = ours(case, drawn)(*drawn.inputs)
        healthy = torch.ones(case.T, dtype=torch.bool)
        healthy[5:7] = False
        assert torch.equal(out[healthy], sick[healthy])
        assert sick[5].isnan().all()

    def test_repeats_are_equal_bit_by_bit(self, repeats: int) -> None:
        case = Case(T=50, E=5)
        drawn = case.draw()
        first = run(ours, case, drawn)
        for _ in range(repeats):
            assert all(map(torch.equal, first, run(ours, case, drawn)))

    def test_a_batch_without_tokens_gives_gradients_of_zero(self) -> None:
        case = Case(T=0)
        out, grad_x, grad_up, grad_down, _ = run(ours, case, case.draw())
        assert out.shape == (0, case.D)
        assert grad_x.shape == (0, case.P)
        assert not grad_up.any()
        assert not grad_down.any()

    def test_an_expert_without_tokens_has_a_gradient_of_zero(self) -> None:
        case = Case(choice="one", A=1)
        _, _, grad_up, grad_down, _ = run(ours, case, case.draw())
        assert not grad_up[:-1].any()
        assert not grad_down[:-1].any()
        assert grad_up[-1].any()

    def test_what_is_frozen_gets_no_gradient(self) -> None:
        case = Case()
        drawn = case.draw()
        x, up, down, weights = drawn.inputs
        up.requires_grad_()
        ours(case, drawn)(x, up, down, weights).backward(drawn.grad_TD)
        assert up.grad is not None
        assert torch.equal(up.grad, run(ours, case, drawn)[2])
        assert down.grad is None

    def test_autocast_decides_the_dtype_and_gradients_keep_their_own(self) -> None:
        case = Case()
        drawn = case.draw()
        with torch.autocast("cpu", dtype=torch.float16):
            out, *found = run(ours, case, drawn)
        assert out.dtype == torch.float16
        assert all(g.dtype == torch.float32 for g in found)
        assert max(errors([out, *found], run(ours, case, drawn))) < 5e-3

    def test_routing_and_experts_compile_without_a_graph_break(self) -> None:
        case = Case(T=20)
        drawn = case.draw()
        inputs = (*drawn.parameters, torch.randn(case.T, case.E))

        def layer(x: Tensor, up: Tensor, down: Tensor, logits: Tensor) -> Tensor:
            routing = route(logits, case.A)
            return experts_mlp(x, up, down, routing, case.activation) + moe.z_loss(logits).mean()

        eager = grads(layer, inputs, drawn.grad_TD)
        compiled = grads(torch.compile(layer, fullgraph=True, backend="aot_eager"), inputs, drawn.grad_TD)
        assert all(map(torch.equal, eager, compiled))

    def test_ops_are_registered_as_torch_expects(self) -> None:
        case = Case(T=9, E=3, P=8, H=4, D=6)
        drawn = case.draw()
        x, up, down, weights = drawn.inputs
        routing = Routing.of(drawn.experts_TA, weights, case.E)
        rows = (routing.order_S, routing.offsets_E1)
        z_SF, h_SH = torch.randn(18, 8), torch.randn(18, 4)
        leaves = [y.clone().requires_grad_() for y in (x, weights, up, down)]
        ops = torch.ops.sfumato
        for op, arguments in (
            (ops.experts_mlp, (*leaves, *rows, "swiglu")),
            (ops.experts_gathered, (x, up, *rows, 2)),
            (ops.experts_summed, (h_SH, down, *rows, 2)),
            (ops.experts_weight_grad, (drawn.grad_TD, h_SH, *rows, 2, True)),
            (ops.experts_activation_backward, (h_SH, z_SF, weights, routing.order_S, "swiglu")),
        ):
            torch.library.opcheck(op.default, arguments)

    def test_flops_are_those_of_the_plain_form(self) -> None:
        case = Case(activation="gelu")
        drawn, counts = case.draw(), list[int]()
        for choice in ("triton", "reference"):
            dispatch.choose(choice, CPU)
            with FlopCounterMode(display=False) as counter:
                run(ours, case, drawn)
            counts.append(counter.get_total_flops())
        _, up, down, _ = drawn.inputs
        assert counts == 2 * [3 * moe.experts_mlp_flops(case.T * case.A, up.shape, down.shape)]
        assert counts[0] == 3 * 2 * case.T * case.A * case.H * (case.P + case.D)

    def test_bytes_are_those_of_the_parameters_tokens_and_rows(self) -> None:
        up, down = torch.Size((8, 48, 40)), torch.Size((8, 36, 24))
        parameters, tokens, rows = 8 * (48 * 40 + 36 * 24), 67 * (40 + 36), 67 * 2 * (48 + 24 + 36)
        assert moe.experts_mlp_bytes(67, 2, up, down, itemsize=2) == 2 * (parameters + tokens + 2 * rows)

    def test_float64_is_refused(self) -> None:
        case = Case()
        with pytest.raises(
            ValueError, match=r"x_TP is float64 of shape \(67, 40\): the kernels take fp16, bf16 or fp32"
        ):
            run(ours, case, case.draw().double())


class TestPlainForm:
    @pytest.mark.parametrize("case", [*QUICK, Case(T=0)], ids=name)
    def test_output_and_gradients_are_the_twins(self, case: Case) -> None:
        drawn = case.draw().double()
        for a, b in zip(run(ours, case, drawn), run(twin, case, drawn), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("normalise", [False, True])
    @pytest.mark.parametrize("activation", ["swiglu", "gelu"])
    def test_gradients_are_the_finite_differences(self, activation: Activation, normalise: bool) -> None:
        case = Case(T=5, E=3, P=4, H=2, D=3, activation=activation)

        def layer(x: Tensor, up: Tensor, down: Tensor, logits: Tensor) -> Tensor:
            return experts_mlp(x, up, down, route(logits, 2, normalise=normalise), activation)

        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inputs = [y.requires_grad_() for y in (*case.draw().double().parameters, logits)]
        assert torch.autograd.gradcheck(layer, inputs)

    def test_the_output_is_in_autocasts_dtype(self) -> None:
        case = Case()
        drawn = case.draw()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, *found = run(ours, case, drawn)
        assert out.dtype == torch.bfloat16
        assert max(errors([out, *found], run(ours, case, drawn))) < 5e-2


class TestRouting:
    @given(st.data())
    @settings(max_examples=50, deadline=None)
    def test_it_is_the_twins_whatever_ties(self, data: st.DataObject) -> None:
        num_experts = data.draw(st.integers(1, 12))
        values = st.sampled_from([-torch.inf, -3.0, -1e-45, -0.0, 0.0, 1e-45, 0.5, 7.0, torch.inf])
        rows = data.draw(st.lists(st.lists(values, min_size=num_experts, max_size=num_experts), max_size=9))
        logits_TE = torch.tensor(rows).view(-1, num_experts)
        top_k = data.draw(st.integers(1, num_experts))
        routing = route(logits_TE, top_k)
        assert torch.equal(routing.experts_TA, reference.highest_experts(logits_TE, top_k))
        flat = routing.experts_TA.flatten()
        assert routing.order_S.tolist() == sorted(range(len(flat)), key=lambda choice: (int(flat[choice]), choice))
        assert routing.offsets_E1.tolist() == [int((flat < e).sum()) for e in range(num_experts + 1)]

    def test_weights_are_probabilities_which_sum_to_one_if_asked(self) -> None:
        logits = torch.randn(20, 6, dtype=torch.float64)
        probabilities = logits.softmax(1).topk(3)
        plain, normalised = route(logits, 3, normalise=False), route(logits, 3)
        assert torch.equal(plain.experts_TA, probabilities.indices)
        torch.testing.assert_close(plain.weights_TA, probabilities.values)
        share = probabilities.values / probabilities.values.sum(1, keepdim=True)
        torch.testing.assert_close(normalised.weights_TA, share)

    def test_weights_are_in_fp32_whatever_the_router_is_in(self) -> None:
        assert route(torch.randn(4, 3).bfloat16(), 2).weights_TA.dtype == torch.float32

    def test_nans_route_somewhere_and_show_in_the_weights(self) -> None:
        logits = torch.randn(5, 4)
        logits[2, 1] = torch.nan
        routing = route(logits, 2)
        assert routing.weights_TA[2].isnan().any()
        assert 0 <= int(routing.experts_TA.min()) <= int(routing.experts_TA.max()) < 4
        assert all(len(set(row)) == 2 for row in routing.experts_TA.tolist())

    def test_an_improbable_only_choice_weighs_one(self) -> None:
        assert route(torch.tensor([[-400.0, -401.0]]), 1).weights_TA.tolist() == [[1.0]]

    def test_load_varies_by_nothing_where_even_and_most_where_all_choose_one(self) -> None:
        assert moe.load_variation(torch.full((8,), 3.0)).item() == 0
        assert moe.load_variation(torch.eye(8)[0]).item() == pytest.approx(7**0.5)
        assert moe.load_variation(torch.zeros(8)).item() == 0

    def test_the_z_loss_is_each_tokens_own(self) -> None:
        logits = torch.randn(6, 5)
        torch.testing.assert_close(moe.z_loss(logits), logits.exp().sum(1).log() ** 2)
        assert torch.equal(moe.z_loss(logits)[2:3], moe.z_loss(logits[2:3]))


def small_tiles(case: Case, descriptor: int = 1) -> dict[tiles.Key, tiles.Tile]:
    """Tiles of 16 for every product of a case's forward and backward in fp32, with descriptors where these can be."""
    f = 2 * case.H if case.activation == "swiglu" else case.H
    pairs = [(f, case.P), (case.D, case.H)]
    shapes = [f"E={case.E} D={d} P={p} fp32" for d, p in pairs + [pair[::-1] for pair in pairs]]
    product = tiles.Tile({**SMALL, "DESCRIPTOR": descriptor}, num_warps=4, num_stages=2)
    of_op = {case.activation: product, "gathered": product, "summed": product}
    of_op |= {"weight_grad": tiles.Tile(SMALL, num_warps=4, num_stages=2)}
    return {(f"moe.{op}", shape): tile for op, tile in of_op.items() for shape in shapes}


X, UP, DOWN = Case(T=6, E=4, P=8, H=3, D=5).draw().parameters
LOGITS = torch.randn(6, 4)
ROUTING = route(LOGITS, 2)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(X[0], 2), r"logits_TE is float32 of shape \(8,\): give floats of shape \(tokens, experts\)"),
        (lambda: route(LOGITS.long(), 2), "logits_TE is int64"),
        (lambda: route(LOGITS, 0), "top_k is 0: give 1 to 4"),
        (lambda: route(LOGITS, 5), "top_k is 5: give 1 to 4"),
        (lambda: Routing.of(torch.zeros(3, dtype=torch.int64), torch.ones(3), 4), "experts_TA is int64 of shape"),
        (lambda: Routing.of(torch.zeros(3, 1), torch.ones(3, 1), 4), "experts_TA is float32"),
        (lambda: Routing.of(ROUTING.experts_TA, torch.ones(6), 4), "weights_TA is float32 of shape"),
        (lambda: Routing.of(ROUTING.experts_TA, ROUTING.experts_TA, 4), "weights_TA is int64"),
        (lambda: Routing.of(ROUTING.experts_TA, ROUTING.weights_TA, 0), "num_experts is 0: give 1 or more"),
        (
            lambda: Routing.of(
                torch.empty(2**28, 8, device=META, dtype=torch.int64), torch.empty(2**28, 8, device=META), 4
            ),
            r"experts_TA has 2147483648 choices: fewer than 2\^31",
        ),
        (lambda: experts_mlp(X, UP, DOWN, ROUTING, "relu"), "activation is 'relu': choose one of swiglu, gelu"),  # type: ignore[arg-type]
        (lambda: experts_mlp(X[None], UP, DOWN, ROUTING), "x_TP is float32 of shape"),
        (lambda: experts_mlp(X[:5], UP, DOWN, ROUTING), "the routing is of 6 tokens"),
        (lambda: experts_mlp(X, UP[:3], DOWN, ROUTING), r"up_EFP is .*: give \(4, 2 x hidden features, 8\)"),
        (lambda: experts_mlp(X, UP[:, :5], DOWN, ROUTING), "up_EFP is"),
        (lambda: experts_mlp(X, UP[:, :0], DOWN[..., :0], ROUTING), "up_EFP is"),
        (lambda: experts_mlp(X, UP[..., :7], DOWN, ROUTING), "up_EFP is"),
        (lambda: experts_mlp(X, UP, DOWN, ROUTING, "gelu"), r"down_EDH is .*: give \(4, output features, 6\)"),
        (lambda: experts_mlp(X, UP, DOWN[0], ROUTING), "down_EDH is"),
        (lambda: experts_mlp(X, UP.double(), DOWN, ROUTING), "up_EFP is torch.float64, x_TP torch.float32"),
        (lambda: experts_mlp(X, UP, DOWN.to(META), ROUTING), "down_EDH is on meta, x_TP on cpu"),
        (
            lambda: experts_mlp(X, UP, DOWN, replace(ROUTING, order_S=ROUTING.order_S.to(META))),
            "the routing is on meta, x_TP on cpu",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [*QUICK, Case(T=4096, P=128, H=256, D=128), Case(T=4096, A=8, E=128, P=64, H=64, D=64)], ids=name
)
def test_output_and_gradients_are_the_twins_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_does_not_know_its_neighbours_on_a_gpu(dtype: torch.dtype) -> None:
    case = Case(T=3000, E=8, P=128, H=192, D=128)
    drawn = case.draw(dtype, torch.device("cuda"))
    everyone = run(ours, case, drawn)
    assert all(map(torch.equal, everyone, run(ours, case, drawn)))
    for some in (torch.randperm(case.T)[:1700], torch.arange(99, 100)):
        alone = run(ours, case, drawn.of(some))
        assert all(torch.equal(everyone[index][some], alone[index]) for index in (0, 1, 4))
