"""The row of transformers' InternVL: the same shapes and samples, as its user would write the step.

Pure bf16, SDPA, fused AdamW, one sample a forward pass, gradients of a step's samples accumulated;
logits of every position, as its loss needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

from benchmarks.gpu.activity import fresh_memory, peak_gib, seconds_of, trace
from benchmarks.gpu.packs import encode, make_plan, noise
from benchmarks.gpu.rows import Repeats, Row, flops_by_part, memory, speed, utilisation, waiting
from benchmarks.gpu.shapes import LANGUAGES, Sizes, make_recipe
from nvlm_train.config.model_schema import LanguageConfig, VisionConfig
from nvlm_train.costs import StepWork
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.parallel.topology import device
from nvlm_train.vision.features import imagenet_normalised


def reference_row(sizes: Sizes, repeats: Repeats, keep: Path | None) -> Row:
    """Like `training_row`; MFU counts the work that D does for the same samples, and no more."""
    samples = encode("d", sizes, make_plan(sizes))
    recipe = make_recipe("d", sizes)
    work = StepWork(
        tokens=sum(len(sample.token_ids) for sample in samples),
        attention_pairs=sum(len(sample.token_ids) ** 2 for sample in samples),
        trained_tokens=sum(len(sample.label_ids) for sample in samples),
        tiles=sum(sample.num_tiles for sample in samples),
    )
    flops = flops_by_part(recipe.model, recipe.stages["sft"], work)
    with fresh_memory():
        model = reference_model(LANGUAGES[sizes.language], sizes.vision)
        figures = _train(ReferenceStep(model, samples, sizes), flops, work, repeats, keep)
        del model
    return figures


def _train(
    step: ReferenceStep,
    flops: dict[str, float],
    work: StepWork,
    repeats: Repeats,
    keep: Path | None,
) -> Row:
    seconds = seconds_of(step, repeats.timed, repeats.warm_up + 1)
    peak = peak_gib()
    parameters = sum(parameter.numel() for parameter in step.model.parameters())
    trained = sum(parameter.numel() for parameter in step.parameters)
    # Weights, and gradients and two moments of what trains, all bf16.
    predicted = 2 * (parameters + 3 * trained) / 2**30
    samples = len(step.inputs)
    return (
        {"samples": samples, "trained_tokens": work.trained_tokens, "losses": step.losses}
        | speed(work.tokens, samples, seconds)
        | utilisation(flops, seconds)
        | waiting(trace(step, keep), seconds)
        | {"tiles": work.tiles}
        | memory(peak, predicted)
    )


def reference_model(
    language: LanguageConfig, vision: VisionConfig
) -> InternVLForConditionalGeneration:
    """With random weights in bf16 on the device; the encoder is frozen."""
    text = Qwen2Config(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
        rms_norm_eps=language.norm_eps,
        rope_theta=language.rope_theta,
        tie_word_embeddings=False,
    )
    encoder = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.ffn_hidden_size,
        image_size=[vision.tile_size] * 2,
        patch_size=[vision.patch_size] * 2,
        use_qk_norm=True,
        norm_type="rms_norm",
        attention_bias=False,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
    )
    config = InternVLConfig(
        vision_config=encoder,
        text_config=text,
        image_token_id=language.vocab_size - 1,
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            model = InternVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


class ReferenceStep:
    """One optimizer step over all samples; called without arguments."""

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        samples: Sequence[EncodedSample],
        sizes: Sizes,
    ) -> None:
        self.model = model
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True
        )
        image_id = LANGUAGES[sizes.language].vocab_size - 1
        self.inputs = [self._inputs(sample, image_id) for sample in samples]
        pixels = noise(sum(sample.num_tiles for sample in samples), sizes.vision)
        self.tiles = pixels.split([sample.num_tiles for sample in samples])
        self.trained = sum(len(sample.label_ids) for sample in samples)
        self.losses: list[float] = []

    @staticmethod
    def _inputs(sample: EncodedSample, image_id: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels, [1, S]."""
        ids = torch.from_numpy(sample.token_ids).clone()
        ids[torch.from_numpy(sample.image_positions)] = image_id
        labels = torch.full_like(ids, -100)
        labels[torch.from_numpy(sample.label_positions) + 1] = torch.from_numpy(sample.label_ids)
        return ids[None].to(device()), labels[None].to(device())

    def __call__(self) -> None:
        total = torch.zeros((), device=device())
        for (ids, labels), tiles in zip(self.inputs, self.tiles, strict=True):
            pixels = imagenet_normalised(tiles.to(device())).to(torch.bfloat16)
            loss = self.model(
                input_ids=ids,
                pixel_values=pixels,
                labels=labels,
                num_items_in_batch=self.trained,
            ).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(round(float(total), 4))
