"""QK-norm and rotary: the kernels in the interpreter against the twin in float64, and what private training needs."""

# B records, N tokens, H query heads, G key heads, K head width, R rotary pairs
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import dispatch, per_record, reference
from kernels.ghost_norm import RecordWeights
from kernels.per_record import Gradients, Pass, PerRecordModule, Site, Use, activate
from kernels.qk_norm_rope import _backward, _forward, qk_norm_rope, qk_norm_rope_bytes, rotary_angles

EPS = 1e-6


@pytest.fixture
def triton() -> Iterator[None]:
    dispatch.choose("triton", torch.device("cpu"))
    yield
    dispatch.choose("auto", torch.device("cpu"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The interpreter's, and a GPU, on which `hard` is the recipes' least aligned width in their dtype."""
    dispatch.choose("triton", torch.device(request.param))
    yield request.param
    dispatch.choose("auto", torch.device("cpu"))


def hard(device: str, **sizes: Any) -> "Inputs":
    if device == "cpu":
        return Case(K=24, **sizes).inputs()
    return Case(K=72, **sizes).inputs(torch.bfloat16, device)


@dataclass(frozen=True)
class Case:
    """Queries and keys of these sizes, as parts of a fused projection, with what a backward is given."""

    B: int = 2
    N: int = 9
    H: int = 3
    G: int = 3
    K: int = 32
    R: int | None = None
    own_angles: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Inputs":
        generator = torch.Generator().manual_seed(self.N + 1000 * self.K)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        positions = torch.randint(0, 4096, (self.B, self.N, 1) if self.own_angles else (self.N, 1), generator=generator)
        return Inputs(
            draw(self.B, self.N, self.H + 2 * self.G, self.K) * 3, 1 + draw(self.B, self.K) / 4,
            1 + draw(self.B, self.K) / 4, rotary_angles(positions.to(device), (self.R or self.K // 2,)),
            draw(self.B, self.N, self.H, self.K), draw(self.B, self.N, self.G, self.K), self.H,
        )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    angles: Tensor
    dq_out: Tensor
    dk_out: Tensor
    H: int

    def run(self, op: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and every gradient of `op` at these inputs, converted to `dtype`."""
        qkv, q_weight, k_weight = (
            x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.qkv, self.q_weight, self.k_weight)
        )
        q, k, _ = qkv.split((self.H, self.dk_out.shape[2], self.dk_out.shape[2]), dim=2)
        out = op(q, k, q_weight, k_weight, self.angles.to(dtype or self.angles.dtype), EPS)
        given = [x.to(out[0].dtype) for x in (self.dq_out, self.dk_out)]
        gradients = torch.autograd.grad(out, [qkv, q_weight, k_weight], given)
        names = ("q", "k", "dqkv", "dq_weight", "dk_weight")
        return dict(zip(names, (*(x.detach() for x in out), *gradients), strict=True))


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest deviation of each, relative to the largest entry."""
    return {name: ((found[name].double() - x).abs().max() / x.abs().max()).item() for name, x in exact.items()}


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = case.inputs(dtype, device)
    exact = inputs.run(reference.qk_norm_rope, torch.float64)
    found = errors(inputs.run(qk_norm_rope), exact)
    if dtype == torch.float32:
        assert max(found.values()) <= 1e-6, found
    else:
        twins = errors(inputs.run(reference.qk_norm_rope, dtype), exact)
        assert all(found[name] <= 2 * twins[name] for name in exact), (found, twins)


CASES = {
    "width_64": Case(K=64, N=40),
    "width_72": Case(K=72, N=33, H=4, G=1),
    "width_80": Case(K=80, N=17, H=2, G=1),
    "width_96": Case(K=96, N=16, G=1),
    "width_128": Case(K=128, N=20, own_angles=True),
    "one_token": Case(N=1, K=64),
    "more_heads_than_a_group": Case(B=1, N=3, H=19, G=18, K=8),
    "turned_in_part": Case(K=40, R=11, own_angles=True),
    "turned_in_one_pair": Case(K=64, R=1),
    "odd_width": Case(K=7, R=2, N=70),
    "narrowest": Case(K=2),
    "widest": Case(K=256, N=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_are_the_twins(triton: None, case: str, dtype: torch.dtype) -> None:
    check(CASES[case], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("N", [1, 63, 111, 256, 1000])
@pytest.mark.parametrize("K", [64, 72, 80, 96, 128])
def test_the_matrix(triton: None, K: int, N: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(Case(1 if N == 1000 else 2, N, *heads, K, own_angles=N % 2 == 1), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 111, 1000])
@pytest.mark.parametrize("K", [64, 72, 80, 96, 128])
def test_on_a_gpu_too(K: int, N: int, dtype: torch.dtype) -> None:
    for heads in ((4, 4), (6, 2)):
        check(Case(3, N, *heads, K, own_angles=N == 111), dtype, "cuda")
    check(Case(3, N, 4, 4, K, R=K // 8), dtype, "cuda")


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", [CASES["width_72"], CASES["turned_in_part"], CASES["odd_width"]])
def test_every_element_is_written(triton: None, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.inputs()
    clean, empty = inputs.run(qk_norm_rope), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(math.nan))
    assert same(clean, inputs.run(qk_norm_rope))


def test_any_strides_and_any_alignment_give_the_same_bits(triton: None) -> None:
    inputs = Case(K=24, N=11, H=4, G=2).inputs()
    q, k, _ = inputs.qkv.split((4, 2, 2), dim=2)

    def misaligned(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def by_heads(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def by_features(x: Tensor) -> Tensor:
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    def apart(x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]

    def run(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parts = [change(x) for x in (q, k, inputs.q_weight, inputs.k_weight)]
        own_q, own_k, q_weight, k_weight = leaves = [x.detach().requires_grad_() for x in parts]
        assert [x.stride() for x in leaves] == [x.stride() for x in parts]
        out = qk_norm_rope(own_q, own_k, q_weight, k_weight, inputs.angles, EPS)
        assert all(x.is_contiguous() for x in out)
        return [*out, *torch.autograd.grad(out, leaves, [change(inputs.dq_out), change(inputs.dk_out)])]

    plain = run(torch.clone)
    for change in (misaligned, by_features, apart, lambda x: by_heads(x) if x.dim() == 4 else x):
        assert all(map(torch.equal, plain, run(change)))


def test_one_weight_for_all_records_and_the_gradient_of_a_sum_have_strides_of_zero(triton: None) -> None:
    inputs = Case(K=24, N=11).inputs()
    q, k, _ = inputs.qkv.split(3, dim=2)
    spread = inputs.q_weight[0].expand(2, -1)  # as from `per_record.copies`
    leaf = q.detach().requires_grad_()
    out, _ = qk_norm_rope(leaf, k, spread, spread, inputs.angles, EPS)
    assert torch.equal(out, qk_norm_rope(q, k, spread.clone(), spread.clone(), inputs.angles, EPS)[0])
    out.sum().backward()
    expected, *_ = _backward(torch.ones_like(q), torch.zeros_like(k), q, k, spread, spread, inputs.angles, EPS)
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)


def test_angles_of_a_longer_table_and_shared_angles_for_each_record_are_the_same(triton: None) -> None:
    inputs = Case(N=5, K=24).inputs()
    q, k, _ = inputs.qkv.split(3, dim=2)
    expected = qk_norm_rope(q, k, inputs.q_weight, inputs.k_weight, inputs.angles)
    longer = torch.cat([inputs.angles, torch.full_like(inputs.angles, math.nan)])[:5]
    for angles in (longer, inputs.angles.expand(2, -1, -1, -1), inputs.angles.mT.contiguous().mT):
        assert all(map(torch.equal, expected, qk_norm_rope(q, k, inputs.q_weight, inputs.k_weight, angles)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_record_depends_on_no_neighbour_and_not_on_its_place(device: str) -> None:
    inputs = hard(device, B=3, N=70, H=2, G=1, own_angles=True)
    inputs.qkv[2] = math.nan
    inputs.dq_out[2] = math.inf
    whole = inputs.run(qk_norm_rope)
    for record in (0, 1):
        own = slice(record, record + 1)
        alone = replace(inputs, **{name: x[own] for name, x in vars(inputs).items() if name != "H"}).run(qk_norm_rope)
        assert same(alone, {name: x[own] for name, x in whole.items()})
        assert all(x.isfinite().all() for x in alone.values())


def test_padding_changes_no_bit(device: str) -> None:
    inputs = hard(device, N=70, own_angles=True)

    def pad(x: Tensor, value: float) -> Tensor:
        return nn.functional.pad(x, (0, 0, 0, 0, 0, 90), value=value)

    no_gradients = {"dq_out": pad(inputs.dq_out, 0.0), "dk_out": pad(inputs.dk_out, 0.0)}
    padded = replace(inputs, qkv=pad(inputs.qkv, 5.0), angles=pad(inputs.angles, 1.0), **no_gradients)
    short, long = inputs.run(qk_norm_rope), padded.run(qk_norm_rope)
    assert same(short, {name: x if x.dim() == 2 else x[:, :70] for name, x in long.items()})


def test_repeats_are_equal_bit_for_bit(device: str, repeats: int) -> None:
    inputs = hard(device, B=1, N=40, H=1, G=1)
    first = inputs.run(qk_norm_rope)
    for _ in range(repeats):
        assert same(first, inputs.run(qk_norm_rope))


@pytest.mark.parametrize("choice", ["triton", "auto"])
@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)])
def test_no_records_or_no_tokens_are_well(choice: dispatch.Choice, sizes: tuple[int, int]) -> None:
    dispatch.choose(choice, torch.device("cpu"))
    try:
        found = Case(*sizes).inputs().run(qk_norm_rope)
    finally:
        dispatch.choose("auto", torch.device("cpu"))
    assert found["q"].shape == (*sizes, 3, 32) and not found["dq_weight"].any() and not found["dk_weight"].any()


def test_the_ops_keep_the_rules_of_custom_ops(triton: None) -> None:
    inputs = Case(N=3, H=2, G=1, K=8).inputs()
    q, k, _ = inputs.qkv.requires_grad_().split((2, 1, 1), dim=2)
    weights = inputs.q_weight.requires_grad_(), inputs.k_weight.requires_grad_()
    torch.library.opcheck(_forward, (q, k, *weights, inputs.angles, EPS))
    plain = [x.detach() for x in (inputs.dq_out, inputs.dk_out, q, k, *weights, inputs.angles)]
    torch.library.opcheck(_backward, (*plain, EPS))


@pytest.mark.parametrize("choice", ["triton", "auto"])
def test_compiles_without_a_graph_break(choice: dispatch.Choice) -> None:
    dispatch.choose(choice, torch.device("cpu"))
    torch.compiler.reset()
    try:
        inputs = Case(N=5, K=8).inputs()
        compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
        found, expected = inputs.run(compiled), inputs.run(qk_norm_rope)
    finally:
        dispatch.choose("auto", torch.device("cpu"))
        torch.compiler.reset()
    assert same(found, expected)


def test_angles_compile_too() -> None:
    positions = torch.arange(6)[:, None]
    made = torch.compile(rotary_angles, fullgraph=True, backend="aot_eager")(positions, (4,))
    assert torch.equal(made, rotary_angles(positions, (4,)))


def test_on_the_cpu_it_is_the_twin_in_fp32_or_wider() -> None:
    inputs = Case(K=24, N=5).inputs()
    assert same(inputs.run(qk_norm_rope), inputs.run(reference.qk_norm_rope))
    half, wide = Case(K=24, N=5).inputs(torch.bfloat16), Case(K=24, N=5).inputs(torch.bfloat16)
    expected = wide.run(reference.qk_norm_rope, torch.float32)
    assert same(half.run(qk_norm_rope), {name: x.bfloat16() for name, x in expected.items()})
    inputs = Case(B=2, N=3, H=2, G=1, K=6, R=2).inputs(torch.float64)
    parts = (*inputs.qkv.split((2, 1, 1), dim=2)[:2], inputs.q_weight, inputs.k_weight)
    leaves = [x.contiguous().requires_grad_() for x in parts]
    assert torch.autograd.gradcheck(lambda q, k, u, w: qk_norm_rope(q, k, u, w, inputs.angles), leaves)


def test_the_twin_is_the_formula() -> None:
    inputs = Case(B=1, N=2, H=1, G=1, K=5, R=2).inputs(torch.float64)
    x, weight = inputs.qkv[0, 1, 0].tolist(), inputs.q_weight[0].tolist()
    (cos, sin) = inputs.angles[1].double().tolist()
    rms = math.sqrt(sum(value**2 for value in x) / 5 + EPS)
    u = [value / rms * scale for value, scale in zip(x, weight, strict=True)]
    expected = [u[0] * cos[0] - u[2] * sin[0], u[1] * cos[1] - u[3] * sin[1],
                u[2] * cos[0] + u[0] * sin[0], u[3] * cos[1] + u[1] * sin[1], u[4]]  # fmt: skip
    found, _ = reference.qk_norm_rope(inputs.qkv[:, :, :1], inputs.qkv[:, :, 1:2], inputs.q_weight, inputs.k_weight,
                                      inputs.angles.double(), EPS)  # fmt: skip
    torch.testing.assert_close(found[0, 1, 0].tolist(), expected, rtol=1e-14, atol=0)


def test_angles_are_those_of_exact_arithmetic_far_out() -> None:
    positions, widths, base = [[8191, 3, 77], [0, 131071, 5]], (4, 8, 20), 10_000.0
    angles = rotary_angles(torch.tensor(positions), widths, base)
    assert angles.shape == (2, 2, 32) and angles.dtype == torch.float32
    for token, at in enumerate(positions):
        exact = [p * base ** (-i / w) for p, w in zip(at, widths, strict=True) for i in range(w)]
        for of_pair, function in zip(angles[token], (math.cos, math.sin), strict=True):
            expected = torch.tensor([function(angle) for angle in exact], dtype=torch.float64)
            assert (of_pair.double() - expected).abs().max() <= 2.0**-25 + 1e-10  # half a unit in the last place of one


def test_scores_depend_on_distances_alone() -> None:
    q, k, ones = torch.randn(1, 1, 1, 24).double(), torch.randn(1, 1, 1, 24).double(), torch.ones(1, 24).double()

    def score(q_position: Sequence[int], k_position: Sequence[int]) -> float:
        positions = torch.tensor([q_position, k_position])
        at_q, at_k = rotary_angles(positions, (4, 4, 4)).split(1)
        return (qk_norm_rope(q, k, ones, ones, at_q)[0] * qk_norm_rope(q, k, ones, ones, at_k)[1]).sum().item()

    assert score((5, 9, 2), (3, 9, 8)) == pytest.approx(score((105, 0, 12), (103, 0, 18)), abs=1e-5)
    assert score((5, 9, 2), (3, 9, 8)) != pytest.approx(score((3, 9, 2), (5, 9, 8)), abs=1e-3)


def test_bytes_are_one_read_and_one_write() -> None:
    q, k, angles = torch.zeros(2, 5, 4, 8).half(), torch.zeros(2, 5, 1, 8).half(), torch.zeros(5, 2, 4)
    assert qk_norm_rope_bytes(q, k, angles) == 2 * (2 * 5 * 5 * 8) * 2 + 5 * 8 * 4
    assert qk_norm_rope_bytes(q, k, angles, backward=True) == 3 * (2 * 5 * 5 * 8) * 2 + 5 * 8 * 4


GOOD: dict[str, Any] = {
    "q_BNHK": torch.zeros(2, 5, 4, 8), "k_BNGK": torch.zeros(2, 5, 2, 8), "q_weight_BK": torch.ones(2, 8),
    "k_weight_BK": torch.ones(2, 8), "angles": torch.ones(5, 2, 4), "eps": EPS,
}  # fmt: skip
BAD: list[tuple[str, Any, str]] = [
    ("q_BNHK", torch.zeros(2, 5, 32), r"q is float32 \(2, 5, 32\): .*\(B, N, H, K\)"),
    ("q_BNHK", torch.zeros(2, 5, 0, 8), r"q is float32 \(2, 5, 0, 8\)"),
    ("q_BNHK", torch.zeros(2, 5, 4, 8, dtype=torch.int32), "q is int32"),
    ("q_BNHK", torch.zeros(2, 5, 4, 264), "q has heads of width 264: 2 to 256"),
    ("q_BNHK", torch.zeros(2, 5, 4, 1), "q has heads of width 1"),
    ("k_BNGK", torch.zeros(2, 6, 2, 8), r"k is float32 \(2, 6, 2, 8\), but q is float32 \(2, 5, 4, 8\)"),
    ("k_BNGK", torch.zeros(2, 5, 2, 16), "only the number of heads"),
    ("k_BNGK", torch.zeros(2, 5, 0, 8), "only the number of heads"),
    ("k_BNGK", torch.zeros(2, 5, 2, 8).half(), "k is float16"),
    ("q_weight_BK", torch.ones(8), r"q_weight is float32 \(8,\): give one for each record, floating-point \(2, 8\)"),
    ("k_weight_BK", torch.ones(2, 8, dtype=torch.int64), "k_weight is int64"),
    ("angles", torch.ones(5, 4), r"angles is float32 \(5, 4\): give rotary_angles, fp32 \(5, 2, R\)"),
    ("angles", torch.ones(3, 5, 2, 4), r"angles is float32 \(3, 5, 2, 4\)"),
    ("angles", torch.ones(()), r"angles is float32 \(\)"),
    ("angles", torch.ones(5, 2, 4).double(), "angles is float64"),
    ("angles", torch.ones(5, 2, 5), "angles turns 5 pairs of features: heads of width 8 have 1 to 4"),
    ("angles", torch.ones(5, 2, 0), "angles turns 0 pairs"),
    ("angles", torch.ones(5, 2, 4, requires_grad=True), "angles requires grad"),
    ("angles", torch.ones(5, 2, 4, device="meta"), "angles is on meta, but q on cpu"),
    ("eps", 0.0, "eps is 0.0: it must be positive"),
    ("eps", math.nan, "eps is nan"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_what_does_not_fit_is_an_error_that_says_what_would(argument: str, value: object, message: str) -> None:
    qk_norm_rope(**GOOD)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**GOOD, argument: value})


def test_the_kernel_refuses_what_it_cannot_hold(triton: None) -> None:
    doubles = {name: x.double() if name in ("q_BNHK", "k_BNGK") else x for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=r"q is torch\.float64: the kernel takes fp16, bf16, fp32"):
        qk_norm_rope(**doubles)


@pytest.mark.parametrize(
    ("positions", "widths", "base", "message"),
    [
        (torch.zeros(4, 2), (8,), 1e4, r"positions has shape \(4, 2\): its last dimension takes 1 axes"),
        (torch.zeros(()), (8,), 1e4, "positions has shape"),
        (torch.zeros(4, 0), (), 1e4, r"widths is \(\)"),
        (torch.zeros(4, 2), (8, 0), 1e4, r"widths is \(8, 0\): give each axis one pair or more"),
        (torch.zeros(4, 1), (8,), 0.0, "base is 0.0: it must be positive"),
    ],
)
def test_axes_that_do_not_fit_are_an_error(
    positions: Tensor, widths: tuple[int, ...], base: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_angles(positions, widths, base)


class Scale(PerRecordModule):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width, generator=torch.Generator().manual_seed(seed)) / 4)

    def forward(self, num_rows: int) -> Tensor:
        return per_record.copies(self.weight, num_rows, self.site)


class Collect(Pass):
    """Each record's squared gradient norm, and for autograd the sum of the gradients under the given weights."""

    def __init__(self, weights_B: Tensor | None = None) -> None:
        self.weights_B, self.squared = weights_B, dict[str, Tensor]()

    def visit(self, use: Use, gradients: Gradients) -> Mapping[str, Tensor]:
        self.squared[use.site.name] = gradients["weight"].squared_norms()
        if self.weights_B is None:
            return {}
        return {"weight": gradients["weight"].weighted_sum(RecordWeights(self.weights_B))}


@pytest.mark.parametrize("choice", ["triton", "auto"])
@pytest.mark.parametrize("rows", [1, 2])  # of a record: several noises of it are one record
def test_private_training_gets_each_records_gradient_of_the_weights(choice: dispatch.Choice, rows: int) -> None:
    records, K = 3, 24
    inputs = Case(B=records * rows, N=37, H=4, G=2, K=K).inputs()
    q, k, _ = inputs.qkv.split((4, 2, 2), dim=2)
    scales, anchor = (Scale(K, 1), Scale(K, 2)), torch.zeros((), requires_grad=True)

    def losses(op: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        q, k = op(q, k, *(w.expand(len(q), -1) if w.dim() == 1 else w for w in weights), inputs.angles, EPS)
        return (q * k.repeat_interleave(2, dim=2)).mean((2, 3)).tanh().sum(1)

    weights = [scale.weight.detach().double().requires_grad_() for scale in scales]
    exact_B = losses(reference.qk_norm_rope, q.double(), k.double(), *weights).view(records, rows).sum(1)
    of_records = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in exact_B]
    coefficients_B = torch.tensor([0.5, 0.0, 2.0])
    dispatch.choose(choice, torch.device("cpu"))
    try:
        for name, scale in zip(("q", "k"), scales, strict=True):
            scale.site = Site(name, records, anchor)
        total = losses(qk_norm_rope, q, k, *(scale(len(q)) for scale in scales)).sum()
        norms = Collect()
        with activate(norms):
            torch.autograd.grad(total, anchor, retain_graph=True, allow_unused=True)
        with activate(Collect(coefficients_B)):
            total.backward()
    finally:
        dispatch.choose("auto", torch.device("cpu"))
    for index, (name, scale) in enumerate(zip(("q", "k"), scales, strict=True)):
        squared_B = torch.stack([own[index].square().sum() for own in of_records])
        # the norm of a sum over rows is given a little too large (`kernels.ghost_norm`), never too small
        torch.testing.assert_close(norms.squared[name].double(), squared_B, rtol=1e-5, atol=0)
        expected = sum(c * own[index] for c, own in zip(coefficients_B.tolist(), of_records, strict=True))
        assert scale.weight.grad is not None
        torch.testing.assert_close(
            scale.weight.grad.double(), expected, rtol=0, atol=1e-6 * squared_B.max().sqrt().item()
        )
