"""SigLIP as it is published: inside a whole model, with its own preprocessing, of sizes that pair up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvlm_train.config.rules import check
from nvlm_train.convert.vision import vision_problems
from nvlm_train.errors import ConfigError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.vision.build import build_vision_encoder
from tests.convert.files.alterations import alterations
from tests.hugging_face import siglip_sizes, transformers_encoder
from tests.vision.siglip import features_of_siglip
from tests.vision.test_intern_vit import CONFIG, tiles

VISION = replace(CONFIG, kind="siglip")


def build(weights: Path) -> Any:
    return build_vision_encoder(
        replace(VISION, weights=str(weights)), torch.float32, torch.device("cpu"), seed=1
    )


def errors(directory: Path, **changes: Any) -> list[str]:
    vision = replace(VISION, weights=str(directory), **changes)
    return [str(each) for each in vision_problems(vision) if each.level == "error"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What save_pretrained of the vision model wrote."""
    transformers_encoder(VISION).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


def whole_siglip(directory: Path) -> torch.nn.Module:
    """SiglipModel with its text tower, saved; its vision tower is returned."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 5,
                     "intermediate_size": 72, "vocab_size": 30, "projection_size": 40},
        vision_config=siglip_sizes(VISION),
    )  # fmt: skip
    model = SiglipModel(config).eval()
    model.vision_model.load_state_dict(transformers_encoder(VISION).state_dict())
    model.save_pretrained(directory)
    return model.vision_model


def test_the_vision_part_of_a_whole_siglip(tmp_path: Path) -> None:
    tower = whole_siglip(tmp_path)
    assert errors(tmp_path) == []
    expected = features_of_siglip(tower, tiles(2))
    torch.testing.assert_close(build(tmp_path)(tiles(2)), expected, rtol=0, atol=1e-4)


def test_the_names_of_transformers_4(weights: Path) -> None:
    """There SiglipVisionModel's tensors have the prefix that they have in the whole model."""
    state = load_file(weights / "model.safetensors")
    plain = {name.removeprefix("vision_model."): each for name, each in state.items()}
    expected = features_of_siglip(transformers_encoder(VISION), tiles(2))
    for prefix in ("vision_model.", ""):
        save_file(
            {prefix + name: each for name, each in plain.items()}, weights / "model.safetensors"
        )
        assert errors(weights) == []
        torch.testing.assert_close(build(weights)(tiles(2)), expected, rtol=0, atol=1e-4)


def test_images_of_any_shape_are_refused_with_the_reason(weights: Path) -> None:
    """The config.json of google/siglip2-so400m-patch16-naflex, in short."""
    config = json.loads((weights / "config.json").read_text())
    config |= {"model_type": "siglip2_vision_model", "num_patches": 256}
    (weights / "config.json").write_text(json.dumps(config))
    assert "NaFlex" in "\n".join(errors(weights))


@pytest.mark.parametrize("head", [True, False])
def test_the_pooling_head_may_be_there(head: bool, tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**siglip_sizes(VISION), vision_use_head=head)
    SiglipVisionModel(config).save_pretrained(tmp_path)
    assert errors(tmp_path) == []


def test_features_are_those_of_the_images_that_siglip_was_trained_on(weights: Path) -> None:
    """transformers' own image processor makes the pixels."""
    from transformers import SiglipImageProcessor

    edge = VISION.tile_size
    process = SiglipImageProcessor(size={"height": edge, "width": edge}, do_resize=False)
    pixels = process(list(tiles(2)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = transformers_encoder(VISION)(pixels).last_hidden_state
    found = build(weights).hidden_states(pixels)
    torch.testing.assert_close(found, states, rtol=0, atol=1e-4)
    expected = features_of_siglip(transformers_encoder(VISION), tiles(2))
    torch.testing.assert_close(build(weights)(tiles(2)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels, tiles(2) / 127.5 - 1, rtol=0, atol=1e-5)


CONTROLS = {
    "without post_layernorm": lambda encoder: setattr(
        encoder, "post_layernorm", torch.nn.Identity()
    ),
    "the layer before the last": lambda encoder: encoder.encoder["layers"].__delitem__(-1),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_other_features_would_be_noticed(control: str, weights: Path) -> None:
    """Negative controls: what LLaVA takes of CLIP."""
    encoder = build(weights)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = encoder.hidden_states(pixels)
    CONTROLS[control](encoder)
    assert (encoder.hidden_states(pixels) - expected).abs().max() > 1e-2


def test_every_key_that_changes_features_is_named(weights: Path) -> None:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    original = json.loads((weights / "config.json").read_text())
    expected = states_of(weights)
    added = CLIPVisionConfig().to_dict() | SiglipVisionConfig().to_dict()
    passed_over, named = [], 0
    for key, config in alterations(
        original, added | {"quantization_config": {"quant_method": "fp8"}}
    ):
        (weights / "config.json").write_text(json.dumps(config))
        if any(key in each for each in errors(weights)):
            named += 1
        elif differs(weights, expected):
            passed_over.append((key, config.get(key, "removed")))
    assert passed_over == [], "\n".join(map(str, passed_over))
    assert named > 20, "a check of nothing would pass"


def states_of(directory: Path) -> Tensor:
    from transformers import AutoModel

    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        return model(pixels).last_hidden_state


def differs(directory: Path, expected: Tensor) -> bool:
    try:
        found = states_of(directory)
    # Whatever it is: what transformers does not load, we must not read either.
    except Exception:
        return True
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5)


def test_wrong_tensors_are_named(weights: Path) -> None:
    path = weights / "model.safetensors"
    state = load_file(path)
    name = next(each for each in state if each.endswith("layers.1.layer_norm2.bias"))
    short = name.removeprefix("vision_model.")
    save_file({key: each for key, each in state.items() if key != name}, path)
    assert f"no tensor named {short}" in "\n".join(errors(weights))
    save_file(state | {name: torch.zeros(41)}, path)
    assert f"{short} gives (41,)" in "\n".join(errors(weights))
    extra = name.replace("layers.1", "layers.7")
    save_file(state | {extra: torch.zeros(40)}, path)
    assert "unexpected=['encoder.layers.7.layer_norm2.bias']" in "\n".join(errors(weights))


@pytest.mark.parametrize(
    ("tile", "patch", "tokens"), [(224, 14, 64), (224, 16, 49), (256, 16, 64), (384, 16, 144)]
)
def test_published_sizes_whose_patches_pair_up(tile: int, patch: int, tokens: int) -> None:
    from nvlm_train.geometry import tokens_per_tile

    vision = replace(VISION, tile_size=tile, patch_size=patch, num_layers=1)
    encoder = transformers_encoder(vision)
    assert encoder.embeddings.num_patches == 4 * tokens_per_tile(vision) == 4 * tokens


@pytest.mark.parametrize(
    ("tile", "patch", "message"),
    [
        (384, 14, "patch_size=14 does not divide model.vision.tile_size=384; use a multiple of 28"),
        (
            378,
            14,
            "tile_size=378 makes 27 patches a side; pixel shuffle joins 2 x 2: use a multiple of 28",
        ),
    ],
)
def test_published_sizes_whose_patches_do_not(tile: int, patch: int, message: str) -> None:
    """SO400M/14-384 has 27 patches a side and leaves 6 pixels out."""
    sizes = [f"model.vision.tile_size={tile}", f"model.vision.patch_size={patch}"]
    with pytest.raises(ConfigError) as caught:
        check(load_recipe(["experiment=smoke", "vision=siglip_so400m_224", *sizes]))
    assert message in str(caught.value) and "weights of that size" in str(caught.value)


def test_its_recipes_are_valid() -> None:
    for size in ("so400m_224", "base_384", "large_384"):
        room = ["stages.pretrain.sequence_length=4096", "stages.sft.sequence_length=4096"]
        check(load_recipe(["experiment=smoke", f"vision=siglip_{size}", *room]))
