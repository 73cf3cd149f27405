from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch
from kernels.per_record import PerRecordModule
from models.dit import SIZES, DiT, DiTConfig
from models.registry import CONFIGS, MODELS

SMALL = DiTConfig(width=32, depth=2, heads=4, image_size=8, channels=3, num_classes=10)


def filled(config: DiTConfig = SMALL, seed: int = 0) -> DiT:
    """A model with no zero weights, so that every path through it shows in its output."""
    model, generator = DiT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def batch(config: DiTConfig = SMALL, size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, config.channels, config.image_size, config.image_size, generator=generator)
    return x, torch.rand(size, generator=generator), torch.randint(config.num_classes, (size,), generator=generator)


@pytest.mark.parametrize(("image_size", "channels", "patch_size"), [(8, 1, 2), (8, 3, 4), (6, 2, 3), (4, 4, 1)])
def test_the_output_has_the_inputs_shape(image_size: int, channels: int, patch_size: int) -> None:
    config = SMALL.model_copy(update={"image_size": image_size, "channels": channels, "patch_size": patch_size})
    x, t, y = batch(config)
    assert filled(config)(x, t, y).shape == x.shape


def test_a_patch_comes_back_where_it_was() -> None:
    config = DiTConfig(width=32, depth=1, heads=4, image_size=6, channels=2, patch_size=3, num_classes=1)
    model, (x, _, _) = DiT(config), batch(config)
    patches_BNF = model._patchify(x)
    assert torch.equal(patches_BNF[1, 1], x[1, :, :3, 3:].flatten()), "token 1 is the upper right patch, channel first"
    channel_last = patches_BNF.unflatten(-1, (2, 9)).transpose(-1, -2).flatten(-2)
    assert torch.equal(model._unpatchify(channel_last), x)


def test_fresh_weights_predict_exactly_zero_and_their_blocks_are_the_identity() -> None:
    model = DiT(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    x, t, y = batch()
    assert torch.count_nonzero(model(x, t, y)) == 0
    tokens, condition = torch.randn(4, 16, 32), torch.randn(4, 32)
    assert torch.equal(model.blocks[0](tokens, condition), tokens)


def test_weights_are_a_function_of_the_generators_seed() -> None:
    def initialised(seed: int) -> dict[str, Tensor]:
        model = DiT(SMALL)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = initialised(0), initialised(0), initialised(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_initial_weights_have_the_papers_spread() -> None:
    model = DiT(DiTConfig(size="nano", image_size=8, channels=1, num_classes=10))
    model.init_weights(torch.Generator().manual_seed(0))
    qkv = model.blocks[0].get_parameter("attention.qkv.weight")
    assert qkv.std().item() == pytest.approx((2 / (128 + 384)) ** 0.5, rel=0.02)
    assert model.class_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.count_nonzero(qkv) == qkv.numel()
    assert all(torch.count_nonzero(p) == 0 for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_model_built_on_meta_becomes_the_one_built_in_memory() -> None:
    with torch.device("meta"):
        model = DiT(SMALL)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    expected = DiT(SMALL)
    expected.init_weights(torch.Generator().manual_seed(0))
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(model.positions, expected.positions)


def check_sharded_initialisation(rank: int) -> None:
    # one rank of three, its collectives answered by nobody: initialisation must need none
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    with torch.device("meta"):
        model = DiT(SMALL)
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    whole = DiT(SMALL)
    whole.init_weights(torch.Generator().manual_seed(0))
    for (name, parameter), full in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.to_local(), full.chunk(3)[rank]), name


@pytest.mark.distributed
def test_a_sharded_model_starts_from_its_part_of_the_whole_models_weights() -> None:
    # processes of their own: DTensor keeps what it learnt of a rank for the life of the process
    torch.multiprocessing.spawn(check_sharded_initialisation, nprocs=3)


def test_changing_a_record_changes_no_other_records_output_by_a_bit() -> None:
    model, (x, t, y) = filled(), batch()
    before = model(x, t, y)
    x[1], t[1], y[1] = 100 * x[1] + 7, 0.9, (y[1] + 1) % 10
    after = model(x, t, y)
    others = [0, 2, 3]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[1], before[1])


def test_a_record_that_is_not_finite_spoils_only_itself() -> None:
    model, (x, t, y) = filled(), batch()
    before = model(x, t, y)
    x[2] = torch.nan
    after = model(x, t, y)
    assert after[2].isnan().all()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_every_parameter_is_in_a_per_record_layer_that_runs_once_a_forward() -> None:
    model, (x, t, y) = filled(), batch()
    layers = [module for module in model.modules() if isinstance(module, PerRecordModule)]
    held = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    assert held == {id(parameter) for parameter in model.parameters()}
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    model(x, t, y)
    assert len(calls) == len(layers) == len(set(calls))


def test_time_and_class_change_the_output_and_the_null_class_is_one_past_the_last() -> None:
    model, (x, t, y) = filled(), batch()
    assert model.null_class == 10
    plain, null = model(x, t, y), model(x, t, torch.full_like(y, model.null_class))
    assert not torch.allclose(plain, null)
    assert not torch.allclose(plain, model(x, t / 2, y))
    with pytest.raises(IndexError):
        model(x, t, torch.full_like(y, model.null_class + 1))


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    model, (x, t, y) = filled().double(), batch()
    x, generator, step = x.double(), torch.Generator().manual_seed(2), 1e-6

    def loss() -> Tensor:
        return model(x, t, y).square().mean()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        measured = (above - below) / (2 * step)
        torch.testing.assert_close(measured, (gradient * direction).sum(), rtol=1e-5, atol=1e-8, msg=name)


def test_bf16_weights_take_fp32_images_and_stay_near_the_fp32_model() -> None:
    model, (x, t, y) = filled(), batch()
    exact = model(x, t, y)
    rounded = model.bfloat16()(x, t, y)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("size", "millions"), [("S", 32.9), ("B", 130.3), ("L", 457.8), ("XL", 674.8)]
)  # the paper's Table 1, less the learned sigma's outputs: 33, 130, 458, 675
def test_named_sizes_count_the_papers_parameters(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(size=size, image_size=32, channels=4, num_classes=1000))  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_xl_with_a_learned_sigma_would_be_the_papers_model_to_the_last_parameter() -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(size="XL", image_size=32, channels=4, num_classes=1000))
    sigma_outputs, stored_positions = 16 * 1152 + 16, 256 * 1152
    assert sum(p.numel() for p in model.parameters()) + sigma_outputs + stored_positions == 675_129_632


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("image_size", "channels", "patch_size"), [(8, 1, 2), (32, 4, 2), (32, 3, 8)])
def test_forward_flops_are_those_the_counter_sees(size: str, image_size: int, channels: int, patch_size: int) -> None:
    shape = {"image_size": image_size, "channels": channels, "patch_size": patch_size, "num_classes": 10}
    with torch.device("meta"):
        model = DiT(DiTConfig(size=size, **shape))  # type: ignore[arg-type]
        x, t, y = torch.empty(3, channels, image_size, image_size), torch.empty(3), torch.zeros(3, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, y)
    assert model.config.forward_flops(3) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    dispatch.choose(request.param, torch.device("cpu"))
    yield request.param
    dispatch.choose("auto", torch.device("cpu"))


ONE_HEAD = SMALL.model_copy(update={"heads": 1})


def test_the_model_compiles_without_a_graph_break(kernels: str) -> None:
    model, (x, t, y) = filled(ONE_HEAD), batch()
    expected = model(x, t, y)
    # aot_eager traces forward and backward as inductor does, without the minute of code generation
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x, t, y)
    torch.testing.assert_close(out, expected)
    out.sum().backward()


def test_every_kernels_flops_are_counted(kernels: str) -> None:
    model, (x, t, y) = filled(ONE_HEAD), batch()
    with FlopCounterMode(display=False) as counter:
        loss = model(x, t, y).sum()
        assert counter.get_total_flops() == pytest.approx(model.config.forward_flops(4), rel=0.01)
        attention = 4 * ONE_HEAD.num_tokens**2 * ONE_HEAD.width * ONE_HEAD.depth * 4
        loss.backward()
    # a backward is two forwards, but for attention's, which recomputes its scores; the first layer's input has none
    first = 2 * 4 * ONE_HEAD.num_tokens * ONE_HEAD.patch_features * ONE_HEAD.width
    expected = 3 * model.config.forward_flops(4) + attention / 2 - first
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_a_block_compiles_to_the_same_output_and_gradient() -> None:
    block = filled().double().blocks[0]  # float64: only a true difference shows
    tokens, condition = torch.randn(4, 16, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    expected = block(tokens, condition)
    gradients = torch.autograd.grad(expected.sum(), list(block.parameters()))
    out = torch.compile(block, fullgraph=True)(tokens, condition)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), list(block.parameters())), gradients)


def test_a_config_survives_being_written_and_read() -> None:
    for config in (SMALL, DiTConfig(size="S", image_size=32, channels=4, num_classes=5)):
        assert CONFIGS["dit"](**config.model_dump()) == config
    assert MODELS["dit"] is DiT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "XXL"}, "size"),
        ({"size": "nano", "width": 256}, "width is 256, but size nano has 128"),
        ({"width": 128, "heads": 4}, "depth is missing"),
        ({"width": 130, "depth": 2, "heads": 4}, "width 130 is not a multiple of heads 4"),
        ({"width": 6, "depth": 2, "heads": 2}, "width 6 is not a multiple of 4"),
        ({"size": "nano", "patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"size": "nano", "dropout": 0.1}, "dropout"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DiTConfig(**{"image_size": 8, "channels": 1, "num_classes": 10, **fields})  # type: ignore[arg-type]


def test_an_image_of_another_shape_is_refused() -> None:
    model, (x, t, y) = filled(), batch()
    with pytest.raises(ValueError, match=r"\(4, 3, 4, 16\).*\(3, 8, 8\)"):
        model(x.reshape(4, 3, 4, 16), t, y)
