"""The digest of the encoder's weights: another one for any change that counts, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nvlm_train.errors import CheckpointError
from nvlm_train.vision.digest import encoder_digest
from tests.vision.test_intern_vit import CONFIG

State = dict[str, Tensor]


def weights() -> State:
    generator = torch.Generator().manual_seed(1)
    shapes = {"b.weight": (6, 4), "a.weight": (4, 6), "a.bias": (4,), "scale": ()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**state, "half": torch.ones(5, dtype=torch.bfloat16)}


def digest(state: State, directory: Path, seed: int = 1, **metadata: str) -> str:
    directory.mkdir(exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata)
    return encoder_digest(replace(CONFIG, weights=str(directory)), seed)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one value": lambda weight: weight.index_fill(0, torch.tensor([0]), 1.0),
    "the sign": lambda weight: -weight,
    "the order of rows": lambda weight: weight.flip(0),
    "the shape": lambda weight: weight.reshape(6, 4),
    "the dtype": lambda weight: weight.double(),
    "the last bit": lambda weight: torch.nextafter(weight, torch.full_like(weight, 9.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_tensor_is_another_encoder(tmp_path: Path, change: str) -> None:
    """Sums of magnitudes, which tell damaged checkpoints, would miss the sign and the order."""
    state = weights()
    changed = {**state, "a.weight": CHANGES[change](state["a.weight"])}
    assert digest(changed, tmp_path) != digest(state, tmp_path)


def test_exchanged_tensors_are_another_encoder(tmp_path: Path) -> None:
    state = weights()
    exchanged = {**state, "a.weight": state["b.weight"].clone(), "b.weight": state["a.weight"]}
    assert digest(exchanged, tmp_path) != digest(state, tmp_path)


def test_what_does_not_count(tmp_path: Path) -> None:
    """Where the files lie, their metadata, the order of tensors, a prefix, a split in two, the seed."""
    state = weights()
    expected = digest(state, tmp_path / "a")
    assert digest(dict(reversed(state.items())), tmp_path / "b", seed=2, format="pt") == expected
    prefixed = {f"vision_tower.{name}": tensor for name, tensor in state.items()}
    assert digest(prefixed, tmp_path / "c") == expected
    prefixed = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    whole = prefixed | {
        "language_model.lm_head.weight": torch.ones(2, 2),
        "mlp1.0.bias": torch.ones(2),
    }
    assert digest(whole, tmp_path / "d") == expected, "other parts of a whole model do not count"
    first = {name: state.pop(name) for name in ("a.weight", "half")}
    save_file(first, tmp_path / "b" / "model-00002-of-00002.safetensors")
    assert digest(state, tmp_path / "b") == expected


def test_random_weights_are_told_by_their_seed() -> None:
    digests = {encoder_digest(CONFIG, seed) for seed in (1, 1, 2)}
    assert digests == {"seed=1", "seed=2"}


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    config = replace(CONFIG, weights=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no \*.safetensors there; give a directory"):
        encoder_digest(config, 1)
    digest(weights(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors is not a whole safetensors file"):
        encoder_digest(config, 1)
