"""Compares `nvlm data prepare` with the least that has to be done: read each image, write each tar.

    OMP_NUM_THREADS=1 python -m benchmarks.prepare

A LLaVA-style list of images of about 100 kB. The floor is one process that reads files and hands
them to webdataset's ShardWriter: no checks, no resume, no digests. All runs are of the whole
command's work in a fresh process; the runs take turns.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

FLOOR = """
import json, sys, webdataset
from pathlib import Path
source, images, out = sys.argv[1:]
Path(out).mkdir()
with webdataset.ShardWriter(out + "/x-%06d.tar", maxcount=1000, verbose=0, encoder=False) as tar:
    for number, item in enumerate(json.loads(Path(source).read_text())):
        data = Path(images, item.pop("image")).read_bytes()
        tar.write({"__key__": f"{number:09d}", "jpg": data, "json": json.dumps(item).encode()})
"""


def main() -> int:
    """Prints a table, then one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        num_bytes = make_input(root, options.samples)
        prepare = ["-m", "nvlm_train", "data", "prepare", "llava", f"{root}/x.json"]
        prepare += ["--images", f"{root}/images", "--name", "x"]
        commands = {
            "floor": ["-c", FLOOR, f"{root}/x.json", f"{root}/images"],
            "1 worker": [*prepare, "--workers", "1", "--out"],
            "2 workers": [*prepare, "--workers", "2", "--out"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(options.rounds):
            for name, command in commands.items():
                out = f"{root}/{name.replace(' ', '')}-{number}"
                start = time.perf_counter()
                subprocess.run([sys.executable, *command, out], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
    result: dict[str, float] = {"samples": options.samples, "megabytes": round(num_bytes / 1e6, 1)}
    for name, taken in seconds.items():
        median = statistics.median(taken)
        result[f"{name} seconds"] = round(median, 2)
        result[f"{name} samples/s"] = round(options.samples / median, 1)
        print(f"{name:10} {median:7.2f} s {options.samples / median:9.1f} samples/s")
    print(json.dumps(result))
    return 0


def make_input(root: Path, count: int) -> int:
    """Writes the list and 50 different images, linked under all names. Returns the bytes to copy."""
    images = root / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    num_bytes, items = 0, []
    for number in range(count):
        file, first = images / f"{number:06d}.jpg", images / f"{number % 50:06d}.jpg"
        if number < 50:
            coarse = noise.integers(0, 256, (96, 128, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(coarse).resize((640, 480)).save(stream, "JPEG", quality=90)
            file.write_bytes(stream.getvalue())
        else:
            file.hardlink_to(first)
        num_bytes += file.stat().st_size
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": f"Noise number {number}."},
        ]
        items.append({"id": str(number), "image": file.name, "conversations": turns})
    (root / "x.json").write_text(json.dumps(items))
    return num_bytes


if __name__ == "__main__":
    raise SystemExit(main())
