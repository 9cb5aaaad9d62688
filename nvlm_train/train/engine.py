"""Builds what one stage trains with on this rank: model, vision encoder and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.geometry import pack_lengths
from nvlm_train.model.build import DTYPES, build_model
from nvlm_train.model.nvlm import NVLM
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.streams import SideStream
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.pipeline.data_parallel import DataParallel
from nvlm_train.pipeline.round import Replica
from nvlm_train.train.optimizer import set_groups
from nvlm_train.train.part_timer import PartTimer
from nvlm_train.vision.ahead import FeatureSource
from nvlm_train.vision.build import build_vision_encoder
from nvlm_train.vision.encoder import VisionEncoder


@dataclass(eq=False)
class Engine:
    """Holds what a stage trains with. `model` is this rank's NVLM shard in megatron-core's DDP wrapper."""

    stage: StageConfig
    topology: Topology
    model: DataParallel
    features: FeatureSource
    optimizer: MegatronOptimizer
    parts: PartTimer = field(default_factory=PartTimer)
    """What this rank's time goes to."""
    saves: SideStream = field(default_factory=SideStream)
    """Where a GPU copies what is saved."""
    copied: torch.cuda.Event | None = None
    """What the next update waits for: copies of what it changes. None where none are under way."""

    @property
    def encoder(self) -> VisionEncoder:
        """The whole vision encoder."""
        return self.features.encoder

    @property
    def replica(self) -> Replica:
        """Returns what the rounds of this stage run on."""
        lengths = self.stage.sequence_length, pack_lengths(self.stage)
        return Replica(self.model, self.features, self.topology, *lengths)

    def whole_model(self) -> NVLM:
        """Returns the model, when all its weights are what the last update made of them. Called by all ranks.

        Everything that reads weights outside of a step asks for them here.
        """
        self.model.gather_weights()
        module: NVLM = self.model.module
        return module

    def wait_for_copies(self) -> None:
        """Lets what is queued from here on wait for a save's copies. The host goes on."""
        self.saves.wait_for(self.copied, ())
        self.copied = None

    def reload_optimizer_weights(self) -> None:
        """Copies the model's weights into the optimizer, which keeps fp32 copies of its own.

        Must be called after weights were written into the model.
        """
        self.optimizer.reload_model_params()

    def set_learning_rate(self, rate: float) -> None:
        """Prepares the optimizer for an update at `rate`; the other constants come from the recipe."""
        set_groups(self.optimizer, self.stage.optimizer, rate)


@dataclass(frozen=True)
class StageWork:
    """Holds a stage that is ready to train: its engine, its data and how samples are encoded."""

    engine: Engine
    plan: DataPlan
    encoder: SampleEncoder
    outside: dict[str, str]
    """Digests of the files that matter and are in no checkpoint (checkpoint/outside.py)."""


def build_engine(
    recipe: Recipe, stage: StageConfig, topology: Topology, kernels: Kernels
) -> Engine:
    """Builds a stage with uninitialised weights; the caller imports, initialises or resumes them."""
    module = build_model(recipe, stage, topology, kernels)
    module.train()
    model = DataParallel(module.config, ddp_config(stage, topology), module)
    optimizer = get_megatron_optimizer(
        config := optimizer_config(recipe, stage, model.ddp_config),
        [model],
        config_overrides=get_standard_config_overrides(config),
        use_gloo_process_groups=False,
    )
    encoder = build_vision_encoder(
        recipe.model.vision, DTYPES[recipe.precision], device(), recipe.seed
    )
    engine = Engine(stage, topology, model, FeatureSource(encoder, topology), optimizer)
    _watch(engine)
    engine.set_learning_rate(stage.optimizer.lr)
    return engine


def _watch(engine: Engine) -> None:
    """Lets the engine's timer see where its parts begin and end."""
    module = engine.model.module
    is_last = engine.topology.is_last_pp_stage
    engine.parts.watch(module, module.language_model.decoder if is_last else None)
    engine.features.around = partial(engine.parts.within, "encode")


def ddp_config(stage: StageConfig, topology: Topology) -> DistributedDataParallelConfig:
    """Returns the settings of megatron-core's DDP: gradients are accumulated and reduced in fp32.

    Here, and nowhere else, it is decided whether communication overlaps: where there is some.
    """
    parallel, has_replicas = stage.parallel, topology.data_size > 1
    is_sharded = parallel.distributed_optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce and has_replicas,
        overlap_param_gather=parallel.overlap_param_gather and is_sharded and has_replicas,
        use_distributed_optimizer=is_sharded,
        # Non-finite values are looked for once a step, on all ranks alike (train/step.py).
        check_for_nan_in_grad=False,
    )


def optimizer_config(
    recipe: Recipe, stage: StageConfig, ddp: DistributedDataParallelConfig
) -> OptimizerConfig:
    """Returns the settings of megatron-core's AdamW; every step sets its learning rate (schedule.py)."""
    settings = stage.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=recipe.precision == "bf16",
        params_dtype=DTYPES[recipe.precision],
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
