"""The autoencoder around its network: the batches it is trained on, its folders, and latents back to images.

A folder holds a VAE as `diffusers` does, in `config.json` and `diffusion_pytorch_model.safetensors`: ours can be read
there, and theirs here.
"""

# B records, C channels, H = W image size, c latent channels, h x w latents
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from checkpointing.export import CONFIG_FILE, DIFFUSERS_WEIGHTS_FILE, read_export, write_export
from models.vae import VAE, VAEConfig, renamed, vae_losses
from train.config import DiffusersVae, LatentsStage, TrainStage
from train.data import ShardDataset
from train.latent_shards import SPLIT_OF_STATISTICS, read_header
from train.parallel import World
from train.run_folder import RunFolder
from train.step import Batches, Microbatch, Slots
from train.tasks import digest_of

VAE_FOLDER = "vae"  # in a latents stage's folder, and in an export's
_DECODED = 64  # images at once


@dataclass(frozen=True)
class Loaded:
    """This rank's slice of a step's units, a record each, and their images; num_units and flops are of all ranks."""

    step: int
    num_units: int
    slots: Slots
    images: Tensor
    flops: float


class Autoencoding(Batches):
    """Images to be encoded, and decoded from a draw that is a function of step and record."""

    def __init__(self, stage: TrainStage, config: VAEConfig, world: World, dataset: ShardDataset) -> None:
        super().__init__(stage, config, world, dataset)
        self.config = config
        self.unit_flops = config.forward_flops()

    def require_fit(self) -> None:
        """Raise ValueError for a split of latents."""
        if self.dataset.latents is not None:
            raise ValueError(
                f"data_from of {self.stage.name} is {self.stage.data_from}, which holds latents: a vae is trained on "
                "images, so name the stage that they were made from"
            )

    def load(self, step: int, slots: Slots) -> Loaded:
        assert slots.shape[1] == 1, "a public unit is a record"
        mine = self.slice_of(slots)
        images, _ = self.dataset.captioned(mine[:, 0], self.config.channels, self.config.image_size)
        return Loaded(step, len(slots), mine, images, len(slots) * self.unit_flops)

    def of(self, loaded: Loaded) -> Iterator[Microbatch]:
        """The slice in microbatches, padded where the units do not fall evenly."""
        share = -(-loaded.num_units // self.world.size)
        count = -(-share // self.stage.train.microbatch_size)
        size = -(-share // count)
        for index in range(count):
            part = slice(index * size, (index + 1) * size)
            yield self._microbatch(loaded, part, size, last=index == count - 1)

    def _microbatch(self, loaded: Loaded, part: slice, size: int, *, last: bool) -> Microbatch:
        there = loaded.slots[part]
        draws = self.draws(loaded.step, there[:, 0].tolist(), self.config.latent_shape, 1)

        def padded(values: Tensor) -> Tensor:
            rows = values.new_zeros(size, *values.shape[1:])
            rows[: len(there)] = values
            return rows.to(self.world.device)

        images, noise = padded(loaded.images[part]), padded(draws.noise)
        slots = np.full((size, 1), -1, np.int64)
        slots[: len(there)] = there

        def losses(network: nn.Module) -> Tensor:
            with self.autocast:
                return vae_losses(network, images, noise, self.stage.objective.kl_weight)

        return Microbatch(torch.from_numpy(slots[:, 0] >= 0).to(self.world.device), losses, last, slots)


def folder_digest(folder: Path) -> str:
    """What a recipe pins of a folder of weights: BLAKE3 of its two files, each with its name and length."""
    digest = blake3()
    for name in (CONFIG_FILE, DIFFUSERS_WEIGHTS_FILE):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: give a folder with the {CONFIG_FILE} and weights of an AutoencoderKL")
        digest.update(f"{name}:{path.stat().st_size}:".encode()).update_mmap(path)
    return f"blake3:{digest.hexdigest()}"


def vae_digest(vae: VAE) -> str:
    """BLAKE3 of the shape and of every weight, on whatever device and in whatever file they are."""
    weights = blake3()
    for name, tensor in sorted(vae.state_dict().items()):
        weights.update(f"{name}:{tuple(tensor.shape)}:".encode()).update(tensor.cpu().numpy().tobytes())
    return digest_of(vae.config.model_dump(), weights.hexdigest())


def load_vae(folder: Path, image_size: int | None = None) -> VAE:
    """The VAE of a folder of `diffusers` weights, in fp32 on the CPU; image_size: null is that of its config.json.

    ValueError names what is missing, damaged, or of another model.
    """
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / DIFFUSERS_WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no AutoencoderKL ({error}): give another folder, or fetch it again") from None
    return _with_weights(VAEConfig.from_diffusers(config, image_size or config["sample_size"]), tensors, str(folder))


def pinned_vae(pinned: DiffusersVae) -> VAE:
    """The VAE of a folder that a recipe names, if its files are those that the recipe means; ValueError else."""
    folder = Path(pinned.folder).expanduser()
    if (found := folder_digest(folder)) != pinned.digest:
        raise ValueError(
            f"diffusers.folder {folder} has digest {found}, and diffusers.digest is {pinned.digest}: put the weights "
            "back, or the digest right"
        )
    return load_vae(folder, pinned.image_size)


def save_vae(folder: Path, vae: VAE, more: Mapping[str, Any] | None = None) -> None:
    """Write the VAE as `diffusers` does, whole or not at all, with `more` in its config.json."""
    config = vae.config.to_diffusers() | dict(more or {})
    write_export(folder, vae.state_dict(), config, weights_file=DIFFUSERS_WEIGHTS_FILE)


@dataclass(frozen=True)
class Decoder:
    """Latents as models see them, of mean 0 and deviation 1 a channel, back to images, and images to these."""

    vae: VAE
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, latents_Bchw: Tensor) -> Tensor:
        """float32 [B, c, h, w] -> [B, C, H, W] in [-1, 1], on the latents' device."""
        vae = self.vae.to(latents_Bchw.device)
        mean, std = (latents_Bchw.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        images = [vae.decode(part * std + mean) for part in latents_Bchw.split(_DECODED)]
        return torch.cat(images).clamp_(-1.0, 1.0) if images else latents_Bchw.new_empty(0, *self.image_shape)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> float32 [B, c, h, w]: the posterior's mean, in float16 as shards hold it.

        ValueError where float16 cannot hold it.
        """
        mean, std = (images_BCHW.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        vae = self.vae.to(images_BCHW.device)
        latents = [vae.encode(part)[0].half().float() for part in images_BCHW.split(_DECODED)]
        latents_Bchw = torch.cat(latents) if latents else images_BCHW.new_empty(0, *vae.config.latent_shape)
        if not bool(torch.isfinite(latents_Bchw).all()):
            raise ValueError("an image encodes to what float16 cannot hold: the model has seen none like it")
        return (latents_Bchw - mean) / std

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        config = self.vae.config
        return config.channels, config.image_size, config.image_size

    def write(self, folder: Path) -> None:
        """Write a folder that `open_decoder`, and an AutoencoderKL, can be read from."""
        statistics = {"latents_mean": list(self.mean), "latents_std": list(self.std), "scaling_factor": 1.0}
        save_vae(folder, self.vae, statistics)


def open_decoder(folder: Path) -> Decoder:
    """The decoder that `Decoder.write` wrote; ExportError where a byte of its weights has changed."""
    config, tensors = read_export(folder, weights_file=DIFFUSERS_WEIGHTS_FILE)
    vae = _with_weights(VAEConfig.from_diffusers(config, config["sample_size"]), tensors, str(folder))
    return Decoder(vae, tuple(config["latents_mean"]), tuple(config["latents_std"]))


def decoder_of(run: RunFolder, data_stage: str) -> Decoder | None:
    """What decodes the samples of a model that was trained on `data_stage`; None where that holds images already."""
    manifest = run.read_manifest(data_stage)
    return decoder_in(run.path / data_stage) if manifest is not None and manifest["kind"] == LatentsStage.kind else None


def decoder_in(folder: Path) -> Decoder:
    """The decoder of the latents that a stage has put into its folder; ValueError where its VAE is not theirs."""
    header, vae = read_header(LocalFileSystem(), str(folder / SPLIT_OF_STATISTICS)), load_vae(folder / VAE_FOLDER)
    if header is None or vae_digest(vae) != header.vae:
        raise ValueError(f"{folder / VAE_FOLDER} is not the VAE that made the latents: restore it from a copy")
    return Decoder(vae, header.mean, header.std)


def _with_weights(config: VAEConfig, tensors: Mapping[str, Tensor], where: str) -> VAE:
    vae = VAE(config)
    try:
        vae.load_state_dict(dict(renamed(tensors)))
    except RuntimeError as error:
        told = str(error).splitlines()[-1].strip()
        raise ValueError(f"{where}: config and weights are not of one model ({told})") from None
    return vae.eval()
