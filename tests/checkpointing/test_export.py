import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpointing.export import (
    CONFIG_FILE,
    DIFFUSERS_WEIGHTS_FILE,
    WEIGHTS_FILE,
    ExportError,
    from_diffusers,
    read_export,
    to_diffusers,
    write_export,
)
from models.dit import DiT, DiTConfig

CONFIG = DiTConfig(width=48, depth=3, heads=4, image_size=8, channels=3, num_classes=10)


def dit(config: DiTConfig = CONFIG) -> DiT:
    """A model with no zero weights, so that every tensor shows in its output."""
    model, generator = DiT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def batch(config: DiTConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, config.channels, config.image_size, config.image_size, generator=generator)
    labels = torch.tensor([0, 1, config.num_classes - 1, config.num_classes])
    return x, torch.tensor([0.0, 0.123, 0.5, 1.0]), labels


def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    config = {"model": {"size": "nano"}, "epsilon": 8.0}
    write_export(tmp_path / "model", tensors(), config, extra_files={"README.md": b"# A model\n"})
    read_config, read_tensors = read_export(tmp_path / "model")
    assert read_config == config
    assert read_tensors.keys() == tensors().keys()
    for name, value in tensors().items():
        assert read_tensors[name].dtype == value.dtype
        assert torch.equal(read_tensors[name], value)
    assert (tmp_path / "model" / "README.md").read_bytes() == b"# A model\n"


def test_equal_models_export_to_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_export(tmp_path / name, dict(sorted(tensors().items(), reverse=name == "two")), {"z": 1, "a": 2})
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_new_export_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_export(tmp_path / "model", tensors(), {"version": 1}, extra_files={"old.txt": b""})
    write_export(tmp_path / "model", tensors(), {"version": 2})
    assert read_export(tmp_path / "model")[0] == {"version": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_a_write_that_fails_leaves_the_old_export_whole_and_the_next_one_clears_up(tmp_path: Path) -> None:
    write_export(tmp_path / "model", tensors(), {"version": 1})
    with pytest.raises(ValueError, match="nan"):
        write_export(tmp_path / "model", tensors(), {"loss": float("nan")})
    assert read_export(tmp_path / "model")[0] == {"version": 1}
    write_export(tmp_path / "model", tensors(), {"version": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "manifest.json").write_text("{}")
    with pytest.raises(ExportError, match="stage holds files but no export"):
        write_export(tmp_path / "stage", tensors(), {})
    assert (tmp_path / "stage" / "manifest.json").exists()


def test_a_flipped_byte_anywhere_in_the_weights_is_refused_by_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_export(folder, tensors(), {})
    weights = folder / WEIGHTS_FILE
    whole = weights.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ExportError, match=WEIGHTS_FILE):
            read_export(folder)
    weights.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=WEIGHTS_FILE):
        read_export(folder)
    weights.write_bytes(whole)
    read_export(folder)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_export(tmp_path / "model", tensors(), {})
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(ExportError, match=f"{missing} is missing"):
        read_export(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"text"'])
def test_a_config_that_is_no_exports_is_refused_by_file_name(tmp_path: Path, content: str) -> None:
    write_export(tmp_path / "model", tensors(), {})
    (tmp_path / "model" / CONFIG_FILE).write_text(content)
    with pytest.raises(ExportError, match=CONFIG_FILE):
        read_export(tmp_path / "model")


@pytest.mark.parametrize("name", ["../escape", CONFIG_FILE, WEIGHTS_FILE, "sub/file"])
def test_an_extra_file_cannot_leave_the_folder_or_take_the_place_of_the_exports_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="extra file"):
        write_export(tmp_path / "model", tensors(), {}, extra_files={name: b""})


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        DiTConfig(width=48, depth=1, heads=3, image_size=6, channels=1, patch_size=3, num_classes=2),
        DiTConfig(size="nano", image_size=8, channels=1, num_classes=10),
    ],
)
def test_diffusers_computes_what_our_model_computes(config: DiTConfig) -> None:
    from diffusers import DiTTransformer2DModel

    model, (x, t, y) = dit(config), batch(config)
    theirs_tensors, theirs_config = to_diffusers(model.state_dict(), config.model_dump())
    theirs: Any = DiTTransformer2DModel.from_config(theirs_config)  # type: ignore[no-untyped-call]
    theirs.load_state_dict(theirs_tensors, strict=True)
    with torch.no_grad():
        expected = model(x, t, y)
        found = theirs.eval()(x, timestep=1000 * t, class_labels=y).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_to_diffusers_and_back_is_the_same_model(tmp_path: Path) -> None:
    model = dit()
    ours, config = from_diffusers(*to_diffusers(model.state_dict(), CONFIG.model_dump()))
    assert DiTConfig(**config) == CONFIG
    assert ours.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(ours[name], value), name


LOAD_IN_DIFFUSERS = """
import sys, torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
folder, batch = sys.argv[1:]
model = DiTTransformer2DModel.from_pretrained(folder).eval()
given = load_file(batch)
with torch.no_grad():
    out = model(given["x"], timestep=1000 * given["t"], class_labels=given["y"]).sample
save_file({"out": out.contiguous()}, batch)
"""


def test_an_export_loads_in_diffusers_in_a_process_that_knows_nothing_of_us(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, (x, t, y) = dit(), batch()
    theirs_tensors, theirs_config = to_diffusers(model.state_dict(), CONFIG.model_dump())
    write_export(tmp_path / "model", theirs_tensors, theirs_config, weights_file=DIFFUSERS_WEIGHTS_FILE)
    save_file({"x": x, "t": t, "y": y}, tmp_path / "batch")
    arguments = [str(tmp_path / "model"), str(tmp_path / "batch")]
    subprocess.run([sys.executable, "-c", LOAD_IN_DIFFUSERS, *arguments], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "batch")["out"], model(x, t, y), rtol=1e-5, atol=1e-5)
    config, read = read_export(tmp_path / "model", weights_file=DIFFUSERS_WEIGHTS_FILE)
    assert DiTConfig(**from_diffusers(read, config)[1]) == CONFIG


def test_only_the_papers_mlp_ratio_goes_to_diffusers() -> None:
    config = CONFIG.model_copy(update={"mlp_ratio": 2})
    with pytest.raises(ExportError, match="mlp_ratio is 2"):
        to_diffusers(DiT(config).state_dict(), config.model_dump())


def test_a_missing_or_foreign_tensor_is_named() -> None:
    ours = dit().state_dict()
    with pytest.raises(ExportError, match=r"ema\.decay"):
        to_diffusers({**ours, "ema.decay": torch.ones(1)}, CONFIG.model_dump())
    del ours["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ExportError, match=r"blocks\.1\.mlp\.fc2\.bias is missing"):
        to_diffusers(ours, CONFIG.model_dump())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn = 'geglu'"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05"),
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name"),
        ({"out_channels": 6}, "learns no sigma"),
    ],
)
def test_a_diffusers_model_that_is_not_ours_is_refused_by_key(change: dict[str, Any], message: str) -> None:
    theirs_tensors, theirs_config = to_diffusers(dit().state_dict(), CONFIG.model_dump())
    with pytest.raises(ExportError, match=message):
        from_diffusers(theirs_tensors, {**theirs_config, **change})


def test_a_diffusers_model_whose_blocks_embed_time_each_in_its_own_way_is_refused() -> None:
    theirs_tensors, theirs_config = to_diffusers(dit().state_dict(), CONFIG.model_dump())
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"
    theirs_tensors[name][0, 0] += 1
    with pytest.raises(ExportError, match=name):
        from_diffusers(theirs_tensors, theirs_config)


def test_the_config_says_which_weights_it_describes(tmp_path: Path) -> None:
    import hashlib

    write_export(tmp_path / "model", tensors(), {"epsilon": 8.0})
    config = json.loads((tmp_path / "model" / CONFIG_FILE).read_text())
    assert config["model_sha256"] == hashlib.sha256((tmp_path / "model" / WEIGHTS_FILE).read_bytes()).hexdigest()
