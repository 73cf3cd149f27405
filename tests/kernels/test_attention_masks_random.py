"""Attention under random masks of every kind against the dense float64 oracle, and that a DiT's is not causal."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, reference
from kernels.attention import attention, attention_with_lse
from kernels.attention_mask import AttentionMask, attention_mask, causal, documents, text_and_images
from models.dit import DiT, DiTConfig

CPU = torch.device("cpu")
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 256, 257, 300]))
LARGE_SIZES = st.one_of(SIZES, st.integers(1, 700))
DTYPES = st.sampled_from([torch.float32, torch.float16])


@pytest.fixture(scope="module")
def triton() -> Iterator[None]:
    """For the whole module's hypothesis: a fixture of each test would be one of each example."""
    dispatch.choose("triton", CPU)
    yield
    dispatch.choose("auto", CPU)


@dataclass(frozen=True)
class Case:
    mask: AttentionMask
    num_groups: int
    heads_per_group: int
    width: int
    seed: int

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output.

        q and k are of deviation 1/2: at 1 the rounding of fp32 scores alone moves gradients by 2e-6, the twin's too.
        """
        mask, heads = self.mask, self.num_groups * self.heads_per_group
        generator = torch.Generator().manual_seed(self.seed)
        queries = (mask.num_records, heads, mask.num_queries, self.width)
        keys = (mask.num_records, self.num_groups, mask.num_keys, self.width)
        q, k, v, grad_out = (torch.randn(shape, generator=generator) for shape in (queries, keys, keys, queries))
        return [x.to(dtype) for x in (q / 2, k / 2, v, grad_out)]


def in_runs(values: Tensor, length: int, num_tokens: int) -> Tensor:
    return values.repeat_interleave(length, 1)[:, :num_tokens].to(torch.int32).contiguous()


@st.composite
def masks(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> AttentionMask:
    """A causal mask, packed documents, text and images, or four vectors of any content, empty rows among them."""
    num_records, num_tokens = draw(st.integers(1, 2)), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def drawn(low: int, high: int, num_values: int) -> Tensor:
        return torch.randint(low, high, (num_records, num_values), generator=generator)

    kind = draw(st.sampled_from(["causal", "documents", "text_and_images", "vectors"]))
    if kind == "causal":
        return causal(num_records, num_tokens)
    if kind == "documents":
        lengths = drawn(0, 2 + num_tokens // 2, draw(st.integers(1, 6)))
        lengths = lengths.cumsum(1).clamp(max=num_tokens).diff(dim=1, prepend=torch.zeros(num_records, 1).long())
        return documents(lengths, num_tokens, causal=draw(st.booleans()))
    length = draw(st.sampled_from([1, 3, 16, 100]))
    num_runs = -(-num_tokens // length)
    if kind == "text_and_images":
        document = in_runs(drawn(0, 2, num_runs).cumsum(1).sub(1), length, num_tokens)  # the first may be padding
        numbers = torch.arange(num_runs).expand(num_records, -1)
        image = in_runs(torch.where(drawn(0, 2, num_runs).bool(), numbers, -1), length, num_tokens)
        noised = in_runs(drawn(0, 2, num_runs), length, num_tokens).bool()
        return text_and_images(document, image, noised)
    num_keys = draw(sizes)
    lo, hi = (in_runs(drawn(0, num_keys + 1, num_runs), length, num_tokens) for _ in range(2))
    if draw(st.booleans()):
        return attention_mask(lo, hi, num_keys=num_keys, debug=True)
    key_length = draw(st.sampled_from([1, 3, 16, 100]))
    seg = in_runs(drawn(-1, 3, num_runs), length, num_tokens)
    noise = in_runs(drawn(-3, 3, -(-num_keys // key_length)), key_length, num_keys)
    return attention_mask(lo, hi, seg, noise, debug=True)


def cases(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[Case]:
    width = st.sampled_from([32, 64, 72, 80, 96, 128])
    return st.builds(Case, masks(sizes), st.integers(1, 2), st.integers(1, 3), width, st.integers(0, 2**31))


def results(case: Case, tensors: list[Tensor], *, oracle: bool = False) -> list[Tensor]:
    """Output, gradients of q, k and v, log-sum-exp."""
    *leaves, grad_out = (x.detach().requires_grad_() for x in tensors)
    q, k, v = leaves
    if oracle:
        out, lse = reference.attention(q, k, v, case.mask.visible_BNM())
    else:
        out, lse = attention_with_lse(q, k, v, case.mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out), lse.detach()]


def compare(case: Case, dtype: torch.dtype) -> None:
    tensors, visible_BNM = case.inputs(dtype), case.mask.visible_BNM()
    *got, lse = results(case, tensors)
    *exact, true_lse = results(case, [x.double() for x in tensors], oracle=True)
    plain = results(case, tensors, oracle=True)[:4]

    largest = max(gradient.abs().max() for gradient in exact[1:])

    def error(name: str, result: Tensor, true: Tensor) -> float:
        # Relative to the largest element: of the three gradients for those of q and k, which are differences of equal
        # sums where a row sees a single key.
        size = (largest if name in ("dq", "dk") else true.abs().max()).clamp(min=1e-30)
        return float((result.double() - true).abs().max() / size)

    for name, ours, twins, true in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        # an fp16 result is rounded, whatever the twin's luck
        limit = 1e-6 if dtype == torch.float32 else max(2 * error(name, twins, true), 2**-11)
        assert ours.isfinite().all() and error(name, ours, true) <= limit, (name, error(name, ours, true), limit)
    empty_BHN = ~visible_BNM.any(-1)[:, None].expand_as(lse)
    assert torch.equal(lse == -torch.inf, empty_BHN), "-inf for the empty rows, and for them only"
    torch.testing.assert_close(lse[~empty_BHN].double(), true_lse[~empty_BHN], rtol=1e-5, atol=1e-5)
    for result in got[:2]:
        assert (result[empty_BHN] == 0).all(), "an empty row gives zeros, and takes no gradient"


# no shrinking: in the interpreter it takes longer than a test may
RANDOM = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.usefixtures("triton")
@settings(RANDOM, max_examples=8)
@given(case=cases(SIZES), dtype=DTYPES)
def test_the_kernels_are_the_dense_oracle_under_any_mask(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("triton")
@settings(RANDOM, max_examples=150)
@given(case=cases(LARGE_SIZES), dtype=DTYPES)
def test_the_kernels_are_the_dense_oracle_under_many_masks(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@settings(RANDOM, max_examples=60)
@given(case=cases(SIZES))
def test_on_the_cpu_attention_is_the_dense_oracle_under_any_mask(case: Case) -> None:
    before = dispatch.chosen()
    dispatch.choose("auto", CPU)
    try:
        compare(case, torch.float32)
    finally:
        dispatch.choose(before, CPU)


@pytest.mark.parametrize("choice", ["auto", "triton"])
@pytest.mark.parametrize("num_tokens", [2, 16, 300])  # the short kernel's, and the long ones'
def test_attention_without_a_mask_is_not_causal(num_tokens: int, choice: dispatch.Choice) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, num_tokens, 64, generator=generator) for _ in range(3))
    last_k, last_v = k.clone(), v.clone()
    last_k[:, :, -1] += 1
    last_v[:, :, -1] += 1
    before = dispatch.chosen()
    dispatch.choose(choice, CPU)
    try:
        first = attention(q, k, v)[:, :, 0]
        assert not torch.equal(attention(q, last_k, v)[:, :, 0], first)
        assert not torch.equal(attention(q, k, last_v)[:, :, 0], first)
        q_of_last = q.clone()
        q_of_last[:, :, -1] += 1
        assert torch.equal(attention(q_of_last, k, v)[:, :, 0], first), "no query sees another"
        order = causal(1, num_tokens)
        assert torch.equal(attention(q, last_k, last_v, order)[:, :, 0], attention(q, k, v, order)[:, :, 0])
    finally:
        dispatch.choose(before, CPU)


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_the_attention_of_a_dit_is_not_causal(choice: dispatch.Choice) -> None:
    config = DiTConfig(width=64, depth=1, heads=2, image_size=8, channels=1, patch_size=2, num_classes=3)
    model, generator = DiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # not the paper's: gates of zero would hide what attention sees
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    x, t, y = torch.randn(1, 1, 8, 8, generator=generator), torch.tensor([0.3]), torch.tensor([1])
    with_another_last_token = x.clone()
    with_another_last_token[..., -2:, -2:] += 1
    before = dispatch.chosen()
    dispatch.choose(choice, CPU)
    try:
        with torch.no_grad():
            change = (model(with_another_last_token, t, y) - model(x, t, y)).abs()
    finally:
        dispatch.choose(before, CPU)
    assert change[..., :2, :2].max() > 1e-3, "the first token must see the last one"
