"""InternViT against transformers' own, and the features that do not depend on company."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.convert.vision import kind_of
from nvlm_train.errors import CheckpointError
from nvlm_train.vision.build import build_vision_encoder
from nvlm_train.vision.features import IMAGENET_MEAN, IMAGENET_STD, pixel_shuffle
from nvlm_train.vision.intern_vit import InternViT
from nvlm_train.vision.tile_parallel import encode_tiles
from tests.hugging_face import transformers_encoder

CONFIG = VisionConfig(
    num_layers=3, hidden_size=40, num_heads=5, ffn_hidden_size=72, tile_size=32, patch_size=4,
    batch_tiles=4,
)  # fmt: skip


def tiles(count: int, seed: int = 0) -> Tensor:
    edge = CONFIG.tile_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, edge, edge), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """transformers' model of the same sizes, with weights away from zero and one everywhere."""
    return transformers_encoder(CONFIG)


@pytest.fixture
def weights(reference: torch.nn.Module, tmp_path: Path) -> Path:
    """What save_pretrained wrote."""
    reference.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def build(config: VisionConfig) -> InternViT:
    return build_vision_encoder(config, torch.float32, torch.device("cpu"), seed=1)


def features_of_transformers(model: torch.nn.Module, tiles_TCEE: Tensor) -> Tensor:
    """Normalised, last layer, class token dropped, shuffled by plain loops."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        states = model((tiles_TCEE.float() / 255 - mean) / std).last_hidden_state
    return shuffle_by_loops(states[:, 1:])


def shuffle_by_loops(patches_TPH: Tensor) -> Tensor:
    """Token (r, c) is the concatenation of the four patches of its 2 x 2 block, in raster order."""
    side = int(patches_TPH.shape[1] ** 0.5)
    tokens = []
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            block = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
            tokens.append(torch.cat([patches_TPH[:, r * side + c] for r, c in block], dim=-1))
    return torch.stack(tokens, dim=1)


def test_features_are_those_of_transformers(reference: torch.nn.Module, weights: Path) -> None:
    expected = features_of_transformers(reference, tiles(3))
    found = build(replace(CONFIG, weights=str(weights)))(tiles(3))
    assert found.shape == (3, 16, 160)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5, "features of about zero would prove nothing"


def test_per_head_norms_would_be_noticed(reference: torch.nn.Module, weights: Path) -> None:
    """Negative control: the norm of queries runs over the whole width (NVLM's encoder)."""
    encoder = build(replace(CONFIG, weights=str(weights)))
    attention = encoder.encoder["layer"][0].attention
    whole = attention.q_norm.forward

    def per_head(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (CONFIG.num_heads, -1))
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + CONFIG.norm_eps)
        return (heads * scale).flatten(-2) * attention.q_norm.weight

    assert not torch.allclose(
        whole(torch.ones(1, 40).cumsum(1)), per_head(torch.ones(1, 40).cumsum(1))
    )
    attention.q_norm.forward = per_head
    error = encoder(tiles(3)) - features_of_transformers(reference, tiles(3))
    assert error.abs().max() > 1e-2


def test_pixel_shuffle() -> None:
    patches = torch.arange(2 * 36 * 5, dtype=torch.float32).view(2, 36, 5)
    assert torch.equal(pixel_shuffle(patches), shuffle_by_loops(patches))


def test_features_do_not_depend_on_the_batch() -> None:
    """Bitwise, whatever the other tiles of the encoder's batch are, and whatever the place in it."""
    encoder = build(CONFIG)
    every = tiles(7)
    together = encode_tiles(encoder, every)
    order = [5, 0, 3, 6, 1, 4, 2]
    assert torch.equal(encode_tiles(encoder, every[order]), together[order])
    for number in range(7):
        assert torch.equal(encode_tiles(encoder, every[number : number + 1])[0], together[number])
    assert encode_tiles(encoder, every[:0]).shape == (0, 16, 160)


def test_random_weights_depend_on_the_seed_only() -> None:
    first, second = build(CONFIG), build(CONFIG)
    other = build_vision_encoder(CONFIG, torch.float32, torch.device("cpu"), seed=2)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b) and not a.requires_grad
        assert torch.equal(a, c) == ("norm" in name or "lambda" in name)


def test_another_config_is_refused(weights: Path) -> None:
    config = replace(CONFIG, weights=str(weights), num_heads=8, norm_eps=1e-5)
    with pytest.raises(CheckpointError) as caught:
        build(config)
    assert "model.vision.num_heads=8 but config.json has num_attention_heads=5" in str(caught.value)
    assert "model.vision.norm_eps=1e-05 but config.json has layer_norm_eps=1e-06" in str(
        caught.value
    )


def test_another_patch_size_is_refused(weights: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"patch_size=8 but config.json has patch_size=\[4, 4\]"
    ):
        build(replace(CONFIG, weights=str(weights), patch_size=8))


def test_an_encoder_of_another_kind_is_refused(weights: Path) -> None:
    path = weights / "config.json"
    stored = json.loads(path.read_text())
    for name, value in {"norm_type": "layer_norm", "hidden_act": "relu"}.items():
        path.write_text(json.dumps(stored | {name: value}))
        with pytest.raises(
            CheckpointError, match=f"{name}={value}, the vision encoder of NVLM needs"
        ):
            build(replace(CONFIG, weights=str(weights)))
    path.unlink()
    with pytest.raises(CheckpointError, match="no config.json there"):
        build(replace(CONFIG, weights=str(weights)))


def test_missing_weights_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*.safetensors there; give a directory"):
        build(replace(CONFIG, weights=str(tmp_path / "nowhere")))
    other = tmp_path / "deeper"
    shutil.copytree(weights, other)
    from safetensors.torch import load_file, save_file

    state = load_file(other / "model.safetensors")
    del state["encoder.layer.1.mlp.fc1.bias"]
    save_file(state | {"extra": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        build(replace(CONFIG, weights=str(other)))
    assert "missing=['encoder.layer.1.mlp.fc1.bias']" in str(caught.value)
    assert "unexpected=['extra']" in str(caught.value)


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_pixels_as_they_are(cast: str) -> None:
    """fp32's, rounded once. As bf16 buffers, mean and std were wrong by up to 0.2 percent."""
    every = tiles(3)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (every.float() / 255 - mean) / std
    encoder = CASTS[cast](InternViT(CONFIG))
    seen: list[Tensor] = []
    encoder.embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(every)
    dtype = encoder.embeddings.cls_token.dtype
    assert seen[0].dtype == dtype and torch.equal(seen[0], expected.to(dtype))


def test_weights_are_read_in_place(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is computed that the files replace, and each tensor is asked for once."""
    from nvlm_train.convert.weight_files import WeightFiles

    asked: list[str] = []
    original = WeightFiles.copy_into

    def counted(self: WeightFiles, into: Tensor, name: str, *index: tuple[slice, ...]) -> None:
        asked.append(name)
        original(self, into, name, *index)

    monkeypatch.setattr(WeightFiles, "copy_into", counted)
    before = torch.get_rng_state()
    config = replace(CONFIG, weights=str(weights))
    encoder = build_vision_encoder(config, torch.bfloat16, torch.device("cpu"), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(asked) == sorted(kind_of(config).shapes(config))
    whole = dict(build(config).named_parameters())
    for name, parameter in encoder.named_parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        assert torch.equal(parameter, whole[name].bfloat16())
