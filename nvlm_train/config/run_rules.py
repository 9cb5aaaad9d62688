"""Rules on where a run lives, and on how it reads, saves and reports."""

from __future__ import annotations

from nvlm_train.config.ranges import Problems, in_range
from nvlm_train.config.schema import Recipe


def counters_are_positive(recipe: Recipe) -> Problems:
    """Reading, saving and tracking: nothing negative, nothing that would never happen."""
    loader, checkpoint = recipe.loader, recipe.checkpoint
    yield from in_range("seed", recipe.seed, 0)
    yield from in_range("loader.workers", loader.workers, 0)
    yield from in_range("loader.prefetch_steps", loader.prefetch_steps, 1)
    yield from in_range("loader.read_attempts", loader.read_attempts, 1)
    yield from in_range("loader.max_skipped_fraction", loader.max_skipped_fraction, 0, 1)
    yield from in_range("loader.max_image_pixels", loader.max_image_pixels, 1)
    for key in ("prefetch_gib", "cache_gib"):
        if getattr(loader, key) <= 0:
            yield f"loader.{key}={getattr(loader, key)} is out of range; use more than 0"
    yield from in_range("checkpoint.interval_steps", checkpoint.interval_steps, 1)
    yield from in_range("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from in_range("checkpoint.max_failed_saves", checkpoint.max_failed_saves, 0)
    tracking = recipe.tracking
    yield from in_range("tracking.log_every", tracking.log_every, 1)
    yield from in_range("tracking.num_examples", tracking.num_examples, 0)
    yield from in_range("tracking.example_tokens", tracking.example_tokens, 1)
    if tracking.examples_every is not None:
        yield from in_range("tracking.examples_every", tracking.examples_every, 1)


def run_dir_is_a_directory(recipe: Recipe) -> Problems:
    """A checkpoint becomes visible by one atomic rename, which object stores do not have."""
    if "://" in recipe.run_dir:
        yield (
            f"run_dir={recipe.run_dir} is a URL; checkpoints need a file system that renames directories: "
            "use a local or shared directory, and copy checkpoints/STAGE-STEP from there when its "
            "manifest.json exists"
        )
