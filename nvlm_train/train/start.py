"""Prepares a run and its stages: finds where the run stands, builds data and model, gives weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.config.schema import Recipe
from nvlm_train.convert.reader import LanguageSource, language_source
from nvlm_train.convert.weight_files import WeightFiles, in_gb
from nvlm_train.convert.whole.reader import ProjectorSource, projector_source
from nvlm_train.data.dataset import build_data
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.errors import CheckpointError, NvlmError
from nvlm_train.geometry import pack_lengths
from nvlm_train.model import global_weights
from nvlm_train.model.build import DTYPES, build_model
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology, device
from nvlm_train.pipeline.round import Replica
from nvlm_train.train.checkpoint import directory, sharded_state
from nvlm_train.train.checkpoint.finite import ENCODER, not_finite, summary
from nvlm_train.train.checkpoint.outside import check_outside, digests_outside
from nvlm_train.train.checkpoint.resume import TO_READ, TO_TRAIN, Rule, check_resumable
from nvlm_train.train.checkpoint.run_state import (
    Run,
    RunState,
    library_versions,
    plain_recipe,
    read_state,
)
from nvlm_train.train.checkpoint.verify import newest_undamaged
from nvlm_train.train.engine import Engine, StageWork, build_engine
from nvlm_train.train.fitting import require_fitting
from nvlm_train.train.rank_zero import on_rank_0
from nvlm_train.train.schedule import Position, stages_to_run
from nvlm_train.vision.ahead import FeatureSource
from nvlm_train.vision.build import build_vision_encoder

logger = logging.getLogger(__name__)


def open_run(recipe: Recipe) -> Run:
    """Finds the checkpoint to go on from, and sets damaged ones aside. Called by all ranks.

    Raises:
        CheckpointError: every checkpoint is damaged, or was made by a recipe that this one does not continue.
    """
    run, damaged = _find_run(recipe, TO_TRAIN)
    for checkpoint in damaged:
        aside = on_rank_0(partial(directory.set_aside, checkpoint))
        logger.warning("set aside as %s; remove it when you have looked at it", aside)
    if run.state is not None and run.state.format == 1 and dist.get_rank() == 0:
        logger.warning(
            "%s was written before weight decay left norms, biases and gates alone, and before replicas "
            "had dropout masks of their own: from here on they do (CHANGELOG.md)",
            run.checkpoint,
        )
    return run


def _find_run(recipe: Recipe, rules: Sequence[Rule]) -> tuple[Run, tuple[Path, ...]]:
    """Returns where the run stands, and the damaged checkpoints that are newer."""
    found = newest_undamaged(Path(recipe.run_dir))
    if found.checkpoint is None:
        return Run(None, None), found.damaged
    state = read_state(found.checkpoint)
    check_resumable(state, recipe, found.checkpoint, rules)
    return Run(found.checkpoint, state), found.damaged


def start_stage(recipe: Recipe, position: Position, run: Run) -> StageWork:
    """Builds a stage and gives it its weights: resumed, handed over, or initial.

    Raises:
        NvlmError: shards, weights, tokenizer, recipe or checkpoint do not fit.
    """
    _check_hand_over(recipe, position, run)
    require_fitting(recipe)
    stage = recipe.stages[position.stage]
    topology = build_topology(stage.parallel, recipe.seed)
    outside = digests_outside(recipe)
    if run.checkpoint is not None and run.state is not None:
        check_outside(run.state.outside, outside, recipe, run.checkpoint)
    plan, encoder = _build_data_rank_0_first(recipe, position)
    engine = build_engine(recipe, stage, topology, kernels.detect())
    _set_weights(recipe, position, run, engine, plan)
    _check_weights(recipe, position, run, engine)
    return StageWork(engine, plan, encoder, outside)


def _check_hand_over(recipe: Recipe, position: Position, run: Run) -> None:
    """Refuses to start a stage from less than was saved last: it may have been damaged or removed since.

    Raises:
        CheckpointError: the newest undamaged checkpoint does not lead to this position.
    """
    if next(stages_to_run(recipe, run.position), None) != position:
        raise CheckpointError(
            f"stage {position.stage} cannot start at step {position.step}: the newest undamaged checkpoint "
            f"is {run.checkpoint}; start the same command again, and training goes on from there"
        )


def _build_data_rank_0_first(recipe: Recipe, position: Position) -> tuple[DataPlan, SampleEncoder]:
    """Lets rank 0 index shards that have no index yet; the other ranks then read the files it wrote.

    Raises:
        NvlmError: on every rank, when rank 0 fails; so no rank waits for it.
    """
    stage, blends = recipe.stages[position.stage], str(data_recipes_dir())
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            built = build_data(stage, recipe, blends)
        except NvlmError as error:
            dist.broadcast_object_list([str(error)], src=0)
            raise
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise NvlmError(f"rank 0 could not open the data:\n{failed[0]}")
    return built if dist.get_rank() == 0 else build_data(stage, recipe, blends)


def _set_weights(
    recipe: Recipe, position: Position, run: Run, engine: Engine, plan: DataPlan
) -> None:
    """Initialises the weights of a new run, resumes a stage, or hands weights over to the next stage."""
    if run.checkpoint is None or run.state is None:
        initial_weights(recipe, engine.model.module)
        engine.reload_optimizer_weights()
    elif run.state.stage == position.stage:
        plan.check_digests(run.state.shard_digests)
        layout = engine.topology.layout
        has_generators = run.state.has_generators_for(layout, device().type)
        sharded_state.load(engine, run.checkpoint, has_generators)
        is_other = run.state.layout != layout
        logger.info("resumed %s%s", run.checkpoint, " in another layout" if is_other else "")
    else:
        sharded_state.load_weights(engine.model.module, run.checkpoint)
        engine.reload_optimizer_weights()
        logger.info("stage %s starts from the weights of %s", position.stage, run.checkpoint)


def initial_weights(recipe: Recipe, module: MegatronModule) -> None:
    """Fills a model before any training.

    The language model and the projector get the weights that the recipe names. Every other tensor, and a
    part without weights, is seeded by its name.

    Raises:
        CheckpointError: the weights do not fit the recipe.
    """
    model = recipe.model
    seeded = global_weights.cut(global_weights.seeded_source(model.language, recipe.seed))
    with ExitStack() as opened:
        imported: list[LanguageSource | ProjectorSource] = []
        if model.projector.weights is not None:
            imported.append(opened.enter_context(projector_source(model)))
        if model.language.weights is not None:
            imported.append(opened.enter_context(language_source(model.language)))
        for each in imported:
            each.expect(global_weights.slices(module))
        sources = [*imported, seeded]
        global_weights.fill(
            module, lambda wanted, into: any(source(wanted, into) for source in sources)
        )
    for each in imported:
        _log_read(each.files)


def _log_read(files: WeightFiles) -> None:
    """Says how much the ranks asked for. Called by every rank."""
    asked: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(asked, files.bytes_asked)
    logger.info(
        "%s: of %s there a rank read at most %s, %d ranks %s together",
        files.setting, in_gb(files.bytes_stored), in_gb(max(asked)), len(asked), in_gb(sum(asked)),
    )  # fmt: skip


def _check_weights(recipe: Recipe, position: Position, run: Run, engine: Engine) -> None:
    """Checks that the weights are those that were saved, and that all of them are finite.

    Raises:
        CheckpointError: they are not.
    """
    if run.state is not None:
        global_weights.check_fingerprint(engine.whole_model(), run.state.weights_fingerprint)
    if broken := not_finite(engine):
        raise CheckpointError(
            f"stage {position.stage} cannot start at step {position.step}: {summary(broken)}; "
            f"{_remedy(recipe, run, broken)}"
        )


def _remedy(recipe: Recipe, run: Run, broken: Sequence[str]) -> str:
    """Says where weights or moments that are not finite came from, and what to do about it."""
    if any(name.startswith(ENCODER) for name in broken):
        return f"they lie in model.vision.weights={recipe.model.vision.weights}: fetch them again"
    if run.checkpoint is not None:
        return f"remove {run.checkpoint}, and the same command goes on from the one before"
    if any(name.startswith("projector.") for name in broken) and recipe.model.projector.weights:
        return f"they lie in model.projector.weights={recipe.model.projector.weights}: fetch them again"
    if recipe.model.language.weights is not None:
        return (
            f"they lie in model.language.weights={recipe.model.language.weights}: fetch them again"
        )
    return "model.language.init_std or the seed gives such weights: change it"


def open_loader(
    recipe: Recipe, position: Position, work: StageWork, left_out: Collection[int] = ()
) -> Loader:
    """Opens this rank's batches from the position's step to the stage's last.

    Args:
        recipe: its `loader` counts.
        position: where the stage starts.
        work: the stage.
        left_out: steps of the stage that are passed over, counted from 0.
    """
    engine = work.engine
    steps = range(position.step, engine.stage.steps)
    return Loader(
        work.plan,
        work.encoder,
        engine.topology.share,
        recipe.loader,
        engine.stage.parallel.max_tiles_in_flight,
        [step for step in steps if step not in left_out],
    )


def run_state(
    recipe: Recipe, work: StageWork, done: Position, wandb_run_id: str | None
) -> RunState:
    """Returns what a checkpoint that is saved now says about itself. Called by every rank."""
    return RunState(
        stage=done.stage,
        step=done.step,
        recipe=plain_recipe(recipe),
        layout=work.engine.topology.layout,
        shard_digests=work.plan.digests,
        weights_fingerprint=global_weights.fingerprint(work.engine.whole_model()),
        wandb_run_id=wandb_run_id,
        versions=library_versions(),
        outside=work.outside,
        device=device().type,
    )


def trained_replica(recipe: Recipe, stage_name: str) -> Replica:
    """Loads the newest weights of a run in a stage's layout, for generation.

    The model has no optimizer, no dropout and no gradient.

    Raises:
        CheckpointError: the run has no complete checkpoint, or it does not fit.
    """
    run, _ = _find_run(recipe, TO_READ)
    if run.checkpoint is None or run.state is None:
        raise CheckpointError(
            f"run_dir={recipe.run_dir} has no complete checkpoint; train it first: nvlm train"
        )
    check_outside(run.state.outside, digests_outside(recipe), recipe, run.checkpoint)
    replica = _empty_replica(recipe, stage_name)
    sharded_state.load_weights(replica.model, run.checkpoint)
    global_weights.check_fingerprint(replica.model, run.state.weights_fingerprint)
    return replica


def untrained_replica(recipe: Recipe, stage_name: str) -> Replica:
    """Builds the model before any training, in a stage's layout, to compare a run with."""
    replica = _empty_replica(recipe, stage_name)
    initial_weights(recipe, replica.model)
    return replica


def _empty_replica(recipe: Recipe, stage_name: str) -> Replica:
    """Builds a model with uninitialised weights, in evaluation mode."""
    require_fitting(recipe)
    stage = replace(recipe.stages[stage_name], trainable=())
    topology = build_topology(stage.parallel, recipe.seed)
    encoder = build_vision_encoder(
        recipe.model.vision, DTYPES[recipe.precision], device(), recipe.seed
    )
    model = build_model(recipe, stage, topology, kernels.detect()).eval()
    features = FeatureSource(encoder, topology)
    return Replica(model, features, topology, stage.sequence_length, pack_lengths(stage))
