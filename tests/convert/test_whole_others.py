"""The encoder inside a whole InternVL, transformers' and OpenGVLab's; what else lies there is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nvlm_train.convert.language import language_problems
from nvlm_train.convert.vision import vision_problems
from nvlm_train.convert.whole.projector import projector_problems
from nvlm_train.vision.build import build_vision_encoder
from tests.convert import whole_runs
from tests.convert.files.models import randomise
from tests.convert.test_whole import FEATURES, FFN, VISION_CONFIG, tiles, whole_config
from tests.hugging_face import encoder_sizes, sizes
from tests.parity.recipes import LANGUAGE, VISION
from tests.vision.opengvlab import random_model, write
from tests.vision.test_intern_vit import features_of_transformers
from tests.vision.test_opengvlab import features


def built(directory: Path) -> torch.Tensor:
    config = replace(VISION, weights=str(directory))
    assert [str(each) for each in vision_problems(config)] == []
    return build_vision_encoder(config, torch.float32, torch.device("cpu"), seed=1)(tiles(2))


@pytest.fixture(scope="module")
def internvl() -> nn.Module:
    """transformers' whole InternVL with random weights away from zero and one."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = {"model_type": "qwen2", **sizes(LANGUAGE)}
    config = InternVLConfig(
        vision_config=encoder_sizes(VISION),
        text_config=text,
        image_token_id=250,
        image_seq_length=4,
    )
    return randomise(InternVLForConditionalGeneration(config))


@pytest.mark.parametrize("shard_size", ["50GB", "100KB"])
def test_the_encoder_inside_transformers_internvl(
    internvl: nn.Module, shard_size: str, tmp_path: Path
) -> None:
    internvl.save_pretrained(tmp_path, max_shard_size=shard_size)
    expected = features_of_transformers(internvl.model.vision_tower, tiles(2))
    torch.testing.assert_close(built(tmp_path), expected, rtol=0, atol=1e-4)


def test_an_earlier_layer_of_it_is_refused(internvl: nn.Module, tmp_path: Path) -> None:
    internvl.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        path.read_text().replace('vision_feature_layer": -1', 'vision_feature_layer": -2')
    )
    (problem,) = vision_problems(replace(VISION, weights=str(tmp_path)))
    assert "vision_feature_layer=-2" in str(problem)


EXPERTS = {
    "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5", "capacity_factor": 1.2, "use_bfloat16": True,
    "eval_capacity_factor": 1.4, "laux_allreduce": "all_nodes", "moe_coeff_ratio": 0.5,
    "moe_intermediate_size": 768, "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before",
    "num_experts": 8, "num_routed_experts": 4, "num_shared_experts": 4, "use_rts": False,
    "shared_expert_intermediate_size": 3072, "use_moe": False, "use_residual": True,
    "use_weighted_residual": False,
}  # fmt: skip
"""Keys beside the encoder's own in vision_config of InternVL 2.5 and 3."""


@pytest.fixture
def chat(qwen2: nn.Module, tmp_path: Path) -> Path:
    """OpenGVLab's whole InternVL: 25 heads without dummies, and a projector with biases."""
    config = whole_config() | {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "hidden_size": LANGUAGE.hidden_size,
        "image_fold": None,
        "output_attentions": False,
        "pad2square": False,
        "system_message": None,
        "tie_word_embeddings": False,
    }
    config["vision_config"] = VISION_CONFIG | EXPERTS
    config["llm_config"] |= {"moe_config": None, "use_bfloat16": True}
    mlp1 = nn.Sequential(
        nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FFN), nn.GELU(), nn.Linear(FFN, 64)
    )
    parts = {"vision_model": random_model(VISION_CONFIG), "mlp1": mlp1, "language_model": qwen2}
    state = {
        f"{prefix}.{name}": tensor
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    return write(tmp_path / "chat", config, state, files=3)


def test_the_encoder_inside_opengvlabs_internvl(chat: Path) -> None:
    expected = features(random_model(VISION_CONFIG), tiles(2))
    torch.testing.assert_close(built(chat), expected, rtol=0, atol=1e-4)


def test_its_language_model_is_read_and_its_projector_refused(chat: Path) -> None:
    model = whole_runs.model_from(chat)
    assert [str(each) for each in language_problems(model.language, {"sft": 96})] == []
    (problem,) = projector_problems(model)
    assert "unexpected=['mlp1.1.bias'], 2 in all" in str(problem)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [("vision_config", "use_moe", True), ("llm_config", "moe_config", {"num_experts": 8})],
)
def test_experts_are_refused(chat: Path, group: str, key: str, value: object) -> None:
    """OpenGVLab's keys for them are passed over only where they say that there are none."""
    path = chat / "config.json"
    config = json.loads(path.read_text())
    config[group][key] = value
    path.write_text(json.dumps(config))
    model = whole_runs.model_from(chat)
    problems = [*vision_problems(model.vision), *language_problems(model.language, {"sft": 96})]
    assert [key in str(each) for each in problems] == [True]
