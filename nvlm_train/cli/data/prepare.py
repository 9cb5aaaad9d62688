"""`nvlm data prepare`: raw files to WebDataset shards with a manifest."""

from __future__ import annotations

import argparse
import os
import sys

from nvlm_train.data.formats import RAW_FORMATS
from nvlm_train.errors import ConfigError, ShardError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser(
        "prepare",
        help="raw files to WebDataset shards; run again after a kill to go on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:9} {text}" for name, text in RAW_FORMATS.items()),
    )
    command.add_argument("format", choices=list(RAW_FORMATS), metavar="FORMAT")
    command.add_argument("input", nargs="+", metavar="INPUT")
    command.add_argument(
        "--images", default=".", metavar="PLACE", help="where image names start; default: here"
    )
    command.add_argument("--out", required=True, metavar="DIR")
    command.add_argument("--name", required=True, help="shards are called NAME-000000.tar, ...")
    command.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores"
    )
    command.add_argument(
        "--max-bad", type=int, default=0, metavar="N", help="leave out up to N entries; default: 0"
    )
    command.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="FIELD=PLACE",
        help="as `fields:` in a data recipe: caption=txt, conversations=json.dialog, image=img",
    )
    command.add_argument("--image-name", default="", metavar="TEMPLATE", help="vqa only")
    command.add_argument("--split", default="", help="datasets only")
    command.set_defaults(run=prepare)


def prepare(options: argparse.Namespace) -> int:
    """Writes the shards and says how a data recipe names them.

    Raises:
        NvlmError: options or input that cannot be used.
    """
    from nvlm_train.cli.data.prepare_view import open_view
    from nvlm_train.data.prepare.inputs.entries import InputSpec
    from nvlm_train.data.prepare.preparation import prepare_input
    from nvlm_train.data.prepare.staging import Target
    from nvlm_train.data.shards.fields import read_fields

    problems = _problems(options)
    mapping = read_fields(_fields(options.field, problems), "--field", problems)
    if problems:
        raise ConfigError(problems)
    paths, images = tuple(options.input), options.images
    spec = InputSpec(options.format, paths, images, mapping, options.image_name, options.split)
    target = Target(options.out, options.name, options.samples_per_shard, options.max_bad)
    try:
        with open_view(options.name) as view:
            manifest = prepare_input(spec, target, options.workers, view.show)
    except OSError as error:
        raise ShardError(f"{error}; the same command goes on from here") from error
    left_out = f", {manifest.num_bad} bad entries left out" if manifest.num_bad else ""
    sys.stdout.write(
        f"{manifest.num_samples} samples, {manifest.num_images} images, {manifest.num_bytes} bytes "
        f"in {len(manifest.shards)} shard(s){left_out}\n"
        f"in a data recipe: shards: {options.out}/{manifest.pattern}\n"
    )
    return 0


def _problems(options: argparse.Namespace) -> list[str]:
    counts = {"samples-per-shard": 1, "workers": 1, "max-bad": 0}
    values = {name: getattr(options, name.replace("-", "_")) for name in counts}
    problems = [
        f"--{name}={values[name]} must be at least {least}"
        for name, least in counts.items()
        if values[name] < least
    ]
    if not options.name or any(part in options.name for part in ("/", "%", "{", "*", "?", "[")):
        problems.append(f"--name={options.name!r} must be a file name without / % {{ * ? [")
    if options.split and options.format != "datasets":
        problems.append(f"--split={options.split}: the format {options.format} has no splits")
    if options.image_name and options.format != "vqa":
        problems.append(f"--image-name is for the format vqa, not {options.format}")
    return problems


def _fields(pairs: list[str], problems: list[str]) -> dict[str, str | list[str]] | None:
    """Returns the FIELD=PLACE pairs as a mapping; a repeated `image` makes a list."""
    fields: dict[str, str | list[str]] = {}
    images: list[str] = []
    for pair in pairs:
        field, equals, place = pair.partition("=")
        if not equals or field in fields:
            problems.append(f"--field={pair} must be FIELD=PLACE, each field once")
        elif field == "image":
            images.append(place)
        else:
            fields[field] = place
    return (fields | ({"image": images} if images else {})) or None
