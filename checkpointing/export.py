"""Exports: a model as `model.safetensors` with its `config.json`, and the same model under `diffusers`' names.

An export folder appears whole or not at all, and what is read back is what was written: `config.json` holds the
SHA-256 of the weights.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import (  # its annotations leave PathLike without a parameter
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # the name its `from_pretrained` looks for
_DIGEST_KEY = "model_sha256"


class ExportError(ValueError):
    """An export, or a set of tensors to export, is not what it should be; the message names the file or the tensor."""


def write_export(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    weights_file: str = WEIGHTS_FILE,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write weights, config and extra files (name -> bytes) as `folder`, replacing an export that is there.

    Guarantee: everything is on disk before `folder` takes its name, so that after a crash it holds one whole export,
    the old or the new, or is missing. Equal tensors and config give equal bytes. A folder that holds anything but an
    export is refused.
    """
    extra_files = extra_files or {}
    for name in extra_files:
        if Path(name).name != name or name in (CONFIG_FILE, weights_file):
            raise ExportError(f"extra file {name!r} of export {folder}: give a plain name, not one the export has")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ExportError(f"{folder} holds files but no export: replacing it would lose them; name a new folder")
    aside, replaced = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.replaced")
    for leftover in (aside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, aside / weights_file, metadata={"format": "pt"})
    described = {**config, _DIGEST_KEY: _sha256(aside / weights_file)}
    (aside / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n")
    for name, content in extra_files.items():
        (aside / name).write_bytes(content)
    for path in (*aside.iterdir(), aside):
        _fsync(path)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_export(folder: Path, *, weights_file: str = WEIGHTS_FILE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, tensors) as `write_export` was given them, tensors on the CPU.

    Raises ExportError, naming the file, where one is missing or unreadable, or the weights are not those recorded.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / weights_file
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ExportError(f"{path} is missing: {folder} is no whole export")
    try:
        config: dict[str, Any] = json.loads(config_path.read_bytes())
        recorded = config.pop(_DIGEST_KEY)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{config_path} is no export's config ({error!r}): export the model again") from error
    found = _sha256(weights_path)
    if found != recorded:
        raise ExportError(f"{weights_path} has SHA-256 {found}, but {config_path} records {recorded}: export it again")
    return config, load_file(weights_path)


# What diffusers' DiTTransformer2DModel must be set to for its forward to be our DiT's.
_DIFFUSERS_FIXED: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_zero",
}
_MLP_RATIO = 4  # diffusers has no setting for it


def to_diffusers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename a DiT's tensors and config (the fields of `DiTConfig`) to those of diffusers' DiTTransformer2DModel.

    That model takes times as 1000 t. It has no shared embedder of time and class: each block holds a copy of ours.
    Raises ExportError where a tensor is missing or left over, or diffusers has no such model.
    """
    if config["mlp_ratio"] != _MLP_RATIO:
        raise ExportError(f"mlp_ratio is {config['mlp_ratio']}: diffusers' DiT has only {_MLP_RATIO}")
    remaining = dict(tensors)
    renamed: dict[str, Tensor] = {}
    for ours, theirs in _name_pairs(config["depth"]):
        tensor = _take(remaining, ours)
        parts = tensor.chunk(len(theirs)) if _is_fused(ours) else [tensor] * len(theirs)
        # safetensors refuses tensors that share memory
        renamed.update((name, part.clone()) for name, part in zip(theirs, parts, strict=True))
    _refuse_leftovers(remaining)
    patch_shape = (config["width"], config["channels"], config["patch_size"], config["patch_size"])
    renamed["pos_embed.proj.weight"] = renamed["pos_embed.proj.weight"].reshape(patch_shape)
    return renamed, {
        **_DIFFUSERS_FIXED,
        "num_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["width"] // config["heads"],
        "in_channels": config["channels"],
        "out_channels": config["channels"],
        "sample_size": config["image_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
    }


def from_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `to_diffusers`; of `config`, keys that change no forward are ignored.

    Raises ExportError where the model is not one that our DiT can be: it has another activation or norm, it learns
    sigma, or its blocks embed time and class each in its own way.
    """
    for key, expected in _DIFFUSERS_FIXED.items():
        if config.get(key) != expected:
            raise ExportError(f"diffusers config has {key} = {config.get(key)!r}, but our DiT is {expected!r}")
    if config.get("out_channels") not in (None, config["in_channels"]):
        raise ExportError(
            f"diffusers config has out_channels = {config['out_channels']} for in_channels = {config['in_channels']}: "
            "our DiT learns no sigma"
        )
    remaining = dict(tensors)
    renamed: dict[str, Tensor] = {}
    for ours, theirs in _name_pairs(config["num_layers"]):
        parts = [_take(remaining, name) for name in theirs]
        if _is_fused(ours):
            renamed[ours] = torch.cat(parts)
            continue
        for name, part in zip(theirs, parts, strict=True):
            if not torch.equal(part, parts[0]):
                raise ExportError(f"{name} differs from {theirs[0]}: our DiT embeds time and class once for all blocks")
        renamed[ours] = parts[0].clone()
    _refuse_leftovers(remaining)
    renamed["patch_embed.weight"] = renamed["patch_embed.weight"].flatten(1)
    return renamed, {
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "image_size": config["sample_size"],
        "channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "num_classes": config["num_embeds_ada_norm"],
        "mlp_ratio": _MLP_RATIO,
    }


def _name_pairs(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of our tensors with those of diffusers that hold it: one, q, k and v of a fused one, or a copy a block."""
    blocks = [f"transformer_blocks.{index}" for index in range(depth)]
    for kind in ("weight", "bias"):
        yield f"patch_embed.{kind}", (f"pos_embed.proj.{kind}",)
        for layer in (1, 2):
            copies = tuple(f"{block}.norm1.emb.timestep_embedder.linear_{layer}.{kind}" for block in blocks)
            yield f"time_embed.fc{layer}.{kind}", copies
        for index, block in enumerate(blocks):
            yield f"blocks.{index}.modulation.{kind}", (f"{block}.norm1.linear.{kind}",)
            yield f"blocks.{index}.attention.qkv.{kind}", tuple(f"{block}.attn1.to_{part}.{kind}" for part in "qkv")
            yield f"blocks.{index}.attention.proj.{kind}", (f"{block}.attn1.to_out.0.{kind}",)
            yield f"blocks.{index}.mlp.fc1.{kind}", (f"{block}.ff.net.0.proj.{kind}",)
            yield f"blocks.{index}.mlp.fc2.{kind}", (f"{block}.ff.net.2.{kind}",)
        yield f"final.modulation.{kind}", (f"proj_out_1.{kind}",)
        yield f"final.proj.{kind}", (f"proj_out_2.{kind}",)
    class_tables = tuple(f"{block}.norm1.emb.class_embedder.embedding_table.weight" for block in blocks)
    yield "class_embed.weight", class_tables


def _is_fused(ours: str) -> bool:
    return ".qkv." in ours


def _take(remaining: dict[str, Tensor], name: str) -> Tensor:
    if name not in remaining:
        raise ExportError(f"tensor {name} is missing: the config and the weights are not of one model")
    return remaining.pop(name)


def _refuse_leftovers(remaining: Mapping[str, Tensor]) -> None:
    if remaining:
        raise ExportError(f"{len(remaining)} tensors are not of this model, {sorted(remaining)[0]} the first of them")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
