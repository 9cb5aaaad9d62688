"""Compares a tensor-parallel training step with megatron-core's own LLaVAModel, in turns, on the CPU.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.llava

Both are frozen ViT, projector and language model of the shapes of `benchmarks/step_time.py`, TP2 without
sequence parallelism (LLaVAModel has it with Transformer Engine only), fp32, one sample of 7 tiles: 1,792
image and 128 text tokens, of which 64 are trained. LLaVAModel is built from megatron-core's local layers,
as its users build it where there is no Transformer Engine; its encoder lacks InternViT's layer scales and
query and key norms. Both run megatron-core's schedule, DDP and distributed AdamW with the same CPU kernels
(`parallel/cpu.py`): what differs is the model. Before anything is measured, both language models get the
same weights and the same features, and must have the same loss.

The two take turns. A repeat gives one ratio, LLaVAModel's seconds over ours, of wall seconds and of CPU
seconds summed over the ranks; the latter say more on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel, pixel_shuffle
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.before import ratios
from benchmarks.step_time import LANGUAGE, LR, TILES, TRAINED, VISION
from nvlm_train.batch import Microbatch, Round, SampleInfo, StepBatch
from nvlm_train.config.model_schema import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import (
    BatchConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StageConfig,
)
from nvlm_train.data.loading.loader import split_tiles
from nvlm_train.geometry import tokens_per_tile
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import Topology, build_topology, process_group
from nvlm_train.train.engine import Engine, build_engine, ddp_config, optimizer_config
from nvlm_train.train.optimizer import set_groups
from nvlm_train.train.placing import place
from nvlm_train.train.start import initial_weights
from nvlm_train.train.step import run_step
from nvlm_train.vision.features import imagenet_normalised
from nvlm_train.vision.tile_parallel import encode_tiles

Step = Callable[[], object]

TENSOR = 2
BEFORE_IMAGE = 16
"""Text tokens in front of the image."""
PLACE_OF_IMAGE = -200
"""What LLaVAModel takes as the token of an image."""


@dataclass(frozen=True)
class Sizes:
    """What both sides train."""

    vision: VisionConfig
    language: LanguageConfig
    tiles: int
    text: int
    trained: int

    @property
    def slots(self) -> int:
        """Image tokens."""
        return self.tiles * tokens_per_tile(self.vision)

    @property
    def length(self) -> int:
        """Tokens of the sample."""
        return self.slots + self.text


LARGE = Sizes(replace(VISION, batch_tiles=4), LANGUAGE, TILES, text=128, trained=TRAINED)
TOY = Sizes(
    VisionConfig(2, 64, 4, 128, 56, 14, batch_tiles=2),
    LanguageConfig(2, 64, 4, 2, 128, 512, rope_theta=10_000.0),
    tiles=3,
    text=40,
    trained=8,
)


@dataclass(frozen=True)
class Sample:
    """The sample that both see: text [text], and uint8 tiles [tiles, 3, E, E]."""

    text: Tensor
    tiles: Tensor


def make_sample(sizes: Sizes) -> Sample:
    """Draws tokens and pixels from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    edge, vocabulary = sizes.vision.tile_size, sizes.language.vocab_size
    text = torch.randint(0, vocabulary, (sizes.text,), generator=generator)
    shape = (sizes.tiles, 3, edge, edge)
    return Sample(text, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))


# ---- this project ----


def make_recipe(sizes: Sizes) -> Recipe:
    """Makes a recipe of D with one stage, which trains everything but the encoder."""
    stage = StageConfig(
        trainable=("projector", "language_model"),
        blend="made up",
        steps=1,
        sequence_length=sizes.length,
        batch=BatchConfig(size=1),
        optimizer=OptimizerConfig(lr=LR, min_lr=LR, warmup_steps=0, clip_grad=1.0),
        parallel=ParallelConfig(tensor=TENSOR),
    )
    hidden = sizes.language.hidden_size
    return Recipe(
        name="llava", run_dir="unused", seed=0, precision="fp32", schedule=("sft",),
        stages={"sft": stage},
        model=ModelConfig(
            "d", sizes.vision, ProjectorConfig(hidden), sizes.language, TokenizerConfig(path="unused")
        ),
    )  # fmt: skip


def make_engine(recipe: Recipe) -> Engine:
    """Builds this rank's part of D with the recipe's initial weights."""
    stage = recipe.stages["sft"]
    engine = build_engine(
        recipe, stage, build_topology(stage.parallel, recipe.seed), kernels.detect()
    )
    initial_weights(recipe, engine.model.module)
    engine.reload_optimizer_weights()
    engine.set_learning_rate(LR)
    return engine


def own_step(engine: Engine, sizes: Sizes, sample: Sample) -> Step:
    """Returns a step through `train.step.run_step`; placing the batch is in it."""
    text, slots = sample.text, torch.zeros(sizes.slots, dtype=torch.int64)
    ids = torch.cat([text[:BEFORE_IMAGE], slots, text[BEFORE_IMAGE:]])
    positions = torch.arange(sizes.length - sizes.trained - 1, sizes.length - 1)
    microbatch = Microbatch(
        token_ids_S=ids,
        image_positions=torch.arange(BEFORE_IMAGE, BEFORE_IMAGE + sizes.slots),
        label_positions_L=positions,
        label_ids_L=ids[positions + 1],
        label_samples_L=torch.zeros(sizes.trained, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, sizes.length], dtype=torch.int32),
        samples=(SampleInfo(0, "made up", "0"),),
        num_tiles=sizes.tiles,
    )
    topology = engine.topology
    counts = split_tiles(sizes.tiles, topology.replica_size)
    own = sample.tiles.split(list(counts))[topology.replica_rank]
    batch = StepBatch(0, (Round((microbatch,), counts, own),), ())
    return lambda: run_step(engine, place(batch, topology), num_sources=1).loss


# ---- megatron-core's LLaVAModel ----


def make_llava(sizes: Sizes) -> LLaVAModel:
    """Builds this rank's part of LLaVAModel from local layers; its encoder is frozen."""
    vision, language = sizes.vision, sizes.language
    common: dict[str, Any] = {
        "tensor_model_parallel_size": TENSOR, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "gradient_accumulation_fusion": True, "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
    }  # fmt: skip
    decoder = TransformerConfig(
        num_layers=language.num_layers, hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads, num_query_groups=language.num_kv_heads,
        ffn_hidden_size=language.ffn_hidden_size, normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps, add_bias_linear=False, add_qkv_bias=True,
        gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=True, **common,
    )  # fmt: skip
    encoder = TransformerConfig(
        num_layers=vision.num_layers, hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads, ffn_hidden_size=vision.ffn_hidden_size,
        activation_func=F.gelu, bias_activation_fusion=False, **common,
    )  # fmt: skip
    encoder.vision_model_type = "internvit"
    projection = copy.copy(decoder)
    projection.gated_linear_unit, projection.activation_func = False, F.gelu
    projection.bias_activation_fusion, projection.ffn_hidden_size = False, language.hidden_size
    model = LLaVAModel(
        decoder, get_gpt_layer_local_spec(normalization="RMSNorm"), language.vocab_size,
        sizes.length, encoder, _vit_layer(), drop_vision_class_token=True,
        vision_projection_config=projection, vision_projection_layer_spec=_mlp(),
        language_position_embedding_type="rope", language_rotary_base=round(language.rope_theta),
        img_h=vision.tile_size, img_w=vision.tile_size, patch_dim=vision.patch_size,
        image_token_index=PLACE_OF_IMAGE, pixel_shuffle=True,
    )  # fmt: skip
    model.freeze(False, True, False)
    # Its trainer says so to the schedule.
    model.model_type = ModelType.encoder_or_decoder
    return model.train()


def _vit_layer() -> ModuleSpec:
    """megatron-core's, without the causal mask that it has there; its users change that as well."""
    layer = copy.deepcopy(get_vit_layer_with_local_spec())
    layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return layer


def _mlp() -> Any:
    return get_gpt_layer_local_spec(normalization="RMSNorm").submodules.mlp.submodules


class LLaVAStep:
    """One optimizer step of LLaVAModel, as Megatron-LM's multimodal example makes it."""

    def __init__(
        self, model: LLaVAModel, recipe: Recipe, topology: Topology, sizes: Sizes, sample: Sample
    ) -> None:
        stage = recipe.stages["sft"]
        ddp = ddp_config(stage, topology)
        self.model = DistributedDataParallel(model.config, ddp, model)
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            optimizer_config(recipe, stage, ddp), [self.model], use_gloo_process_groups=False
        )
        set_groups(self.optimizer, stage.optimizer, LR)
        self.inputs, self.tiles = llava_inputs(sizes, sample), sample.tiles
        self._run = get_forward_backward_func()

    def __call__(self) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        (result,) = self._run(
            forward_step_func=self._forward, data_iterator=None, model=[self.model],
            num_microbatches=1, seq_length=0, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        finalize_model_grads([self.model])
        self.optimizer.step()
        return float(result["loss"])

    def _forward(self, data: None, model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        losses, mask = model(images=imagenet_normalised(self.tiles), **self.inputs)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (losses * mask).sum() / mask.sum()
            return loss, {"loss": loss.detach()}

        return losses, mean


def llava_inputs(sizes: Sizes, sample: Sample) -> dict[str, Tensor]:
    """Returns what the model's forward takes beside pixels: labels are the next tokens, text alone counts."""
    image = torch.tensor([PLACE_OF_IMAGE])
    ids = torch.cat([sample.text[:BEFORE_IMAGE], image, sample.text[BEFORE_IMAGE:]])
    trained = torch.zeros(len(ids))
    trained[-sizes.trained - 1 : -1] = 1
    size = sizes.length
    return {
        "input_ids": ids[None],
        "position_ids": torch.arange(len(ids))[None],
        # Without a mask megatron-core makes the same one, on a GPU.
        "attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool).triu_(1),
        "labels": ids.roll(-1)[None],
        "loss_mask": trained[None],
        "num_image_tiles": torch.tensor([sizes.tiles]),
    }


# ---- the same loss ----


def as_patches(features_TNF: Tensor) -> Tensor:
    """Undoes `pixel_shuffle`, and puts a class token in front: [T, N, F] to [T, 1 + 4 N, F / 4]."""
    tiles, tokens, size = features_TNF.shape
    numbers = torch.arange(tokens * size).view(1, 4 * tokens, size // 4)
    patches = torch.empty(tiles, tokens * size)
    patches[:, pixel_shuffle(numbers).flatten()] = features_TNF.flatten(1)
    return F.pad(patches.view(tiles, 4 * tokens, size // 4), (0, 0, 1, 0))


def check_losses(engine: Engine, own: Step, llava: LLaVAStep) -> float:
    """Gives both sides the same weights and features, and returns the loss that they agree on.

    LLaVAModel's local projector has no norm in front: it gets features that ours has normalised.

    Raises:
        SystemExit: the losses differ.
    """
    module, model = engine.model.module, llava.model.module
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[_own_name(name)])
        features = module.projector.norm(encode_tiles(engine.encoder, llava.tiles))
    llava.optimizer.reload_model_params()
    patches = as_patches(features)
    hook = model.vision_model.register_forward_hook(lambda *_: patches)
    theirs, ours = llava(), float(own())  # type: ignore[arg-type]
    hook.remove()
    if abs(theirs - ours) > 1e-5 * ours:
        raise SystemExit(f"first losses differ: ours {ours}, LLaVAModel's {theirs}")
    return ours


def _own_name(name: str) -> str:
    return name.replace("vision_projection.encoder.", "projector.mlp.")


# ---- measuring ----


def compare(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measures on every rank of a world of two; the figures are the same on both."""
    recipe, sample = make_recipe(sizes), make_sample(sizes)
    engine = make_engine(recipe)
    own = own_step(engine, sizes, sample)
    llava = LLaVAStep(make_llava(sizes), recipe, engine.topology, sizes, sample)
    loss = check_losses(engine, own, llava)
    own(), llava()
    seconds: dict[str, list[tuple[float, float]]] = {"own": [], "llava": []}
    for repeat in range(repeats):
        turns: list[tuple[str, Step]] = [("own", own), ("llava", llava)]
        for side, step in turns if repeat % 2 else reversed(turns):
            seconds[side].append(_timed(step))
    return {
        "tokens": sizes.length,
        "trained_tokens": sizes.trained,
        "first_loss": round(loss, 4),
    } | {
        clock: ratios(
            llava=[each[place] for each in seconds["llava"]],
            own=[each[place] for each in seconds["own"]],
        )
        for place, clock in enumerate(("wall", "cpu"))
    }


def _timed(step: Step) -> tuple[float, float]:
    """Wall seconds until all ranks are done, of the slowest, and CPU seconds of all ranks."""
    dist.barrier()
    started, used = time.perf_counter(), time.process_time()
    step()
    cpu = torch.tensor(time.process_time() - used, dtype=torch.float64)
    wall = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(cpu)
    dist.all_reduce(wall, op=dist.ReduceOp.MAX)
    return wall.item(), cpu.item()


def main() -> int:
    """Measures, and prints one line of JSON on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with process_group():
        found = compare(TOY if options.toy else LARGE, options.repeats)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
