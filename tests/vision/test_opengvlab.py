"""InternViT as OpenGVLab and NVLM-D lay it out, against an independent implementation of theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.vision import vision_problems
from nvlm_train.errors import CheckpointError
from nvlm_train.vision.build import build_vision_encoder
from nvlm_train.vision.features import IMAGENET_MEAN, IMAGENET_STD
from tests.convert.files.alterations import alterations
from tests.vision.opengvlab import CONFIG, CONFIG_300M, Json, random_model, write
from tests.vision.test_intern_vit import CONFIG as VISION
from tests.vision.test_intern_vit import shuffle_by_loops, tiles

PUBLISHED = {"intern_vit_6b": CONFIG, "intern_vit_300m": CONFIG_300M}
QKV = "encoder.layers.1.attn.qkv.weight"
PROJ = "encoder.layers.1.attn.proj.weight"


def features(model: torch.nn.Module, tiles_TCEE: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return shuffle_by_loops(model((tiles_TCEE.float() / 255 - mean) / std)[:, 1:])


def build(vision: VisionConfig) -> Any:
    return build_vision_encoder(vision, torch.float32, torch.device("cpu"), seed=1)


def errors(directory: Path, **changes: Any) -> list[str]:
    vision = replace(VISION, weights=str(directory), **changes)
    return [str(each) for each in vision_problems(vision) if each.level == "error"]


def test_heads_of_zeros_change_nothing_in_the_reference() -> None:
    """And what is not zero counts in it, or the comparisons below would prove nothing."""
    plain, padded = random_model(CONFIG), random_model(CONFIG, 7)
    for name, parameter in padded.named_parameters():
        real = plain.get_parameter(name).data
        parameter.data.zero_()
        for block in range(3 if "qkv" in name else 1):
            rows = real.unflatten(0, (3, -1))[block] if "qkv" in name else real
            index = [slice(0, size) for size in rows.shape]
            index[0] = slice(block * 96, block * 96 + len(rows))
            parameter.data[tuple(index)] = rows
    expected = features(plain, tiles(2))
    torch.testing.assert_close(features(padded, tiles(2)), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        plain.encoder["layers"][0].attn.q_norm.weight[1] += 1
    assert (features(plain, tiles(2)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize(
    ("kind", "dummy_heads"), [("intern_vit_6b", 0), ("intern_vit_6b", 7), ("intern_vit_300m", 0)]
)
def test_features_are_those_of_the_published_code(
    kind: str, dummy_heads: int, prefix: str, files: int, tmp_path: Path
) -> None:
    config = PUBLISHED[kind]
    model = random_model(config, dummy_heads)
    directory = write(tmp_path / "encoder", config, model.state_dict(), files, prefix)
    vision = replace(VISION, kind=kind, weights=str(directory))
    assert [str(each) for each in vision_problems(vision)] == []
    expected = features(model, tiles(3))
    assert expected.std() > 0.5
    torch.testing.assert_close(build(vision)(tiles(3)), expected, rtol=0, atol=1e-4)


def test_another_epsilon_is_right_in_this_layout(tmp_path: Path) -> None:
    """OpenGVLab's norms of queries and keys take it from the same key, as ours do."""
    config = CONFIG | {"layer_norm_eps": 1e-2}
    model = random_model(config)
    directory = write(tmp_path / "encoder", config, model.state_dict())
    found = build(replace(VISION, norm_eps=1e-2, weights=str(directory)))(tiles(2))
    torch.testing.assert_close(found, features(model, tiles(2)), rtol=0, atol=1e-4)


def test_bf16_files_are_read_as_they_are(tmp_path: Path) -> None:
    state = {name: each.bfloat16() for name, each in random_model(CONFIG, 7).state_dict().items()}
    directory = write(tmp_path / "encoder", CONFIG | {"torch_dtype": "bfloat16"}, state)
    model = random_model(CONFIG, 7)
    model.load_state_dict({name: each.float() for name, each in state.items()})
    found = build(replace(VISION, weights=str(directory)))(tiles(2))
    torch.testing.assert_close(found, features(model, tiles(2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "zero",
    [
        {},
        {QKV: (slice(2 * 96 + 40, None), slice(None))},
        {PROJ: (slice(None), slice(40, None))},
    ],
    ids=["neither", "values", "columns"],
)
def test_dummy_heads_must_add_nothing(zero: dict[str, Any], tmp_path: Path) -> None:
    """Zero values or zero columns are enough; otherwise cutting would change what is computed."""
    model = random_model(CONFIG, 7)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    state[QKV][2 * 96 + 40 + 17] = 1.0
    state[PROJ][:, 40 + 17] = 1.0
    for name, index in zero.items():
        state[name][index] = 0.0
    directory = write(tmp_path / "encoder", CONFIG, state)
    model.load_state_dict(state)
    if zero:
        found = build(replace(VISION, weights=str(directory)))(tiles(2))
        torch.testing.assert_close(found, features(model, tiles(2)), rtol=0, atol=1e-4)
        return
    (problem,) = errors(directory)
    assert "dummy head 7 of layer 1 is not zero" in problem and QKV in problem and PROJ in problem
    with pytest.raises(CheckpointError, match="dummy head 7 of layer 1 is not zero"):
        build(replace(VISION, weights=str(directory)))


def test_real_heads_are_no_dummy_heads(tmp_path: Path) -> None:
    """A config.json that states too few heads does not cut away the others."""
    model = random_model(CONFIG, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    (problem,) = errors(write(tmp_path / "encoder", CONFIG, model.state_dict()))
    assert "dummy head 5 of layer 0 is not zero" in problem


def test_rows_that_are_no_whole_heads_are_a_wrong_shape(tmp_path: Path) -> None:
    state = random_model(CONFIG, 7).state_dict()
    state[QKV.replace("1", "0")] = torch.zeros(3 * 40 + 3, 40)
    found = "\n".join(errors(write(tmp_path / "encoder", CONFIG, state)))
    assert "encoder.layers.0.attn.qkv.weight gives (123, 40)" in found


def test_biased_encoders_have_no_dummy_heads(tmp_path: Path) -> None:
    directory = write(tmp_path / "e", CONFIG_300M, random_model(CONFIG_300M, 7).state_dict())
    found = "\n".join(errors(directory, kind="intern_vit_300m"))
    assert "attn.qkv.weight gives (288, 40)" in found and "attn.proj.weight gives (40, 96)" in found


def changed(name: str, tensor: Tensor | None, config: Json, tmp_path: Path) -> str:
    state = dict(random_model(config).state_dict())
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    return "\n".join(errors(write(tmp_path / "encoder", config, state)))


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    ls1 = "encoder.layers.2.ls1"
    assert f"no tensor named {ls1}" in changed(ls1, None, CONFIG, tmp_path)
    assert f"{ls1} gives (41,)" in changed(ls1, torch.ones(41), CONFIG, tmp_path)
    found = changed(ls1, torch.ones(40, dtype=torch.int8), CONFIG, tmp_path)
    assert f"{ls1} has dtype=I8" in found
    for extra in ("encoder.layers.3.ls1", "head.0.weight", "encoder.layers.0.attn.qkv.bias"):
        assert f"unexpected=['{extra}']" in changed(extra, torch.ones(120), CONFIG, tmp_path)


def test_a_cut_file_and_an_index_that_lies(tmp_path: Path) -> None:
    directory = write(tmp_path / "e", CONFIG, random_model(CONFIG).state_dict(), files=2)
    first, second = sorted(directory.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    assert f"{second.name} is not a whole safetensors file" in "\n".join(errors(directory))
    second.unlink()
    assert f"names {second.name}, which is not there" in "\n".join(errors(directory))
    first.unlink()
    assert errors(directory) != []


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_key_that_changes_features_is_named(kind: str, tmp_path: Path) -> None:
    """Each key of the published config.json altered, removed and added in turn."""
    config = PUBLISHED[kind]
    state = random_model(config).state_dict()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = random_model(config)(pixels)
    directory = write(tmp_path / "encoder", config, state)
    added = {
        "quantization_config": {"quant_method": "fp8"},
        "select_layer": -4,
        "norm_type": "rms_norm",
    }
    passed_over, named = [], 0
    for key, altered in alterations(config, added):
        (directory / "config.json").write_text(json.dumps(altered))
        if any(key in each for each in errors(directory, kind=kind)):
            named += 1
        elif differs(altered, state, pixels, expected):
            passed_over.append((key, altered.get(key, "removed")))
    assert passed_over == []
    assert named > 20, "a check of nothing would pass"


def differs(config: Json, state: dict[str, Tensor], pixels: Tensor, expected: Tensor) -> bool:
    """What the published code would compute; a config that it cannot build is different, too."""
    try:
        model = random_model(config)
        model.load_state_dict(state)
        found = model(pixels)
    except (KeyError, RuntimeError, TypeError, ZeroDivisionError, ValueError):
        return True
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "other"), [tuple(PUBLISHED), tuple(reversed(PUBLISHED))])
def test_the_other_kind_is_named(kind: str, other: str, tmp_path: Path) -> None:
    model = random_model(PUBLISHED[other])
    directory = write(tmp_path / "encoder", PUBLISHED[other], model.state_dict())
    assert f"set model.vision.kind={other}" in "\n".join(errors(directory, kind=kind))
