"""A source's shards by name: those the data recipe lists, or all that a manifest lists.

`nvlm data prepare` writes `NAME.manifest.json` beside the shards. A recipe that names the manifest
holds for any number of shards, and a shard lost on the way is an error, not a smaller source.
"""

from __future__ import annotations

import json
from dataclasses import replace

from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.shards.manifest import check_format
from nvlm_train.data.shards.store import DIRECT
from nvlm_train.data.shards.tar import join_root
from nvlm_train.errors import ShardError

MANIFEST_SUFFIX = ".manifest.json"


def list_shards(blend: Blend, data_root: str) -> Blend:
    """The blend with every manifest replaced by the shards it lists, which lie beside it.

    Raises:
        ShardError: a manifest that is missing or is none.
    """
    return replace(
        blend,
        sources=tuple(
            replace(source, shards=_shard_names(blend.name, source, data_root))
            for source in blend.sources
        ),
    )


def missing_shard(blend: str, source: SourceConfig, name: str, data_root: str) -> ShardError:
    """The error for a shard or manifest that is not there: whose it is and how to get it."""
    return ShardError(
        f"missing shard={join_root(data_root, name)}: blend={blend} source={source.name} names "
        f"{name}, and relative names start at loader.data_root={data_root}; correct either, or "
        f"{source.remedy}"
    )


def _shard_names(blend: str, source: SourceConfig, data_root: str) -> tuple[str, ...]:
    names: list[str] = []
    for name in source.shards:
        is_manifest = name.endswith(MANIFEST_SUFFIX)
        names += _listed(blend, source, name, data_root) if is_manifest else [name]
    return tuple(names)


def _listed(blend: str, source: SourceConfig, name: str, data_root: str) -> list[str]:
    path = join_root(data_root, name)
    try:
        with DIRECT.open(path).open() as stream:
            content = json.loads(stream.read())
        check_format(content, path)
        files = [str(shard["file"]) for shard in content["shards"]]
    except FileNotFoundError as error:
        raise missing_shard(blend, source, name, data_root) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"manifest={path} cannot be read ({type(error).__name__}: {error}); blend={blend} "
            f"source={source.name} names it; {source.remedy}"
        ) from error
    directory = name.rpartition("/")[0]
    return [f"{directory}/{file}" if directory else file for file in files]
