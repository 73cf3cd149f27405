"""The private step's mechanism: what is charged before what, how much noise, and what happens when the budget ends."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from privacy.ledger import Ledger, LedgerError, read_ledger
from privacy.mechanism import BudgetExhausted, Mechanism, Terms

SECRET = bytes(range(32))
TERMS = Terms(
    stage="run/finetune_dp",
    steps=4,
    replay_steps=2,
    num_units=200,
    expected_batch_size=20,
    max_grad_norm=0.5,
    loss_bound=2.0,
    loss_share=0.1,
    target_epsilon=3.0,
    delta=1e-5,
    dataset_cap=None,
    secure_noise=True,
    operator_metrics=False,
)


@dataclass(frozen=True)
class Shard:
    name: str
    offset: int


def open_ledger(path: Path) -> Ledger:
    return Ledger.open(path, delta=1e-5, unit="record", dataset_root="blake3:" + "a" * 64, fencing_epoch=1)


def mechanism(ledger: Ledger | None, terms: Terms = TERMS, secret: bytes = SECRET, **kwargs: Any) -> Mechanism:
    broadcast = kwargs.pop("broadcast", lambda value: value)
    return Mechanism(terms, secret, ledger, broadcast, code_version="git:abc", config_sha256="c" * 64)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with the stage's plan, whose calibration takes seconds, to be copied."""
    path = tmp_path_factory.mktemp("planned") / "ledger.jsonl"
    with open_ledger(path) as ledger:
        mechanism(ledger)
    return path


@pytest.fixture
def ledger(planned: Path, tmp_path: Path) -> Iterator[Ledger]:
    shutil.copy(planned, tmp_path / "ledger.jsonl")
    with open_ledger(tmp_path / "ledger.jsonl") as opened:
        yield opened


def test_a_charge_is_in_the_file_before_anything_is_drawn(ledger: Ledger) -> None:
    private = mechanism(ledger)
    charge = private.charge(0)
    last = json.loads(ledger.path.read_text().splitlines()[-1])
    assert (last["type"], last["stage"], last["step"], last["attempt"]) == ("charge", "run/finetune_dp", 0, 0)
    assert last["hash"] == charge.hash


def test_the_gradient_and_the_loss_together_cost_what_is_charged(ledger: Ledger) -> None:
    private = mechanism(ledger)
    together = private.gradient_multiplier**-2 + private.loss_multiplier**-2
    assert together == pytest.approx(private.event["noise_multiplier"] ** -2, rel=1e-12)


def test_noise_has_the_standard_deviation_it_claims(ledger: Ledger) -> None:
    private = mechanism(ledger)
    charge = private.charge(0)
    gradient = torch.zeros(200_000)
    private.privatise(charge)(Shard("weight", 0), gradient)
    claimed = private.gradient_multiplier * TERMS.max_grad_norm / TERMS.expected_batch_size
    assert gradient.std().item() == pytest.approx(claimed, rel=0.01)
    released = private.release_loss(torch.zeros(()), private.charge(1))
    assert 0 < abs(released) < 8.6 * private.loss_multiplier * TERMS.loss_bound / TERMS.expected_batch_size


def test_a_replay_meets_another_draw_and_another_noise(ledger: Ledger) -> None:
    private = mechanism(ledger)
    first, second = private.charge(1), private.charge(1)
    assert (first.attempt, second.attempt) == (0, 1)
    assert private.draw(first).tolist() != private.draw(second).tolist()
    noise = [torch.zeros(1000) for _ in range(2)]
    for charge, gradient in zip((first, second), noise, strict=True):
        private.privatise(charge)(Shard("weight", 0), gradient)
    assert not torch.equal(*noise)


def test_a_resumed_mechanism_draws_what_the_first_would_have(ledger: Ledger) -> None:
    first = mechanism(ledger)
    charge = first.charge(0)
    again = mechanism(ledger)
    assert again.event == first.event
    assert again.draw(charge).tolist() == first.draw(charge).tolist()


def test_another_ledger_gives_the_same_step_other_noise(ledger: Ledger, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "other.jsonl") as other:
        noise = []
        for opened in (ledger, other):
            private, gradient = mechanism(opened), torch.zeros(1000)
            private.privatise(private.charge(0))(Shard("weight", 0), gradient)
            noise.append(gradient)
    assert not torch.equal(*noise)


def test_the_step_that_would_pass_the_target_is_neither_charged_nor_run(ledger: Ledger) -> None:
    private = mechanism(ledger)
    for attempt in range(TERMS.max_charges):
        private.charge(attempt % 2)
    assert private.spent() <= TERMS.target_epsilon
    with pytest.raises(BudgetExhausted, match="would pass epsilon 3 at delta 1e-05"):
        private.charge(2)
    assert read_ledger(ledger.path).num_charges == TERMS.max_charges
    with pytest.raises(BudgetExhausted):
        mechanism(ledger).charge(2)


def test_a_cap_of_the_data_set_binds_below_the_target(ledger: Ledger) -> None:
    capped = mechanism(ledger, replace(TERMS, dataset_cap=1.0))
    with pytest.raises(BudgetExhausted, match="would pass epsilon 1 "):
        for step in range(TERMS.max_charges):
            capped.charge(step)
    assert capped.spent() <= 1.0


def test_every_rank_hears_of_a_failed_charge(ledger: Ledger) -> None:
    said: list[Any] = []

    def broadcast(value: Any) -> Any:
        said.append(value)
        return value

    private = mechanism(ledger, broadcast=broadcast)
    ledger.close()
    with pytest.raises(LedgerError, match="takes no more records"):
        private.charge(0)
    result, error = said[-1]
    assert result is None
    assert isinstance(error, LedgerError)


def test_the_digest_of_what_went_in_is_keyed(ledger: Ledger) -> None:
    private = mechanism(ledger)
    digests = ["blake3:" + "1" * 64, "blake3:" + "2" * 64]
    private.done(private.charge(0), digests)
    written = json.loads(ledger.path.read_text().splitlines()[-1])["digest"]
    assert hashlib.sha256("\n".join(digests).encode()).hexdigest() not in written
    other = mechanism(ledger, secret=bytes(32))
    other.done(other.charge(1), digests)
    assert json.loads(ledger.path.read_text().splitlines()[-1])["digest"] != written


def test_losses_are_clipped_and_what_is_not_finite_counts_as_zero(ledger: Ledger) -> None:
    losses = torch.tensor([0.5, 3.0, float("nan"), float("inf"), -1.0, 0.25])
    present = torch.tensor([True, True, True, True, True, False])
    assert mechanism(ledger).clip_losses(losses, present).item() == pytest.approx(0.5 + 2.0)


def test_a_batch_larger_than_the_data_set_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size is 300, but the private data set has 200 units"):
        mechanism(ledger, replace(TERMS, expected_batch_size=300))
