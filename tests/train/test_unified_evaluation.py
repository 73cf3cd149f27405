"""What eval_unified measures: against the model run by hand, against real drawings, and what it refuses."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from models.packed import image_to_text
from models.unified_objective import UnifiedObjective
from tests.train.unified_models import IMAGE_SIZE, MAX_TOKENS, config, filled, shapes
from train.config import EvalUnifiedStage
from train.documents import layout_of
from train.evaluation import train_classifier
from train.measurements import Row, judged
from train.retrieval import train_encoder
from train.shapes import COLOURS, FORMS, Scene, draw
from train.unified_evaluation import Judges, Measured, Records, Source, bits_per_byte, measure, recognised, side_by_side


def stage(**changes: object) -> EvalUnifiedStage:
    values = {"captions": 6, "images": 4, "sampler_steps": 2, "reference_images": 12, "batch_size": 4}
    return EvalUnifiedStage(
        name="eval", stage="eval_unified", init_from=("pretrain",), data_from="ingest", **{**values, **changes}  # type: ignore[arg-type]
    )  # fmt: skip


def drawn(*scenes: Scene) -> Records:
    images = torch.stack([torch.from_numpy(draw(scene, IMAGE_SIZE)).permute(2, 0, 1) for scene in scenes]) / 127.5 - 1
    return Records(images, images, [scene.caption for scene in scenes])


SCENES = [Scene(form, colour, 1, "large", "in the centre") for form, colour in zip(FORMS, COLOURS, strict=True)]


def values(rows: list[Row]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in rows}  # type: ignore[misc]


def test_bits_are_those_of_each_token_given_what_stands_before_it_and_a_cut_caption_has_no_end() -> None:
    model, records = filled(), drawn(*SCENES[:3])
    records.captions[1] = "é" * MAX_TOKENS  # twice as many bytes
    layout, nats = layout_of(model.config), 0.0
    for image, caption in zip(records.inputs, records.captions, strict=True):
        tokens = [*caption.encode()][:MAX_TOKENS]
        batch = layout.pack([[image_to_text(image, tokens)]])
        logits = model(batch, torch.zeros(1, 1)).logits_BNV[0].log_softmax(-1)
        start = layout.length([image_to_text(image, tokens)[0]])  # of begin_text
        wanted = tokens if caption.startswith("é") else [*tokens, layout.tokenizer.special("end_text")]
        nats -= sum(logits[start + n, token].item() for n, token in enumerate(wanted))
    num_bytes = sum(len(caption.encode()[:MAX_TOKENS]) for caption in records.captions)
    assert bits_per_byte(model, records, batch_size=2) == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_drawings_are_recognised_for_what_they_show_and_for_nothing_else() -> None:
    asked = drawn(*SCENES)
    right, rows = recognised(asked.pixels, asked, "test")
    assert right == [True] * 6 and set(values(rows).values()) == {1.0}
    wrong = asked.pixels.clone()
    wrong[0] = drawn(Scene("circle", "red", 1, "large", "on the left")).pixels  # another place: the same shape
    wrong[1], wrong[2] = asked.pixels[0], torch.rand(3, IMAGE_SIZE, IMAGE_SIZE)
    right, rows = recognised(wrong, asked, "test")
    assert right == [True, False, False, True, True, True]
    found = values(rows)
    assert (found["shapes_recognised.test"], found["scenes_recognised.test"]) == (4 / 6, 3 / 6)
    assert found["shapes_recognised_real.test"] == 1
    asked.captions[3] = "a cat"
    assert recognised(asked.pixels, asked, "test") == (None, [])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = shapes(tmp_path_factory.mktemp("shapes"))
    return Source(folder, folder)


@pytest.fixture(scope="module")
def judges(source: Source) -> Judges:
    """Barely trained, and so judges of nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, train in (("train_classifier", train_classifier), ("train_encoder", train_encoder)):
            patch.setattr(f"train.unified_evaluation.{name}", partial(train, steps=3))
        return source.judges(stage(retrieval=True), config())


def test_figures_are_a_function_of_weights_records_and_seed(source: Source, judges: Judges) -> None:
    model, told = filled(), list[tuple[int, str]]()
    first = measure(model, UnifiedObjective(), stage(), "test", source, judges, lambda *words: told.append(words))
    again = measure(model, UnifiedObjective(), stage(), "test", source, judges, lambda *_: None)
    assert (first.rows, first.written) == (again.rows, again.written) and torch.equal(first.drawn, again.drawn)
    found = values(first.rows)
    assert {name.partition(".")[0] for name in found} == {
        "captions_exact", "bits_per_byte", "shapes_recognised", "shapes_recognised_real", "scenes_recognised",
        "scenes_recognised_real", "frechet_distance", "frechet_distance_real",
        *(f"recall_at_{k}{kind}" for k in (1, 5, 10) for kind in ("", "_real", "_chance")),
    }  # fmt: skip
    assert found["shapes_recognised_real.test"] == 1 and found["frechet_distance.test"] > 0
    assert [row.get("interval") is not None for row in first.rows[:2]] == [True, False]
    done = [n for n, _ in told]
    assert done == sorted(done) and done[-1] == 10
    other = measure(model, UnifiedObjective(), stage(seed=1), "test", source, judges, lambda *_: None)
    assert other.asked.captions != first.asked.captions


def test_captions_to_the_letter_count_and_the_picture_shows_good_and_bad_ones(
    source: Source, judges: Judges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = source.records("test", 24, 0, config())
    lines = [caption if n % 3 else caption.upper() for n, caption in enumerate(records.captions)]
    monkeypatch.setattr("train.unified_evaluation.write", lambda *_, **__: lines)
    found = measure(filled(), UnifiedObjective(), stage(captions=24), "test", source, judges, lambda *_: None)
    assert found.rows[0] == {
        "name": "captions_exact.test", "value": 16 / 24, "unit": "of 24",
        "interval": pytest.approx((0.467, 0.820), abs=0.001),
    }  # fmt: skip
    shown = list[list[list[tuple[str, str]]]]()
    monkeypatch.setattr("train.unified_evaluation.image_grid", lambda *words: shown.append(words[4]))
    found.show_captions(tmp_path / "captions.png", "title")
    assert [len(notes) for notes in shown[0]] == [1] * 5 + [2] * 5  # a bad one stands above the true one
    Measured(**{**vars(found), "written": found.told.captions}).show_captions(tmp_path / "captions.png", "title")
    assert [len(notes) for notes in shown[1]] == [1] * 10


def test_the_pictures_are_made_and_long_words_are_broken(source: Source, tmp_path: Path) -> None:
    records = source.records("test", 4, 0, config())
    captions = ["word " * 30, "x" * 200, "", "one"]
    found = Measured([], records, captions, records, records.pixels, [True, False, True, False])
    for path in (found.show_samples(tmp_path / "a.png", "ε 8"), found.show_captions(tmp_path / "b.png", "ε 8")):
        assert min(Picture.open(path).size) > 100


def test_rows_get_their_thresholds_and_an_unknown_figure_is_refused() -> None:
    rows = [
        Row(name="a.test", value=0.5, unit=""),
        Row(name="b.test", value=None, unit=""),
        Row(name="c", value=1, unit=""),
    ]
    found = {row["name"]: row.get("ok") for row in judged("eval.x", rows, {"a.test": 0.6, "b.test": 0.1}, {"c": 1.0})}
    assert found == {"eval.x.a.test": False, "eval.x.b.test": None, "eval.x.c": True}
    with pytest.raises(ValueError, match=r"at_least names 'a.tets', which was not measured \(did you mean a.test\?\)"):
        judged("eval.x", rows, {"a.tets": 1.0}, {})


def test_a_person_reads_the_models_side_by_side_with_the_real_images() -> None:
    def rows(value: float) -> list[Row]:
        return [
            Row(name="frechet_distance.test", value=value, unit=""),
            Row(name="frechet_distance_real.test", value=1.0, unit=""),
            Row(name="captions_exact.test", value=value / 10, unit="", interval=(0.1, 0.9)),
        ]  # fmt: skip

    assert side_by_side({"pretrain": rows(3.0), "finetune_dp": rows(4.0)}) == {
        "frechet_distance.test": "pretrain 3.000, finetune_dp 4.000, real 1.000",
        "captions_exact.test": "pretrain 0.300 [0.100, 0.900], finetune_dp 0.400 [0.100, 0.900]",
    }


def test_private_records_and_thresholds_of_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="splits names private"):
        stage(splits=("test", "private"))
    with pytest.raises(ValueError, match=r"at_least names finetune_dp, which is not in init_from \(pretrain\)"):
        stage(at_least={"finetune_dp": {"captions_exact.test": 0.5}})
