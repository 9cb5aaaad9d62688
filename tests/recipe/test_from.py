"""`model.language.from` and `model.vision.from`: sizes from config.json, and what else is stated."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig
from nvlm_train.convert.language import language_problems
from nvlm_train.convert.vision import vision_problems
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import as_yaml, load_recipe
from tests.hugging_face import KINDS, encoder_sizes, sizes
from tests.parity.recipes import LANGUAGE, VISION

TOKENIZER = "model.tokenizer.path=package://demo/assets/language_model"
START = ["experiment=smoke", "model=nvlm_d", "vision=smoke", TOKENIZER]
"""An NVLM-D whose language model nobody states."""
NAMES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
STRETCH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 1},
    "llama": {"rope_parameters": STRETCH},
    "mistral": {"head_dim": 12, "sliding_window": None},
}


def write_language(directory: Path, family: str, **changes: Any) -> Path:
    """What save_pretrained writes of a small model."""
    import transformers

    config = getattr(transformers, f"{NAMES[family]}Config")
    model = getattr(transformers, f"{NAMES[family]}ForCausalLM")
    names = sizes(LANGUAGE) | {"vocab_size": 641} | changes
    if "rope_parameters" in changes:
        del names["rope_theta"]
    model(config(**names)).save_pretrained(directory)
    return directory


def write_encoder(directory: Path, kind: str) -> Path:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(**encoder_sizes(replace(VISION, kind=kind)))
    InternVLVisionModel(config).save_pretrained(directory)
    return directory


def from_(directory: Path, *more: str) -> LanguageConfig:
    return load_recipe([*START, f"model.language.from={directory}", *more]).model.language


@pytest.mark.parametrize("family", NAMES)
def test_every_size_comes_from_the_weights(family: str, tmp_path: Path) -> None:
    directory = write_language(tmp_path / "weights", family, **OTHERS[family])
    language = from_(directory)
    assert language.weights == str(directory) and language.vocab_size == 641
    assert list(language_problems(language, {})) == []
    expected = {
        "qwen2": (None, True, False, True, None, 10_000.0, 2),
        "qwen3": (24, False, True, False, None, 10_000.0, 1),
        "llama": (
            16, False, False, False,
            RopeScalingConfig("llama3", 8.0, 1.0, 4.0, original_max_positions=32), 500.0, 2,
        ),
        "mistral": (12, False, False, False, None, 10_000.0, 2),
    }  # fmt: skip
    found = (
        language.head_dim, language.qkv_bias, language.qk_norm, language.tied_embeddings,
        language.rope_scaling, language.rope_theta, language.num_kv_heads,
    )  # fmt: skip
    assert found == expected[family]


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_s_kind_and_sizes_come_from_the_weights(kind: str, tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "encoder", kind)
    vision = load_recipe(["experiment=smoke", f"model.vision.from={directory}"]).model.vision
    assert vision.kind == kind and list(vision_problems(vision)) == []
    assert vision == replace(VISION, kind=kind, weights=str(directory), batch_tiles=8)


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return write_language(tmp_path / "weights", "qwen2")


def test_sizes_of_earlier_files_give_way(qwen2: Path) -> None:
    """Those of language=qwen2_72b, say; what refers to sizes follows."""
    settings = [*START, "language=qwen2_72b", f"model.language.from={qwen2}"]
    model = load_recipe(settings).model
    assert model.language.num_layers == LANGUAGE.num_layers
    assert model.projector.ffn_hidden_size == LANGUAGE.ffn_hidden_size


def test_what_is_stated_beside_it_stays_and_must_agree(qwen2: Path) -> None:
    language = from_(qwen2, "model.language.num_layers=2", "model.language.init_std=0.5")
    assert (language.num_layers, language.init_std) == (2, 0.5)
    texts = [each.text for each in language_problems(language, {})]
    assert any("model.language.num_layers=2 but" in text for text in texts)


def test_what_an_experiment_states_beside_it_stays(qwen2: Path, tmp_path: Path) -> None:
    own = {"from": str(qwen2), "vocab_size": 704, "weights": None}
    path = tmp_path / "mine/experiment/own.yaml"
    path.parent.mkdir(parents=True)
    tokenizer = {"path": "package://demo/assets/language_model"}
    body = {"defaults": ["smoke"], "model": {"language": own, "tokenizer": tokenizer}}
    path.write_text("# @package _global_\n" + yaml.safe_dump(body))
    language = load_recipe(["experiment=own"], tmp_path / "mine").model.language
    assert (language.vocab_size, language.num_tokens, language.weights) == (704, 641, None)
    later = load_recipe(["experiment=own", f"model.language.from={qwen2}"], tmp_path / "mine")
    assert (later.model.language.vocab_size, later.model.language.num_tokens) == (641, None)
    assert later.model.language.weights == str(qwen2)


@pytest.mark.parametrize("by", ["from", "weights"])
def test_rows_beyond_those_of_the_weights_are_padding(qwen2: Path, by: str) -> None:
    stated = ["model.language.vocab_size=704"]
    if by == "from":
        language = from_(qwen2, *stated)
    else:
        settings = ["experiment=smoke", f"model.language.weights={qwen2}", *stated]
        language = load_recipe(settings).model.language
    assert (language.vocab_size, language.num_tokens) == (704, 641)


def test_a_table_that_a_layout_does_not_divide_is_padded(qwen2: Path, tmp_path: Path) -> None:
    """The first size that the layouts of all scheduled stages cut; a run keeps it in every other layout."""
    tp2 = [f"stages.{name}.parallel.tensor=2" for name in ("pretrain", "sft")]
    assert (from_(qwen2).vocab_size, from_(qwen2).num_tokens) == (641, None)
    for layouts in (tp2, tp2[:1], tp2[1:]):
        language = from_(qwen2, *layouts)
        assert (language.vocab_size, language.num_tokens) == (704, 641)
        assert list(language_problems(language, {})) == []
    alone = from_(qwen2, "schedule=[pretrain]", tp2[1])
    assert (alone.vocab_size, alone.num_tokens) == (641, None), "sft does not run"
    with pytest.raises(ConfigError, match=r"vocab_size=643; use 704, .*num_tokens=641"):
        from_(qwen2, *tp2, "model.language.vocab_size=643")

    settings = [*START, f"run_dir={tmp_path / 'run'}", f"model.language.from={qwen2}"]
    begun([*settings, *tp2], tmp_path / "run")
    later = load_recipe(settings).model.language
    assert (later.vocab_size, later.num_tokens) == (704, 641)


def test_the_tokenizer_beside_the_weights_is_the_recipe_s(qwen2: Path) -> None:
    shipped = load_recipe(["experiment=smoke"]).model.tokenizer.path
    content = (Path(shipped) / "tokenizer.json").read_bytes()
    settings = ["experiment=smoke", f"model.language.from={qwen2}"]
    assert load_recipe(settings).model.tokenizer.path == shipped
    (qwen2 / "tokenizer.json").write_bytes(content)
    assert load_recipe(settings).model.tokenizer.path == str(qwen2)
    assert load_recipe([*settings, TOKENIZER]).model.tokenizer.path == shipped


def begun(recipe_settings: list[str], run_dir: Path) -> None:
    """A complete checkpoint of the recipe, without its tensors."""
    model = yaml.safe_load(as_yaml(load_recipe(recipe_settings)))["model"]
    checkpoint = run_dir / "checkpoints/pretrain-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"recipe": {"model": model}}))
    (checkpoint / "manifest.json").write_text("{}")


def test_a_run_goes_on_when_the_weights_have_gone(qwen2: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    settings = [*START, run, f"model.language.from={qwen2}", "model.language.vocab_size=704"]
    before = load_recipe(settings)
    begun(settings, tmp_path / "run")
    qwen2.rename(tmp_path / "elsewhere")
    assert load_recipe(settings) == before
    with pytest.raises(ConfigError) as caught:
        load_recipe([*settings, f"run_dir={tmp_path / 'other'}"])
    assert f"model.language.from={qwen2}: no config.json there" in str(caught.value)


def test_a_run_that_was_begun_without_num_tokens_goes_on_without(
    qwen2: Path, tmp_path: Path
) -> None:
    settings = ["experiment=smoke", f"run_dir={tmp_path / 'run'}", "model.language.vocab_size=704"]
    begun(settings, tmp_path / "run")
    language = load_recipe([*settings, f"model.language.weights={qwen2}"]).model.language
    assert language.num_tokens is None
    (found,) = [each for each in language_problems(language, {}) if "num_tokens" in each.text]
    assert found.level == "warning" and "set model.language.num_tokens=641" in found.remedy


def test_a_value_of_another_type_names_the_file(qwen2: Path) -> None:
    path = qwen2 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": "four"}))
    with pytest.raises(ConfigError) as caught:
        from_(qwen2)
    assert f"model.language.num_layers=four (str) has the wrong type (stated in {path})" in str(
        caught.value
    )


def test_a_model_that_is_not_read_is_named(qwen2: Path) -> None:
    path = qwen2 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma"}))
    with pytest.raises(ConfigError, match="model_type=gemma, the language model of NVLM reads"):
        from_(qwen2)


def test_cfg_prints_the_whole_recipe_without_torch(qwen2: Path) -> None:
    code = (
        "import sys; from nvlm_train.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'megatron'} & sys.modules.keys(); sys.exit(code)"
    )
    settings = [*START, f"model.language.from={qwen2}", "--cfg", "job"]
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", *settings], capture_output=True, text=True, check=True
    )
    printed = yaml.safe_load(ended.stdout)
    assert printed["model"]["language"]["num_layers"] == LANGUAGE.num_layers
    assert "from" not in printed["model"]["language"]


def test_a_mapping_on_the_command_line_states_what_is_in_it(qwen2: Path) -> None:
    """Hydra merges it: sizes that are not in it come from the weights."""
    own = f"model.language={{from: {qwen2}, vocab_size: 704}}"
    language = load_recipe(["experiment=smoke", own]).model.language
    assert (language.vocab_size, language.num_tokens) == (704, 641)
    assert language.weights == str(qwen2) and language.rope_theta == 10_000.0


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(["experiment=smoke", *overrides])
    return list(caught.value.problems)


def test_null_is_no_directory() -> None:
    assert load_recipe(["experiment=smoke", "model.language.from=null"]) == load_recipe(
        ["experiment=smoke"]
    )


@pytest.mark.parametrize("value", ["[a,b]", "{a: b}", "3", "true", "", "'???'"])
def test_what_is_no_path_is_refused(value: str) -> None:
    (problem,) = problems_of(f"model.language.from={value}")
    assert problem.startswith("model.language.from=") and "give its path, or null" in problem


def test_everything_that_is_wrong_is_said_at_once(qwen2: Path) -> None:
    file = qwen2 / "config.json"
    found = problems_of(f"model.vision.from={file}", "model.language.from=/no/where", "sead=1")
    assert found[0].startswith(f"model.vision.from={file}: no config.json there: that is a file")
    assert found[1].startswith(
        "model.language.from=/no/where: no config.json there: no such directory"
    )
    assert found[2].startswith("sead=1 is an unknown key") and len(found) == 3


@pytest.mark.parametrize("key", ["stages", "stages.sft", "stages.sft.parallel", "schedule"])
def test_what_is_no_group_is_named(qwen2: Path, key: str) -> None:
    found = problems_of(f"model.language.from={qwen2}", f"{key}=5")
    assert any(each.startswith(f"{key}=5 (int) has the wrong type") for each in found)


@pytest.mark.parametrize("value", [10**12, 10**18])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_that_no_model_has_is_named_at_once(qwen2: Path, key: str, value: int) -> None:
    """Lists of so many layers, or divisors of so many channels, would never end."""
    path = qwen2 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    found = problems_of(f"model.language.from={qwen2}")
    assert any(f"={value} is out of range; use from 1 to" in each for each in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", -1.0), ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0})],
)
def test_a_number_that_gives_none_is_named(qwen2: Path, key: str, value: Any) -> None:
    path = qwen2 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (problem,) = problems_of(f"model.language.from={qwen2}")
    assert "is out of range" in problem and (
        "norm_eps=-1.0" in problem or "rope_theta=0.0" in problem
    )


def test_the_home_directory_is_not_looked_up() -> None:
    (problem,) = problems_of("model.language.from=~/weights")
    assert "~ is not replaced" in problem and "write $HOME" in problem


def test_what_cfg_prints_is_the_recipe_again(qwen2: Path, tmp_path: Path) -> None:
    settings = [*START, f"model.language.from={qwen2}", "stages.sft.parallel.tensor=2"]
    recipe = load_recipe(settings)
    assert (recipe.model.language.vocab_size, recipe.model.language.num_tokens) == (704, 641)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/again.yaml").write_text(as_yaml(recipe))
    assert load_recipe(["experiment=again", "model=nvlm_x"], tmp_path) == recipe
