"""The private step's mechanism: what is drawn, what it costs, which noise it gets, and the order in which that happens.

For each step: the charge is durable in the ledger; then units are drawn; then clipped gradients and losses are summed;
then noise is drawn for this very attempt; then the charge is marked done. Sampling, noise, accounting and ledger know
nothing of each other: here they meet.

One event covers all that a step releases: the noised gradient, the noised loss and, where clipping bounds adapt, the
noised counts that move them. Scaled by their bounds they are one Gaussian release, with
1/sigma^2 = 1/sigma_gradient^2 + 1/sigma_loss^2 + 1/sigma_counts^2.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.noisy_adamw import Noise
from privacy.accounting import EpsilonCurve, Spent, calibrate_noise, epsilon, max_steps
from privacy.ledger import Charge, Ledger, LedgerError
from privacy.noise import BandedNoise, GaussianNoise, rounding_sensitivity
from privacy.sampling import Method, Sampler, ShuffledSampler, UserRecords, make_sampler
from privacy.secrets import derive

T = TypeVar("T")


class BudgetExhausted(ValueError):
    """The next step would pass the epsilon allowed on this data set: it was neither charged nor run."""


@dataclass(frozen=True)
class Terms:
    """What a private stage promises and how it spends it; from its configuration and the size of its data set."""

    stage: str
    steps: int
    replay_steps: int  # charges kept back for steps that run again after a restart
    charge_ahead: int  # steps charged at once: a crash wastes at most these
    unit: Literal["record", "user"]
    max_records: int  # of one unit in a step
    num_units: int
    expected_batch_size: int  # units
    sampling: Method
    max_batch_size: int | None
    cycle: int | None
    bands: int  # of correlated noise; 1 for independent
    clipping: str
    max_grad_norm: float
    loss_bound: float
    loss_share: float  # the share of 1/sigma^2 that buys the loss curve
    counts_share: float  # and the share that buys adaptive clipping bounds; 0 where they are fixed
    target_epsilon: float
    delta: float
    dataset_cap: float | None
    secure_noise: bool
    operator_metrics: bool

    def __post_init__(self) -> None:
        if self.bands > (self.cycle or 1):
            raise ValueError(
                f"bands is {self.bands} and cycle {self.cycle}: a unit must stay away for as many steps as noise is "
                "correlated over, so sample by cyclic_poisson with a cycle no shorter"
            )

    def sampler(self, key: bytes) -> Sampler:
        """The draws under a key; events and costs do not depend on it."""
        return make_sampler(
            self.sampling,
            key,
            self.stage,
            self.num_units,
            self.expected_batch_size,
            max_batch_size=self.max_batch_size,
            cycle=self.cycle,
        )

    @property
    def max_charges(self) -> int:
        """Attempts the noise is calibrated for."""
        return self.steps + self.replay_steps

    @property
    def allowed_epsilon(self) -> float:
        """The epsilon that everything charged to this data set, by all runs and stages, may reach."""
        return min(self.target_epsilon, self.dataset_cap or self.target_epsilon)

    def calibrate(self, spent: Spent = ()) -> float:
        """The noise multiplier at which all steps and replays fit under the allowed epsilon, after what is spent.

        Where batches are Poisson draws of all units, any replays; else those of one restart, wherever it falls: where
        several restarts run one part again, the budget may end before the run.
        """
        sampler = self.sampler(bytes(32))
        # Where one stretch of replays costs most: at the fullest parts of a cycle, and across the ends of most epochs.
        first = 0
        if isinstance(sampler, ShuffledSampler):
            first = max(0, min(sampler.steps_per_epoch - 1, self.steps - self.replay_steps))

        def planned(noise: float) -> list[tuple[dict[str, Any], int]]:
            return sampler.planned(0, self.steps, noise) + sampler.planned(first, self.replay_steps, noise)

        return calibrate_noise(self.allowed_epsilon, self.delta, planned, spent)


class OwnedShard(Protocol):
    """A flat range of one parameter (`train.parallel.Shard`)."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...


@dataclass(frozen=True)
class Release:
    """What each owned shard of one attempt's clipped, reduced sum gets: its noise, and the fixed divisor."""

    charge: Charge
    std: float
    divisor: int
    _noise: GaussianNoise | BandedNoise

    def __call__(self, shard: OwnedShard, gradient: Tensor) -> None:
        """Both, in place, on the CPU, wherever the shard lies."""
        self._noise.add_(
            gradient,
            name=shard.name,
            offset=shard.offset,
            step=self.charge.step,
            attempt=self.charge.attempt,
            std=self.std,
        )
        gradient.div_(self.divisor)

    def for_kernels(self, shards: Sequence[OwnedShard]) -> Noise | None:
        """The same noise for `kernels.noisy_adamw`, or None: what has a history, or is Philox, is made on the CPU."""
        if isinstance(self._noise, BandedNoise):
            return None
        places = [(shard.name, shard.offset) for shard in shards]
        return self._noise.for_kernels(places, step=self.charge.step, attempt=self.charge.attempt, std=self.std)


class Mechanism:
    """A Gaussian mechanism on sampled batches, over a ledger that rank 0 writes and every rank obeys.

    `ledger` is rank 0's, None elsewhere; `broadcast` hands every rank the value that rank 0 gives it. `unit_of` gives
    the unit of each record, int64 (records,), where a unit is a user.
    """

    def __init__(
        self,
        terms: Terms,
        master_secret: bytes,
        ledger: Ledger | None,
        broadcast: Callable[[Any], Any],
        *,
        code_version: str,
        config_sha256: str,
        operational: Sequence[str] = (),
        shards_root: str | None = None,
        unit_of: NDArray[np.int64] | None = None,
    ) -> None:
        if terms.expected_batch_size > terms.num_units:
            raise ValueError(
                f"train.batch_size is {terms.expected_batch_size}, but the private data set has {terms.num_units} "
                "units: the expected batch cannot exceed it"
            )
        if (unit_of is not None) != (terms.unit == "user"):
            raise ValueError(
                f"the unit is a {terms.unit}: give unit_of, the user of each record, for users and only then"
            )
        self.terms, self._ledger, self._broadcast, self._code_version = terms, ledger, broadcast, code_version
        # The ledger's id is in every key: only within one ledger are (stage, step, attempt) unique.
        ledger_id: str = self._on_rank_0(lambda ledger: ledger.ledger_id)
        sampling_key, noise_key, self._digest_key = (
            derive(master_secret, purpose, ledger_id) for purpose in ("sampling", "noise", "ledger-digest")
        )
        self._sampler = terms.sampler(sampling_key)
        self._users = None
        if unit_of is not None:
            self._users = UserRecords(sampling_key, terms.stage, unit_of, terms.max_records)
        recorded: dict[str, Any] = {"config_sha256": config_sha256, "code_version": code_version}
        recorded |= {"operational": list(operational), "shards_root": shards_root}
        plan: dict[str, Any] = self._on_rank_0(lambda ledger: self._plan(ledger, recorded))
        self.noise_multiplier: float = plan["event"]["noise_multiplier"]
        self.gradient_multiplier = self.noise_multiplier / (1.0 - terms.loss_share - terms.counts_share) ** 0.5
        self._scalar_noise = GaussianNoise(noise_key, terms.stage, "chacha20" if terms.secure_noise else "philox")
        self._gradient_noise = BandedNoise(self._scalar_noise, terms.bands) if terms.bands > 1 else self._scalar_noise
        self._charged: deque[Charge] = deque()  # ahead of their steps
        self._next_step: int | None = None  # any may be the first
        self._affordable = 0  # steps, of those that follow on the ones charged
        self._charges_seen: int | None = None  # in the ledger, when that was last known
        self._curve: EpsilonCurve | None = None
        self._num_charged = 0  # since the curve began

    def _plan(self, ledger: Ledger, recorded: dict[str, Any]) -> dict[str, Any]:
        """The stage's plan: the ledger's on a resume, or else calibrated from the budget that is left."""
        terms = self.terms
        found = ledger.planned(terms.stage)
        needs_its_key = terms.sampling == "shuffled" or terms.bands > 1
        if found is not None and needs_its_key and ledger.rotated_since_plan(terms.stage):
            raise LedgerError(
                f"the key of {ledger.path} was rotated since {terms.stage} began, and under another key its epochs or "
                "its correlated noise would begin anew: run it as another stage, or in another run"
            )
        shards_root = recorded["shards_root"]
        if found is not None and found.get("shards_root", shards_root) != shards_root:  # older plans have none
            raise LedgerError(
                f"stage {terms.stage} was planned in {ledger.path} over filtered shards of Merkle root "
                f"{found['shards_root']}, and now reads those of {shards_root}: put them back, or begin another run"
            )
        event = found["event"] if found else self._sampler.event(0, terms.calibrate(ledger.counts()))
        promised = {
            name: value for name, value in asdict(terms).items() if name not in ("stage", "steps", "delta", "unit")
        }
        return ledger.plan(terms.stage, steps=terms.steps, event=event, **promised, **recorded)

    def charge(self, step: int) -> Charge:
        """Charge one attempt at `step`, durably, before anything of it is drawn or computed; the same on every rank.

        Raises BudgetExhausted, with nothing charged, where the attempt would pass the allowed epsilon.
        Steps follow each other: one that runs again, after a restart, is charged by a new object.
        """
        if self._next_step is not None and step != self._next_step:
            raise ValueError(
                f"step {step} of {self.terms.stage} does not follow on step {self._next_step - 1}: to run a step again "
                "or to skip one, begin with a new Mechanism"
            )
        if not self._charged:
            self._charged.extend(self._on_rank_0(lambda ledger: self._charge_ahead(ledger, step)))
        self._next_step = step + 1
        return self._charged.popleft()

    def _charge_ahead(self, ledger: Ledger, step: int) -> list[Charge]:
        terms, sampler, noise = self.terms, self._sampler, self.noise_multiplier
        if ledger.num_charges != self._charges_seen:  # at first, and where another stage charged the same open ledger
            self._look_ahead(ledger, step)
        number = min(terms.charge_ahead, self._affordable, terms.steps - step)
        if number <= 0:
            raise BudgetExhausted(
                f"step {step} of {terms.stage} would pass epsilon {terms.allowed_epsilon:g} at delta "
                f"{terms.delta:g}: stop here, or in another run raise privacy.target_epsilon or replay_steps"
            )
        steps = [(ahead, sampler.event(ahead, noise)) for ahead in range(step, step + number)]
        charges = ledger.charge_ahead(terms.stage, steps, self._code_version)
        self._affordable -= number
        self._num_charged += number
        self._charges_seen = ledger.num_charges
        return charges

    def _look_ahead(self, ledger: Ledger, step: int) -> None:
        """Ask the accountant, once for all steps from `step` on: a query takes as long as a step or longer."""
        terms, spent = self.terms, ledger.counts()

        def planned(num_steps: int) -> list[tuple[dict[str, Any], int]]:
            return self._sampler.planned(step, num_steps, self.noise_multiplier)

        left = max(0, terms.max_charges - ledger.num_charges_of(terms.stage))
        self._affordable = max_steps(planned, terms.allowed_epsilon, terms.delta, spent, limit=left)
        self._curve, self._num_charged = EpsilonCurve(planned, terms.delta, spent, limit=self._affordable), 0

    def draw(self, charge: Charge) -> NDArray[np.int64]:
        """The records of this attempt's units, (units, most records of a unit), -1 where a unit has fewer.

        Units are ascending and a unit's records stand together; the same on every rank.
        """
        units = self._sampler.draw(charge.step, charge.attempt)
        if self._users is None:
            return units[:, None]
        return self._users.draw(units, charge.step, charge.attempt)

    def privatise(self, charge: Charge, num_elements: int) -> Callable[[OwnedShard, Tensor], None]:
        """A `Release`: what each owned shard of the clipped, reduced sum gets.

        num_elements: of the whole sum; rounding it to the noise's grid adds to its sensitivity.
        """
        terms = self.terms
        std = self.gradient_multiplier * terms.max_grad_norm
        std += self.gradient_multiplier * rounding_sensitivity(num_elements, 2 * std, terms.bands)
        return Release(charge, std, terms.expected_batch_size, self._gradient_noise)

    def clip_losses(self, losses_B: Tensor, present_B: Tensor) -> Tensor:
        """Sum of the present units' losses, each clipped to [0, loss_bound]; what is not finite counts as zero.

        In float64: one loss more would move an fp32 sum by the rounding of all the others too.
        """
        finite_B = torch.where(present_B & torch.isfinite(losses_B), losses_B, 0.0).double()
        return finite_B.clamp(0.0, self.terms.loss_bound).sum()

    def release_loss(self, clipped_sum: Tensor, charge: Charge) -> float:
        """The noised mean loss of the attempt, from the sum over all ranks; already paid for by the charge."""
        std = self.noise_multiplier / self.terms.loss_share**0.5 * self.terms.loss_bound
        (noised,) = self._release("released loss", clipped_sum.reshape(1), std, charge)
        return noised / self.terms.expected_batch_size

    def release_counts(self, counts: Tensor, charge: Charge) -> list[float]:
        """Noised counts (K,), each moved by at most 1/2 by one unit, summed over all ranks; paid for by the charge."""
        std = self.noise_multiplier / self.terms.counts_share**0.5 * len(counts) ** 0.5 / 2
        return self._release("released counts", counts, std, charge)

    def _release(self, name: str, values: Tensor, std: float, charge: Charge) -> list[float]:
        noised = values.detach().double().cpu()
        self._scalar_noise.add_(noised, name=name, offset=0, step=charge.step, attempt=charge.attempt, std=std)
        return [float(value) for value in noised]

    def done(self, charge: Charge, record_digests: Sequence[str]) -> None:
        """Mark the charge as used, with a keyed digest of the records that went in (a plain one could be guessed)."""
        if self._ledger is not None:
            keyed = hmac.new(self._digest_key, "\n".join(record_digests).encode(), hashlib.sha256)
            self._ledger.done(charge, f"hmac-sha256:{keyed.hexdigest()}")

    def spent(self) -> float:
        """Epsilon, at the terms' delta, of all that is charged; a close upper bound. 0 on ranks without a ledger."""
        return 0.0 if self._curve is None else self._curve(self._num_charged)

    def summary(self) -> dict[str, Any]:
        """What a manifest says of the promise: on rank 0, empty elsewhere."""
        if self._ledger is None:
            return {}
        return {
            "target_epsilon": self.terms.target_epsilon,
            "delta": self.terms.delta,
            "epsilon": epsilon(self._ledger.counts(), self.terms.delta),
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.terms.sampling,
            "expected_batch_size": self.terms.expected_batch_size,
            "num_units": self.terms.num_units,
            "max_grad_norm": self.terms.max_grad_norm,
        }

    @property
    def head(self) -> str | None:
        """The ledger's head, made durable, on rank 0; None elsewhere."""
        if self._ledger is None:
            return None
        self._ledger.sync()
        return self._ledger.head

    def statement(self) -> dict[str, Any] | None:
        """Where the ledger stands: path, head, number of charges, and the stage's name in it; None but on rank 0."""
        if self._ledger is None:
            return None
        return {
            "path": str(self._ledger.path),
            "head": self.head,
            "public_key": self._ledger.public_key,
            "charges": self._ledger.num_charges,
            "stage": self.terms.stage,
        }

    def _on_rank_0(self, act: Callable[[Ledger], T]) -> T:
        """Let rank 0 act on the ledger and every rank have the result, or the error."""
        result: T | None = None
        error: Exception | None = None
        if self._ledger is not None:
            try:
                result = act(self._ledger)
            except Exception as raised:  # handed to every rank, which raise it together
                error = raised
        result, error = self._broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
