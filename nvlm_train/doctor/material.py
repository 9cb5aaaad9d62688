"""Checks what the first step would read: tokenizer, shards, indexes and labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.config.schema import Recipe
from nvlm_train.convert import check
from nvlm_train.convert.tokenizer import stage_tags, tag_problems
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.shard_index import index_state
from nvlm_train.data.plan.data_recipe import Blend, list_shards, read_blend
from nvlm_train.data.plan.sources import Source, open_sources, skipped_share, unusable_kinds
from nvlm_train.data.shards.store import Store, build_store
from nvlm_train.doctor.finding import Finding, Findings, error, findings_of, ok, warning
from nvlm_train.doctor.storage import gigabytes
from nvlm_train.errors import ConfigError, NvlmError, ShardError
from nvlm_train.tokens import Tokenizer

SHARDS_READ = 4
"""Shards of each source whose labels are counted, unless `--all-shards` asks for all."""


def check_tokenizer(recipe: Recipe) -> Findings:
    """Checks that control tokens are single ids that text cannot forge, that tags survive a round trip,
    and that all ids fit the embedding table.
    """
    problems = list(check.tokenizer(recipe))
    yield from findings_of("tokenizer", problems)
    try:
        tokenizer = Tokenizer(recipe.model.tokenizer)
    except ConfigError:
        return  # the problems above name it
    rows = recipe.model.language.vocab_size
    if tokenizer.vocab_size <= rows:
        yield ok("tokenizer", f"{tokenizer.vocab_size} ids fit model.language.vocab_size={rows}")
    for name in recipe.schedule:
        stage = recipe.stages[name]
        if any(tag_problems(name, stage, tokenizer)):
            continue
        lengths = [len(tokenizer.encode(tag)) for tag in stage_tags(stage, tokenizer)]
        shown = f"{min(lengths)} to {max(lengths)} tokens each" if lengths else "none"
        yield ok(
            "tokenizer",
            f"stage {name}: tile tags ({stage.tiling.tags}): {shown}, round trip exact",
        )


def check_shards(recipe: Recipe) -> Findings:
    """Checks that every shard of every scheduled stage exists, and was indexed after it was written."""
    for blend in dict.fromkeys(recipe.stages[name].blend for name in recipe.schedule):
        try:
            store = build_store(recipe.loader)
            found = _listed(blend, store)
        except ConfigError as problems:
            for problem in problems.problems:
                yield error("shards", problem, "correct the data recipe")
            continue
        except ShardError as problem:
            yield error("shards", str(problem), "write what is missing, or correct the data recipe")
            continue
        yield from _shards(found, store, IndexFiles(recipe.loader.index_dir))


def _listed(blend: str, store: Store) -> Blend:
    """Reads a blend and the manifests that it names.

    Raises:
        ConfigError: the blend is wrong.
        ShardError: a manifest is missing or damaged.
    """
    return list_shards(read_blend(blend, str(data_recipes_dir())), store)


def _shards(blend: Blend, store: Store, files: IndexFiles) -> Findings:
    states: Counter[str] = Counter()
    total = unindexed = 0
    for name, fields in ((name, each.fields) for each in blend.sources for name in each.shards):
        try:
            shard = store.open(name)
            size, state = shard.stamp().size, index_state(shard, files, fields)
        except ShardError as problem:
            yield error("shards", str(problem), "correct the data recipe")
            continue
        except OSError as problem:
            yield error(
                "shards",
                f"blend={blend.name}: {store.path(name)}: {problem.strerror or problem}",
                f"set loader.data_root (now {store.root}), or write the shard with `nvlm data prepare`",
            )
            continue
        states[state] += 1
        total += size
        unindexed += size if state != "fresh" else 0
    count = sum(states.values())
    yield ok("shards", f"blend={blend.name}: {count} shard(s), {gigabytes(total)}")
    if count == states["fresh"]:
        yield ok("index", f"blend={blend.name}: every index is up to date")
        return
    yield warning(
        "index",
        f"blend={blend.name}: {states['missing']} shard(s) without an index, {states['stale']} written "
        f"since: {gigabytes(unindexed)} to read before the first step, while GPUs wait",
        "run `nvlm data index` with this recipe's overrides on a machine without GPUs",
    )


def check_labels(recipe: Recipe, shards_read: int | None) -> Findings:
    """Reports the shares of trained tokens and unusable samples, stage by stage. Makes missing indexes.

    Args:
        recipe: a checked recipe.
        shards_read: shards of each source that are looked at; None for all.
    """
    for name in recipe.schedule:
        stage = recipe.stages[name]
        try:
            store = build_store(recipe.loader)
            blend = _first_shards(_listed(stage.blend, store), shards_read)
            encoder = build_encoder(stage, recipe)
            sources = open_sources(blend, store, encoder, recipe.loader.index_dir)
        except NvlmError as problem:
            yield error("labels", f"stage {name}: {problem}", "see the lines above")
            continue
        for source in sources:
            yield _coverage(name, source)
        yield _skipped(name, sources, recipe.loader.max_skipped_fraction)


def _first_shards(blend: Blend, count: int | None) -> Blend:
    sources = [replace(source, shards=source.shards[:count]) for source in blend.sources]
    return replace(blend, sources=tuple(sources))


def _coverage(stage: str, source: Source) -> Finding:
    tokens, trained = source.table.num_tokens, source.table.num_trained
    usable = source.num_samples - source.num_unusable
    text = (
        f"stage {stage}: {source.name}: {usable} of {source.num_samples} samples have trained tokens, "
        f"{trained / max(tokens, 1):.0%} of their tokens; {source.num_truncated} are cut"
    )
    if usable == 0:
        return error("labels", text, "mend the source or take it out of the blend")
    if source.num_truncated * 100 > source.num_samples:
        remedy = f"raise stages.{stage}.sequence_length, or split the long samples"
        return warning("labels", text, remedy)
    return ok("labels", text)


def _skipped(stage: str, sources: list[Source], tolerance: float) -> Finding:
    """Reports the share of unusable samples among those drawn, which training compares as well."""
    share = skipped_share(sources)
    text = f"stage {stage}: {share:.2%} of the samples drawn cannot be used (tolerance {tolerance:.2%})"
    if share <= tolerance:
        return ok("labels", text)
    examples = [kind.examples[0] for kind in unusable_kinds(sources)]
    return error(
        "labels",
        "\n".join([text, *examples]),
        "mend these samples, or raise loader.max_skipped_fraction",
    )
