from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.dit import DiT, DiTConfig
from models.packed import image_to_text
from models.unified import Unified, UnifiedConfig
from models.unified_objective import UnifiedObjective
from privacy.ledger import Ledger
from train import ROOT
from train.config import FinetuneStage, TrainStage
from train.documents import layout_of
from train.images import encode_png
from train.launchers import Placement
from train.plan import ParameterCounts, count_records, plan, plan_memory, plan_privacy
from train.recipe import ConfigError, load_recipe
from train.shards import Record, write_shards

DIGITS = ROOT / "configs" / "digits"
SHAPES = ROOT / "configs" / "shapes"
XL2 = ROOT / "configs" / "imagenet_dit_xl2"
NANO = DiTConfig(size="nano", image_size=8, channels=1, patch_size=2, num_classes=10)
SMALL = DiTConfig(width=64, depth=6, heads=4, image_size=16, channels=4, patch_size=2, num_classes=10)


def finetune(*overrides: str) -> FinetuneStage:
    stage = load_recipe(DIGITS, [f"finetune_dp.{override}" for override in overrides]).stage("finetune_dp")
    assert isinstance(stage, FinetuneStage)
    return stage


def write_private_split(run_dir: Path, units: list[str]) -> None:
    """A private split of one tiny image for each entry, which names its user."""
    image = encode_png(Image.new("L", (8, 8)))
    records = (Record(f"r{number:03d}", unit, image, 0, None) for number, unit in enumerate(units))
    write_shards(run_dir / "filter" / "private", "private", records, shard_size=16)


def test_dit_xl2_is_planned_with_its_parameters_memory_and_epsilon_and_nothing_is_written(tmp_path: Path) -> None:
    rows = {row.name: row for row in plan(load_recipe(XL2), tmp_path / "x", Placement())}
    for name in ("pretrain", "finetune_dp"):
        # 675 M, table 4 of Peebles and Xie; theirs has a learned sigma, 0.04 M more
        assert rows[name].num_parameters == pytest.approx(675e6, rel=1e-3)
        assert rows[name].world_size == 8
        assert "h100" in rows[name].fits
    privacy = rows["finetune_dp"].privacy
    assert privacy is not None and privacy.epsilon < privacy.target == 10
    assert rows["pretrain"].privacy is None
    assert list(tmp_path.iterdir()) == []


@contextmanager
def kept_for_the_backward(network: DiT | Unified) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps within the context, by address; `network` is given weights, which do not count."""
    network.init_weights(torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    held, kept = list[torch.UntypedStorage](), dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(storage)  # so that no other takes its address
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("model", [NANO, SMALL], ids=["nano", "small"])
def test_activations_are_estimated_within_a_tenth_of_what_autograd_keeps(model: DiTConfig) -> None:
    images = torch.randn(16, model.channels, model.image_size, model.image_size)
    with kept_for_the_backward(network := DiT(model)) as kept:
        network(images, torch.rand(16), torch.zeros(16, dtype=torch.long))
    assert 16 * model.num_tokens * 4 * model.kept_elements() == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "top_k": 2}, {"modality_experts": True, "num_experts": 2}])
def test_so_are_a_unified_models(experts: dict[str, Any]) -> None:
    shape = {"width": 64, "depth": 4, "heads": 2, "image_size": 16, "channels": 3, "patch_size": 4}
    model = UnifiedConfig(**shape, max_caption_tokens=40, **experts)
    batch = layout_of(model).pack([[image_to_text(torch.zeros(3, 16, 16), [97] * 30)]] * 4, num_tokens=56)
    noise, times = torch.randn(batch.patches_BNF.shape), torch.rand(batch.noised_BI.shape)
    with kept_for_the_backward(network := Unified(model)) as kept:
        UnifiedObjective().losses(network, batch, noise, times)
    assert batch.tokens_BN.numel() * 4 * model.kept_elements() == pytest.approx(sum(kept.values()), rel=0.1)


def test_activation_checkpointing_keeps_less() -> None:
    assert NANO.kept_elements(checkpointed=True) < NANO.kept_elements()


@pytest.mark.parametrize(
    ("backend", "copies_of_the_weights"),
    [
        # weights + gradients + moments + average, in whole copies and in quarters
        ("ddp", 6),
        ("fsdp2", 5 / 4),
        ("zero1", 1 + 1 / 4 + 1 + 3 / 4),
        ("zero2", 1 + 1 / 4 + 1 / 4 + 3 / 4),
        ("zero3", 6 / 4),
    ],
)
def test_states_are_counted_by_what_the_backend_shards(backend: str, copies_of_the_weights: float) -> None:
    stage = finetune(f"parallel={{backend: {backend}, nproc: 4}}")
    memory = plan_memory(
        stage, NANO, ParameterCounts(1000, experts=0, experts_a_layer=0, block=100, block_experts=0), 4
    )
    states = memory.parameters + memory.gradients + memory.optimizer + memory.ema
    assert states == pytest.approx(4 * 1000 * copies_of_the_weights)


def test_the_noise_planned_holds_the_target_with_every_replay_step_used(tmp_path: Path) -> None:
    from privacy.accounting import epsilon

    stage = finetune("train.steps=40", "privacy.replay_steps=10", "privacy.target_epsilon=3", "optim.warmup_steps=0")
    planned = plan_privacy(stage, 1000, tmp_path / "ledger.jsonl")
    assert planned is not None and planned.spent == 0
    event = {
        "mechanism": "poisson_sampled_gaussian",
        "sampling_rate": planned.sampling_rate,
        "noise_multiplier": planned.noise_multiplier,
    }
    assert planned.sampling_rate == stage.train.batch_size / 1000
    assert planned.epsilon < epsilon([(event, 50)], stage.privacy.delta) <= 3


def test_what_other_runs_spent_on_the_data_is_planned_around(tmp_path: Path) -> None:
    from privacy.accounting import epsilon

    stage = finetune("train.steps=40", "privacy.replay_steps=10", "privacy.target_epsilon=3", "optim.warmup_steps=0")
    event = {"mechanism": "poisson_sampled_gaussian", "sampling_rate": 0.05, "noise_multiplier": 1.5}
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(
        path, delta=1e-5, unit="record", dataset_root="d", signing_seed=bytes(32), fencing_epoch=1
    ) as ledger:
        ledger.charge_ahead("another/finetune_dp", [(step, event) for step in range(40)], "git:abc")
    planned = plan_privacy(stage, 1000, path)
    assert planned is not None
    assert planned.spent == pytest.approx(epsilon([(event, 40)], 1e-5))
    own = event | {"sampling_rate": planned.sampling_rate, "noise_multiplier": planned.noise_multiplier}
    assert epsilon([(event, 40), (own, 50)], 1e-5) <= planned.target == 3
    assert plan_privacy(finetune("privacy.target_epsilon=0.5"), 1000, path) is None


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    stage = finetune()
    with pytest.raises(ConfigError, match="but split private has 5 units: lower it to at most 5"):
        plan_privacy(stage, 5, tmp_path / "ledger.jsonl")


def test_users_are_counted_in_the_shards_and_not_guessed_from_records(tmp_path: Path) -> None:
    users = ["finetune_dp.privacy.unit=user", "finetune_dp.privacy.max_records_per_user=3"]
    recipe = load_recipe(DIGITS, ["finetune_dp.expected_records=500", "finetune_dp.train.batch_size=4", *users])
    stage = recipe.stage("finetune_dp")
    (row,) = plan(recipe, tmp_path, Placement(), [stage])
    assert row.privacy is None
    assert "the number of users is not known" in row.notes[0]
    write_private_split(tmp_path, [f"u{number % 7}" for number in range(21)])
    (row,) = plan(recipe, tmp_path, Placement(), [stage])
    assert row.privacy is not None
    assert (row.privacy.num_units, row.privacy.sampling_rate) == (7, 4 / 7)


def test_records_are_counted_in_the_shards_where_they_are_there(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS, ["finetune_dp.expected_records=500"])
    stage = recipe.stage("finetune_dp")
    assert isinstance(stage, TrainStage)
    assert count_records(recipe, stage, tmp_path) == 500
    split = tmp_path / "filter" / "private"
    split.mkdir(parents=True)
    (split / "private-00000.index.jsonl").write_text("{}\n" * 7)
    (split / "private-00001.index.jsonl").write_text("{}\n" * 2)
    assert count_records(recipe, stage, tmp_path) == 9


def test_the_digits_are_counted_by_their_source(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS)
    stage = recipe.stage("finetune_dp")
    assert isinstance(stage, TrainStage)
    count = count_records(recipe, stage, tmp_path)
    assert count is not None and 0 < count < 1797


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(XL2, ["finetune_dp.expected_records=null"])
    row = next(row for row in plan(recipe, tmp_path, Placement()) if row.name == "finetune_dp")
    assert row.privacy is None
    assert "the number of records is not known before the data is there; set expected_records" in row.notes[0]


def test_a_delta_that_would_allow_giving_a_record_away_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS, ["finetune_dp.expected_records=1000", "privacy.delta=2e-3"])
    row = next(row for row in plan(recipe, tmp_path, Placement()) if row.name == "finetune_dp")
    assert "not below 1/1000" in row.notes[0]


def test_the_plan_refuses_a_batch_that_the_nodes_cannot_share(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS, ["pretrain.train.batch_size=64", "pretrain.train.microbatch_size=32"])
    with pytest.raises(ValueError, match="which 6 ranks"):
        plan(recipe, tmp_path, Placement(nnodes=3), [recipe.stage("pretrain")])


def test_the_plan_refuses_experts_that_the_ranks_cannot_share(tmp_path: Path) -> None:
    recipe = load_recipe(SHAPES, ["pretrain.parallel={backend: ddp, nproc: 1, expert_parallel: 2}"])
    with pytest.raises(ValueError, match="expert_parallel is 2, which does not divide the 1 ranks"):
        plan(recipe, tmp_path, Placement(), [recipe.stage("pretrain")])
    (row,) = plan(recipe, tmp_path, Placement(nnodes=2), [recipe.stage("pretrain")])
    whole = load_recipe(SHAPES, ["pretrain.parallel={backend: ddp, nproc: 1}"])
    (all_experts,) = plan(whole, tmp_path, Placement(nnodes=2), [whole.stage("pretrain")])
    assert row.memory is not None and all_experts.memory is not None
    assert row.memory.total < all_experts.memory.total
