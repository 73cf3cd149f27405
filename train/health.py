"""Bad steps: a loss or a weight that is not finite, or a loss spike. Seen, named, and answered by policy.

A bad step ends the process group before anything of it is saved; the launch starts it again from the newest good save,
and `supervision.bad_steps` says what comes then:

    stop     nothing: a person must look (the default)
    replay   the step runs again, on the same records in a public stage and on a fresh draw in a private one; a step
             that is bad twice stops the stage
    skip     public stages only: the step is left out, its records unused; the checkpoint and the manifest say which

What is judged is public: in a private stage the released, noised loss and weights that carry their noise already.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.sharded import Checkpoint
from train.config import TrainStage
from train.parallel import Backend, World

BAD_STEPS = "bad_steps.jsonl"
_FEWEST_LOSSES = 10  # a median of fewer says little


class BadStep(Exception):
    """The step is noted in the stage's folder; a new process group goes on from the newest save."""


class BadStepsEndTheStage(ValueError):
    """The step is noted, and a person must look."""


class Health:
    """Judges each step's loss, and the weights before each save; the same verdict on every rank."""

    def __init__(self, stage: TrainStage, folder: Path, world: World, resumed: Checkpoint | None) -> None:
        """resumed: the save that the stage goes on from, with what `state` said when it was taken."""
        state = None if resumed is None else resumed.state
        self.stage, self.world = stage, world
        self.path = folder / BAD_STEPS
        self.policy, self.spike = stage.supervision.bad_steps, stage.supervision.spike
        self.recent = deque[float](state["recent_losses"] if state else (), maxlen=stage.supervision.spike_window)
        noted: list[dict[str, Any]] = world.broadcast(read_bad_steps(folder))
        self._noted = frozenset(entry["step"] for entry in noted if entry["exact"])
        # Weights are looked at before saves only; up to one that was bad, at every step, to find the step at fault.
        self._watched = max((entry["step"] for entry in noted if not entry["exact"]), default=-1)
        self._judged = -1 if resumed is None else resumed.step - 1  # what is saved was found fit
        self.skipped: list[int] = list(state["skipped_steps"]) if state else []

    def skips(self, step: int) -> bool:
        """Whether the step is to be left out; it is then counted among `skipped`."""
        if self.policy != "skip" or step not in self._noted:
            return False
        self.skipped.append(step)
        return True

    def state(self) -> dict[str, Any]:
        """For the checkpoint: what the verdicts to come depend on."""
        return {"recent_losses": list(self.recent), "skipped_steps": self.skipped}

    def judge_loss(self, step: int, loss: float, mine: float | None = None) -> None:
        """Raise BadStep (or BadStepsEndTheStage, by policy) unless `loss`, the same on every rank, is fit.

        mine: this rank's part of a public loss, so that the ranks at fault can be named.
        """
        if math.isfinite(loss):
            if not self._spikes(loss):
                self.recent.append(loss)
                return
            what = f"loss {loss:.4g}, over {self.spike:g} times the median {statistics.median(self.recent):.4g}"
        else:
            what = f"loss {loss}"
            if mine is not None:
                parts = self.world.gather(mine)
                what += f", from rank {_listed([r for r, part in enumerate(parts) if not math.isfinite(part)])}"
        self._bad(step, what)

    def judge_weights(self, step: int, backend: Backend, *, saving: bool) -> None:
        """The same for the weights that the step left behind, which must not reach a save."""
        if not saving and step > self._watched:
            return
        exact, self._judged = self._judged == step - 1, step
        # one sum a shard: it is finite only if every element is
        mine = [s.name for s in backend.shards if not bool(torch.isfinite(s.value.sum(dtype=torch.float64)))]
        if not self.world.any(bool(mine)):
            return
        by_rank = {rank: names for rank, names in enumerate(self.world.gather(mine)) if names}
        names = list(dict.fromkeys(name for names in by_rank.values() for name in names))
        self._bad(step, f"weights not finite in {_listed(names)} (rank {_listed(list(by_rank))})", exact=exact)

    def _spikes(self, loss: float) -> bool:
        if self.spike is None or len(self.recent) < _FEWEST_LOSSES:
            return False
        return loss > self.spike * statistics.median(self.recent)

    def _bad(self, step: int, what: str, *, exact: bool = True) -> None:
        if self.world.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "exact": exact, "what": what, "policy": self.policy}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        found = f"step {step} of {self.stage.name} is bad: {what}"
        if self.policy == "stop":
            raise BadStepsEndTheStage(
                f"{found}. Lower optim.learning_rate or raise optim.warmup_steps, or let supervision.bad_steps replay "
                f"it{'' if self.stage.kind == 'finetune_dp' else ' or skip it'}; saves from before it are good"
            )
        if step in self._noted:
            raise BadStepsEndTheStage(f"{found}, and it was before ({self.path}): running it again does not help")
        raise BadStep(f"{found}; going on from the newest save, to {self.policy} it")


def read_bad_steps(folder: Path) -> list[dict[str, Any]]:
    """What was noted of bad steps in a stage's folder, in order; a line torn by a crash is left out."""
    path = folder / BAD_STEPS
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _listed(values: Sequence[object], most: int = 3) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
