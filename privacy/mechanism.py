"""The private step's mechanism: what is drawn, what it costs, which noise it gets, and the order in which that happens.

For each step: the charge is durable in the ledger; then units are drawn; then clipped gradients and losses are summed;
then noise is drawn for this very attempt; then the charge is marked done. Sampling, noise, accounting and ledger know
nothing of each other: here they meet.

One event covers both things a step releases, the noised gradient and the noised loss: scaled by their bounds they are
one Gaussian release with 1/sigma^2 = 1/sigma_gradient^2 + 1/sigma_loss^2.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.accounting import calibrate_noise, epsilon, max_charges
from privacy.ledger import Charge, Ledger
from privacy.noise import GaussianNoise
from privacy.sampling import PoissonSampler
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
    num_units: int
    expected_batch_size: int
    max_grad_norm: float
    loss_bound: float
    loss_share: float  # the share of 1/sigma^2 that buys the loss curve
    target_epsilon: float
    delta: float
    dataset_cap: float | None
    secure_noise: bool
    operator_metrics: bool

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.num_units

    @property
    def max_charges(self) -> int:
        """Attempts the noise is calibrated for."""
        return self.steps + self.replay_steps

    @property
    def allowed_epsilon(self) -> float:
        """The epsilon that everything charged to this data set, by all runs and stages, may reach."""
        return min(self.target_epsilon, self.dataset_cap or self.target_epsilon)


class OwnedShard(Protocol):
    """A flat range of one parameter (`train.parallel.Shard`)."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...


class Mechanism:
    """Poisson-sampled Gaussian mechanism over a ledger that rank 0 writes and every rank obeys.

    `ledger` is rank 0's, None elsewhere; `broadcast` hands every rank the value that rank 0 gives it.
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
    ) -> None:
        if terms.expected_batch_size > terms.num_units:
            raise ValueError(
                f"train.batch_size is {terms.expected_batch_size}, but the private data set has {terms.num_units} "
                "units: the expected batch cannot exceed it"
            )
        self.terms, self._ledger, self._broadcast, self._code_version = terms, ledger, broadcast, code_version
        plan: dict[str, Any] = self._on_rank_0(lambda ledger: self._plan(ledger, config_sha256))
        self.event: dict[str, Any] = plan["event"]
        self.noise_multiplier: float = self.event["noise_multiplier"]
        self.gradient_multiplier = self.noise_multiplier / (1.0 - terms.loss_share) ** 0.5
        self.loss_multiplier = self.noise_multiplier / terms.loss_share**0.5
        self._charges_left: int = self._on_rank_0(self._affordable)
        # The ledger's id is in every key: only within one ledger are (stage, step, attempt) unique.
        ledger_id: str = self._on_rank_0(lambda ledger: ledger.ledger_id)
        sampling_key, noise_key, self._digest_key = (
            derive(master_secret, purpose, ledger_id) for purpose in ("sampling", "noise", "ledger-digest")
        )
        self._sampler = PoissonSampler(sampling_key, terms.stage, terms.num_units, terms.sampling_rate)
        self._noise = GaussianNoise(noise_key, terms.stage, "chacha20" if terms.secure_noise else "philox")

    def _plan(self, ledger: Ledger, config_sha256: str) -> dict[str, Any]:
        """The stage's plan: the ledger's on a resume, or else calibrated from the budget that is left."""
        terms = self.terms
        found = ledger.planned(terms.stage)
        if found is None:
            event = {
                "mechanism": "poisson_sampled_gaussian",
                "sampling_rate": terms.sampling_rate,
                "noise_multiplier": calibrate_noise(
                    terms.allowed_epsilon, terms.delta, terms.sampling_rate, terms.max_charges, ledger.counts()
                ),
            }
        else:
            event = found["event"]
        return ledger.plan(
            terms.stage,
            steps=terms.steps,
            replay_steps=terms.replay_steps,
            event=event,
            max_grad_norm=terms.max_grad_norm,
            loss_bound=terms.loss_bound,
            loss_share=terms.loss_share,
            expected_batch_size=terms.expected_batch_size,
            target_epsilon=terms.target_epsilon,
            secure_noise=terms.secure_noise,
            operator_metrics=terms.operator_metrics,
            config_sha256=config_sha256,
            code_version=self._code_version,
        )

    def _affordable(self, ledger: Ledger) -> int:
        """How many more attempts fit under the allowed epsilon, as far as the plan goes."""
        planned = max(0, self.terms.max_charges - ledger.num_charges_of(self.terms.stage))
        return max_charges(self.event, self.terms.allowed_epsilon, self.terms.delta, ledger.counts(), limit=planned)

    def charge(self, step: int) -> Charge:
        """Charge one attempt at `step`, durably, before anything of it is drawn or computed; the same on every rank.

        Raises BudgetExhausted, with nothing charged, where the attempt would pass the allowed epsilon.
        """
        if self._charges_left <= 0:
            raise BudgetExhausted(
                f"step {step} of {self.terms.stage} would pass epsilon {self.terms.allowed_epsilon:g} at delta "
                f"{self.terms.delta:g}: stop here, or in another run raise privacy.target_epsilon or replay_steps"
            )
        charge: Charge = self._on_rank_0(
            lambda ledger: ledger.charge(self.terms.stage, step, self.event, self._code_version)
        )
        self._charges_left -= 1
        return charge

    def draw(self, charge: Charge) -> NDArray[np.int64]:
        """The units of this attempt, ascending: each is in with probability `sampling_rate`, independently."""
        return self._sampler.draw(charge.step, charge.attempt)

    def privatise(self, charge: Charge) -> Callable[[OwnedShard, Tensor], None]:
        """What each owned shard of the clipped, reduced sum gets: this attempt's noise and the fixed divisor."""
        std = self.gradient_multiplier * self.terms.max_grad_norm

        def add_noise(shard: OwnedShard, gradient: Tensor) -> None:
            self._noise.add_(
                gradient, name=shard.name, offset=shard.offset, step=charge.step, attempt=charge.attempt, std=std
            )
            gradient.div_(self.terms.expected_batch_size)

        return add_noise

    def clip_losses(self, losses_B: Tensor, present_B: Tensor) -> Tensor:
        """Sum of the present records' losses, each clipped to [0, loss_bound]; what is not finite counts as zero."""
        finite_B = torch.where(present_B & torch.isfinite(losses_B), losses_B, torch.zeros_like(losses_B))
        return finite_B.clamp(0.0, self.terms.loss_bound).sum()

    def release_loss(self, clipped_sum: Tensor, charge: Charge) -> float:
        """The noised mean loss of the attempt, from the sum over all ranks; already paid for by the charge."""
        noised = clipped_sum.detach().reshape(1).double().cpu()
        std = self.loss_multiplier * self.terms.loss_bound
        self._noise.add_(noised, name="released loss", offset=0, step=charge.step, attempt=charge.attempt, std=std)
        return float(noised) / self.terms.expected_batch_size

    def done(self, charge: Charge, record_digests: Sequence[str]) -> None:
        """Mark the charge as used, with a keyed digest of the records that went in (a plain one could be guessed)."""
        if self._ledger is not None:
            keyed = hmac.new(self._digest_key, "\n".join(record_digests).encode(), hashlib.sha256)
            self._ledger.done(charge, f"hmac-sha256:{keyed.hexdigest()}")

    def spent(self) -> float:
        """Epsilon, at the terms' delta, of everything the ledger holds; 0 on ranks that hold no ledger."""
        return 0.0 if self._ledger is None else epsilon(self._ledger.counts(), self.terms.delta)

    def summary(self) -> dict[str, Any]:
        """What a manifest says of the promise: on rank 0, empty elsewhere."""
        if self._ledger is None:
            return {}
        return {
            "target_epsilon": self.terms.target_epsilon,
            "delta": self.terms.delta,
            "epsilon": self.spent(),
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.terms.sampling_rate,
            "max_grad_norm": self.terms.max_grad_norm,
        }

    @property
    def head(self) -> str | None:
        """The ledger's head, on rank 0; None elsewhere."""
        return None if self._ledger is None else self._ledger.head

    def statement(self) -> dict[str, Any] | None:
        """Where the ledger stands: path, head, number of charges, and the stage's name in it; None but on rank 0."""
        if self._ledger is None:
            return None
        return {
            "path": str(self._ledger.path),
            "head": self._ledger.head,
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
