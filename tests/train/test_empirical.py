"""The empirical check: canaries take the way of every record, and broken engines are told from the real one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.empirical
from models.dit import DiT, DiTConfig
from privacy.empirical import audit_one_run
from tests.train.unified_models import config, filled
from train import ROOT
from train.config import FinetuneStage
from train.empirical import (
    Attack,
    Canaries,
    CanarySplit,
    Noiseless,
    Observed,
    attack_engine,
    check_engine,
    open_mechanism,
    throwaway_stage,
)
from train.recipe import load_stage
from train.shards import Record

MODEL = DiTConfig(width=48, depth=2, heads=2, image_size=8, channels=1, patch_size=2, num_classes=10)
SECRET = bytes(range(32))
SMALL: dict[str, Any] = {"canaries": 200, "guesses": 100, "steps": 10, "sampling_rate": 0.5, "target_epsilon": 2.0}


class BlankRecords:
    """Ten public records, without captions."""

    caption_bytes = np.full(10, -1)
    latents = None

    def __len__(self) -> int:
        return 10

    def digest(self, index: int) -> str:
        return f"record {index}"

    def batch(self, indices: np.ndarray, channels: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(indices))
        images = torch.rand(len(indices), channels, image_size, image_size, generator=generator) * 2 - 1
        return images, torch.as_tensor(indices) % 10

    def cropped(
        self, indices: np.ndarray, channels: int, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[torch.Tensor], list[str | None]]:
        return [torch.zeros(channels, *size) for size in sizes], [None] * len(sizes)

    def read(self, index: int) -> Record:
        return Record(f"r{index}", f"r{index}", b"", None, None)


SPLIT = CanarySplit(BlankRecords(), 10, SMALL["canaries"])


@pytest.fixture(scope="module")
def stage() -> FinetuneStage:
    return private_stage()


@pytest.fixture(scope="module")
def planned_once(stage: FinetuneStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planned") / "ledger.jsonl"
    with open_mechanism(Observed, throwaway(stage), SPLIT, path, SECRET):
        return path


@pytest.fixture
def planned(planned_once: Path, tmp_path: Path) -> Path:
    """A copy of a ledger that holds the throwaway stage's plan, whose calibration takes seconds."""
    return Path(shutil.copy(planned_once, tmp_path / "ledger.jsonl"))


def private_stage(*overrides: str) -> FinetuneStage:
    loaded = load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", ["objective.noise_draws=2", *overrides])
    assert isinstance(loaded, FinetuneStage)
    return loaded


def throwaway(stage: FinetuneStage) -> FinetuneStage:
    return throwaway_stage(stage, SMALL["steps"], SMALL["sampling_rate"], len(SPLIT), SMALL["target_epsilon"])


def fresh_model() -> DiT:
    model = DiT(MODEL)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def attack(engine: type[Observed], stage: FinetuneStage, ledger: Path) -> Attack:
    return attack_engine(engine, throwaway(stage), fresh_model(), SPLIT, ledger, SECRET)


def bound(found: Attack) -> float:
    return audit_one_run(found.scores, found.included, SMALL["guesses"], 1e-5).epsilon_lower_bound


def test_the_engine_holds_and_without_noise_the_check_sees_it(stage: FinetuneStage) -> None:
    told: list[tuple[int, int, str]] = []
    joined = torch.distributed.is_initialized()
    check = check_engine(
        stage, MODEL, fresh_model().state_dict(), BlankRecords(), SECRET,
        progress=lambda *words: told.append(words), **SMALL,
    )  # fmt: skip
    assert check.holds, check.verdict
    assert check.engine.epsilon_lower_bound < check.epsilon <= 2.0 < check.control.epsilon_lower_bound
    assert (check.steps, check.engine.canaries, check.engine.guesses) == (10, 200, 100)
    assert check.sampling_rate == pytest.approx(0.5)
    assert told[-1] == (20, 20, "the same without noise")
    assert torch.distributed.is_initialized() == joined


@pytest.mark.parametrize("clipping", ["two_pass", "kept_gradients", "group_wise"])
def test_a_canary_releases_its_direction_at_the_bound_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipping: str
) -> None:
    """Every unit drawn once and without noise: the sum is that of the included canaries' unit directions, times C."""
    monkeypatch.setattr(train.empirical, "fair_coins", lambda key, count: np.arange(count) % 2 == 0)
    canaries_alone = CanarySplit(BlankRecords(), 0, 6)
    once = throwaway_stage(private_stage(f"privacy.clipping={clipping}"), 1, 1.0, 6, 2.0)
    found = attack_engine(Noiseless, once, fresh_model(), canaries_alone, tmp_path / "ledger.jsonl", SECRET)
    gram = directions(6) @ directions(6).T
    assert np.allclose(np.diag(gram), 1.0, atol=1e-5)
    assert np.abs(gram - np.eye(6)).max() < 0.1  # nearly orthogonal
    assert found.included.tolist() == [True, False] * 3
    assert np.allclose(found.scores, gram @ found.included, atol=1e-4)


def directions(count: int) -> np.ndarray:
    """Each canary's unit direction over all parameters, by autograd through the plain model."""
    model = fresh_model()
    with Canaries(model, count, norm=1.0) as canaries:
        rows = []
        for number in range(count):
            model.zero_grad()
            losses = canaries.losses(
                lambda network: (
                    network(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
                    .square()
                    .mean((1, 2, 3))
                ),
                torch.tensor([number]),
                model,
            )
            losses.sum().backward()
            rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).numpy())  # type: ignore[union-attr]
    return np.stack(rows)


def test_an_engine_that_clips_too_late_is_found_out(
    stage: FinetuneStage, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = train.empirical.stage_clipper

    def late(*arguments: Any) -> Any:
        clipper = right(*arguments)
        clipper.bound *= 20
        return clipper

    monkeypatch.setattr(train.empirical, "stage_clipper", late)
    found = attack(Observed, stage, planned)
    assert bound(found) > found.epsilon


def test_an_engine_with_a_twentieth_of_its_noise_is_found_out(stage: FinetuneStage, planned: Path) -> None:
    class Quiet(Observed):
        def privatise(self, charge: Any, num_elements: int) -> Any:
            true, self.gradient_multiplier = self.gradient_multiplier, self.gradient_multiplier / 20
            try:
                return super().privatise(charge, num_elements)
            finally:
                self.gradient_multiplier = true

    found = attack(Quiet, stage, planned)
    assert bound(found) > found.epsilon


def test_the_same_keys_give_the_same_scores(stage: FinetuneStage, planned: Path) -> None:
    again = Path(shutil.copy(planned, planned.with_name("again.jsonl")))
    first, second = (attack(Observed, stage, ledger) for ledger in (planned, again))
    assert np.array_equal(first.scores, second.scores)
    assert np.array_equal(first.included, second.included)


def test_the_throwaway_stage_samples_as_the_stage_does() -> None:
    truncated = private_stage("privacy.sampling={method: truncated_poisson, max_batch_size: 192}")  # 1.5 times 128
    assert throwaway(truncated).privacy.sampling.max_batch_size == round(1.5 * throwaway(truncated).train.batch_size)
    cyclic = throwaway(private_stage("privacy.sampling={method: cyclic_poisson, cycle: 4}", "privacy.bands=4"))
    assert (cyclic.train.batch_size, cyclic.privacy.bands) == (len(SPLIT) // 4, 4)  # a part's rate is at most 1
    users = throwaway(private_stage("privacy.unit=user", "privacy.max_records_per_user=3"))
    assert (users.privacy.unit, users.privacy.max_records_per_user) == ("record", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    ["{method: truncated_poisson, max_batch_size: 192}", "{method: cyclic_poisson, cycle: 4}", "{method: shuffled}"],
)
def test_every_way_of_sampling_is_checked_alike(sampling: str) -> None:
    settings = SMALL | {"sampling_rate": 0.25, "steps": 16}
    stage = private_stage(f"privacy.sampling={sampling}")
    check = check_engine(stage, MODEL, fresh_model().state_dict(), BlankRecords(), SECRET, **settings)
    assert check.holds, check.verdict


def test_a_check_that_could_not_see_a_broken_engine_is_refused(stage: FinetuneStage) -> None:
    settings = SMALL | {"guesses": 10}
    with pytest.raises(
        ValueError, match=r"empirical\.guesses is 10 on 200 canaries: all right, they show epsilon 1\.0"
    ):
        check_engine(stage, MODEL, fresh_model().state_dict(), BlankRecords(), SECRET, **settings)


@pytest.mark.parametrize("experts", [{}, {"modality_experts": True, "num_experts": 2}])
def test_a_canary_of_a_unified_model_releases_its_direction_at_the_bound_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: dict[str, Any]
) -> None:
    """As above, through packed documents and two noise draws: norms, embeddings and experts get nothing of a canary."""
    monkeypatch.setattr(train.empirical, "fair_coins", lambda key, count: np.arange(count) % 2 == 0)
    overrides = ["objective.noise_draws=2", "documents.row_tokens=160", "privacy.clipping=two_pass"]
    loaded = load_stage(ROOT / "configs/shapes/40_finetune_dp.yaml", overrides)
    assert isinstance(loaded, FinetuneStage)
    model = filled(config(max_caption_tokens=48, **experts))
    once = throwaway_stage(loaded, 1, 1.0, 6, 2.0)
    canaries_alone = CanarySplit(BlankRecords(), 0, 6)
    found = attack_engine(Noiseless, once, model, canaries_alone, tmp_path / "ledger.jsonl", SECRET)
    assert found.included.tolist() == [True, False] * 3
    assert np.allclose(found.scores, found.included, atol=0.1)  # nearly orthogonal directions
