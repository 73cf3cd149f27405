"""What a person may ask of scripts/sample.py, what comes of it, and what is refused in words that say the mend."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from checkpointing.export import write_export
from models.dit import DiT, DiTConfig
from models.flow import Objective
from models.packed import Image, Text
from models.tokenizer import ByteTokenizer, open_tokenizer
from models.unified import Unified
from models.unified_objective import UnifiedObjective
from models.vae import VAE, VAEConfig
from scripts.sample import main
from tests.train.unified_models import IMAGE_SIZE, MAX_TOKENS, config, filled
from train import ROOT
from train.autoencoding import VAE_FOLDER, Decoder
from train.generation import exported, write
from train.sampling import documents_of, open_model, read_image, read_images

PIXELS = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("unified") / "model"
    model = filled()
    section, files = exported(model.config)
    described = {"model": section, "objective": UnifiedObjective().model_dump(), "source": "test"}
    write_export(folder, model.state_dict(), described, extra_files=files)
    return str(folder)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classes") / "model"
    model = DiT(DiTConfig(width=32, depth=1, heads=2, image_size=8, channels=1, patch_size=4, num_classes=3))
    model.init_weights(torch.Generator().manual_seed(0))
    section, _ = exported(model.config)
    described = {"model": section, "objective": Objective().model_dump(), "source": "test"}
    write_export(folder, model.state_dict(), described)
    return str(folder)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A unified model of a VAE's latents, of another number of channels and another size than its images."""
    folder = tmp_path_factory.mktemp("latents") / "model"
    vae = VAE(VAEConfig(image_size=IMAGE_SIZE, channels=3, latent_channels=4, widths=(4, 8), norm_groups=2))
    vae.init_weights(torch.Generator().manual_seed(0))
    model = filled(config(channels=4, image_size=IMAGE_SIZE // 2, patch_size=4))
    section, _ = exported(model.config)
    described = {"model": section, "objective": UnifiedObjective().model_dump(), "source": "test"}
    write_export(folder, model.state_dict(), described)
    Decoder(vae.eval(), mean=(0.1,) * 4, std=(0.5, 1.0, 0.5, 1.0)).write(folder / VAE_FOLDER)
    return str(folder)


def picture(path: Path, width: int = 20, height: int = 20) -> str:
    Picture.fromarray(np.full((height, width, 3), 200, np.uint8)).save(path)
    return str(path)


def test_prompts_become_one_sheet_or_a_file_each(unified: str, tmp_path: Path) -> None:
    asked = ["--model", unified, "--prompt", "a red ring", "--prompt", "two", "--steps", "1", "--number", "2"]
    assert main([*asked, "--out", str(tmp_path / "sheet.png")]) == 0
    width, height = Picture.open(tmp_path / "sheet.png").size
    assert width > 4 * 100 and height > 100  # enlarged, four in a row
    assert main([*asked, "--out", str(tmp_path / "each"), "--sampler", "heun"]) == 0
    files = sorted((tmp_path / "each").iterdir())
    assert [path.name for path in files] == [f"{n:04d}.png" for n in range(4)]
    assert {Picture.open(path).size for path in files} == {(IMAGE_SIZE, IMAGE_SIZE)}


def test_an_image_becomes_a_caption_that_can_do_a_terminal_no_harm(
    unified: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", unified, "--image", picture(tmp_path / "a.png")]
    assert main(asked) == 0
    greedy = capsys.readouterr().out
    assert main([*asked, "--seed", "4"]) == 0 and capsys.readouterr().out == greedy
    assert main([*asked, "--temperature", "2", "--number", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 5 and all(line.startswith("a.png: ") and line.isprintable() for line in lines)


def test_a_files_name_can_do_a_terminal_no_harm_either(
    unified: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(tmp_path / "a\x1b[31m\udcff.png")
    assert main(["--model", unified, "--image", image, "--number", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.isprintable() and line.startswith("a\ufffd[31m\ufffd.png: ") for line in lines)


def test_where_images_cannot_go_is_said_before_they_are_drawn(
    unified: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.sampling.draw", lambda *_, **__: pytest.fail("drawn in vain"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, said in (("file", "file"), ("file/sheet.png", "file"), ("folder.png", "folder"), ("a.jpg", "FILE.png")):
        assert main(["--model", unified, "--prompt", "a", "--out", str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_seed_has_64_bits(unified: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", unified, "--prompt", "a", "--steps", "1", "--out", str(tmp_path), "--seed"]
    assert main([*asked, str(2**64 - 1)]) == 0
    for seed in (-1, 2**64):
        with pytest.raises(SystemExit) as caught:
            main([*asked, str(seed)])
        assert caught.value.code == 2 and f"{seed} is out of range" in capsys.readouterr().err


def test_images_stand_where_the_prompt_says_and_either_comes_of_them(
    unified: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", unified, "--image", picture(tmp_path / "a.png"), "--prompt", "<|image|> and then"]
    assert main([*asked, "--make", "text"]) == 0
    assert capsys.readouterr().out
    assert main([*asked, "--steps", "1", "--out", str(tmp_path / "next.png")]) == 0
    first, second = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    (document,) = documents_of(["a <|image|> b <|image|>"], [first, second], config(), ByteTokenizer())
    kinds = [part.pixels_CHW if isinstance(part, Image) else bytes(part.tokens) for part in document]
    assert kinds[0] == b"a" and kinds[1] is first and kinds[2] == b"b" and kinds[3] is second
    assert isinstance(document[0], Text)


def test_a_model_of_latents_is_given_what_its_vae_makes_of_an_image(
    latents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", latents, "--image", picture(tmp_path / "a.png")]
    assert main(asked) == 0
    caption = capsys.readouterr().out
    assert main(asked) == 0 and capsys.readouterr().out == caption, "no draw from the posterior"
    opened = open_model(latents)
    assert isinstance(opened.model, Unified) and opened.decode is not None
    (image,) = read_images([tmp_path / "a.png"], opened.model.config, opened.decode)
    assert image.shape == (4, 8, 8)
    assert write(opened.model, [[Image(image)]]) != write(opened.model, [[Image(image + 1)]]), "which it looks at"
    pixels = read_image(tmp_path / "a.png", 3, IMAGE_SIZE)[None]
    with torch.no_grad():
        mean, _ = opened.decode.vae.encode(pixels)
    normalised = (mean[0] - 0.1) / torch.tensor([0.5, 1.0, 0.5, 1.0])[:, None, None]
    torch.testing.assert_close(image, normalised, rtol=2e-3, atol=1e-3)
    again = ["--prompt", "<|image|> and then", "--steps", "1", "--out", str(tmp_path / "next")]
    assert main([*asked, *again]) == 0
    assert Picture.open(tmp_path / "next" / "0000.png").size == (IMAGE_SIZE, IMAGE_SIZE)


def test_lines_of_the_standard_input_are_prompts(
    unified: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", unified, "--prompt", "-", "--steps", "1", "--out", str(tmp_path / "each")]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("eins\n\nzwölf\n".encode())))
    assert main(asked) == 0
    assert len(list((tmp_path / "each").iterdir())) == 2
    marked = "\ufeff" + "x" * MAX_TOKENS + "\r\n"  # a file as editors on Windows begin it; the mark is no word of it
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(marked.encode())))
    assert main(asked) == 0
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"eins\nzw\xf6lf\n")))
    assert main(asked) == 2
    assert "prompt 2: the text is not valid UTF-8 at byte 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "images", "said"),
    [
        ("x" * (MAX_TOKENS + 1), 0, "prompt 1: the text has 41 tokens, 40 are allowed"),
        ("a \udcff", 0, "prompt 1: the text is not valid UTF-8 at character 2"),
        ("a <|end_text|>", 0, r"prompt 1 has the special token <\|end_text\|>, which the program alone places"),
        ("<|cat|>", 0, r"prompt 1 has the special token <\|cat\|>, which is unknown"),
        ("  ", 0, "prompt 1 is empty"),
        ("<|image|><|image|>", 1, r"prompt 1 says <\|image\|> once more than there are images"),
        ("<|image|>", 3, "2 of 3 images are in no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: str, images: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        documents_of([prompt], [PIXELS] * images, config(), ByteTokenizer())


def test_words_that_the_model_never_met_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = open_tokenizer(str(ROOT / "configs/shapes/tokenizer.json"))
    documents_of(["two  red rings"], [], config(), words)
    assert capsys.readouterr().err == ""
    documents_of(["two red cats"], [], config(), words)
    assert "prompt 1 has what the model's vocabulary lacks: it reads 'two red <|unknown|>'" in capsys.readouterr().err


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    empty = b"P5 0 4 255\n"
    (tmp_path / "empty.png").write_bytes(empty)
    for name, said in (("text.png", "unknown_image_type"), ("empty.png", "no image that can be read")):
        with pytest.raises(ValueError, match=said):
            read_image(tmp_path / name, 3, IMAGE_SIZE)
    with pytest.raises(ValueError, match="is 90 x 10: crop it to a ratio of 8 or less"):
        read_image(Path(picture(tmp_path / "wide.png", 90, 10)), 3, IMAGE_SIZE)
    assert read_image(Path(picture(tmp_path / "a.png", 80, 10)), 3, IMAGE_SIZE).shape == (3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_model_of_classes_draws_labels(classes: str, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert main(["--model", classes, "--label", "2", "--label", "0", "--steps", "1", "--out", str(out)]) == 0
    assert {Picture.open(path).mode for path in out.iterdir()} == {"L"}
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("classes", ["--prompt", "a cat"], "are for unified models"),
        ("classes", ["--label", "3"], "has classes 0 to 2"),
        ("unified", ["--label", "3"], "--label is for models of classes"),
        ("unified", [], "nothing to do: give --prompt or --image"),
        ("unified", ["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_a_model_of_the_other_kind_and_a_missing_part_are_said(
    model: str, arguments: list[str], said: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", request.getfixturevalue(model), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a run folder, RUN:STAGE, or an exported folder"):
        open_model(str(tmp_path))
    (tmp_path / "run.json").write_text('{"format": 1, "recipe": "shapes", "id": "a"}')
    for given in (str(tmp_path), f"{tmp_path}:pretrain"):
        with pytest.raises(ValueError, match="the run's finished stages with a model are none"):
            open_model(given)
    for damaged in ("{", "{}", "[]"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json"):
            open_model(str(tmp_path))
