"""Each key of a vision encoder's config.json in turn: whatever changes its features is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train.convert.vision import KINDS, kind_of, vision_problems
from nvlm_train.errors import CheckpointError
from nvlm_train.vision.build import build_vision_encoder
from nvlm_train.vision.intern_vit import InternViT
from tests.convert.files.alterations import alterations
from tests.convert.files.conftest import Write
from tests.convert.files.models import PIXELS, VISION, features
from tests.vision.placed import placed


def errors(directory: Path, **changes: Any) -> list[str]:
    vision = replace(VISION, weights=str(directory), **changes)
    return [str(each) for each in vision_problems(vision) if each.level == "error"]


def changes_features(directory: Path, expected: torch.Tensor) -> bool:
    try:
        found = features(directory)
    # Whatever it is: what transformers does not load, we must not read either.
    except Exception:
        return True
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5)


def other_keys() -> dict[str, Any]:
    """Keys that the file does not state, and keys of other encoders."""
    from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    found: dict[str, Any] = {}
    for kind in (InternVLVisionConfig, CLIPVisionConfig, SiglipVisionConfig, Dinov2Config):
        found |= {key: value for key, value in kind().to_dict().items() if key not in found}
    return found | {"quantization_config": {"quant_method": "fp8"}, "select_layer": -4}


def test_every_key_that_changes_features_is_named(encoder: Write, encoder_files: Path) -> None:
    original = json.loads((encoder_files / "config.json").read_text())
    expected, passed_over, counted = features(encoder_files), [], 0
    assert errors(encoder_files) == []
    for key, config in alterations(original, other_keys()):
        directory = encoder(config)
        named = any(key in each for each in errors(directory))
        if not named and changes_features(directory, expected):
            passed_over.append((key, config.get(key, "removed")))
        counted += named
    assert passed_over == [], "\n".join(map(str, passed_over))
    assert counted > 30, "a check of nothing would pass"


def test_the_encoder_that_is_accepted_has_the_features_of_transformers(encoder_files: Path) -> None:
    config = replace(VISION, weights=str(encoder_files))
    ours = build_vision_encoder(config, torch.float32, torch.device("cpu"), seed=1)
    torch.testing.assert_close(
        ours.hidden_states(PIXELS)[0], features(encoder_files), rtol=0, atol=1e-4
    )


def test_keys_that_change_nothing_are_accepted(encoder: Write, encoder_files: Path) -> None:
    original = json.loads((encoder_files / "config.json").read_text())
    harmless = {
        "attention_dropout": 0.1, "hidden_dropout_prob": 0.1, "projection_dropout": 0.1,
        "initializer_range": 0.5, "layer_scale_init_value": 1.0, "torch_dtype": "float32",
        "image_size": 32, "patch_size": 4, "transformers_version": "4.52.0",
    }  # fmt: skip
    for key, value in harmless.items():
        directory = encoder(original | {key: value})
        assert errors(directory) == [], key
        assert not changes_features(directory, features(encoder_files)), key


def test_another_epsilon_is_refused_even_where_the_recipe_has_it(
    encoder: Write, encoder_files: Path
) -> None:
    """transformers' norms of queries and keys have 1e-6 whatever layer_norm_eps says."""
    original = json.loads((encoder_files / "config.json").read_text())
    directory = encoder(original | {"layer_norm_eps": 1e-5})
    (problem,) = errors(directory, norm_eps=1e-5)
    assert "layer_norm_eps=1e-05" in problem


def test_the_table_lists_the_tensors_that_the_code_has() -> None:
    family = kind_of(VISION)
    sizes = family.sizes(VISION)
    listed = {
        name.replace("{n}", str(number)): tuple(d if isinstance(d, int) else sizes[d] for d in dims)
        for name, dims in family.tensors.items()
        for number in range(VISION.num_layers)
    }
    encoder = InternViT(VISION)
    assert listed == placed(encoder, KINDS["intern_vit_6b"][0], VISION)
    assert not list(encoder.named_buffers()), "no file has them"


@pytest.mark.parametrize("change", [{"use_mean_pooling": False}, {"attention_bias": True}])
def test_building_refuses_what_the_check_refuses(
    encoder: Write, encoder_files: Path, change: dict[str, Any]
) -> None:
    original = json.loads((encoder_files / "config.json").read_text())
    config = replace(VISION, weights=str(encoder(original | change)))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        build_vision_encoder(config, torch.float32, torch.device("cpu"), seed=1)
