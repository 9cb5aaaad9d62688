"""Measures indexing speed: shards of captions, documents and chats, with the lengths of one encoding.

    OMP_NUM_THREADS=1 python -m benchmarks.index --samples 20000 --workers 2

Images are small JPEGs of few different contents (only headers are decoded) padded to the size of
ordinary photos, so that reading and checksums cost what they do in practice; the tokenizer is a
byte-level BPE of 8,000 tokens trained on the spot. Time to make the shards is not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.index.build import Encoding, IndexedShard, WantedShard, index_shards
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.samples.encoder import EncodingSpec
from nvlm_train.data.shards.tar import Sample, write_shards
from nvlm_train.routes import ROUTES

WORDS = 4000
PHOTO_BYTES = 60_000


def make_samples(count: int) -> Iterator[Sample]:
    """Yields captions, documents and chats in turn, with text as long as in such sets."""
    numbers = np.random.default_rng(0)
    words = [
        "".join(chr(97 + letter) for letter in numbers.integers(0, 26, numbers.integers(2, 9)))
        for _ in range(WORDS)
    ]
    photos = [_photo(*size) for size in ((640, 480), (480, 640), (1240, 1754), (1000, 400))]

    def text(length: float) -> str:
        return " ".join(words[n] for n in numbers.integers(0, WORDS, max(3, int(length))))

    for number in range(count):
        key, photo = f"{number:08d}", photos[number % len(photos)]
        if number % 3 == 0:
            yield key, {"caption": text(numbers.lognormal(2.6, 0.5))}, [("jpg", photo)]
        elif number % 3 == 1:
            question = {"from": "human", "value": "<image>\n" + text(12)}
            answer = {"from": "gpt", "value": text(numbers.lognormal(4.2, 0.7))}
            yield key, {"conversations": [question, answer]}, [("jpg", photo)]
        else:
            turns = [
                {"from": who, "value": text(numbers.lognormal(4.2, 0.9))}
                for who in ("human", "gpt") * 2
            ]
            yield key, {"conversations": turns}, []


def _photo(width: int, height: int) -> bytes:
    """Returns a JPEG that is padded after its end mark to the size of a photo."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 150)).save(stream, "JPEG")
    return stream.getvalue().ljust(PHOTO_BYTES, b"\0")


def make_tokenizer(path: Path) -> TokenizerConfig:
    """Trains a byte-level BPE with the chat template's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator((json.dumps(record) for _, record, _ in make_samples(1500)), trainer)
    fast.save(str(path))
    return TokenizerConfig(path=str(path))


def make_encoding(tokenizer: TokenizerConfig) -> Encoding:
    """Returns the paper's tiling: tiles of 448 pixels, 256 tokens each, at most six and a thumbnail."""
    spec = EncodingSpec(
        tile_size=448, tokens_per_tile=256, context_tokens_per_tile=256, routes=ROUTES["d"],
        tiling=TilingConfig(), sequence_length=4096, prompts="sft", system_message=None,
        max_image_pixels=178_956_970,
    )  # fmt: skip
    return Encoding(tokenizer, spec)


def measure(
    paths: list[str], encodings: list[Encoding], workers: int
) -> tuple[float, list[IndexedShard]]:
    """Returns wall seconds, and the indexed shards."""
    start = time.perf_counter()
    numbers = tuple(range(len(encodings)))
    work = index_shards(
        dict.fromkeys(map(WantedShard, paths), numbers), encodings, IndexFiles(), workers
    )
    done = list(work)
    assert not any(shard.error for shard in done), done
    return time.perf_counter() - start, done


def main() -> int:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shards = write_shards(make_samples(options.samples), str(root / "s-%06d.tar"), 1000)
        paths = [shard.path for shard in shards]
        encodings = [make_encoding(make_tokenizer(root / "tokenizer.json"))]
        alone_s, alone = measure(paths, [], options.workers)
        for path in paths:
            Path(path + ".index").unlink()
        both_s, both = measure(paths, encodings, options.workers)
        again_s, again = measure(paths, encodings, options.workers)
        assert all(shard.was_known for shard in again)
        found = {
            "samples": options.samples, "workers": options.workers,
            "bytes": sum(shard.num_bytes for shard in both),
            "index_samples_per_cpu_s": round(options.samples / sum(s.seconds for s in alone)),
            "index_and_lengths_samples_per_cpu_s": round(
                options.samples / sum(s.seconds for s in both)
            ),
            "index_wall_s": round(alone_s, 2), "index_and_lengths_wall_s": round(both_s, 2),
            "again_wall_s": round(again_s, 2),
            "index_bytes_per_sample": round(
                sum(Path(path + ".index").stat().st_size for path in paths) / options.samples, 1
            ),
        }  # fmt: skip
        minutes = 1e6 / found["index_and_lengths_samples_per_cpu_s"] / options.workers / 60
        found["minutes_per_million_samples"] = round(minutes, 2)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
