"""Our shards in megatron-energon's own hands: its command indexes them, its loader yields every sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_train.data.shards.tar import write_shards
from tests.data.conftest import chat, draw_image, encoded

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]

LIST_SAMPLES = """
import json, sys
from megatron import energon
worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
data = energon.get_val_dataset(sys.argv[1], split_part="train", worker_config=worker, batch_size=1)
for batch in energon.get_loader(data):
    print(json.dumps([batch.__key__[0], batch.caption[0], list(batch.image.shape)]))
"""


@pytest.fixture(scope="module")
def energon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed: a folder of its own, since its requirements clash with ours."""
    folder = tmp_path_factory.mktemp("energon")
    wanted = ["-r", str(ROOT / "benchmarks" / "energon.txt")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *wanted], check=True)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_energon_prepares_and_reads_our_shards(energon: Path, tmp_path: Path) -> None:
    samples = [
        (
            f"k{n:03d}",
            chat("<image>what?", f"a{n}"),
            [("jpg", encoded(draw_image(30 + n, 20), "JPEG"))],
        )
        for n in range(10)
    ]
    write_shards(samples, str(tmp_path / "s-%06d.tar"), 4)
    fields = {"image": "jpg", "caption": "json[conversations][1][value]"}
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--num-workers", "1"]
    options += ["--sample-type", "CaptioningSample", "--field-map", json.dumps(fields)]
    run(energon, str(energon / "bin" / "energon"), "prepare", *options, str(tmp_path))
    read = [
        json.loads(line) for line in run(energon, "-c", LIST_SAMPLES, str(tmp_path)).splitlines()
    ]
    found = {key.rsplit("/", 1)[-1]: (caption, shape) for key, caption, shape in read}
    assert found == {f"k{n:03d}": (f"a{n}", [1, 3, 20, 30 + n]) for n in range(10)}
