"""`nvlm convert gguf`: a GGUF file of llama.cpp to a directory of weights, config and tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser(
        "gguf",
        help="make a directory as save_pretrained leaves it from a GGUF file",
        description="Weights become fp32, exactly as the file's quantisation defines them.",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="the .gguf file")
    command.add_argument("out", type=Path, metavar="OUT", help="the directory, not there yet")
    command.add_argument(
        "--tokenizer", type=Path, metavar="FILE",
        help="the model's own tokenizer.json (default: made from the vocabulary in the file)",
    )  # fmt: skip
    command.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> int:
    """Converts, and says what was written.

    Raises:
        CheckpointError: the file cannot be converted, or OUT holds something.
    """
    from nvlm_train.convert.gguf.directory import convert_gguf

    model = convert_gguf(options.file, options.out, options.tokenizer)
    language = model.language
    print(
        f"{options.out}: {model.architecture.causal}, {language.num_layers} layers, "
        f"{language.hidden_size} wide, {language.num_heads} heads, {language.num_kv_heads} KV groups, "
        f"vocabulary {language.vocab_size:,}{', tied' if language.tied_embeddings else ''}"
    )
    return 0
