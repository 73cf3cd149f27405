"""The private step's mechanism: what is charged before what, how much noise, and what happens when the budget ends."""

# One file, somewhat long: every promise of the one class that composes the others, over one prepared ledger.

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import privacy.noise
from privacy.accounting import epsilon
from privacy.ledger import Ledger, LedgerError, read_ledger
from privacy.mechanism import BudgetExhausted, Mechanism, Terms
from privacy.noise import GaussianNoise
from privacy.secrets import signing_seed
from tests.privacy.mechanism_events import gaussian, sampled

SECRET, CONFIG = bytes(range(32)), "c" * 64
NOISE = 2.0
TERMS = Terms(
    stage="run/finetune_dp",
    steps=4,
    replay_steps=2,
    charge_ahead=1,
    unit="record",
    max_records=1,
    num_units=200,
    expected_batch_size=20,
    sampling="poisson",
    max_batch_size=None,
    cycle=None,
    bands=1,
    clipping="two_pass",
    max_grad_norm=0.5,
    loss_bound=2.0,
    loss_share=0.1,
    counts_share=0.0,
    target_epsilon=3.0,
    delta=1e-5,
    dataset_cap=None,
    secure_noise=True,
    operator_metrics=False,
)
SAMPLING: dict[str, dict[str, Any]] = {
    "poisson": {"sampling": "poisson"},
    "truncated_poisson": {"sampling": "truncated_poisson", "max_batch_size": 24},
    "cyclic_poisson": {"sampling": "cyclic_poisson", "cycle": 3},
    "shuffled": {"sampling": "shuffled", "expected_batch_size": 67},
}


@dataclass(frozen=True)
class Shard:
    name: str
    offset: int


def open_ledger(path: Path, **changes: Any) -> Ledger:
    settings: dict[str, Any] = {"delta": 1e-5, "unit": "record", "dataset_root": "blake3:" + "a" * 64}
    return Ledger.open(path, **settings | {"signing_seed": signing_seed(SECRET), "fencing_epoch": 1} | changes)


def plan(ledger: Ledger, terms: Terms, noise: float = NOISE) -> Ledger:
    """Give the stage a plan with a noise of the test's choice: calibration takes seconds."""
    event = terms.sampler(bytes(32)).event(0, noise)
    ledger.plan(terms.stage, steps=terms.steps, event=event, config_sha256=CONFIG)
    return ledger


def mechanism(ledger: Ledger | None, terms: Terms = TERMS, secret: bytes = SECRET, **kwargs: Any) -> Mechanism:
    broadcast = kwargs.pop("broadcast", lambda value: value)
    return Mechanism(terms, secret, ledger, broadcast, code_version="git:abc", config_sha256=CONFIG, **kwargs)


def noise_of(private: Mechanism, step: int, length: int = 1000) -> torch.Tensor:
    """What a gradient of zeros is released as at one more attempt at `step`."""
    gradient = torch.zeros(length)
    private.privatise(private.charge(step), length)(Shard("weight", 0), gradient)
    return gradient


def attempts(ledger: Ledger, stage: str = TERMS.stage) -> dict[int, int]:
    return read_ledger(ledger.path).stages[stage].attempts


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with plan(open_ledger(tmp_path / "ledger.jsonl"), TERMS) as opened:
        yield opened


# --- a charge, and what follows it ---


def test_a_charge_is_in_the_file_and_synced_before_anything_is_drawn(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, synced = mechanism(ledger), list[int]()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(os.fstat(file).st_size)))
    charge = private.charge(0)
    assert synced[-1] == ledger.path.stat().st_size
    last = json.loads(ledger.path.read_text().splitlines()[-1])
    assert (last["type"], last["stage"], last["step"], last["attempt"]) == ("charge", "run/finetune_dp", 0, 0)
    assert last["hash"] == charge.hash


def test_steps_out_of_order_are_refused_and_charge_nothing(ledger: Ledger) -> None:
    for ahead in (1, 3):
        private = mechanism(ledger, replace(TERMS, charge_ahead=ahead))
        private.charge(0)
        before = ledger.num_charges
        for step in (0, 2):
            with pytest.raises(ValueError, match=f"step {step} of run/finetune_dp does not follow on step 0"):
                private.charge(step)
        assert ledger.num_charges == before
        private.charge(1)


def test_a_replay_meets_another_draw_and_another_noise(ledger: Ledger) -> None:
    runs = [mechanism(ledger), mechanism(ledger)]
    first, second = (private.charge(1) for private in runs)
    assert (first.attempt, second.attempt) == (0, 1)
    assert runs[0].draw(first).tolist() != runs[1].draw(second).tolist()
    noise = [torch.zeros(1000) for _ in range(2)]
    for private, charge, gradient in zip(runs, (first, second), noise, strict=True):
        private.privatise(charge, 1000)(Shard("weight", 0), gradient)
    assert not torch.equal(*noise)


def test_no_noise_key_is_ever_used_twice_however_often_a_run_begins_anew(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, visit = list[bytes](), privacy.noise.visit_gaussian
    monkeypatch.setattr(privacy.noise, "visit_gaussian", lambda key, *rest: (keys.append(key), visit(key, *rest))[1])
    terms = replace(TERMS, replay_steps=40, target_epsilon=50.0, counts_share=0.1)
    for first, last, ahead in ((0, 3, 1), (1, 2, 3), (1, 4, 2), (0, 4, 4), (3, 4, 1)):
        private = mechanism(ledger, replace(terms, charge_ahead=ahead))
        for step in range(first, last):
            charge = private.charge(step)
            for name in ("weight", "bias"):
                private.privatise(charge, 20)(Shard(name, 0), torch.zeros(10))
            private.release_loss(torch.zeros(()), charge)
            private.release_counts(torch.zeros(2), charge)
    assert len(keys) == 4 * (3 + 1 + 3 + 4 + 1)
    assert len(set(keys)) == len(keys)


def test_a_resumed_mechanism_draws_what_the_first_would_have(ledger: Ledger) -> None:
    first = mechanism(ledger)
    charge = first.charge(0)
    again = mechanism(ledger)
    assert again.noise_multiplier == first.noise_multiplier == NOISE
    assert again.draw(charge).tolist() == first.draw(charge).tolist()


def test_the_plan_names_the_filtered_shards_and_other_ones_are_refused(tmp_path: Path) -> None:
    before, after = (f"blake3:{letter * 64}" for letter in "ab")
    with open_ledger(tmp_path / "ledger.jsonl") as ledger:
        mechanism(ledger, shards_root=before)
        assert read_ledger(ledger.path).plans[TERMS.stage]["shards_root"] == before
        mechanism(ledger, shards_root=before)
        with pytest.raises(LedgerError, match=f"over filtered shards of Merkle root {before}, and now reads"):
            mechanism(ledger, shards_root=after)


def test_a_stage_planned_before_there_were_roots_goes_on(ledger: Ledger) -> None:
    mechanism(ledger, shards_root="blake3:" + "a" * 64)
    assert "shards_root" not in read_ledger(ledger.path).plans[TERMS.stage]


def test_another_ledger_gives_the_same_step_other_noise(ledger: Ledger, tmp_path: Path) -> None:
    with plan(open_ledger(tmp_path / "other.jsonl"), TERMS) as other:
        noise = [noise_of(mechanism(opened), 0) for opened in (ledger, other)]
    assert not torch.equal(*noise)


def test_the_digest_of_what_went_in_is_keyed(ledger: Ledger) -> None:
    private = mechanism(ledger)
    digests = ["blake3:" + "1" * 64, "blake3:" + "2" * 64]
    private.done(private.charge(0), digests)
    written = json.loads(ledger.path.read_text().splitlines()[-1])["digest"]
    assert hashlib.sha256("\n".join(digests).encode()).hexdigest() not in written
    other = mechanism(ledger, secret=bytes(32))
    other.done(other.charge(1), digests)
    assert json.loads(ledger.path.read_text().splitlines()[-1])["digest"] != written


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


def test_the_head_is_durable_before_anybody_is_told_of_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    private, synced = mechanism(ledger), list[int]()
    private.done(private.charge(0), [])
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(os.fstat(file).st_size)))
    assert private.head == json.loads(ledger.path.read_text().splitlines()[-1])["hash"]
    assert synced == [ledger.path.stat().st_size]


# --- charging ahead ---


def test_steps_charged_ahead_cost_one_write_and_one_sync(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    private = mechanism(ledger, replace(TERMS, charge_ahead=3))
    calls, write, fsync = list[str](), os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: (calls.append("write"), write(file, data))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), fsync(file))[1])
    charges = [private.charge(step) for step in range(3)]
    assert calls == ["write", "sync"]
    private.charge(3)
    assert calls == ["write", "sync"] * 2
    assert [charge.step for charge in charges] == [0, 1, 2]
    assert attempts(ledger) == dict.fromkeys(range(4), 1)


def test_a_stop_wastes_at_most_the_steps_charged_ahead_and_a_whole_run_none(ledger: Ledger) -> None:
    terms = replace(TERMS, steps=5, charge_ahead=3, replay_steps=20, target_epsilon=20.0)
    private = mechanism(ledger, terms)
    for step in range(4):
        private.done(private.charge(step), [])
    assert len(read_ledger(ledger.path).unfinished) == 1  # step 4: beyond the last step nothing is charged
    resumed = mechanism(ledger, terms)
    for step in range(2, 5):
        resumed.done(resumed.charge(step), [])
    assert attempts(ledger) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2}
    assert len(read_ledger(ledger.path).unfinished) == 1


def test_a_budget_that_ends_within_a_batch_of_charges_is_charged_to_its_end(ledger: Ledger) -> None:
    terms = replace(TERMS, steps=10, replay_steps=0, charge_ahead=4)
    event = sampled(0.1, NOISE)
    allowed = replace(terms, target_epsilon=(epsilon([(event, 6)], 1e-5) + epsilon([(event, 7)], 1e-5)) / 2)
    private = mechanism(ledger, allowed)
    for step in range(6):
        assert private.charge(step).step == step
    with pytest.raises(BudgetExhausted, match="step 6 of run/finetune_dp would pass epsilon"):
        private.charge(6)
    assert attempts(ledger) == dict.fromkeys(range(6), 1)
    assert epsilon(ledger.counts(), 1e-5) <= private.spent() <= allowed.target_epsilon


# --- the budget ---


def test_the_step_beyond_the_charges_calibrated_for_is_neither_charged_nor_run(ledger: Ledger) -> None:
    for first, last in ((0, 2), (0, 4)):
        private = mechanism(ledger)
        for step in range(first, last):
            private.charge(step)
    assert private.spent() <= TERMS.target_epsilon
    with pytest.raises(BudgetExhausted, match=r"would pass epsilon 3 at delta 1e-05: .* raise privacy\.target"):
        mechanism(ledger).charge(3)
    assert ledger.num_charges == TERMS.max_charges == 6


def test_a_cap_of_the_data_set_binds_below_the_target(ledger: Ledger) -> None:
    cap = epsilon([(sampled(0.1, NOISE), 2)], 1e-5)
    capped = mechanism(ledger, replace(TERMS, dataset_cap=cap))
    capped.charge(0)
    capped.charge(1)
    with pytest.raises(BudgetExhausted, match="would pass epsilon"):
        capped.charge(2)
    assert capped.spent() <= cap


def test_what_is_spent_is_an_upper_bound_at_every_step(ledger: Ledger) -> None:
    terms = replace(TERMS, steps=100, replay_steps=0, charge_ahead=7, target_epsilon=20.0)
    private = mechanism(ledger, terms)
    for step in range(90):
        private.charge(step)
        if step % 13 == 0:
            true = epsilon(ledger.counts(), 1e-5)
            assert true <= private.spent() <= 1.1 * true
    resumed = mechanism(ledger, terms)
    resumed.charge(90)
    assert epsilon(ledger.counts(), 1e-5) <= resumed.spent()


def test_two_runs_on_one_ledger_are_summed_and_the_second_is_refused_at_the_cap(tmp_path: Path) -> None:
    event = sampled(0.1, NOISE)
    cap = epsilon([(event, 7)], 1e-5)
    terms = [
        replace(TERMS, stage=f"{run}/finetune_dp", steps=5, replay_steps=0, dataset_cap=cap, target_epsilon=cap)
        for run in ("first", "second")
    ]
    path = tmp_path / "shared.jsonl"
    with plan(open_ledger(path, dataset_cap=cap), terms[0]) as ledger:
        private = mechanism(ledger, terms[0])
        for step in range(5):
            private.charge(step)
    with plan(open_ledger(path), terms[1]) as ledger:
        private = mechanism(ledger, terms[1])
        private.charge(0)
        assert private.spent() >= epsilon([(event, 6)], 1e-5)
        private.charge(1)
        with pytest.raises(BudgetExhausted, match="step 2 of second/finetune_dp"):
            private.charge(2)
        assert ledger.num_charges == 7
        assert epsilon(ledger.counts(), 1e-5) <= cap
        with pytest.raises(ValueError, match=r"no noise multiplier up to|already spent"):
            mechanism(ledger, replace(terms[1], stage="third/finetune_dp"))


def test_two_stages_that_charge_one_open_ledger_by_turns_do_not_pass_the_cap_together(ledger: Ledger) -> None:
    cap = epsilon([(sampled(0.1, NOISE), 5)], 1e-5)
    terms = [replace(TERMS, stage=name, dataset_cap=cap, charge_ahead=2) for name in ("a", "b")]
    runs = [mechanism(plan(ledger, each), each) for each in terms]
    with pytest.raises(BudgetExhausted):
        for step in range(4):
            for private in runs:
                private.charge(step)
    assert ledger.num_charges == 5
    assert all(private.spent() >= 0 for private in runs)


# --- noise, and what one event pays for ---


@pytest.mark.parametrize(("counts_share", "bands"), [(0.0, 1), (0.2, 1), (0.2, 3)])
def test_all_that_a_step_releases_costs_together_what_is_charged(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, counts_share: float, bands: int
) -> None:
    changes = SAMPLING["cyclic_poisson"] | {"bands": bands} if bands > 1 else {}
    terms = replace(TERMS, counts_share=counts_share, **changes)
    private = mechanism(ledger, terms)
    stds = dict[str, float]()
    for kind in (privacy.noise.GaussianNoise, privacy.noise.BandedNoise):
        monkeypatch.setattr(kind, "add_", lambda self, shard, *, name, std, **_: stds.update({name: std}))
    charge = private.charge(0)
    private.privatise(charge, 1_000_000)(Shard("weight", 0), torch.zeros(10))
    private.release_loss(torch.zeros(()), charge)
    sensitivity = {"weight": TERMS.max_grad_norm, "released loss": TERMS.loss_bound}
    if counts_share:
        private.release_counts(torch.zeros(9), charge)
        sensitivity["released counts"] = 9**0.5 / 2  # nine counts, each moved by a half
    assert stds.keys() == sensitivity.keys()
    together = sum((sensitivity[name] / std) ** 2 for name, std in stds.items())
    assert together <= NOISE**-2  # the grid's rounding is paid for too
    assert together == pytest.approx(NOISE**-2, rel=1e-6)


def test_noise_has_the_standard_deviation_it_claims(ledger: Ledger) -> None:
    private = mechanism(ledger, replace(TERMS, counts_share=0.2))
    gradient = noise_of(private, 0, 200_000)
    claimed = private.gradient_multiplier * TERMS.max_grad_norm / TERMS.expected_batch_size
    assert gradient.std().item() == pytest.approx(claimed, rel=0.01)
    counts = torch.tensor(private.release_counts(torch.zeros(40_000), private.charge(1)))
    assert counts.std().item() == pytest.approx(NOISE / 0.2**0.5 * 200 / 2, rel=0.02)
    released = private.release_loss(torch.zeros(()), private.charge(2))
    assert 0 < abs(released) < 8.6 * NOISE / 0.1**0.5 * TERMS.loss_bound / TERMS.expected_batch_size


def test_losses_are_clipped_and_what_is_not_finite_counts_as_zero(ledger: Ledger) -> None:
    losses = torch.tensor([0.5, 3.0, float("nan"), float("inf"), -1.0, 0.25])
    present = torch.tensor([True, True, True, True, True, False])
    assert mechanism(ledger).clip_losses(losses, present).item() == pytest.approx(0.5 + 2.0)


def test_one_unit_moves_the_sum_of_losses_by_no_more_than_the_bound_however_large_the_batch(ledger: Ledger) -> None:
    private = mechanism(ledger, replace(TERMS, loss_bound=1.7))
    losses = torch.rand(200_001, generator=torch.Generator().manual_seed(1)) + 1.0
    losses[7] = 9.0
    everyone = torch.ones(200_001, dtype=torch.bool)
    others = everyone.clone()
    others[7] = False
    moved = private.clip_losses(losses, everyone) - private.clip_losses(losses, others)
    assert abs(moved.item()) <= 1.7 * (1 + 1e-9)
    floats = losses.clamp(0.0, 1.7)
    assert (floats.sum() - torch.where(others, floats, 0.0).sum()).item() > 1.7 * 1.01  # had they been summed as floats


def test_a_batch_larger_than_the_data_set_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size is 300, but the private data set has 200 units"):
        mechanism(ledger, replace(TERMS, expected_batch_size=300))


# --- ways to sample ---


@pytest.fixture(scope="module")
def calibrated() -> Callable[[str], tuple[Terms, float]]:
    """Terms that sample by a method, and the noise they ask for."""
    known = dict[str, tuple[Terms, float]]()

    def of(method: str) -> tuple[Terms, float]:
        if method not in known:
            terms = replace(TERMS, steps=7, replay_steps=3, **SAMPLING[method])
            known[method] = terms, terms.calibrate()
        return known[method]

    return of


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow if name == "truncated_poisson" else ()) for name in SAMPLING],
)
def test_a_run_with_all_its_replays_stays_within_the_target_and_pays_for_each(
    ledger: Ledger, calibrated: Callable[[str], tuple[Terms, float]], method: str
) -> None:
    terms, noise = calibrated(method)
    terms = replace(terms, stage=f"run/{method}")
    plan(ledger, terms, noise)
    sampler, charged = terms.sampler(bytes(32)), Counter[str]()
    for first, last in ((0, 5), (2, 7)):  # stopped after step 4, with step 2 in the checkpoint
        private = mechanism(ledger, terms)
        for step in range(first, last):
            charge = private.charge(step)
            assert charge.event == sampler.event(step, noise)
            charged[json.dumps(charge.event, sort_keys=True, separators=(",", ":"))] += 1
            assert private.draw(charge).shape[1] == 1
            assert epsilon(ledger.counts(), 1e-5) <= private.spent() <= terms.target_epsilon
    assert attempts(ledger, terms.stage) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1}
    assert ledger.counts() == charged
    with pytest.raises(BudgetExhausted):
        mechanism(ledger, terms).charge(6)
    # The noise is no larger than it need be: with a hundredth less of it, all charges would pass the target.
    tight = sampler.planned(0, 7, noise / 1.01) + sampler.planned(2, 3, noise / 1.01)
    assert epsilon(tight, 1e-5) > terms.target_epsilon


def test_replays_that_fall_on_one_part_of_a_cycle_more_often_than_calibrated_for_are_stopped_in_time(
    ledger: Ledger, calibrated: Callable[[str], tuple[Terms, float]]
) -> None:
    terms, noise = calibrated("cyclic_poisson")
    plan(ledger, replace(terms, stage="s"), noise)
    with pytest.raises(BudgetExhausted):
        for _ in range(10):
            mechanism(ledger, replace(terms, stage="s")).charge(3)
    assert epsilon(ledger.counts(), 1e-5) <= terms.target_epsilon


def test_a_stream_read_once_costs_one_gaussian_release(ledger: Ledger) -> None:
    terms = replace(TERMS, stage="stream", steps=10, replay_steps=0, sampling="cyclic_poisson", cycle=10)
    private = mechanism(plan(ledger, terms), terms)
    read = [private.draw(private.charge(step))[:, 0] for step in range(10)]
    assert np.concatenate(read).tolist() == list(range(200))
    once = epsilon([(gaussian(NOISE), 1)], 1e-5)
    assert epsilon(ledger.counts(), 1e-5) == pytest.approx(once, rel=1e-3)
    assert private.spent() == pytest.approx(once, rel=1e-3)


def test_shuffled_epochs_are_charged_one_unamplified_release_each(ledger: Ledger) -> None:
    terms = replace(TERMS, stage="epochs", steps=6, target_epsilon=9.0, **SAMPLING["shuffled"])
    private = mechanism(plan(ledger, terms), terms)
    read = [private.draw(private.charge(step))[:, 0] for step in range(6)]
    for epoch in (read[:3], read[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(200))
    assert {json.loads(event)["mechanism"] for event in ledger.counts()} == {"gaussian"}
    twice = epsilon([(gaussian(NOISE), 2)], 1e-5)
    assert epsilon(ledger.counts(), 1e-5) == pytest.approx(twice, rel=1e-9)


def test_a_draw_beyond_the_cap_is_cut_and_charged_as_truncated(ledger: Ledger) -> None:
    terms = replace(TERMS, stage="cut", sampling="truncated_poisson", max_batch_size=15)
    private = mechanism(plan(ledger, terms), terms)
    charges = [private.charge(step) for step in range(4)]
    assert max(len(private.draw(charge)) for charge in charges) == 15
    assert {charge.event["mechanism"] for charge in charges} == {"truncated_poisson_sampled_gaussian"}


# --- users ---


def test_a_users_records_stand_together_in_the_slots_and_users_are_the_units(tmp_path: Path) -> None:
    sizes = np.arange(50) % 5 + 1
    unit_of = np.random.default_rng(0).permutation(np.repeat(np.arange(50), sizes))
    terms = replace(TERMS, unit="user", max_records=3, num_units=50, expected_batch_size=10)
    with plan(open_ledger(tmp_path / "users.jsonl", unit="user"), terms) as ledger:
        private = mechanism(ledger, terms, unit_of=unit_of)
        assert ledger.planned(terms.stage)["event"]["sampling_rate"] == 10 / 50  # type: ignore[index]
        charge = private.charge(0)
        slots = private.draw(charge)
    assert slots.shape[1] == 3 and len(slots) > 0
    users = [{int(unit_of[record]) for record in row if record >= 0} for row in slots]
    assert all(len(of_row) == 1 for of_row in users)
    drawn = [of_row.pop() for of_row in users]
    assert drawn == sorted(set(drawn))
    assert (slots >= 0).sum(1).tolist() == [min(3, int(sizes[user])) for user in drawn]
    chosen = slots[slots >= 0].tolist()
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("unit", "unit_of"), [("user", None), ("record", np.zeros(200, np.int64))])
def test_users_without_their_records_and_records_with_users_are_refused(
    ledger: Ledger, unit: Any, unit_of: Any
) -> None:
    with pytest.raises(ValueError, match=f"the unit is a {unit}: give unit_of"):
        mechanism(ledger, replace(TERMS, unit=unit), unit_of=unit_of)


# --- correlated noise ---

BANDED = replace(TERMS, stage="banded", bands=3, steps=9, target_epsilon=20.0, **SAMPLING["cyclic_poisson"])


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def test_banded_noise_is_taken_back_within_a_run_and_begins_anew_after_a_restart(ledger: Ledger) -> None:
    private = mechanism(plan(ledger, BANDED), BANDED)
    before = [noise_of(private, step, 40_000) for step in range(3)]
    assert correlation(before[0], before[1]) < -0.3
    resumed = mechanism(ledger, BANDED)
    after = [noise_of(resumed, step, 40_000) for step in (2, 3)]
    for earlier in before:
        assert abs(correlation(earlier, after[0])) < 0.02
        assert abs(correlation(earlier, after[1])) < 0.02
    assert correlation(after[0], after[1]) < -0.3
    assert after[0].std().item() == pytest.approx(before[0].std().item(), rel=0.02)  # a first step's: no history


@pytest.mark.parametrize("changes", [{"sampling": "poisson"}, {"sampling": "cyclic_poisson", "cycle": 2}])
def test_noise_correlated_over_more_steps_than_a_unit_stays_away_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bands is 3 and cycle"):
        replace(TERMS, bands=3, **changes)


@pytest.mark.parametrize(
    ("terms", "goes_on"),
    [
        (TERMS, True),
        (replace(TERMS, **SAMPLING["cyclic_poisson"]), True),
        (replace(TERMS, **SAMPLING["shuffled"]), False),
        (replace(BANDED, stage=TERMS.stage), False),
    ],
    ids=["poisson", "cyclic", "shuffled", "banded"],
)
def test_after_a_change_of_key_only_steps_that_stand_alone_go_on(tmp_path: Path, terms: Terms, goes_on: bool) -> None:
    path, new = tmp_path / "ledger.jsonl", bytes(reversed(range(32)))
    terms = replace(terms, target_epsilon=20.0)
    with plan(open_ledger(path), terms) as ledger:
        before = noise_of(mechanism(ledger, terms), 0)
        ledger.rotate(signing_seed(new))
    with open_ledger(path, signing_seed=signing_seed(new)) as ledger:
        if goes_on:
            resumed = mechanism(ledger, terms, new)
            assert not torch.equal(noise_of(resumed, 0), before)
            assert attempts(ledger) == {0: 2}
        else:
            with pytest.raises(LedgerError, match="was rotated since run/finetune_dp began"):
                mechanism(ledger, terms, new)


def test_the_noise_generator_is_the_one_the_terms_promise(ledger: Ledger) -> None:
    chacha, philox = (mechanism(ledger, replace(TERMS, secure_noise=secure)) for secure in (True, False))
    kinds = {private._scalar_noise.generator for private in (chacha, philox)}  # pyright: ignore[reportPrivateUsage]
    assert kinds == {"chacha20", "philox"}
    assert isinstance(chacha._gradient_noise, GaussianNoise)  # pyright: ignore[reportPrivateUsage]
