"""`nvlm data prepare`: raw files to WebDataset shards with a manifest."""

from __future__ import annotations

import argparse
import sys

from nvlm_train.data.import_formats import read_jsonl, read_llava
from nvlm_train.data.prepare import prepare_shards
from nvlm_train.errors import ShardError

_READERS = {"llava": read_llava, "jsonl": read_jsonl}


def prepare(options: argparse.Namespace) -> int:
    """Writes the shards and says how a data recipe names them.

    Raises:
        NvlmError: input that cannot be read.
    """
    samples = _READERS[options.format](options.input, options.images)
    try:
        manifest = prepare_shards(samples, options.out, options.name, options.samples_per_shard)
    except (ValueError, OSError) as error:
        raise ShardError(str(error)) from error
    sys.stdout.write(
        f"{manifest.num_samples} samples, {manifest.num_images} images, {manifest.num_bytes} bytes "
        f"in {len(manifest.shards)} shard(s)\nin a data recipe: shards: {options.out}/{manifest.pattern}\n"
    )
    return 0
