"""The README's way from one's own data to a trained model, run as it is written there."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
NUM_IMAGES = 24
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 200),
    "yellow": (230, 200, 40),
}
SIZES = ((320, 240), (240, 320), (480, 160))


def section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("## From your own data", 1)[1].split("\n## ", 1)[0]


def files() -> dict[str, str]:
    """The files that the section shows, by the name in front of each."""
    return dict(re.findall(r"`(mine/[\w/]+\.yaml)`[^`]*```yaml\n(.*?)```", section(), re.DOTALL))


def commands() -> list[str]:
    (block,) = re.findall(r"```\n(nvlm .*?)```", section(), re.DOTALL)
    return [line.split("#")[0].strip() for line in block.splitlines()]


def draw(rng: random.Random) -> tuple[Image.Image, str]:
    """A shape somewhere on paper, and what it is."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(["circle", "square"])
    width, height = rng.choice(SIZES)
    image = Image.new("RGB", (width, height), (245, 244, 240))
    pen = ImageDraw.Draw(image)
    x, y, size = rng.randint(20, width - 110), rng.randint(10, height - 100), rng.randint(50, 90)
    outline = pen.ellipse if shape == "circle" else pen.rectangle
    outline((x, y, x + size, y + size), fill=COLOURS[colour])
    return image, f"a {colour} {shape}"


def make_photos(folder: Path) -> None:
    """Drawn shapes, with a question about each in LLaVA's form."""
    (folder / "photos").mkdir()
    rng, entries = random.Random(1), []
    for number in range(NUM_IMAGES):
        image, answer = draw(rng)
        image.save(folder / "photos" / f"{number:03}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is shown?"), ("gpt", answer)]
        chat = [{"from": who, "value": words} for who, words in turns]
        entries.append({"id": str(number), "image": f"{number:03}.jpg", "conversations": chat})
    (folder / "chat.json").write_text(json.dumps(entries))


def test_the_section_has_two_files_and_six_commands() -> None:
    assert list(files()) == ["mine/chat.yaml", "mine/experiment/mine.yaml"]
    assert [line.split()[:2] for line in commands()] == [
        ["nvlm", "data"],
        ["nvlm", "data"],
        ["nvlm", "data"],
        ["nvlm", "doctor"],
        ["nvlm", "train"],
        ["nvlm", "chat"],
    ]


@pytest.mark.slow
def test_the_commands_lead_to_a_trained_model(tmp_path: Path) -> None:
    make_photos(tmp_path)
    for name, content in files().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for command in commands():
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    answer = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch("a [a-z]+ (circle|square)", answer), answer
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "runs/mine/metrics.jsonl").open("rb")
    ]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[10]
