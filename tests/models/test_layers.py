import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import per_record
from models.layers import Attention, Embedding, Linear, TimestepEmbedding, modulated_norm, sincos_positions


def test_linear_and_embedding_are_torchs_own_without_a_norm_row() -> None:
    torch.manual_seed(0)
    linear, embedding = Linear(5, 3), Embedding(7, 4)
    x, indices = torch.randn(2, 6, 5), torch.tensor([0, 6])
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert torch.equal(embedding(indices), embedding.weight[indices])


def test_linear_and_embedding_report_each_records_squared_gradient_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Embedding(7, 4), Linear(4, 3))
    indices = torch.tensor([1, 1, 6])
    expected = []
    for record in range(3):
        loss = model(indices[record : record + 1]).square().sum()
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))))
    norm_row = torch.zeros(4, requires_grad=True)
    for layer in model:
        layer.norm_row = norm_row  # type: ignore[assignment]
    with per_record.norm_pass():
        (reported,) = torch.autograd.grad(model(indices).square().sum(), norm_row)
    torch.testing.assert_close(reported[:3], torch.stack(expected))
    assert reported[3] == 2, "each of the two layers reports once"


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
