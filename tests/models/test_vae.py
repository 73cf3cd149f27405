"""The VAE beside `diffusers`' AutoencoderKL, whose names, shapes and numbers are its own."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from models.vae import VAE, VAEConfig, renamed, vae_losses

SMALL = VAEConfig(image_size=8, channels=1, latent_channels=2, widths=(8, 16))
LARGE = VAEConfig(
    image_size=16,
    channels=3,
    latent_channels=4,
    widths=(8, 16, 16),
    layers=2,
    norm_groups=4,
    attention=True,
    quant_conv=True,
    post_quant_conv=True,
)


def filled(config: VAEConfig, seed: int = 0) -> VAE:
    """A model with no zero weights, so that every path through it shows in its output."""
    model, generator = VAE(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def images(config: VAEConfig, size: int = 3) -> Tensor:
    shape = (size, config.channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The first numbers of the first image, as diffusers 0.42 gives them where they are compared below: of posterior.mean,
# posterior.logvar and decode(posterior.mean).
DIFFUSERS = {
    SMALL: [[-0.41366, -0.48532, -0.61162], [-0.47018, -0.51874, -0.16993], [-0.12676, -0.03208, 0.02102]],
    LARGE: [[-0.09358, -0.33855, -0.35043], [-0.15857, -0.53206, -0.20754], [0.2216, 0.1218, 0.07612]],
}


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_the_numbers_are_those_that_diffusers_gave(config: VAEConfig) -> None:
    model = filled(config)
    with torch.no_grad():
        mean, log_variance = model.encode(images(config))
        found = [values[0].flatten()[:3].tolist() for values in (mean, log_variance, model.decode(mean))]
    torch.testing.assert_close(found, DIFFUSERS[config], rtol=0, atol=2e-5)


@pytest.mark.slow  # for diffusers is long to import
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_diffusers_computes_what_our_model_computes(config: VAEConfig) -> None:
    from diffusers import AutoencoderKL

    ours = filled(config)
    theirs = AutoencoderKL.from_config(config.to_diffusers()).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert VAEConfig.from_diffusers(theirs.config, config.image_size) == config
    x = images(config)
    with torch.no_grad():
        mean, log_variance = ours.encode(x)
        posterior = theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, log_variance, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(mean).sample, ours.decode(mean), rtol=1e-5, atol=1e-5)


def test_old_weights_load_by_their_old_names_in_whatever_precision() -> None:
    ours = filled(LARGE).half()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in ours.state_dict().items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")  # noqa: PLW2901
        old[name] = tensor
    assert old.keys() != ours.state_dict().keys()
    again = VAE(LARGE)
    again.load_state_dict(dict(renamed(old)))
    assert all(torch.equal(tensor, ours.state_dict()[name].float()) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of class AutoencoderTiny: give the folder of an AutoencoderKL"),
        ({"act_fn": "relu"}, "an act_fn that is not silu"),
        ({"out_channels": 6}, "out_channels that are not its in_channels"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "has down_block_types .* ours is DownEncoderBlock2D"),
    ],
)
def test_an_autoencoder_that_is_not_ours_is_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_diffusers({**SMALL.to_diffusers(), **change}, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 10, "widths": (8, 8, 8)}, "image_size 10 is not a multiple of 4, by which 3 widths shrink"),
        ({"widths": (8, 12)}, "width 12 is not a multiple of norm_groups 8"),
        ({"widths": ()}, "widths"),
        ({"depth": 3}, "depth"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VAEConfig(**{**SMALL.model_dump(), **change})


def test_an_image_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 9, 8\), but the VAE takes \[B, 1, H, W\] .* multiples of 2"):
        filled(SMALL).encode(torch.zeros(1, 1, 9, 8))


def test_each_output_depends_on_its_record_alone() -> None:
    model, x = filled(LARGE), images(LARGE)
    noise = torch.randn(3, *LARGE.latent_shape, generator=torch.Generator().manual_seed(2))
    other = torch.cat([torch.randn_like(x[:1]), x[1:2], torch.randn_like(x[2:])])
    for whole, part in zip(model(x, noise), model(other, noise), strict=True):
        torch.testing.assert_close(whole[1], part[1])


def test_a_records_loss_is_its_error_and_its_latents_distance_from_a_standard_normal() -> None:
    model, x = filled(SMALL), images(SMALL)
    noise = torch.randn(3, *SMALL.latent_shape, generator=torch.Generator().manual_seed(2))
    found = vae_losses(model, x, noise, 0.5).detach()
    for n in range(3):
        mean, log_variance = (moment[0].detach().double() for moment in model.encode(x[n : n + 1]))
        posterior = Normal(mean, (0.5 * log_variance).exp())
        drawn = (mean + posterior.scale * noise[n]).float()
        error = (model.decode(drawn[None])[0].detach() - x[n]).abs().mean()
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
        assert found[n].item() == pytest.approx(float(error + 0.5 * kl), rel=1e-5)


def test_it_fills_in_on_the_meta_device_what_it_is_filled_with_elsewhere() -> None:
    with torch.device("meta"):
        empty = VAE(LARGE)
    empty.to_empty(device="cpu")
    plain = VAE(LARGE)
    for model in (empty, plain):
        model.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in empty.state_dict().items())
    assert torch.equal(plain.encoder.conv_norm_out.weight, torch.ones(16))
    weight = plain.encoder.mid_block.resnets[0].conv1.weight  # type: ignore[union-attr]
    assert weight.std().item() == pytest.approx((1 / (3 * 16 * 9)) ** 0.5, rel=0.05)


def test_the_flops_of_a_forward_are_those_counted() -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        filled(LARGE)(images(LARGE), torch.zeros(3, *LARGE.latent_shape))
    assert LARGE.forward_flops(3) == counter.get_total_flops()


def test_blocks_hold_most_of_the_weights() -> None:
    model = VAE(LARGE)
    inside = sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    assert inside > 0.8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("widths", [(16, 32, 32), (8, 16)])
def test_what_the_plan_says_is_kept_for_the_backward_is_near_what_is(widths: tuple[int, ...]) -> None:
    config = SMALL.model_copy(update={"widths": widths})
    model, kept = VAE(config), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[Tensor] = []  # so that no storage's address comes again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vae_losses(model, images(config), torch.zeros(3, *config.latent_shape), 0.1).sum()
    told = config.kept_elements() * config.num_tokens * 3 * 4
    assert told == pytest.approx(sum(kept.values()), rel=0.1)
    assert config.kept_elements(checkpointed=True) < config.kept_elements()
