"""`nvlm data prepare`: raw files to WebDataset shards with a manifest."""

from __future__ import annotations

import argparse
import sys

from nvlm_train.errors import ShardError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments of the command."""
    command = commands.add_parser("prepare", help="raw files to WebDataset shards")
    command.add_argument("format", choices=["llava", "jsonl"])
    command.add_argument("input", help="the JSON or JSONL file")
    command.add_argument(
        "--images", default=".", metavar="DIR", help="where relative image paths start"
    )
    command.add_argument("--out", required=True, metavar="DIR")
    command.add_argument("--name", required=True, help="shards are called NAME-000000.tar, ...")
    command.add_argument("--samples-per-shard", type=int, default=1000)
    command.set_defaults(run=prepare)


def prepare(options: argparse.Namespace) -> int:
    """Writes the shards and says how a data recipe names them.

    Raises:
        NvlmError: input that cannot be read.
    """
    from nvlm_train.data.import_formats import read_jsonl, read_llava
    from nvlm_train.data.prepare import prepare_shards

    readers = {"llava": read_llava, "jsonl": read_jsonl}
    samples = readers[options.format](options.input, options.images)
    try:
        manifest = prepare_shards(samples, options.out, options.name, options.samples_per_shard)
    except (ValueError, OSError) as error:
        raise ShardError(str(error)) from error
    sys.stdout.write(
        f"{manifest.num_samples} samples, {manifest.num_images} images, {manifest.num_bytes} bytes "
        f"in {len(manifest.shards)} shard(s)\nin a data recipe: shards: {options.out}/{manifest.pattern}\n"
    )
    return 0
