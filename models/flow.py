"""Diffusion objectives and samplers: what a model is trained to predict at time t, and how an image comes of it.

Time runs from 0 (data) to 1 (noise) on a path x_t = alpha(t) x0 + sigma(t) e:

- `flow`: alpha = 1 - t, sigma = t; the target is the velocity e - x0 (Lipman et al. 2023; Liu et al. 2023);
- `x0`: the same path; the target is x0, which a small model of large patches learns with less, for images lie in few
  dimensions and noise in all (Li & He 2025, arXiv:2511.13720);
- `epsilon` and `v`: alpha = cos(pi t / 2), sigma = sin(pi t / 2); the target is e, or alpha e - sigma x0
  (Ho et al. 2020; Salimans & Ho 2022).

Everything here is a pure function: randomness comes in as an argument, and no record touches another's result.
"""

# B records; x, noise and predictions are [B, ...], of any shape after the record

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, ...], t in [0, 1] [B], labels int64 [B]) -> prediction [B, ...]: a `DiT`, wrapped or not."""

Sampler = Literal["euler", "heun", "ddim"]

# Where epsilon sampling starts: at t = 1 the prediction says nothing of x0, and near it its errors reach x0 times
# 1 / alpha, 13 at t = 0.95 and 64 at t = 0.99. Stable Diffusion's last step has about this alpha, 0.07.
EPSILON_START = 0.95


class Objective(BaseModel):
    """What the model predicts, and how its training times are spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prediction: Literal["flow", "x0", "epsilon", "v"] = "flow"
    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"

    def sample_timesteps(self, u_B: Tensor) -> Tensor:
        """Turn uniforms in [0, 1] into times in [0, 1]; `logit_normal` is the sigmoid of a standard normal.

        Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", Eq. 19 with m = 0, s = 1.
        """
        return u_B if self.timesteps == "uniform" else torch.sigmoid(torch.special.ndtri(u_B))

    def losses(self, model: Model, x0: Tensor, y_B: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
        """Each record's squared error, averaged over its elements: fp32 [B].

        Guarantee: loss i depends on record i alone (its x0, label, time and noise).
        """
        # fp32 even where the model computes in bf16: the path and the error keep their precision
        x0, noise, t_B = x0.float(), noise.float(), t_B.float()
        x_t, target = self.noised(x0, noise, t_B.view(-1, *[1] * (x0.ndim - 1)))
        prediction = model(x_t, t_B, y_B).float()
        return (prediction - target).square().flatten(1).mean(1)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and what the model is to predict of it; `t` broadcasts."""
        alpha, sigma = self.path(t)
        targets = {"flow": noise - x0, "x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}
        return alpha * x0 + sigma * noise, targets[self.prediction]

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t)."""
        if self.prediction in ("flow", "x0"):
            return 1 - t, t
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    def data_and_noise(self, x: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The x0 and e that the prediction sees in x = alpha x0 + sigma e."""
        alpha, sigma = self.path(t)
        match self.prediction:
            case "flow":
                return x - sigma * prediction, x + alpha * prediction
            case "x0":
                return prediction, (x - alpha * prediction) / sigma
            case "epsilon":
                return (x - sigma * prediction) / alpha, prediction
            case "v":
                return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def velocity(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """dx/dt of the probability flow, alpha'(t) x0 + sigma'(t) e."""
        if self.prediction == "flow":
            return prediction
        x0, noise = self.data_and_noise(x, t, prediction)
        if self.prediction == "x0":
            return noise - x0
        alpha, sigma = self.path(t)
        return math.pi / 2 * (alpha * noise - sigma * x0)


def drop_labels(y_B: Tensor, u_B: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace by `null_class` the labels of the records whose uniform in [0, 1) lies under `probability`."""
    return torch.where(u_B < probability, null_class, y_B)


@torch.no_grad()
def sample(
    model: Model,
    objective: Objective,
    noise: Tensor,
    labels_B: Tensor,
    *,
    sampler: Sampler = "euler",
    steps: int = 50,
    guidance: float = 1.0,
    null_class: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Carry standard normal noise [B, ...] to data along `steps` equal steps of time; fp32, about [-1, 1], unclamped.

    The model sees times above 0 only, as fp32 [B]: `euler` and `ddim` call it once a step, `heun` twice but for the
    last step. Under `guidance` w it is called with 2B records, labels then `null_class`, and the prediction is
    null + w (labelled - null). `progress` is called with (steps done, steps) after each step.
    Source: Euler and Heun as in Karras et al. 2022, Alg. 1; DDIM with eta = 0, Song et al. 2021, Eq. 12; guidance, Ho &
    Salimans 2022.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler is {sampler!r}: choose one of {', '.join(get_args(Sampler))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: a sampler needs at least 1")
    if guidance != 1 and null_class is None:
        raise ValueError(f"guidance is {guidance}, which needs null_class: the model's label for no class")
    guided = model if null_class is None or guidance == 1 else _guide(model, guidance, null_class)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return guided(x, t.expand(len(x)), labels_B).float()

    x = noise.float()
    start = EPSILON_START if objective.prediction == "epsilon" else 1.0
    times = torch.linspace(start, 0, steps + 1, device=x.device)
    for done, (t, t_next) in enumerate(pairwise(times), start=1):
        prediction = predict(x, t)
        if sampler == "ddim":
            x0, e = objective.data_and_noise(x, t, prediction)
            alpha, sigma = objective.path(t_next)
            x = alpha * x0 + sigma * e
        else:
            velocity = objective.velocity(x, t, prediction)
            if sampler == "heun" and done < steps:
                ahead = x + (t_next - t) * velocity
                velocity = (velocity + objective.velocity(ahead, t_next, predict(ahead, t_next))) / 2
            x = x + (t_next - t) * velocity
        if progress is not None:
            progress(done, steps)
    return x


def _guide(model: Model, guidance: float, null_class: int) -> Model:
    def guided(x: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        both_labels = torch.cat([y_B, torch.full_like(y_B, null_class)])
        labelled, null = model(torch.cat([x, x]), torch.cat([t_B, t_B]), both_labels).float().chunk(2)
        return null + guidance * (labelled - null)

    return guided
