"""Compares a training step with transformers' InternVL: same shapes, weights and tokens, one process.

    OMP_NUM_THREADS=2 python -m benchmarks.step_time

ViT 6 x 256 (frozen), language model 8 x 512, vocabulary 32,000, one sample of 7 tiles: 1,792 image
and 128 text tokens, of which 64 are trained, AdamW. Both sides get decoded pixels; both run the
encoder. The two take turns, so that a noisy machine slows both; the ratio is of their medians.
Where the CPU has no bf16 matrix products, both sides get ours (`parallel/cpu_bf16.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nvlm_train.batch import Microbatch, Round, SampleInfo, StepBatch
from nvlm_train.config.model_schema import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import BatchConfig, OptimizerConfig, Recipe, StageConfig
from nvlm_train.model import global_weights
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology, start_process_group
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.placing import place
from nvlm_train.train.start import initial_weights
from nvlm_train.train.step import run_step
from nvlm_train.vision.features import IMAGENET_MEAN, IMAGENET_STD

TILES, TEXT, TRAINED, IMAGE_ID, LR = 7, 128, 64, 31_999, 1e-4
VISION = VisionConfig(
    num_layers=6, hidden_size=256, num_heads=4, ffn_hidden_size=1024, tile_size=448, patch_size=14,
    batch_tiles=TILES,
)  # fmt: skip
LANGUAGE = LanguageConfig(
    num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=2, ffn_hidden_size=1408,
    vocab_size=32_000, rope_theta=10_000.0,
)  # fmt: skip
SLOTS = TILES * 256
LENGTH = SLOTS + TEXT
Step = Callable[[], float]


def reference_models(directory: Path) -> InternVLForConditionalGeneration:
    """Makes transformers' InternVL with random weights, and saves its two backbones under `directory`."""
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=LANGUAGE.vocab_size,
        hidden_size=LANGUAGE.hidden_size,
        intermediate_size=LANGUAGE.ffn_hidden_size,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_kv_heads,
        rms_norm_eps=LANGUAGE.norm_eps,
        rope_theta=LANGUAGE.rope_theta,
        tie_word_embeddings=False,
    )
    vision = InternVLVisionConfig(
        hidden_size=VISION.hidden_size,
        num_hidden_layers=VISION.num_layers,
        num_attention_heads=VISION.num_heads,
        intermediate_size=VISION.ffn_hidden_size,
        image_size=[VISION.tile_size] * 2,
        patch_size=[VISION.patch_size] * 2,
        use_qk_norm=True,
        norm_type="rms_norm",
        attention_bias=False,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    language, encoder = Qwen2ForCausalLM(text), InternVLVisionModel(vision)
    language.save_pretrained(directory / "language")
    encoder.save_pretrained(directory / "vision")
    model = InternVLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        # NVLM's projector has no biases on its linears.
        if "linear" in name and name.endswith("bias"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    model.model.vision_tower.requires_grad_(False)
    return model


def make_inputs() -> tuple[Tensor, Tensor]:
    """Returns token ids [S] with image slots in the middle of the text, and uint8 tiles."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 30_000, (TEXT,), generator=generator)
    ids = torch.cat([text[:16], torch.full((SLOTS,), IMAGE_ID), text[16:]])
    edge = VISION.tile_size
    return ids, torch.randint(
        0, 256, (TILES, 3, edge, edge), dtype=torch.uint8, generator=generator
    )


def reference_step(model: InternVLForConditionalGeneration, dtype: torch.dtype) -> Step:
    """Returns a step of forward, backward and AdamW as a transformers user writes them."""
    ids, tiles = make_inputs()
    model = model.to(dtype).train()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    labels = ids.clone()
    labels[: LENGTH - TRAINED] = -100
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.1, betas=(0.9, 0.95))

    def step() -> float:
        pixels = ((tiles.float() / 255 - mean) / std).to(dtype)
        loss = model(input_ids=ids[None], pixel_values=pixels, labels=labels[None]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def own_step(model: InternVLForConditionalGeneration, directory: Path, precision: str) -> Step:
    """Returns a step with the same sample and weights through `train.step.run_step`."""
    engine = _build_engine(directory, precision)
    projector = model.model.multi_modal_projector.state_dict()
    names = {
        "projector.norm.weight": "layer_norm.weight",
        "projector.norm.bias": "layer_norm.bias",
        "projector.mlp.linear_fc1.weight": "linear_1.weight",
        "projector.mlp.linear_fc2.weight": "linear_2.weight",
    }
    global_weights.fill(
        engine.model.module,
        global_weights.cut(lambda name, shape: projector[names[name]] if name in names else None),
    )
    engine.reload_optimizer_weights()
    batch = _step_batch()
    for group in engine.optimizer.param_groups:
        group["lr"] = LR
    return lambda: run_step(engine, place(batch, engine.topology), num_sources=1).loss


def _build_engine(directory: Path, precision: str) -> Engine:
    stage = StageConfig(
        trainable=("projector", "language_model"),
        blend="made up",
        steps=1,
        sequence_length=LENGTH,
        batch=BatchConfig(size=1),
        optimizer=OptimizerConfig(lr=LR, min_lr=LR, warmup_steps=0, clip_grad=1.0),
    )
    recipe = Recipe(
        name="step_time", run_dir="unused", seed=0, precision=precision,  # type: ignore[arg-type]
        schedule=("sft",), stages={"sft": stage},
        model=ModelConfig(
            "d", replace_weights(VISION, directory / "vision"), ProjectorConfig(512),
            replace_weights(LANGUAGE, directory / "language"), TokenizerConfig(path="unused"),
        ),
    )  # fmt: skip
    topology = build_topology(stage.parallel, recipe.seed)
    engine = build_engine(recipe, stage, topology, kernels.detect())
    initial_weights(recipe, engine.model.module)
    return engine


def replace_weights(config, weights: Path):  # type: ignore[no-untyped-def]
    """Returns a copy of a frozen config with another weights directory."""
    import dataclasses

    return dataclasses.replace(config, weights=str(weights))


def _step_batch() -> StepBatch:
    ids, tiles = make_inputs()
    positions = torch.arange(LENGTH - TRAINED - 1, LENGTH - 1)
    microbatch = Microbatch(
        token_ids_S=ids,
        image_positions=torch.arange(16, 16 + SLOTS),
        label_positions_L=positions,
        label_ids_L=ids[positions + 1],
        label_samples_L=torch.zeros(TRAINED, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, LENGTH], dtype=torch.int32),
        samples=(SampleInfo(0, "made up", "0"),),
        num_tiles=TILES,
    )
    return StepBatch(0, (Round((microbatch,), (TILES,), tiles),), ())


def measure(precision: str, repeats: int) -> dict[str, float]:
    """Returns the median seconds of both, which take turns. It checks that the first losses agree."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with tempfile.TemporaryDirectory() as name:
        model = reference_models(Path(name))
        own = own_step(model, Path(name), precision)
        reference = reference_step(model, dtype)
    first = own(), reference()
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    if abs(first[0] - first[1]) > tolerance * first[1]:
        raise SystemExit(
            f"{precision}: first losses differ: ours {first[0]}, transformers {first[1]}"
        )
    seconds: dict[str, list[float]] = {"own": [], "reference": []}
    for _ in range(repeats):
        for side, step in (("own", own), ("reference", reference)):
            started = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        f"{precision}_tokens_per_second": LENGTH / medians["own"],
        f"{precision}_reference_tokens_per_second": LENGTH / medians["reference"],
        f"{precision}_ratio": medians["reference"] / medians["own"],
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    options = parser.parse_args()
    start_process_group()
    result: dict[str, float] = {}
    for precision in options.precision:
        result |= measure(precision, options.repeats)
    sys.stdout.write(json.dumps({key: round(value, 3) for key, value in result.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
