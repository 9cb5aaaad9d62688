"""A small run for tests: a tokenizer, three sources in real shards, and the smoke recipe on top of them.

`python -m tests.train.smoke DIRECTORY` writes the shards for `nvlm train experiment=smoke
loader.data_root=DIRECTORY`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from nvlm_train.config.schema import Recipe
from nvlm_train.recipe.load import load_recipe

_WORDS = [
    "red", "green", "blue", "left", "right", "big", "small", "cat", "dog", "tree", "house", "car"
]  # fmt: skip


def make_smoke_data(root: Path, samples: int = 24) -> None:
    """Writes tokenizer.json, shards and blend.yaml under `root`."""
    from nvlm_train.data.prepare.write import prepare_shards

    _write_tokenizer(root / "tokenizer.json")
    for name, records in (
        ("captions", _captions(samples)),
        ("vqa", _questions(samples)),
        ("text", _chats(samples)),
    ):
        prepare_shards(records, str(root), name, samples_per_shard=samples // 2)
    sources = [
        {"name": name, "shards": str(root / f"{name}-{{000000..000001}}.tar"), "weight": weight}
        for name, weight in (("captions", 0.4), ("vqa", 0.4), ("text", 0.2))
    ]
    (root / "blend.yaml").write_text(json.dumps({"sources": sources}))


def overrides(root: Path, run_dir: Path, *more: str) -> list[str]:
    """Returns the overrides of the smoke recipe on the data under `root`, as `nvlm train` takes them."""
    return [
        "experiment=smoke",
        f"run_dir={run_dir}",
        f"model.tokenizer.path={root}/tokenizer.json",
        "model.language.vocab_size=512",  # rows for the tokenizer above, which has up to 500 ids
        f"stages.pretrain.blend={root}/blend.yaml",
        f"stages.sft.blend={root}/blend.yaml",
        *more,
    ]


def smoke_recipe(root: Path, run_dir: Path, *more: str) -> Recipe:
    """Loads `overrides`."""
    return load_recipe(overrides(root, run_dir, *more))


def read_metrics(run_dir: Path) -> list[dict]:
    """Records of metrics.jsonl without what the machine decides."""
    timing = (
        "seconds",
        "data_seconds",
        "tokens_per_second",
        "tflops_per_rank",
        "peak_memory_gib",
    )
    prefixes = ("slowest_rank", "seconds/", "tflops_per_rank/", "mfu")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in each.items() if k not in timing and not k.startswith(prefixes)}
        for each in records
    ]


def _captions(count: int) -> Iterator[tuple]:
    for number in range(count):
        # One tile, several tiles, and an image that is taller than wide.
        size = [(32, 32), (96, 64), (40, 120)][number % 3]
        yield f"cap{number:04d}", {"caption": _text(number, 4)}, [("png", _image(size, number))]


def _questions(count: int) -> Iterator[tuple]:
    for number in range(count):
        record = {
            "question": f"what is {_text(number, 1)}?",
            "answers": [{"answer": _text(number + 1, 1), "weight": 1.0}],
        }
        if number % 4 == 3:
            two = {
                "conversations": [
                    {"from": "human", "value": "<image>\n<image>\nsame?"},
                    {"from": "gpt", "value": "no"},
                ]
            }
            images = [
                ("0.png", _image((32, 32), number)),
                ("1.png", _image((64, 32), number + 1)),
            ]
            yield f"vqa{number:04d}", two, images
        else:
            yield f"vqa{number:04d}", record, [("png", _image((48, 48), number))]


def _chats(count: int) -> Iterator[tuple]:
    for number in range(count):
        turns = [("user", _text(number, 5)), ("assistant", _text(number + 3, 5))]
        yield f"txt{number:04d}", {"messages": [{"role": r, "content": c} for r, c in turns]}, []


def _text(seed: int, words: int) -> str:
    return " ".join(_WORDS[(seed * 7 + i * 5) % len(_WORDS)] for i in range(words))


def _image(size: tuple[int, int], seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(
        [" ".join(_WORDS) + " <Image><tile_1></Image> question answer"] * 20, trainer
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fast.save(str(path))


if __name__ == "__main__":
    make_smoke_data(Path(sys.argv[1]))
