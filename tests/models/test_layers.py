"""The layers against torch's own. What they tell of each record is tested in tests/privacy/test_engines.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    Attention,
    Conv2d,
    Embedding,
    LayerNorm,
    LearnedTensor,
    Linear,
    LoRALinear,
    RMSNorm,
    TimestepEmbedding,
    modulated_norm,
    sincos_positions,
)


def test_linear_embedding_and_convolution_are_torchs_own_outside_a_private_step() -> None:
    torch.manual_seed(0)
    linear, embedding, conv = Linear(5, 3), Embedding(7, 4), Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x, indices, image = torch.randn(2, 6, 5), torch.tensor([0, 6]), torch.randn(2, 4, 9, 9)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert torch.equal(embedding(indices), embedding.weight[indices])
    assert torch.equal(conv(image), F.conv2d(image, conv.weight, conv.bias, (2, 2), (1, 1), (1, 1), 2))


@pytest.mark.parametrize("geometry", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_a_convolution_padded_otherwise_than_with_zeros_is_refused(geometry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"padding is .*: give numbers, filled with zeros"):
        Conv2d(2, 2, 3, **geometry)(torch.zeros(1, 2, 4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("coupling", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_couples_records_is_refused(coupling: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="couple records"):
        Embedding(3, 2, **coupling)(torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_norms_are_torchs_own_with_a_learned_scale_and_shift(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for ours, plain in (
        (LayerNorm(6), nn.LayerNorm(6, eps=1e-6)),
        (LayerNorm(6, bias=False), nn.LayerNorm(6, eps=1e-6, bias=False)),
        (RMSNorm(6), nn.RMSNorm(6, eps=1e-6)),
    ):
        torch.testing.assert_close(ours(x), plain(x))
        with torch.no_grad():
            for mine, parameter in zip(ours.parameters(), plain.parameters(), strict=True):
                parameter.copy_(torch.randn(6))
                mine.copy_(parameter)
        torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_a_learned_tensor_is_the_same_for_each_record_and_takes_no_memory(shape: tuple[int, ...]) -> None:
    learned = LearnedTensor(*shape)
    with torch.no_grad():
        learned.weight.copy_(torch.randn(shape))
    copies: Tensor = learned(4)
    assert copies.shape == (4, *shape)
    assert all(torch.equal(copy, learned.weight) for copy in copies)
    assert copies.untyped_storage().data_ptr() == learned.weight.untyped_storage().data_ptr()


def test_lora_starts_as_the_frozen_layer_and_trains_only_its_two_factors() -> None:
    torch.manual_seed(0)
    frozen, x = nn.Linear(6, 5), torch.randn(3, 6)
    adapted = LoRALinear(frozen, rank=2, alpha=8)
    assert torch.equal(adapted(x), frozen(x))
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {"down.weight", "up.weight"}
    with torch.no_grad():
        adapted.up.weight.normal_()
    product = adapted.up.weight @ adapted.down.weight
    torch.testing.assert_close(adapted(x), frozen(x) + 4 * x @ product.mT)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_lora_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"LoRA rank is {rank}: a 6 x 5 layer takes less"):
        LoRALinear(nn.Linear(6, 5), rank, 1.0)


def test_attention_is_softmax_attention_over_all_tokens_of_a_record() -> None:
    torch.manual_seed(0)
    attention = Attention(width=12, heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    heads = []
    for head in range(3):
        query, key, value = (
            F.linear(x, attention.qkv.weight[rows], attention.qkv.bias[rows])
            for rows in (slice(part * 12 + head * 4, part * 12 + head * 4 + 4) for part in range(3))
        )
        heads.append(torch.softmax(query @ key.mT / 4**0.5, dim=-1) @ value)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_modulated_norm_normalises_each_token_then_scales_and_shifts_by_record() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    shift, scale = torch.full((2, 16), 0.5), torch.tensor([[0.0], [1.0]]).expand(2, 16)
    out = modulated_norm(x, shift, scale)
    torch.testing.assert_close(out.mean(-1), torch.full((2, 5), 0.5))
    torch.testing.assert_close(out.std(-1, correction=0), torch.tensor([[1.0], [2.0]]).expand(2, 5))


def test_nearby_times_embed_differently_even_under_bf16_weights() -> None:
    torch.manual_seed(0)
    embed = TimestepEmbedding(32).bfloat16()
    first, second = embed(torch.tensor([0.500, 0.501]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("grid_size", "width"), [(1, 4), (3, 8), (16, 1152)])
def test_positions_tell_every_cell_from_every_other(grid_size: int, width: int) -> None:
    positions = sincos_positions(grid_size, width)
    assert positions.shape == (grid_size**2, width)
    assert len(torch.unique(positions, dim=0)) == grid_size**2
