"""Recipes as a user composes them: every shipped one is valid, and mistakes are explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_train.config import rules
from nvlm_train.config.paths import PACKAGE, find_data_recipe, recipes_dir, resolve_path
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import load_recipe

EXPERIMENTS = sorted(path.stem for path in (recipes_dir() / "experiment").glob("*.yaml"))


def problems_of(*overrides: str, recipes: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(list(overrides), recipes)
    return list(caught.value.problems)


NAMED = [
    "model.tokenizer.path=tokenizer.json",
    "model.language.weights=null",
    "model.vision.weights=null",
]
"""What files of published sizes leave to the user."""


def test_a_published_size_without_its_weights_is_no_recipe() -> None:
    """A frozen backbone with random weights would train without a complaint."""
    assert problems_of("experiment=nvlm_d_2b") == [
        "model.vision.weights is missing (stated in recipes/vision/intern_vit_300m.yaml); "
        "state a string or null for it",
        "model.language.weights is missing (stated in recipes/language/qwen2_5_1_5b.yaml); "
        "state a string or null for it",
        "model.tokenizer.path is missing (stated in recipes/language/qwen2_5_1_5b.yaml); "
        "state a string for it",
    ]


@pytest.mark.parametrize("choice", ["model=null", "parallel@stages.sft.parallel=3"])
def test_a_choice_that_is_no_name(choice: str) -> None:
    (problem,) = problems_of("experiment=smoke", choice)
    assert choice in problem and "choose a file by its name" in problem


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shipped_experiments_are_valid(name: str) -> None:
    named = NAMED if name.startswith("nvlm_") else []
    recipe = load_recipe([f"experiment={name}", *named])
    assert recipe.name == name
    assert recipe.run_dir == f"runs/{name}"
    assert recipe == load_recipe([f"+experiment={name}", *named])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_how_to_run_them(name: str) -> None:
    lines = (recipes_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert f"experiment={name}" in lines[1]


@pytest.mark.parametrize(
    "layout", sorted(path.stem for path in (recipes_dir() / "parallel").glob("*.yaml"))
)
def test_every_layout_fits_the_smoke_recipe(layout: str) -> None:
    """With heads and KV groups for eight tensor-parallel ranks."""
    heads = ["model.language.num_heads=8", "model.language.num_kv_heads=8"]
    recipe = load_recipe(["experiment=smoke", *heads, f"parallel@stages.sft.parallel={layout}"])
    parallel = recipe.stages["sft"].parallel
    rules.check(recipe, parallel.tensor * parallel.pipeline)


def test_fields_that_no_file_states_can_be_set() -> None:
    recipe = load_recipe(
        ["experiment=smoke", "checkpoint.keep_last=5", "stages.sft.optimizer.beta1=0.8"]
    )
    assert recipe.checkpoint.keep_last == 5
    assert recipe.stages["sft"].optimizer.beta1 == 0.8
    assert recipe.stages["pretrain"].optimizer.beta1 == 0.9


def test_exponents_without_a_dot_are_numbers() -> None:
    recipe = load_recipe(["experiment=smoke", "stages.sft.optimizer.min_lr=1e-5"])
    assert recipe.stages["sft"].optimizer.min_lr == 1e-5


def test_unknown_key_on_the_command_line() -> None:
    assert problems_of("experiment=smoke", "stages.sft.optimizer.lrr=3") == [
        "stages.sft.optimizer.lrr=3 is an unknown key (stated in the command line); did you mean lr?"
    ]


def test_all_problems_come_at_once() -> None:
    found = problems_of("experiment=smoke", "sead=1", "stages.sft.steps=many", "model.visin.a=1")
    assert len(found) == 3
    assert "did you mean seed?" in found[0]
    assert found[1].startswith("model.visin") or found[2].startswith("model.visin")


def test_unknown_experiment_names_the_nearest() -> None:
    assert problems_of("experiment=smoek") == [
        "experiment=smoek: no such recipe file; did you mean smoke?"
    ]


def test_a_recipe_without_a_model() -> None:
    (problem,) = problems_of()
    assert "You must specify 'model'" in problem


def test_broken_override() -> None:
    (problem,) = problems_of("experiment=smoke", "seed=[")
    assert problem.startswith("seed=[: not an override")


def test_own_recipes_are_found_and_named(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    (own / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: nvlm_d_smoke\nname: good\n"
    stages = "stages:\n  pretrain: {blend: a}\n  sft: {blend: b}\n"
    (own / "experiment" / "good.yaml").write_text(text + stages)
    (own / "experiment" / "bad.yaml").write_text(text + stages + "chekpoint: {keep_last: 1}\n")
    assert load_recipe(["experiment=good"], own).name == "good"
    (problem,) = problems_of("experiment=bad", recipes=own)
    assert problem == (
        "chekpoint is an unknown key (stated in mine/experiment/bad.yaml); did you mean checkpoint?"
    )


def test_stage_file_is_named_at_its_mount() -> None:
    found = problems_of(
        "experiment=smoke", "+stage@stages.more=d_sft", "schedule=[pretrain,sft,more]"
    )
    assert found == [
        "stages.more.blend is missing (stated in recipes/stage/d_sft.yaml); state a string for it"
    ]


def test_missing_directory_of_recipes() -> None:
    (problem,) = problems_of("experiment=smoke", recipes=Path("nowhere-at-all"))
    assert problem.startswith("recipes=nowhere-at-all: no such directory")


def test_package_paths() -> None:
    assert resolve_path("package://demo/assets") == str(PACKAGE / "demo" / "assets")
    assert resolve_path("plain/path") == "plain/path"
    path = load_recipe(["experiment=smoke"]).model.tokenizer.path
    assert Path(path).is_relative_to(PACKAGE)


def test_unknown_data_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no such data recipe; use one of .*smoke"):
        find_data_recipe("smoek")


def test_a_recipe_loads_without_torch_and_leaves_no_files(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from nvlm_train.recipe.load import load_recipe\n"
        "import nvlm_train.geometry, nvlm_train.batch, nvlm_train.tokens, nvlm_train.logs\n"
        "load_recipe(['experiment=smoke'])\n"
        "heavy = {'torch', 'megatron', 'numpy', 'wandb', 'transformers'}\n"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_another_format_is_refused_before_its_keys_are_judged(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text("# @package _global_\ndefaults:\n  - smoke\nformat: 1\nname: mine\n")
    assert load_recipe(["experiment=mine"], tmp_path).name == "mine"
    own.write_text("# @package _global_\ndefaults:\n  - smoke\nformat: 2\nnaem: mine\n")
    (problem,) = problems_of("experiment=mine", recipes=tmp_path)
    assert problem.startswith("format=2 (stated in ") and "mine.yaml" in problem
    assert "reads recipes of format 1" in problem and "CHANGELOG" in problem


NUMBERS = (
    "stages.sft.optimizer.lr",
    "stages.sft.optimizer.min_lr",
    "stages.sft.optimizer.eps",
    "stages.sft.optimizer.clip_grad",
    "stages.sft.optimizer.weight_decay",
    "stages.sft.optimizer.beta2",
    "stages.sft.hidden_dropout",
    "loader.prefetch_gib",
    "loader.cache_gib",
    "loader.max_skipped_fraction",
    "health.spike_threshold",
    "health.hang_grace_seconds",
    "model.language.norm_eps",
    "model.language.rope_theta",
    "model.language.init_std",
)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_no_field_takes_nan_or_infinity(value: str) -> None:
    found = problems_of("experiment=smoke", *(f"{key}={value}" for key in NUMBERS))
    assert len(found) == len(NUMBERS)
    for key in NUMBERS:
        assert any(line.startswith(f"{key}=") and "is not finite" in line for line in found), key


def test_yamls_own_words_for_them_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    lines = "stages: {sft: {optimizer: {lr: .inf}}}\nhealth: {spike_threshold: .nan}\n"
    own.write_text(f"# @package _global_\ndefaults:\n  - smoke\nname: mine\n{lines}")
    found = problems_of("experiment=mine", recipes=tmp_path)
    assert len(found) == 2 and all("is not finite" in line for line in found)


GROUPS = {
    group: sorted(path.stem for path in (recipes_dir() / group).glob("*.yaml"))
    for group in ("vision", "language")
}
LONG = [f"stages.{stage}.sequence_length=2048" for stage in ("pretrain", "sft")]


@pytest.mark.parametrize(
    ("architecture", "language", "vision"),
    [
        *zip("dxhd", GROUPS["language"], GROUPS["vision"], strict=False),
        *zip("hdxh", GROUPS["language"], reversed(GROUPS["vision"]), strict=False),
    ],
)
def test_any_encoder_goes_with_any_language_model(
    architecture: str, language: str, vision: str
) -> None:
    parts = [f"model=nvlm_{architecture}", f"language={language}", f"vision={vision}"]
    small = ["model.cross_attention.every=2"] if architecture != "d" else []
    recipe = load_recipe(["experiment=smoke", *parts, *small, *LONG, *NAMED])
    alone = load_recipe(["experiment=smoke", f"vision={vision}", *LONG, NAMED[-1]])
    assert recipe.model.vision == alone.model.vision, "files of a group state every field"
    assert recipe.model.architecture == architecture
    wide = recipe.model.language.ffn_hidden_size
    assert recipe.model.projector.ffn_hidden_size == (None if architecture == "x" else wide)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_replaces_all_of_what_was_chosen_before(group: str) -> None:
    """The demo's backbones have weights, which must not stay behind with other sizes."""
    demo = load_recipe(["experiment=demo", *LONG])
    other = load_recipe(["experiment=demo", f"{group}=smoke", *LONG])
    smoke = load_recipe(["experiment=smoke", *LONG])
    assert getattr(demo.model, group).weights is not None
    assert getattr(other.model, group) == getattr(smoke.model, group)


def test_a_group_that_was_not_chosen_is_named() -> None:
    assert problems_of("experiment=smoke", "model=nvlm_d", "vision=smoke") == [
        "model.projector.ffn_hidden_size refers to model.language.ffn_hidden_size, which nothing "
        "states; choose language=NAME (recipes/language/)"
    ]


def test_the_file_that_wins_is_the_one_that_is_named(tmp_path: Path) -> None:
    """An experiment wins over the stage file that it changes."""
    own = tmp_path / "mine"
    (own / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - smoke\nstages: {sft: {steps: many}}\n"
    (own / "experiment" / "bad.yaml").write_text(text)
    (problem,) = problems_of("experiment=bad", recipes=own)
    assert "stages.sft.steps=many" in problem and "mine/experiment/bad.yaml" in problem
