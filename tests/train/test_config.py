import re
import shutil
from pathlib import Path

import pytest

from train import ROOT
from train.config import FinetuneStage, PretrainStage, check_batch
from train.expert_parallel import require_even
from train.hardware import find_hardware, known_hardware
from train.recipe import ConfigError, load_recipe, load_stage, model_of

DIGITS = ROOT / "configs" / "digits"
PRETRAIN = DIGITS / "30_pretrain.yaml"
RECIPES = sorted(path for path in (ROOT / "configs").iterdir() if path.name != "hardware")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of the digits recipe that a test may spoil."""
    return Path(shutil.copytree(DIGITS, tmp_path / "digits"))


def spoil(recipe: Path, file: str, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, (recipe / file).read_text(), count=1)
    assert count == 1
    (recipe / file).write_text(text)


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_every_recipe_of_the_house_is_valid(folder: Path) -> None:
    kinds = [stage.kind for stage in load_recipe(folder).stages]
    assert kinds[-2:] == ["audit", "export"] or not {"pretrain", "finetune_dp"} & set(kinds)


def test_stages_come_in_the_order_of_their_numbers_and_are_named_by_their_files(recipe: Path) -> None:
    (recipe / "70_export.yaml").rename(recipe / "100_export.yaml")
    names = [stage.name for stage in load_recipe(recipe).stages]
    assert names == ["ingest", "filter", "pretrain", "finetune_dp", "eval", "audit", "export"]


def test_a_stage_is_frozen() -> None:
    stage = load_stage(PRETRAIN)
    with pytest.raises(ValueError, match="frozen"):
        stage.name = "other"


# --- overrides ---


def test_an_override_reaches_every_stage_that_has_the_key() -> None:
    recipe = load_recipe(DIGITS, ["log.every=7"])
    assert [stage.log.every for stage in recipe.stages if hasattr(stage, "log")] == [7, 7]


def test_an_override_that_begins_with_a_stage_reaches_that_one_alone() -> None:
    recipe = load_recipe(DIGITS, ["finetune_dp.train.steps=17"])
    steps = {
        stage.name: stage.train.steps for stage in recipe.stages if isinstance(stage, PretrainStage | FinetuneStage)
    }
    assert steps["finetune_dp"] == 17 != steps["pretrain"]
    assert recipe.overrides["finetune_dp"] == ("train.steps=17",)
    assert recipe.overrides["pretrain"] == ()


def test_the_overrides_a_recipe_places_give_the_same_stage_by_hand() -> None:
    recipe = load_recipe(DIGITS, ["log.every=7", "finetune_dp.privacy.target_epsilon=4"])
    for stage in recipe.stages:
        assert load_stage(recipe.paths[stage.name], recipe.overrides[stage.name]) == stage


def test_a_later_override_wins() -> None:
    stage = load_stage(PRETRAIN, ["train.seed=1", "train.seed=2"])
    assert isinstance(stage, PretrainStage) and stage.train.seed == 2


def test_an_override_may_set_a_whole_section() -> None:
    stage = load_stage(PRETRAIN, ["checkpoint={every: 5}"])
    assert isinstance(stage, PretrainStage) and (stage.checkpoint.every, stage.checkpoint.keep) == (5, 3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("privacy.target_epsilom=4", "did you mean privacy.target_epsilon?"),
        ("finetune_dp.train.step=3", "did you mean finetune_dp.train.steps?"),
        ("finetun_dp.train.steps=3", "did you mean finetune_dp.train.steps?"),
        ("finetune_dp.model.size=tiny", "no key finetune_dp.model.size"),
        ("train.steps", "expected KEY=VALUE"),
        ("log={every: [}", "--set log={every: [}: not valid YAML"),
    ],
)
def test_an_override_nobody_has_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(DIGITS, [override])
    assert says in str(error.value)


# --- mistakes ---


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pretrain.train.steps=0", "30_pretrain.yaml: train.steps is 0: it should be greater than 0"),
        ("pretrain.train.steps=true", "train.steps is True: it should be a valid integer"),
        ("pretrain.train.steps=1.5", "train.steps is 1.5"),
        ("optim.learning_rate=.nan", "optim.learning_rate is '.nan'"),
        ("optim.betas=[0.9]", "optim.betas.1 is missing"),
        ("parallel.backend=fsdp", "parallel.backend is 'fsdp' (did you mean fsdp2?); known are single, ddp"),
        ("pretrain.parallel={backend: single, nproc: 2}", "parallel.nproc is 2 but parallel.backend is single"),
        ("objective=null", "objective is None: it should be a mapping"),
        ("privacy.delta=1", "40_finetune_dp.yaml: privacy.delta is 1: it should be less than 1"),
        ("privacy.target_epsilon=0", "privacy.target_epsilon is 0: it should be greater than 0"),
        ("privacy.dataset_cap=0.5", "above privacy.dataset_cap 0.5: lower the target or raise the cap"),
        ("pretrain.split=private", "a pretrain stage gives no privacy"),
        ("pretrain.split=test", "split is test, which is held out: eval stages show its records"),
        ("finetune_dp.split=private_test", "split is private_test, which is held out"),
        ("finetune_dp.parallel.backend=zero3 privacy.clipping=kept_gradients", "set privacy.clipping to auto"),
        (
            "privacy.adaptive_bounds={quantile: 0.5}",
            "privacy.adaptive_bounds needs clipping group_wise, and it is auto",
        ),
        ("privacy.bands=4", "privacy.bands is 4: correlated noise protects units that stay away for as many steps"),
        ("privacy.bands=4 privacy.sampling={method: cyclic_poisson, cycle: 3}", "with a cycle no shorter"),
        ("privacy.unit=user", "unit user needs the number, and unit record takes none"),
        ("privacy.max_records_per_user=2", "privacy.unit is record and privacy.max_records_per_user 2"),
        (
            "privacy.sampling={method: balls}",
            "privacy.sampling.method is 'balls'; known are poisson, truncated_poisson",
        ),
        ("privacy.sampling={method: truncated_poisson}", "max_batch_size is missing with method truncated_poisson"),
        ("privacy.sampling={cycle: 5}", "cycle is 5 with method poisson: it goes with cyclic_poisson, and only there"),
        ("privacy.charge_ahead=0", "privacy.charge_ahead is 0: it should be greater than 0"),
        ("finetune_dp.train.max_grad_norm=1", "train.max_grad_norm is 1 in a private stage"),
        ("finetune_dp.init_from=null", "neither model nor init_from"),
        ("pretrain.data_from=ingets", "no earlier stage of the recipe (did you mean ingest?)"),
        ("export.init_from=eval", "which is of kind eval; it can be pretrain or finetune_dp"),
        ("pretrain.optim.warmup_steps=100000", "more than train.steps"),
        ("model.num_classes=0", "model.num_classes is 0"),
        (
            "pretrain.parallel={backend: zero2, nproc: 2, expert_parallel: 2}",
            "parallel.expert_parallel is 2 under parallel.backend zero2, which keeps all experts together: choose ddp",
        ),
        (
            "pretrain.parallel={backend: ddp, nproc: 4, expert_parallel: 3}",
            "parallel.expert_parallel is 3, and parallel.nproc 4: let one divide the other",
        ),
        (
            "pretrain.parallel={backend: ddp, nproc: 4, expert_parallel: 2, min_ranks: 3}",
            "parallel.min_ranks is 3 with parallel.expert_parallel 2",
        ),
        (
            "pretrain.parallel={backend: ddp, nproc: 2, expert_parallel: 2}",
            "parallel.expert_parallel is 2, but the model has no experts to spread: set it to 1",
        ),
        (
            "finetune_dp.parallel={backend: fsdp2, nproc: 2, expert_parallel: 2}",
            "parallel.expert_parallel is 2 in a private stage",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(DIGITS, re.split(r" (?=privacy\.)", override))
    assert says in str(error.value)


def test_a_mistyped_key_is_refused_with_the_nearest(recipe: Path) -> None:
    spoil(recipe, "30_pretrain.yaml", "  batch_size:", "  batchsize:")
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe)
    assert f"{recipe / '30_pretrain.yaml'}: train.batchsize: unknown key (did you mean train.batch_size?)" in str(
        error.value
    )
    assert f"{recipe / '30_pretrain.yaml'}: train.batch_size is missing" in str(error.value)


def test_privacy_outside_a_private_stage_is_refused(recipe: Path) -> None:
    with (recipe / "30_pretrain.yaml").open("a") as file:
        file.write("privacy: {target_epsilon: 1}\n")
    with pytest.raises(ConfigError, match=r"30_pretrain.yaml: privacy: unknown key"):
        load_recipe(recipe)


def test_a_private_stage_without_privacy_is_refused(recipe: Path) -> None:
    text = (recipe / "40_finetune_dp.yaml").read_text()
    (recipe / "40_finetune_dp.yaml").write_text(text[: text.index("privacy:")])
    with pytest.raises(ConfigError, match=r"40_finetune_dp.yaml: privacy is missing"):
        load_recipe(recipe)


def test_an_unknown_kind_of_stage_is_refused_with_the_nearest(recipe: Path) -> None:
    spoil(recipe, "30_pretrain.yaml", "stage: pretrain", "stage: pretrian")
    with pytest.raises(ConfigError, match=r"stage is 'pretrian' \(did you mean pretrain\?\)"):
        load_recipe(recipe)


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    spoil(recipe, "30_pretrain.yaml", "  seed: ", "  seed: 1\n  seed: ")
    with pytest.raises(ConfigError, match=r"the key 'seed' is given twice"):
        load_recipe(recipe)


def test_a_file_that_is_not_named_as_a_stage_is_refused(recipe: Path) -> None:
    (recipe / "60_audit.yaml").rename(recipe / "audit.yaml")
    with pytest.raises(ConfigError, match=r"a stage file is named NUMBER_NAME\.yaml"):
        load_recipe(recipe)


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such recipe folder \(did you mean .*configs/digits\?\)"):
        load_recipe(ROOT / "configs" / "digit")


# --- batches ---

TWO_RANKS = ("parallel.backend=ddp", "parallel.nproc=2")


@pytest.mark.parametrize(
    ("batch", "micro", "says"),
    [
        (
            63,
            32,
            "2 ranks (parallel.nproc a node) cannot share evenly; nearest valid with train.microbatch_size 32: 64",
        ),
        (129, 32, "nearest valid with train.microbatch_size 32: 128 or 192"),
        (64, 24, "does not divide a rank's share of train.batch_size (64 / 2 ranks = 32): nearest valid: 16 or 32"),
        (64, 33, "nearest valid: 32"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(batch: int, micro: int, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_stage(PRETRAIN, [*TWO_RANKS, f"train.batch_size={batch}", f"train.microbatch_size={micro}"])
    assert says in str(error.value)


def test_a_batch_is_checked_against_the_ranks_there_are() -> None:
    stage = load_stage(PRETRAIN, [*TWO_RANKS, "train.batch_size=64", "train.microbatch_size=8"])
    assert isinstance(stage, PretrainStage)
    with pytest.raises(ValueError, match="3 ranks"):
        check_batch(stage, 3)


@pytest.mark.parametrize(("num_experts", "parts"), [(6, 4), (2, 4), (3, 2)])
def test_experts_that_do_not_divide_are_refused_with_the_parts_that_do(num_experts: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"{parts}, which does not divide a layer's {num_experts} experts") as error:
        require_even(num_experts, parts)
    assert str(error.value).endswith({6: "1, 2, 3 or 6", 2: "1 or 2", 3: "1 or 3"}[num_experts])


@pytest.mark.parametrize(
    "privacy",
    [
        "sampling={method: truncated_poisson, max_batch_size: 160}",
        "sampling={method: cyclic_poisson, cycle: 5}",
        "sampling={method: shuffled}",
        "clipping=group_wise privacy.adaptive_bounds={quantile: 0.6}",
        "unit=user privacy.max_records_per_user=4",
        "bands=5 privacy.sampling={method: cyclic_poisson, cycle: 5}",
    ],
)
def test_every_way_to_sample_clip_and_count_units_can_be_said(privacy: str) -> None:
    stage = load_stage(DIGITS / "40_finetune_dp.yaml", [f"privacy.{key}" for key in privacy.split(" privacy.")])
    assert stage.sha256() != load_stage(DIGITS / "40_finetune_dp.yaml").sha256()


def test_a_private_batch_need_not_divide() -> None:
    load_stage(DIGITS / "40_finetune_dp.yaml", ["train.batch_size=101", "parallel.nproc=3"])


# --- identity ---


@pytest.mark.parametrize(
    "override", ["parallel.nproc=1", "log.every=1", "checkpoint.keep=9", "train.microbatch_size=1"]
)
def test_how_a_stage_runs_is_no_part_of_its_identity(override: str) -> None:
    path = PRETRAIN
    assert load_stage(path, [override]).sha256() == load_stage(path).sha256()


def test_how_many_steps_are_charged_at_once_is_no_part_of_a_private_stages_identity() -> None:
    path = DIGITS / "40_finetune_dp.yaml"
    assert load_stage(path, ["privacy.charge_ahead=9"]).sha256() == load_stage(path).sha256()
    assert load_stage(path, ["privacy.replay_steps=9"]).sha256() != load_stage(path).sha256()


@pytest.mark.parametrize("override", ["train.steps=123457", "optim.learning_rate=0.777", "split=other"])
def test_what_a_stage_computes_is_its_identity(override: str) -> None:
    path = PRETRAIN
    assert load_stage(path, [override]).sha256() != load_stage(path).sha256()


def test_the_model_of_a_stage_is_that_of_the_stage_it_starts_from() -> None:
    recipe = load_recipe(DIGITS)
    finetune = recipe.stage("finetune_dp")
    assert isinstance(finetune, FinetuneStage)
    assert model_of(recipe, finetune).name == "pretrain"


# --- hardware ---


def test_every_gpu_has_dense_peaks_memory_and_bandwidth() -> None:
    known = known_hardware()
    assert set(known) == {"a100", "b200", "cpu", "h100", "h200"}
    for name, hardware in known.items():
        figures = (hardware.peak_flops.bf16, hardware.peak_flops.fp32, hardware.memory_bytes, hardware.bandwidth)
        assert all(figure is None for figure in figures) if name == "cpu" else all(figures)


def test_hardware_is_found_by_device_name_and_never_guessed() -> None:
    found = find_hardware("auto", "NVIDIA H200")
    assert found is not None and found.name == "h200"
    cpu = find_hardware("auto", None)
    assert cpu is not None and cpu.peak_flops.fp32 is None
    with pytest.warns(UserWarning, match="NVIDIA H100 PCIe has no entry"):
        assert find_hardware("auto", "NVIDIA H100 PCIe") is None


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.hardware is 'h300': known are auto, a100"):
        find_hardware("h300", None)
