import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.dit import DiT, DiTConfig
from models.flow import EPSILON_START, Model, Objective, Sampler, drop_labels, sample

PREDICTIONS = ["flow", "x0", "epsilon", "v"]
SAMPLERS = get_args(Sampler)
MEAN, STD = 0.3, 0.4


def objective(prediction: str, timesteps: str = "uniform") -> Objective:
    return Objective(prediction=prediction, timesteps=timesteps)  # type: ignore[arg-type]


def exact_gaussian_model(prediction: str, mean: float = MEAN, std: float = STD) -> Model:
    """The best possible prediction for data drawn from N(mean, std^2), elementwise, in float64."""
    path = objective(prediction).path

    def model(x: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        alpha, sigma = path(t_B.double().view(-1, *[1] * (x.ndim - 1)))
        residual = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0, noise = mean + alpha * std**2 * residual, sigma * residual
        return {"flow": noise - x0, "x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[prediction]

    return model


def exact_transport(prediction: str, noise: Tensor) -> Tensor:
    """Where the probability flow of N(MEAN, STD^2) carries each point: quantiles stay quantiles."""
    start = torch.tensor(EPSILON_START if prediction == "epsilon" else 1.0)
    alpha, sigma = objective(prediction).path(start)
    return MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def no_labels(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_path_runs_from_data_to_noise(prediction: str) -> None:
    alpha, sigma = objective(prediction).path(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_a_perfect_prediction_is_zero(prediction: str) -> None:
    x0, noise, t_B = normals(3, 2, 4, 4), normals(3, 2, 4, 4, seed=1), torch.tensor([0.1, 0.5, 0.9])
    t = t_B.view(3, 1, 1, 1)
    straight, turning = (1 - t, t), (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t))
    alpha, sigma = straight if prediction in ("flow", "x0") else turning
    target = {"flow": noise - x0, "x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[prediction]

    def perfect(x_t: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
        return target

    assert torch.equal(objective(prediction).losses(perfect, x0, no_labels(3), t_B, noise), torch.zeros(3))


def test_the_loss_is_the_mean_square_over_a_records_own_elements_in_fp32() -> None:
    x0, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)

    def model(x_t: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        return torch.tensor([1.0, 3.0], dtype=torch.bfloat16).view(2, 1, 1, 1).expand(2, 1, 2, 2)

    losses = objective("flow").losses(model, x0, no_labels(2), torch.tensor([0.5, 0.5]), noise)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_changing_a_record_changes_no_other_records_loss_by_a_bit(prediction: str) -> None:
    model = DiT(DiTConfig(width=32, depth=1, heads=2, image_size=4, channels=1, num_classes=3))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * normals(*parameter.shape, seed=index))
    x0, noise, t_B, y_B = normals(3, 1, 4, 4), normals(3, 1, 4, 4, seed=1), torch.tensor([0.2, 0.5, 0.8]), no_labels(3)
    before = objective(prediction).losses(model, x0, y_B, t_B, noise)
    x0[1], noise[1], t_B[1], y_B[1] = 5.0, -3.0, 0.99, 2
    after = objective(prediction).losses(model, x0, y_B, t_B, noise)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert before[1] != after[1]


def test_logit_normal_times_are_the_sigmoid_of_normals() -> None:
    u_B = (torch.arange(100_000) + 0.5) / 100_000
    logits = torch.logit(objective("flow", "logit_normal").sample_timesteps(u_B).double())
    assert logits.mean().item() == pytest.approx(0, abs=1e-3)
    assert logits.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_times_rise_with_their_uniforms_and_stay_in_the_unit_interval_at_its_very_ends(timesteps: str) -> None:
    t = objective("flow", timesteps).sample_timesteps(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]))
    assert t[0] == 0
    assert t[2] == 0.5
    assert t[4] == 1
    assert (t.diff() > 0).all()


def test_labels_drop_to_the_null_class_where_the_uniform_lies_under_the_probability() -> None:
    y_B, u_B = torch.tensor([3, 4, 5]), torch.tensor([0.0, 0.1, 0.9])
    assert drop_labels(y_B, u_B, 0.1, null_class=10).tolist() == [10, 4, 5]
    assert drop_labels(y_B, u_B, 0.0, null_class=10).tolist() == [3, 4, 5]
    assert drop_labels(y_B, u_B, 1.0, null_class=10).tolist() == [10, 10, 10]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_data_and_noise_are_read_back_from_a_perfect_prediction(prediction: str) -> None:
    x0, noise, t = normals(5), normals(5, seed=1), torch.tensor(0.3)
    alpha, sigma = objective(prediction).path(t)
    target = {"flow": noise - x0, "x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[prediction]
    found_x0, found_noise = objective(prediction).data_and_noise(alpha * x0 + sigma * noise, t, target)
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_noise, noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_is_the_slope_of_the_path(prediction: str) -> None:
    x0, noise, t, h = normals(5).double(), normals(5, seed=1).double(), torch.tensor(0.3).double(), 1e-6

    def at(time: Tensor) -> Tensor:
        alpha, sigma = objective(prediction).path(time)
        return alpha * x0 + sigma * noise

    alpha, sigma = objective(prediction).path(t)
    target = {"flow": noise - x0, "x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[prediction]
    velocity = objective(prediction).velocity(at(t), t, target)
    torch.testing.assert_close(velocity, (at(t + h) - at(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_samplers_converge_to_the_exact_transport_at_their_order(prediction: str, sampler: Sampler, order: int) -> None:
    noise = normals(64, 3)
    exact = exact_transport(prediction, noise)

    def error(steps: int) -> float:
        out = sample(
            exact_gaussian_model(prediction), objective(prediction), noise, no_labels(64), sampler=sampler, steps=steps
        )
        return (out - exact).abs().max().item()

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.1)
    assert error(256) < 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_turn_normals_into_the_datas_distribution(prediction: str, sampler: Sampler) -> None:
    noise = normals(20_000, 1)
    out = sample(
        exact_gaussian_model(prediction), objective(prediction), noise, no_labels(20_000), sampler=sampler, steps=100
    )
    assert out.dtype == torch.float32
    assert out.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert out.std().item() == pytest.approx(STD, abs=0.015)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_reaches_a_single_point_exactly_in_any_number_of_steps(prediction: str, steps: int) -> None:
    model = exact_gaussian_model(prediction, mean=0.3, std=0.0)
    out = sample(model, objective(prediction), normals(16, 4), no_labels(16), sampler="ddim", steps=steps)
    torch.testing.assert_close(out, torch.full((16, 4), 0.3), rtol=0, atol=2e-5)


def test_on_the_straight_path_ddim_is_euler() -> None:
    arguments: dict[str, Any] = {"noise": normals(16, 4), "labels_B": no_labels(16), "steps": 10}
    euler, ddim = (
        sample(exact_gaussian_model("flow"), objective("flow"), sampler=sampler, **arguments)
        for sampler in ("euler", "ddim")
    )
    torch.testing.assert_close(ddim, euler, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "calls"), [("euler", 5), ("ddim", 5), ("heun", 9)])
def test_the_model_is_called_at_times_above_zero_as_often_as_said(
    prediction: str, sampler: Sampler, calls: int
) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        seen.append(t_B)
        return torch.zeros_like(x)

    out = sample(model, objective(prediction), normals(3, 2), no_labels(3), sampler=sampler, steps=5)
    assert len(seen) == calls
    assert all(t_B.shape == (3,) and t_B.dtype == torch.float32 and (t_B > 0).all() for t_B in seen)
    assert seen[0][0].item() == pytest.approx(EPSILON_START if prediction == "epsilon" else 1.0)
    assert out.isfinite().all()


def test_guidance_moves_from_the_null_prediction_through_the_labelled_one_in_one_forward() -> None:
    batches: list[list[int]] = []

    def model(x: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        batches.append(y_B.tolist())
        return torch.where(y_B == 9, 1.0, 2.0)[:, None].expand_as(x)  # null predicts 1, a label 2

    noise, labels = torch.zeros(2, 3), torch.tensor([4, 5])
    out = sample(model, objective("flow"), noise, labels, steps=1, guidance=3.0, null_class=9)
    assert batches == [[4, 5, 9, 9]]
    assert torch.equal(out, torch.full((2, 3), -4.0)), "x - (1 + 3 * (2 - 1))"
    sample(model, objective("flow"), noise, labels, steps=1, guidance=1.0, null_class=9)
    assert batches[1] == [4, 5], "without guidance the null class costs nothing"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_guidance_between_equal_predictions_changes_nothing(guidance: float) -> None:
    model, noise = exact_gaussian_model("flow"), normals(4, 2)
    guided = sample(model, objective("flow"), noise, no_labels(4), steps=5, guidance=guidance, null_class=1)
    assert torch.equal(guided, sample(model, objective("flow"), noise, no_labels(4), steps=5))


def test_sampling_is_a_pure_function_of_its_noise() -> None:
    noise = normals(4, 2)
    kept = noise.clone()
    first, second = (
        sample(exact_gaussian_model("v"), objective("v"), noise, no_labels(4), sampler="heun", steps=3) for _ in "ab"
    )
    assert torch.equal(first, second)
    assert torch.equal(noise, kept)


def test_progress_is_told_after_every_step() -> None:
    told: list[tuple[int, int]] = []
    sample(
        exact_gaussian_model("flow"),
        objective("flow"),
        normals(2, 2),
        no_labels(2),
        steps=3,
        progress=lambda done, steps: told.append((done, steps)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "dpm"}, "sampler is 'dpm': choose one of euler, heun, ddim"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": 2.0}, "guidance is 2.0, which needs null_class"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(exact_gaussian_model("flow"), objective("flow"), normals(2, 2), no_labels(2), **arguments)


def test_an_unknown_objective_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="prediction"):
        objective("score")
    with pytest.raises(ValidationError, match="schedule"):
        Objective(schedule="cosine")  # type: ignore[call-arg]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_small_model_learns_two_images_and_gives_back_the_one_its_label_names(prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    task = objective(prediction)
    model = DiT(DiTConfig(width=32, depth=2, heads=2, image_size=4, channels=1, num_classes=2))
    model.init_weights(generator)
    images = torch.rand(2, 1, 4, 4, generator=generator).round() * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        y_B = torch.randint(2, (32,), generator=generator)
        t_B = task.sample_timesteps(torch.rand(32, generator=generator))
        noise = torch.randn(32, 1, 4, 4, generator=generator)
        dropped_B = drop_labels(y_B, torch.rand(32, generator=generator), 0.1, model.null_class)
        optimizer.zero_grad()
        task.losses(model, images[y_B], dropped_B, t_B, noise).mean().backward()
        optimizer.step()
    labels = torch.tensor([0, 1, 0, 1])
    out = sample(
        model,
        task,
        torch.randn(4, 1, 4, 4, generator=generator),
        labels,
        sampler="ddim",
        steps=20,
        guidance=1.5,
        null_class=model.null_class,
    )
    assert (out - images[labels]).abs().mean() < 0.25
    assert (out.sign() == images[labels]).float().mean() > 0.95
