"""The whole of NVLM-D 72B as a start, made small: encoder, projector and language model in one directory.

The files are written by hand from the published names; the parts are compared with independent ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvlm_train.cli import main
from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.convert import check
from nvlm_train.convert.language import language_problems, stored_rows
from nvlm_train.convert.names import to_hugging_face
from nvlm_train.convert.vision import vision_problems
from nvlm_train.convert.whole.projector import projector_problems
from nvlm_train.doctor.weights import check_weights
from nvlm_train.recipe.load import load_recipe
from nvlm_train.vision.digest import encoder_digest
from tests.convert import whole_runs
from tests.hugging_face import sizes
from tests.parity import recipes
from tests.parity.recipes import LANGUAGE, MODEL, VISION
from tests.vision.opengvlab import CONFIG, InternVisionModel, Json, random_model, write
from tests.vision.test_opengvlab import features
from tests.workers import WorkerPool

FEATURES, FFN = 4 * VISION.hidden_size, 96
VISION_CONFIG = CONFIG | {
    "hidden_size": 32, "image_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "patch_size": 8, "norm_type": "rms_norm", "model_type": "intern_vit_6b",
}  # fmt: skip


def whole_config() -> Json:
    """The config.json of NVLM-D 72B; its Qwen2 calls itself a llama, as the published one does."""
    llm = sizes(LANGUAGE) | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "llama", "attention_bias": True,
        "mlp_bias": False, "rope_scaling": {"factor": 3.0, "type": "dynamic"}, "hidden_act": "silu",
        "max_position_embeddings": 32768, "pretraining_tp": 1, "torch_dtype": "float32",
        "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {
        "architectures": ["NVLM_D"], "model_type": "NVLM_D", "llm_config": llm,
        "vision_config": VISION_CONFIG, "downsample_ratio": 0.5, "dynamic_image_size": True,
        "force_image_size": 32, "max_dynamic_patch": 6, "min_dynamic_patch": 1, "ps_version": "v2",
        "select_layer": -1, "template": "chatml", "torch_dtype": "float32", "use_backbone_lora": 0,
        "use_llm_lora": 0, "use_thumbnail": True, "transformers_version": "4.37.2",
        "auto_map": {"AutoModel": "modeling_nvlm_d.NVLM_D_Model"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> InternVisionModel:
    return random_model(VISION_CONFIG, dummy_heads=7)


@pytest.fixture(scope="module")
def mlp1() -> nn.Sequential:
    model = nn.Sequential(
        nn.LayerNorm(FEATURES),
        nn.Linear(FEATURES, FFN, bias=False),
        nn.GELU(),
        nn.Linear(FFN, LANGUAGE.hidden_size, bias=False),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return model


@pytest.fixture(scope="module")
def nvlm_d(
    encoder: nn.Module,
    mlp1: nn.Module,
    qwen2: nn.Module,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Five files and their index."""
    parts = {"vision_model": encoder, "mlp1": mlp1, "language_model": qwen2}
    state = {
        f"{prefix}.{name}": tensor
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    return write(tmp_path_factory.mktemp("nvlm-d"), whole_config(), state, files=5)


@pytest.fixture
def broken(nvlm_d: Path, tmp_path: Path) -> Path:
    """A copy, to break."""
    return shutil.copytree(nvlm_d, tmp_path / "nvlm-d")


def tiles(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def errors(directory: Path, **projector: Any) -> dict[str, str]:
    """By part, what is refused."""
    model = whole_runs.model_from(directory)
    model = replace(model, projector=replace(model.projector, **projector))
    found = {
        "vision": vision_problems(model.vision),
        "projector": projector_problems(model),
        "language": language_problems(model.language, {"sft": 96}),
    }
    return {
        part: "\n".join(str(each) for each in problems if each.level == "error")
        for part, problems in found.items()
    }


NOTHING = {"vision": "", "projector": "", "language": ""}


def test_it_is_accepted_by_doctor_and_training(nvlm_d: Path) -> None:
    assert errors(nvlm_d) == NOTHING
    recipe = recipes.recipe(ParallelConfig(), model=whole_runs.model_from(nvlm_d))
    assert [each.level for each in check_weights(recipe)] == ["ok", "ok", "ok"]
    assert stored_rows(recipe.model.language) == LANGUAGE.vocab_size


def test_its_sizes_make_a_recipe(nvlm_d: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One directory for both backbones; `nvlm convert inspect` says how."""
    own = [f"model.{part}.from={nvlm_d}" for part in ("vision", "language")]
    tokenizer = "model.tokenizer.path=package://demo/assets/language_model"
    model = load_recipe(["experiment=smoke", "model=nvlm_d", tokenizer, *own]).model
    expected = whole_runs.model_from(nvlm_d)
    assert replace(model.vision, batch_tiles=expected.vision.batch_tiles) == expected.vision
    assert replace(model.language, init_std=expected.language.init_std) == expected.language
    assert main(["convert", "inspect", str(nvlm_d)]) == 0
    output = capsys.readouterr().out
    assert "in a whole NVLM_D" in output
    for setting in (*own, f"model.projector.weights={nvlm_d}"):
        assert setting in output


@pytest.mark.parametrize("layout", ["TP2 x PP2", "one process"])
def test_every_part_starts_as_it_lies_there(
    workers: WorkerPool,
    nvlm_d: Path,
    encoder: nn.Module,
    mlp1: nn.Module,
    qwen2: nn.Module,
    layout: str,
) -> None:
    split = layout != "one process"
    parallel = ParallelConfig(tensor=2, pipeline=2) if split else ParallelConfig()
    start = workers.run(4 if split else 1, whole_runs.start_of, parallel, nvlm_d, tiles(3))
    whole, found, _ = start[0]
    for part in start:
        torch.testing.assert_close(part[1], features(encoder, tiles(3)), rtol=0, atol=1e-4)
    assert found.std() > 0.1
    exported, stored = to_hugging_face(LANGUAGE, whole), qwen2.state_dict()
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    for ours, theirs in {
        "projector.norm.weight": "0.weight", "projector.norm.bias": "0.bias",
        "projector.mlp.linear_fc1.weight": "1.weight", "projector.mlp.linear_fc2.weight": "3.weight",
    }.items():  # fmt: skip
        assert torch.equal(whole[ours], mlp1.state_dict()[theirs]), ours


def test_two_steps_are_those_of_one_process(workers: WorkerPool, nvlm_d: Path) -> None:
    split = ParallelConfig(tensor=2, pipeline=2)
    _, _, losses = workers.run(4, whole_runs.start_of, split, nvlm_d, tiles(1))[0]
    _, _, alone = workers.run(1, whole_runs.start_of, ParallelConfig(), nvlm_d, tiles(1))[0]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert losses[0] != losses[1]


def test_the_language_model_sees_what_mlp1_makes(
    workers: WorkerPool, nvlm_d: Path, encoder: nn.Module, mlp1: nn.Module
) -> None:
    (found,) = workers.run(1, whole_runs.projected, nvlm_d, tiles(2))
    with torch.no_grad():
        expected = mlp1(features(encoder, tiles(2)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_only_the_encoder_of_a_whole_model_counts_for_its_digest(
    nvlm_d: Path, encoder: nn.Module, tmp_path: Path
) -> None:
    alone = write(tmp_path / "alone", VISION_CONFIG, encoder.state_dict())
    digests = {encoder_digest(replace(VISION, weights=str(each)), 1) for each in (nvlm_d, alone)}
    assert len(digests) == 1


def change_config(directory: Path, change: Callable[[Json], object]) -> None:
    path = directory / "config.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


LIES: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"ps_version": "v1"}, "ps_version=v1", {"projector"}),
    ({"downsample_ratio": 0.25}, "downsample_ratio=0.25", {"projector"}),
    ({"select_layer": -2}, "select_layer=-2", {"vision"}),
    ({"force_image_size": 64}, "force_image_size=64", {"vision"}),
    ({"use_backbone_lora": 8}, "use_backbone_lora=8", {"vision"}),
    ({"use_llm_lora": 8}, "use_llm_lora=8", {"language"}),
    ({"vision_config": None}, "no group vision_config", {"vision"}),
    ({"llm_config": []}, "no group llm_config", {"language"}),
    ({"window": 7}, "window=7, a key that is not known here", {"vision", "projector", "language"}),
    ({"torch_dtype": "int8"}, "torch_dtype=int8", {"vision", "projector", "language"}),
    ({"model_type": "llava"}, "model_type=llava", {"vision", "projector", "language"}),
]


@pytest.mark.parametrize(
    ("changes", "message", "parts"), LIES, ids=[message for _, message, _ in LIES]
)
def test_a_config_that_lies_is_named_by_the_parts_that_it_changes(
    broken: Path, changes: dict[str, Any], message: str, parts: set[str]
) -> None:
    change_config(broken, lambda stored: stored.update(changes))
    found = errors(broken)
    assert {part for part, text in found.items() if message in text} == parts
    if "model_type" not in changes:
        assert {part for part, text in found.items() if text} == parts


def test_groups_that_lie(broken: Path) -> None:
    change_config(broken, lambda stored: stored["vision_config"].update(hidden_size=64))
    change_config(broken, lambda stored: stored["llm_config"].update(num_key_value_heads=4))
    found = errors(broken)
    assert "config.json (vision_config) has hidden_size=64" in found["vision"]
    assert "config.json (llm_config) has num_key_value_heads=4" in found["language"]


def test_another_language_model_is_named(broken: Path) -> None:
    change_config(
        broken, lambda stored: stored["llm_config"].update(architectures=["InternLM2ForCausalLM"])
    )
    assert "InternLM2ForCausalLM" in errors(broken)["language"]


def change(directory: Path, name: str, tensor: Tensor | None) -> None:
    """A tensor written over, added, or removed with its line of the index."""
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = directory / index["weight_map"].get(name, "model-00001-of-00005.safetensors")
    state = load_file(file)
    state.pop(name, None)
    index["weight_map"].pop(name, None)
    if tensor is not None:
        state[name], index["weight_map"][name] = tensor, file.name
    save_file(state, file)
    index_path.write_text(json.dumps(index))


TENSORS: dict[str, tuple[str, Tensor | None, str, str]] = {
    "no linear": ("mlp1.3.weight", None, "projector", "no tensor named mlp1.3.weight"),
    "another width": (
        "mlp1.1.weight", torch.zeros(80, FEATURES), "projector", "mlp1.1.weight gives (80, 128)"
    ),
    "a bias, as InternVL's": (
        "mlp1.1.bias", torch.zeros(FFN), "projector", "unexpected=['mlp1.1.bias']"
    ),
    "quantised": (
        "mlp1.3.weight", torch.zeros(64, FFN, dtype=torch.int8), "projector",
        "mlp1.3.weight has dtype=I8",
    ),
    "no norm of the encoder": (
        "vision_model.encoder.layers.1.norm2.weight", None, "vision",
        "no tensor named encoder.layers.1.norm2.weight",
    ),
    "no norm of the language model": (
        "language_model.model.norm.weight", None, "language", "no tensor named model.norm.weight"
    ),
    "a part that nobody knows": ("audio.weight", torch.zeros(2), "vision", "unexpected=['audio.weight']"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_is_wrong_is_named_by_its_part(broken: Path, case: str) -> None:
    name, tensor, part, message = TENSORS[case]
    change(broken, name, tensor)
    found = errors(broken)
    assert message in found[part]
    if case != "a part that nobody knows":
        assert all(not text for other, text in found.items() if other != part)


def test_the_doctor_finds_dummy_heads_that_are_not_zero(broken: Path, encoder: nn.Module) -> None:
    name = "vision_model.encoder.layers.1.attn.{}.weight"
    attention = encoder.encoder["layers"][1].attn
    values, columns = attention.qkv.weight.data.clone(), attention.proj.weight.data.clone()
    change(broken, name.format("qkv"), values.index_fill(0, torch.tensor([3 * 88 - 1]), 1.0))
    assert errors(broken) == NOTHING, "columns of zeros are enough"
    change(broken, name.format("proj"), columns.index_fill(1, torch.tensor([87]), 1.0))
    recipe = recipes.recipe(ParallelConfig(), model=whole_runs.model_from(broken))
    (problem,) = (each for each in check_weights(recipe) if each.level == "error")
    assert "dummy head 10 of layer 1 is not zero" in problem.text


def test_what_the_recipe_must_say_for_mlp1(nvlm_d: Path) -> None:
    found = errors(nvlm_d, norm_eps=1e-6, ffn_hidden_size=80)["projector"]
    assert (
        "model.projector.norm_eps=1e-06" in found and "set model.projector.norm_eps=1e-05" in found
    )
    assert "mlp1.1.weight gives (96, 128)" in found
    assert "ffn_hidden_size=null is one linear" in errors(nvlm_d, ffn_hidden_size=None)["projector"]


def test_a_directory_without_a_projector(qwen2_dir: Path) -> None:
    found = errors(qwen2_dir)["projector"]
    assert (
        "model_type=qwen2, a projector is read out of model_type=NVLM_D or internvl_chat" in found
    )


def test_a_run_with_a_checkpoint_does_not_need_the_projector_any_more(tmp_path: Path) -> None:
    model: ModelConfig = replace(
        MODEL, projector=replace(MODEL.projector, weights=str(tmp_path / "gone"))
    )
    recipe = replace(recipes.recipe(ParallelConfig(), model=model), run_dir=str(tmp_path))
    assert {each.level for each in check.projector(recipe)} == {"error"}
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / "manifest.json").write_text("{}")
    assert {each.level for each in check.projector(recipe)} == {"warning"}
