"""The empirical check: canaries take the way of every record, and broken engines are told from the real one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train.empirical
from models.dit import DiT, DiTConfig
from privacy.clipping import make_clipper
from privacy.empirical import audit_one_run
from train import ROOT
from train.config import FinetuneStage
from train.empirical import (
    Attack,
    Canaries,
    Noiseless,
    Observed,
    Slots,
    attack_engine,
    check_engine,
    open_mechanism,
    throwaway_stage,
)
from train.recipe import load_stage
from train.run_folder import RunFolder

MODEL = DiTConfig(width=48, depth=2, heads=2, image_size=8, channels=1, patch_size=2, num_classes=10)
SECRET = bytes(range(32))
SMALL: dict[str, Any] = {"canaries": 200, "guesses": 100, "steps": 10, "sampling_rate": 0.5, "target_epsilon": 2.0}


class BlankRecords:
    """Ten public records."""

    def __len__(self) -> int:
        return 10

    def digest(self, index: int) -> str:
        return f"record {index}"

    def batch(self, indices: np.ndarray, channels: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(indices))
        images = torch.rand(len(indices), channels, image_size, image_size, generator=generator) * 2 - 1
        return images, torch.as_tensor(indices) % 10


SLOTS = Slots(BlankRecords(), 10, SMALL["canaries"])


@pytest.fixture(scope="module")
def stage() -> FinetuneStage:
    loaded = load_stage(ROOT / "configs/digits/40_finetune_dp.yaml", ["objective.noise_draws=2"])
    assert isinstance(loaded, FinetuneStage)
    return loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.open(tmp_path_factory.mktemp("run"), "digits")


@pytest.fixture(scope="module")
def planned_once(stage: FinetuneStage, run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planned") / "ledger.jsonl"
    with open_mechanism(Observed, throwaway(stage), run, SLOTS, path, SECRET):
        return path


@pytest.fixture
def planned(planned_once: Path, tmp_path: Path) -> Path:
    """A copy of a ledger that holds the throwaway stage's plan, whose calibration takes seconds."""
    return Path(shutil.copy(planned_once, tmp_path / "ledger.jsonl"))


def throwaway(stage: FinetuneStage) -> FinetuneStage:
    batch_size = round(SMALL["sampling_rate"] * len(SLOTS))
    return throwaway_stage(stage, SMALL["steps"], batch_size, SMALL["target_epsilon"])


def fresh_model() -> DiT:
    model = DiT(MODEL)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def attack(engine: type[Observed], stage: FinetuneStage, run: RunFolder, ledger: Path) -> Attack:
    return attack_engine(engine, throwaway(stage), run, fresh_model(), SLOTS, ledger, SECRET)


def bound(found: Attack) -> float:
    return audit_one_run(found.scores, found.included, SMALL["guesses"], 1e-5).epsilon_lower_bound


def test_the_engine_holds_and_without_noise_the_check_sees_it(stage: FinetuneStage, run: RunFolder) -> None:
    before = sorted(run.path.rglob("*"))
    told: list[tuple[int, int, str]] = []
    check = check_engine(
        stage, run, MODEL, fresh_model().state_dict(), BlankRecords(), SECRET,
        progress=lambda *words: told.append(words), **SMALL,
    )  # fmt: skip
    assert check.holds, check.verdict
    assert check.engine.epsilon_lower_bound < check.epsilon <= 2.0 < check.control.epsilon_lower_bound
    assert (check.steps, check.engine.canaries, check.engine.guesses) == (10, 200, 100)
    assert check.sampling_rate == pytest.approx(0.5)
    assert told[-1] == (20, 20, "the same without noise")
    assert sorted(run.path.rglob("*")) == before  # no ledger, no key and no weights of it are left behind
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("clipping", ["two_pass", "kept_gradients", "group_wise"])
def test_a_canary_releases_its_direction_at_the_bound_and_nothing_else(
    stage: FinetuneStage, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clipping: str
) -> None:
    """Every unit drawn once and without noise: the sum is that of the included canaries' unit directions, times C."""
    monkeypatch.setattr(train.empirical, "_clipper", clipper(clipping))  # type: ignore[arg-type]
    monkeypatch.setattr(train.empirical, "fair_coins", lambda key, count: np.arange(count) % 2 == 0)
    slots = Slots(BlankRecords(), 0, 6)
    found = attack_engine(
        Noiseless, throwaway_stage(stage, 1, 6, 2.0), run, fresh_model(), slots, tmp_path / "ledger.jsonl", SECRET
    )
    gram = directions(6) @ directions(6).T
    assert np.allclose(np.diag(gram), 1.0, atol=1e-5)
    assert np.abs(gram - np.eye(6)).max() < 0.1  # nearly orthogonal
    assert found.included.tolist() == [True, False] * 3
    assert np.allclose(found.scores, gram @ found.included, atol=1e-4)


def clipper(name: Any, times: float = 1.0) -> Callable[..., Any]:
    def make(stage: FinetuneStage, model: nn.Module) -> Any:
        return make_clipper(name, model, times * stage.privacy.max_grad_norm)

    return make


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
    stage: FinetuneStage, run: RunFolder, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.empirical, "_clipper", clipper("two_pass", times=20.0))
    found = attack(Observed, stage, run, planned)
    assert bound(found) > found.epsilon


def test_an_engine_with_a_twentieth_of_its_noise_is_found_out(
    stage: FinetuneStage, run: RunFolder, planned: Path
) -> None:
    class Quiet(Observed):
        def privatise(self, charge: Any) -> Any:
            true, self.gradient_multiplier = self.gradient_multiplier, self.gradient_multiplier / 20
            try:
                return super().privatise(charge)
            finally:
                self.gradient_multiplier = true

    found = attack(Quiet, stage, run, planned)
    assert bound(found) > found.epsilon


def test_the_same_keys_give_the_same_scores(stage: FinetuneStage, run: RunFolder, planned: Path) -> None:
    again = Path(shutil.copy(planned, planned.with_name("again.jsonl")))
    first, second = (attack(Observed, stage, run, ledger) for ledger in (planned, again))
    assert np.array_equal(first.scores, second.scores)
    assert np.array_equal(first.included, second.included)


def test_a_check_that_could_not_see_a_broken_engine_is_refused(stage: FinetuneStage, run: RunFolder) -> None:
    settings = SMALL | {"guesses": 10}
    with pytest.raises(
        ValueError, match=r"empirical\.guesses is 10 on 200 canaries: all right, they show epsilon 1\.0"
    ):
        check_engine(stage, run, MODEL, fresh_model().state_dict(), BlankRecords(), SECRET, **settings)
