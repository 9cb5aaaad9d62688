"""Our language model against transformers' Qwen2 with the same weights, and the tables both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvlm_train.batch import RankShare
from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.convert.names import GlobalSlice, to_hugging_face
from nvlm_train.convert.reader import LanguageSource, language_source
from nvlm_train.errors import CheckpointError
from tests.convert import language_runs
from tests.parity import recipes
from tests.parity.recipes import LANGUAGE
from tests.workers import WorkerPool

PACKS = [[(30, 0), (20, 0), (40, 0)], [(96, 0)], [(25, 0)]]
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "PP2": (2, ParallelConfig(pipeline=2)),
}


@pytest.fixture(scope="module")
def expected(qwen2: torch.nn.Module) -> list[list[Tensor]]:
    return expected_of(qwen2)


def expected_of(model: torch.nn.Module) -> list[list[Tensor]]:
    """transformers' logits of each sample of each pack, every sample run alone."""
    (work,) = recipes.step_batch(PACKS, RankShare(), 0).rounds
    with torch.no_grad():
        return [
            [
                model(sample[None]).logits[0]
                for sample in pack.token_ids_S.split(pack.cu_seqlens.diff().tolist())
            ]
            for pack in work.microbatches
        ]


def assert_close(found: list[Tensor], expected: list[list[Tensor]]) -> None:
    for pack, samples in zip(found, expected, strict=True):
        scale = torch.cat(samples).std()
        assert scale > 0.5, "logits of about zero would prove nothing"
        torch.testing.assert_close(pack, torch.cat(samples), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    workers: WorkerPool, qwen2_dir: Path, expected: list[list[Tensor]], layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    found = workers.run(world, language_runs.logits_of, parallel, qwen2_dir, PACKS)[-1]
    assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_a_llama_are_those_of_transformers(
    workers: WorkerPool, llama: torch.nn.Module, llama_dir: Path, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    run = partial(language_runs.logits_of, qkv_bias=False)
    found = workers.run(world, run, parallel, llama_dir, PACKS)[-1]
    assert_close(found, expected_of(llama))


LLAMA_3 = {
    "qkv_bias": False,
    "head_dim": 24,
    "tied_embeddings": True,
    "rope_scaling": RopeScalingConfig("llama3", factor=8.0, original_max_positions=32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_with_stretched_rope_are_those_of_transformers(
    workers: WorkerPool, llama_3: torch.nn.Module, llama_3_dir: Path, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    run = partial(language_runs.logits_of, **LLAMA_3)
    found = workers.run(world, run, parallel, llama_3_dir, PACKS)[-1]
    assert_close(found, expected_of(llama_3))


def test_without_the_stretch_they_are_others(
    workers: WorkerPool, llama_3: torch.nn.Module, llama_3_dir: Path, tmp_path: Path
) -> None:
    """The control: plain RoPE on the same weights, with a config.json that says so."""
    plain = shutil.copytree(llama_3_dir, tmp_path / "plain")
    theta = {"rope_type": "default", "rope_theta": LANGUAGE.rope_theta}
    change_config(plain, lambda stored: stored.update(rope_parameters=theta))
    run = partial(language_runs.logits_of, **LLAMA_3 | {"rope_scaling": None})
    found = workers.run(1, run, ParallelConfig(), plain, PACKS)[-1]
    with pytest.raises(AssertionError):
        assert_close(found, expected_of(llama_3))


@pytest.mark.parametrize("family", ["qwen2", "llama 3"])
def test_two_steps_are_those_of_one_process(
    workers: WorkerPool, qwen2_dir: Path, llama_3_dir: Path, family: str
) -> None:
    directory, fields = {"qwen2": (qwen2_dir, {}), "llama 3": (llama_3_dir, LLAMA_3)}[family]
    run = partial(language_runs.losses_of_steps, **fields)
    layout = ParallelConfig(tensor=2, pipeline=2)
    split = workers.run(4, run, layout, directory, 2)[0]
    alone = workers.run(1, run, ParallelConfig(), directory, 2)[0]
    assert split == pytest.approx(alone, rel=1e-5)
    assert split[1] != split[0]


def test_a_stretch_that_differs_is_named(llama_3_dir: Path) -> None:
    plain = error_of(llama_3_dir, **LLAMA_3 | {"rope_scaling": None})
    assert "model.language.rope_scaling=null" in plain and "type llama3" in plain
    assert (
        "set model.language.rope_scaling={kind: llama3, factor: 8.0, low_freq_factor: 1.0, "
        "high_freq_factor: 4.0, original_max_positions: 32}" in plain
    )
    other = RopeScalingConfig("llama3", factor=4.0, original_max_positions=32)
    message = error_of(llama_3_dir, **LLAMA_3 | {"rope_scaling": other})
    assert "model.language.rope_scaling.factor=4.0" in message and "factor=8.0" in message


def test_import_and_export_round_trip(
    workers: WorkerPool, qwen2: torch.nn.Module, qwen2_dir: Path
) -> None:
    """Bitwise, through a layout that cuts every matrix."""
    layout = ParallelConfig(tensor=2, pipeline=2)
    whole = workers.run(4, language_runs.whole_weights, layout, qwen2_dir)[0]
    exported, stored = to_hugging_face(LANGUAGE, whole), qwen2.state_dict()
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    assert sorted(name for name in whole if name.startswith("projector.")) == [
        "projector.mlp.linear_fc1.weight",
        "projector.mlp.linear_fc2.weight",
        "projector.norm.bias",
        "projector.norm.weight",
    ]


def test_a_padded_vocabulary_gets_zero_rows(qwen2: torch.nn.Module, qwen2_dir: Path) -> None:
    """Whole, and on ranks whose rows are partly or all in the padding."""
    stored = qwen2.state_dict()["lm_head.weight"]
    expected = torch.cat([stored, torch.zeros(64, LANGUAGE.hidden_size)])
    padded = replace(LANGUAGE, weights=str(qwen2_dir), vocab_size=320, num_tokens=256)
    with language_source(padded) as source:
        for rows in (slice(0, 320), slice(240, 280), slice(256, 288), slice(288, 320)):
            assert torch.equal(
                rows_of(source, "language_model.output_layer.weight", 320, rows), expected[rows]
            )


def rows_of(source: LanguageSource, name: str, whole: int, rows: slice) -> Tensor:
    """Rows of a global matrix with inputs of the hidden size; what nothing writes is not a number."""
    hidden = LANGUAGE.hidden_size
    into = torch.full((rows.stop - rows.start, hidden), float("nan"))
    assert source(GlobalSlice(name, (whole, hidden), (rows, slice(0, hidden))), into)
    return into


@pytest.fixture
def broken(qwen2_dir: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(qwen2_dir, tmp_path / "broken")


def error_of(weights: Path, **changes: object) -> str:
    """What is said when the weights are opened."""
    language: LanguageConfig = replace(LANGUAGE, weights=str(weights), **changes)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        open_source(language)
    return str(caught.value)


def open_source(language: LanguageConfig) -> None:
    with language_source(language):
        pass


def change_config(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "config.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_missing_tensor_is_named(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.k_proj.weight"
    for path in broken.glob("*.safetensors"):
        state = load_file(path)
        state.pop(name, None)
        save_file(state, path)
    assert f"model.language.weights={broken}: no tensor named {name}" in error_of(broken)


def test_wrong_sizes_are_all_named(qwen2_dir: Path) -> None:
    message = error_of(qwen2_dir, num_layers=2, rope_theta=1e6)
    assert (
        f"model.language.num_layers=2 but {qwen2_dir}/config.json has num_hidden_layers=4"
        in message
    )
    assert "model.language.rope_theta=1000000.0" in message and "rope_theta=10000.0" in message


def test_wrong_shape_is_named(qwen2_dir: Path) -> None:
    language = replace(LANGUAGE, weights=str(qwen2_dir), vocab_size=200)
    with pytest.raises(CheckpointError, match=r"gives \(256, 64\) .* has \(200, 64\); correct"):
        open_source(language)


def test_tied_embeddings_must_be_the_recipes(broken: Path) -> None:
    change_config(broken, lambda stored: stored.update(tie_word_embeddings=True))
    message = error_of(broken)
    assert "model.language.tied_embeddings=False" in message
    assert "tie_word_embeddings=true" in message


def test_missing_files_are_named(broken: Path, tmp_path: Path) -> None:
    assert "no *.safetensors there" in error_of(tmp_path / "nowhere")
    (broken / "config.json").unlink()
    assert f"model.language.weights={broken}: no config.json there" in error_of(broken)


def test_config_without_a_field_is_refused(broken: Path) -> None:
    change_config(broken, lambda stored: stored.pop("num_key_value_heads"))
    assert "model.language.num_kv_heads=2" in error_of(broken)
