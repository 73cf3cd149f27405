"""Images to latents: what their shards hold, what the statistics are of, and that any number of workers make them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpointing.export import ExportError
from models.vae import VAE, VAEConfig
from train import ROOT
from train.autoencoding import (
    VAE_FOLDER,
    decoder_in,
    decoder_of,
    folder_digest,
    load_vae,
    open_decoder,
    pinned_vae,
    save_vae,
    vae_digest,
)
from train.config import DiffusersVae, LatentsStage
from train.data import ShardDataset
from train.heartbeat import Heartbeat
from train.images import encode_png
from train.latents import LatentsJob, encode_shards, plan_latents, reconstruction_psnr
from train.recipe import ConfigError, Recipe, load_recipe
from train.run_folder import RunFolder
from train.shards import Record, ShardError, write_shards
from train.stages import run_stage
from train.tasks import read_job, work

CONFIG = VAEConfig(image_size=8, channels=1, latent_channels=3, widths=(4, 8), norm_groups=2)
SIZES = {"public": 20, "private": 12, "test": 5}


def vae(seed: int = 0) -> VAE:
    model = VAE(CONFIG)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def huge() -> VAE:
    """One whose latents are beyond float16."""
    model = vae()
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(1e9)
    return model


def records(split: str, seed: int = 0) -> list[Record]:
    """Pictures of chance, with classes, captions, units of two records, and drawings."""
    shades = np.random.default_rng([seed, SIZES[split]]).integers(0, 256, (SIZES[split], 10, 8), np.uint8)
    return [
        Record(f"{split}-{n}", f"u{n // 2}", encode_png(Image.fromarray(shade)), n % 3, f"picture {n}", b"<svg/>")
        for n, shade in enumerate(shades)
    ]


def write(folder: Path, **seeds: int) -> Path:
    for split in SIZES:
        write_shards(folder / split, split, records(split, seeds.get(split, 0)), shard_size=6)
    return folder


def plan(source: Path, out: Path, model: VAE | None = None, splits: Sequence[str] = tuple(SIZES)) -> LatentsJob:
    return plan_latents(source, out, splits, model or vae())


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one worker makes, and the stage's metrics."""
    out = tmp_path_factory.mktemp("latents")
    return out, encode_shards(plan(source, out), work)


def test_a_record_keeps_all_but_its_image_which_is_its_posteriors_mean(source: Path, encoded: Any) -> None:
    out, metrics = encoded
    for split, size in SIZES.items():
        dataset, images = ShardDataset(out / split, split), ShardDataset(source / split, split)
        told = metrics["splits"][split]
        assert (told["records"], told["shards"], told["root"]) == (size, -(-size // 6), dataset.root)
        with torch.no_grad():
            expected, _ = vae().encode(images.batch(range(size), 1, 8)[0])
        for n in range(size):
            ours, before = dataset.read(n), images.read(n)
            stored = np.load(io.BytesIO(ours.image))
            assert stored.dtype == np.float16
            np.testing.assert_allclose(stored, expected[n], rtol=2e-3, atol=1e-4)
            assert (ours.key, ours.unit, ours.label, ours.caption) == (
                before.key, before.unit, before.label, before.caption
            )  # fmt: skip
            assert ours.svg is None


def test_what_is_read_has_mean_0_and_deviation_1_on_the_public_split(encoded: Any) -> None:
    out, metrics = encoded
    dataset = ShardDataset(out / "public", "public")
    latents, labels = dataset.batch(range(len(dataset)), 3, 4)
    assert (latents.shape, latents.dtype, labels[4]) == ((20, 3, 4, 4), torch.float32, 1)
    mean, std = latents.double().mean((0, 2, 3)), latents.double().std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert dataset.latents is not None
    assert metrics["mean"] == list(dataset.latents.mean)
    assert metrics["shape"] == [3, 4, 4]
    again, captions = dataset.captioned([4, 2], 3, 4)
    assert torch.equal(again, latents[[4, 2]])
    assert captions == ["picture 4", "picture 2"]


def test_a_records_latents_are_the_same_to_the_bit_in_any_company(tmp_path: Path) -> None:
    """They are in the digest that chance is keyed by: were a bit another, so would be all that the record meets."""
    model = VAE(VAEConfig(image_size=32, channels=1, latent_channels=4, widths=(16, 32)))
    model.init_weights(torch.Generator().manual_seed(0))
    shades = np.random.default_rng(0).integers(0, 256, (66, 32, 32), np.uint8)
    images = [Record(f"r{n}", f"r{n}", encode_png(Image.fromarray(shade)), None, "") for n, shade in enumerate(shades)]
    digests: list[str] = []
    for first in (0, 1, 2):  # the last image is one of two in its batch, alone in it, and in the first one
        folder = tmp_path / str(first)
        write_shards(folder / "in/public", "public", images[first:], shard_size=100)
        encode_shards(plan(folder / "in", folder / "out", model, ["public"]), work)
        dataset = ShardDataset(folder / "out/public", "public")
        digests.append(dataset.digest(len(dataset) - 1))
    assert len(set(digests)) == 1


def test_no_private_record_enters_the_statistics(encoded: Any, tmp_path: Path) -> None:
    out, _ = encoded
    encode_shards(plan(write(tmp_path / "in", private=1, test=1), tmp_path / "out"), work)
    ours, others = files(out), files(tmp_path / "out")
    assert ours.keys() == others.keys()
    changed = {name for name in ours if ours[name] != others[name]}
    assert changed
    assert all(name.startswith(("private/private-", "test/test-")) for name in changed), "and no latents.json"
    encode_shards(plan(write(tmp_path / "other", public=1), tmp_path / "moved"), work)
    moved = files(tmp_path / "moved")
    assert moved["private/latents.json"] != ours["private/latents.json"], "a public record does"
    for name, content in ours.items():
        if name.endswith(".latents.json") and not name.startswith("public/"):
            assert json.loads(content)["sums"] is json.loads(content)["square_sums"] is None


def test_two_workers_make_what_one_makes(source: Path, encoded: Any, tmp_path: Path) -> None:
    def run(job: LatentsJob) -> None:
        other = threading.Thread(target=work, args=[read_job(job.path)])
        other.start()
        work(read_job(job.path))
        other.join()

    assert encode_shards(plan(source, tmp_path / "out"), run) == encoded[1]
    assert files(tmp_path / "out") == files(encoded[0])


def test_a_stage_that_ended_halfway_goes_on_and_what_was_harmed_is_done_again(
    source: Path, encoded: Any, tmp_path: Path
) -> None:
    job = plan(source, tmp_path / "out")

    def half(job: LatentsJob) -> None:
        for task in job.tasks()[:4]:
            job.run(task, lambda done: None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards(job, half)
    harmed = tmp_path / "out" / "public" / "public-00001.tar"
    content = bytearray(harmed.read_bytes())
    content[700] ^= 1
    harmed.write_bytes(content)
    begun: list[str] = []

    def rest(job: LatentsJob) -> None:
        begun.extend(task.name for task in job.tasks() if not job.done(task))
        work(job)
        assert job.look() == (37, 37)

    encode_shards(plan(source, tmp_path / "out"), rest)
    assert begun[0] == "public/public-00001"
    assert "public/public-00000" not in begun
    assert files(tmp_path / "out") == files(encoded[0])


def test_another_vae_makes_everything_anew_and_its_folder_is_never_mixed_up(
    source: Path, encoded: Any, tmp_path: Path
) -> None:
    encode_shards(plan(source, tmp_path / "out", vae(1)), work)
    first = files(tmp_path / "out")
    encode_shards(plan(source, tmp_path / "out"), work)
    assert files(tmp_path / "out") == files(encoded[0]) != first
    job = plan(source, tmp_path / "new")
    save_vae(tmp_path / "new" / VAE_FOLDER, vae(1))
    with pytest.raises(ValueError, match="new/vae is not the VAE that the stage began with: run it again"):
        encode_shards(job, work)


def test_the_decoder_gives_images_back_from_the_stage_and_from_an_export(
    source: Path, encoded: Any, tmp_path: Path
) -> None:
    out, _ = encoded
    decode = decoder_in(out)
    dataset = ShardDataset(out / "public", "public")
    latents, _ = dataset.batch(range(20), 3, 4)
    images = decode(latents)
    stored = torch.from_numpy(np.stack([np.load(io.BytesIO(dataset.read(n).image)) for n in range(20)])).float()
    with torch.no_grad():
        torch.testing.assert_close(images, vae().decode(stored).clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert decode(latents[:0]).shape == (0, 1, 8, 8)
    real, _ = ShardDataset(source / "public", "public").batch(range(20), 1, 8)
    torch.testing.assert_close(decode.encode(real), latents, rtol=2e-3, atol=1e-3)  # what a shard holds: the mean
    assert decode.encode(real[:0]).shape == (0, 3, 4, 4)
    with pytest.raises(ValueError, match="an image encodes to what float16 cannot hold"):
        dataclasses.replace(decode, vae=huge()).encode(real)
    expected = 10 * np.log10(4 / float((images - real).square().mean()))
    assert reconstruction_psnr(ShardDataset(source / "public", "public"), dataset, decode) == pytest.approx(expected)
    decode.write(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["latents_mean"] == list(decode.mean)
    assert torch.equal(open_decoder(tmp_path / "export")(latents), images)
    assert vae_digest(load_vae(tmp_path / "export")) == vae_digest(vae())
    save_vae(out.parent / "elsewhere" / VAE_FOLDER, vae(1))
    (out.parent / "elsewhere" / "public").symlink_to(out / "public")
    with pytest.raises(ValueError, match="elsewhere/vae is not the VAE that made the latents"):
        decoder_in(out.parent / "elsewhere")
    (tmp_path / "export" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="has SHA-256"):
        open_decoder(tmp_path / "export")


def test_a_folder_of_weights_is_taken_by_its_digest_and_no_other(tmp_path: Path) -> None:
    save_vae(tmp_path / "sd", vae())
    found = folder_digest(tmp_path / "sd")
    taken = pinned_vae(DiffusersVae(folder=str(tmp_path / "sd"), digest=found, image_size=16))
    assert taken.config == CONFIG.model_copy(update={"image_size": 16})
    assert torch.equal(taken.encoder.conv_in.weight, vae().encoder.conv_in.weight)
    wrong = DiffusersVae(folder=str(tmp_path / "sd"), digest="blake3:" + "0" * 64, image_size=16)
    with pytest.raises(ValueError, match=f"has digest {found}, and diffusers.digest is blake3:000"):
        pinned_vae(wrong)
    config = json.loads((tmp_path / "sd" / "config.json").read_text())
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 4}))
    assert folder_digest(tmp_path / "sd") != found, "which no tensor's shape would tell"
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config | {"block_out_channels": [4, 12]}))
    with pytest.raises(ValueError, match="sd: config and weights are not of one model"):
        load_vae(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"nowhere/config.json is missing: give a folder"):
        folder_digest(tmp_path / "nowhere")


def test_the_stage_encodes_by_a_folder_of_pinned_weights(run: RunFolder, tmp_path: Path) -> None:
    save_vae(tmp_path / "sd", vae())
    pinned = DiffusersVae(folder=str(tmp_path / "sd"), digest=folder_digest(tmp_path / "sd"), image_size=8)
    stage = LatentsStage(name="latents", stage="latents", data_from="filter", diffusers=pinned)
    wrong = pinned.model_copy(update={"digest": "blake3:" + "0" * 64})
    with pytest.raises(ValueError, match=f"has digest {pinned.digest}"):
        run_stage(stage.model_copy(update={"diffusers": wrong}), run, None, Heartbeat(0))
    run_stage(stage, run, None, Heartbeat(0))
    manifest = run.read_manifest("latents")
    assert manifest is not None
    assert manifest["metrics"]["vae"] == vae_digest(vae())
    assert set(manifest["outputs"]) == {
        "latents/public/latents.json",
        "latents/vae/config.json",
        "latents/vae/diffusion_pytorch_model.safetensors",
    }
    dataset = ShardDataset(run.path / "latents" / "public", "public")
    assert (len(dataset), dataset.root) == (40, manifest["metrics"]["splits"]["public"]["root"])
    decode = decoder_of(run, "latents")
    assert decode is not None
    assert decode.image_shape == (1, 8, 8)
    assert decoder_of(run, "filter") is None


def test_a_model_of_another_shape_is_told_the_latents_own(encoded: Any) -> None:
    told = r"latents of shape \(3, 4, 4\), not \(1, 8, 8\): set model.channels to 3 and model.image_size to 4"
    with pytest.raises(ValueError, match=told):
        ShardDataset(encoded[0] / "public", "public").batch([0], 1, 8)


def test_a_header_that_was_changed_is_refused(source: Path, tmp_path: Path) -> None:
    encode_shards(plan(source, tmp_path / "out"), work)
    header = tmp_path / "out" / "private" / "latents.json"
    header.write_bytes(header.read_bytes().replace(b'"public_records": 20', b'"public_records": 21'))
    with pytest.raises(ShardError, match=r"latents\.json is not as it was written: run the latents stage again"):
        ShardDataset(tmp_path / "out" / "private", "private")


def test_what_cannot_be_encoded_is_an_error_that_names_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no public split \(private\): mean and deviation"):
        plan(source, tmp_path / "out", splits=["private"])
    dead = vae()
    with torch.no_grad():
        dead.encoder.conv_out.weight[1], dead.encoder.conv_out.bias[1] = 0, 2  # type: ignore[index]
    with pytest.raises(ValueError, match="channel 1 of the latents is the same all over the public split"):
        encode_shards(plan(source, tmp_path / "dead", dead), work)
    with pytest.raises(ValueError, match=r"record public-\d+ encodes to what float16 cannot hold: take another VAE"):
        encode_shards(plan(source, tmp_path / "huge", huge()), work)
    broken = write(tmp_path / "broken")
    tar = broken / "test" / "test-00000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"PNG") + 40] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ShardError, match="record test-0 was changed: restore the shard"):
        encode_shards(plan(broken, tmp_path / "out"), work)


def test_latents_are_no_images_to_encode(encoded: Any, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="record public-0: unknown_image_type"):
        encode_shards(plan(encoded[0], tmp_path / "out"), work)


RECIPE = {
    "10_ingest": "{stage: ingest, source: {kind: digits}}",
    "20_filter": "{stage: filter, data_from: ingest, policy: {}}",
    "30_vae": "{stage: pretrain, data_from: filter, split: public, model: {name: vae, image_size: 8, channels: 1, "
    "latent_channels: 2, widths: [8, 16]}, %s}",
    "40_latents": "{stage: latents, init_from: vae, data_from: filter}",
    "50_pretrain": "{stage: pretrain, data_from: latents, split: public, model: {name: dit, size: nano, image_size: 4, "
    "channels: 2, num_classes: 10}, %s}",
}
TRAINING = (
    "train: {steps: 4, batch_size: 8, microbatch_size: 8, seed: 0}, optim: {learning_rate: 1e-3}, "
    "parallel: {backend: single}"
)
PRIVATE = "privacy: {target_epsilon: 8, max_grad_norm: 1, replay_steps: 0}"

PRIVATE_VAE = RECIPE["30_vae"].replace("pretrain", "finetune_dp").replace("%s", f"%s, {PRIVATE}")


def recipe(folder: Path, **changed: str) -> Recipe:
    for name, text in (RECIPE | changed).items():
        (folder / f"{name}.yaml").write_text(text.replace("%s", TRAINING))
    return load_recipe(folder)


def test_a_recipe_may_train_on_the_latents_of_a_vae_of_its_own(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in recipe(tmp_path).stages}
    assert stages["latents"].inputs() == ("filter", "vae")
    assert stages["pretrain"].inputs() == ("latents",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"30_vae": PRIVATE_VAE},
            "30_vae.yaml: the model is a vae in a private stage",
        ),
        (
            {"60_private": f"{{stage: finetune_dp, init_from: vae, data_from: filter, split: private, %s, {PRIVATE}}}"},
            "60_private.yaml: the model is a vae in a private stage",
        ),
        ({"60_export": "{stage: export, init_from: vae}"}, "60_export.yaml: init_from is 'vae', whose model is vae"),
        (
            {"60_other": "{stage: latents, init_from: pretrain, data_from: filter}"},
            "60_other.yaml: init_from is 'pretrain', whose model is dit: a latents stage takes a vae",
        ),
        (
            {"60_again": "{stage: latents, init_from: vae, data_from: latents}"},
            "60_again.yaml: data_from is 'latents', which is of kind latents",
        ),
        ({"40_latents": "{stage: latents, data_from: filter}"}, "neither init_from nor diffusers"),
        (
            {"40_latents": "{stage: latents, data_from: filter, diffusers: {folder: sd, digest: abc, image_size: 8}}"},
            "diffusers.digest is 'abc'",
        ),
        (
            {"30_vae": RECIPE["30_vae"].replace("%s", "objective: {label_dropout: 0.5}, %s")},
            "objective.label_dropout is 0.5, which a model vae does not have",
        ),
        (
            {"50_pretrain": RECIPE["50_pretrain"].replace("%s", "objective: {kl_weight: 1}, %s")},
            "objective.kl_weight is 1.0, which a model dit does not have",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_uses_a_vae_otherwise_is_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        recipe(tmp_path, **changed)
    assert message in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["task.leased", "task.renamed", "task.marked"])
def test_a_worker_that_is_killed_loses_nothing(source: Path, encoded: Any, tmp_path: Path, failpoint: str) -> None:
    def run(job: LatentsJob) -> None:
        command = [sys.executable, "-m", "train.tasks", str(job.path)]
        dying = subprocess.run(command, cwd=ROOT, env={**os.environ, "SFUMATO_FAILPOINT": failpoint}, check=False)
        assert dying.returncode == -signal.SIGKILL
        assert job.look() == (6 if failpoint == "task.marked" else 0, 37)
        work(job)

    assert encode_shards(plan(source, tmp_path / "out"), run) == encoded[1]
    assert files(tmp_path / "out") == files(encoded[0])


@pytest.mark.slow
def test_workers_killed_at_random_times_lose_nothing(source: Path, encoded: Any, tmp_path: Path) -> None:
    """Once they have begun: the times lie in the work, not in the imports before."""

    def run(job: LatentsJob) -> None:
        chance, command = np.random.default_rng(0), [sys.executable, "-m", "train.tasks", str(job.path)]
        for _ in range(6):
            process = subprocess.Popen(command, cwd=ROOT)
            while process.poll() is None and not any((tmp_path / "out").glob("*/*.lease")):
                time.sleep(0.001)
            time.sleep(float(chance.uniform(0, 0.05)))
            process.kill()
            process.wait()
        work(job)

    assert encode_shards(plan(source, tmp_path / "out"), run) == encoded[1]
    assert files(tmp_path / "out") == files(encoded[0])
