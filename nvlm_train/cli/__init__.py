"""Floor 8: the console script `nvlm`. It imports only what the chosen command needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvlm_train.cli import convert, dashboard, data, doctor, launch
from nvlm_train.errors import ConfigError, NvlmError
from nvlm_train.logs import set_up_logging

if TYPE_CHECKING:
    from nvlm_train.config.schema import Recipe

EXIT_ERROR = 2
"""Exit code of an error that the user can fix; the message says what and how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 2 for a user's error, 75 for "saved, start me again".
    """
    options = _parser().parse_args(arguments)
    set_up_logging(_environment("RANK"), _environment("WORLD_SIZE"))
    try:
        code: int = options.run(options)
    except ConfigError as error:
        _complain(f"{len(error.problems)} problem(s) in the recipe:\n{error}")
        return EXIT_ERROR
    except NvlmError as error:
        _complain(f"{type(error).__name__}: {error}")
        return EXIT_ERROR
    return code


def _environment(name: str) -> int | None:
    value = os.environ.get(name)
    return int(value) if value else None


def _complain(message: str) -> None:
    rank = os.environ.get("RANK")
    sys.stderr.write(f"nvlm{f' (rank {rank})' if rank else ''}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nvlm", description="Trains NVLM-style multimodal models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe's schedule, or continue it")
    _recipe_arguments(train)
    train.set_defaults(run=_train)
    launch.add_parser(commands)
    chat = commands.add_parser("chat", help="ask a trained run about an image")
    _recipe_arguments(chat)
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )
    chat.add_argument("--question", required=True, help="without <image> markers images come first")
    chat.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    chat.set_defaults(run=_chat)
    shards = commands.add_parser("data", help="make, index and look at training data")
    data.add_parsers(shards.add_subparsers(required=True, metavar="COMMAND"))
    weights = commands.add_parser("convert", help="read the weights of others")
    convert.add_parsers(weights.add_subparsers(required=True, metavar="COMMAND"))
    doctor.add_parser(commands)
    dashboard.add_parser(commands)
    runs = commands.add_parser("compare", help="show runs side by side")
    runs.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    runs.set_defaults(run=_compare)
    demo = commands.add_parser("demo", help="train and judge the small NVLM of the README")
    demo.add_argument("--architecture", choices=["d", "x", "h"], default="d")
    demo.add_argument(
        "--language", choices=["demo", "smollm2"], default="demo",
        help="the language model: a small one that comes along, or SmolLM2-135M-Instruct (d only)",
    )  # fmt: skip
    demo.add_argument("--run-dir", help="default: runs/demo, demo_x, demo_h or demo_smollm2")
    demo.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    demo.set_defaults(run=_demo)
    return parser


def _recipe_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    command.add_argument(
        "--recipes", metavar="DIR", help="your own recipes, in addition to the shipped ones"
    )
    command.add_argument(
        "--cfg", nargs="?", choices=["job"], const="job",
        help="print the whole recipe as YAML, with sizes that come from weights, and end",
    )  # fmt: skip


def _recipe(options: argparse.Namespace) -> Recipe | None:
    """Loads the recipe of a command. Where only its text is asked for, prints it and returns None."""
    from nvlm_train.recipe.load import as_yaml, load_recipe

    recipe = load_recipe(options.overrides, options.recipes)
    if options.cfg is None:
        return recipe
    sys.stdout.write(as_yaml(recipe))
    return None


def _train(options: argparse.Namespace) -> int:
    if (recipe := _recipe(options)) is None:
        return 0
    _before_megatron()
    from nvlm_train.cli.train import run

    return run(recipe)


def _chat(options: argparse.Namespace) -> int:
    if (recipe := _recipe(options)) is None:
        return 0
    _before_megatron()
    from nvlm_train.cli.chat import answer

    return answer(recipe, options.image, options.question, options.max_new_tokens)


def _before_megatron() -> None:
    """Prepares megatron-core's import, which without CUDA is then faster."""
    from nvlm_train.parallel import cpu

    cpu.install()


def _demo(options: argparse.Namespace) -> int:
    from nvlm_train.demo.run import run_demo

    return run_demo(options.architecture, options.run_dir, options.overrides, options.language)


def _compare(options: argparse.Namespace) -> int:
    from nvlm_train.cli.compare import compare

    return compare(options.run_dirs)
