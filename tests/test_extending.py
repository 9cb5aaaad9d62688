"""docs/extending.md, followed literally: its blocks change a copy of the repository, which is then used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.conftest import encoded, picture
from tests.train.smoke import make_smoke_data, overrides

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COPIED = ("nvlm_train", "recipes", "data_recipes", "docs/reference")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the page changes."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=ignored)
    return tmp_path / "copy"


def blocks(heading: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks under a heading."""
    _, found, rest = PAGE.partition(f"\n## {heading}\n")
    assert found, heading
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", rest.partition("\n## ")[0], re.M | re.S)


def follow(heading: str, copy: Path) -> None:
    """Applies a section's blocks: whole new files, and changes of files that there are."""
    for language, content in blocks(heading):
        if language == "diff":
            change(content, copy)
        else:
            first, _, rest = content.partition("\n")
            path = copy / first.removeprefix("# ")
            assert not path.exists(), path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest)


def change(diff: str, copy: Path) -> None:
    """Replaces each hunk's old lines, which have to be in their file once, by its new ones."""
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        name, plus, *lines = part.splitlines()
        assert plus == f"+++ b/{name}"
        path = copy / name
        for hunk in re.split(r"^@@$\n?", "\n".join(lines), flags=re.M):
            each = [line for line in hunk.splitlines() if line]
            old = "".join(f"{line[1:]}\n" for line in each if line[0] in " -")
            new = "".join(f"{line[1:]}\n" for line in each if line[0] in " +")
            text = path.read_text()
            assert text.count(old) == 1, f"{name} has not once:\n{old}"
            path.write_text(text.replace(old, new))


def run(copy: Path, *command: str | Path) -> str:
    """A command of Python in the copy, with the copy's package."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def code_lines(heading: str) -> list[str]:
    """The section's indented lines: commands."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    plain = re.sub(r"^```.*?^```$", "", section, flags=re.M | re.S)
    return re.findall(r"^    (\S.*)$", plain, re.M)


def test_an_input_format(copy: Path) -> None:
    follow("An input format", copy)
    (copy / "photos").mkdir()
    (copy / "photos" / "a.png").write_bytes(encoded(picture(40, 30), "PNG"))
    (copy / "pairs.tsv").write_text("a.png\tA red cat.\na.png\tA cat, again.\nno tab\n")
    (command,) = code_lines("An input format")
    output = run(copy, "-m", "nvlm_train", *command.split()[1:], "--max-bad", "1", "--workers", "1")
    assert "2 samples, 2 images" in output and "1 bad entries left out" in output
    manifest = json.loads((copy / "shards" / "pairs.manifest.json").read_text())
    assert "it has no tab between image and caption" in json.dumps(manifest)
    assert "tsv       an image's name" in run(copy, "-m", "nvlm_train", "data", "prepare", "--help")


def test_a_style_of_tile_tags(copy: Path) -> None:
    follow("A style of tile tags", copy)
    (command,) = code_lines("A style of tile tags")
    code = f"""
from nvlm_train.config.load import load_recipe
from nvlm_train.tokens import tile_tags
style = load_recipe({command.split()[2:]!r}).stages["sft"].tiling.tags
print(*tile_tags(style, (2, 1), 2, 1, "<all>"))
"""
    assert run(copy, "-c", code).split() == ["<tile_1_of_2>", "<tile_2_of_2>", "<all>"]


@pytest.mark.slow
def test_everything_in_one_run(copy: Path) -> None:
    """A stage of the page, on the page's tags, reports the page's metric, and the reference page has it."""
    for heading in ("A style of tile tags", "A metric", "A stage"):
        follow(heading, copy)
    make_smoke_data(copy)
    _, *settings = overrides(copy, copy / "run", "stages.sft.tiling.tags=1d_of")
    three = ("experiment=three", f"stages.align.blend={copy}/blend.yaml")
    run(copy, "-m", "nvlm_train", "train", *three, *settings, "--recipes", "mine")
    records = [
        json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [each["stage"] for each in records] == ["align"] * 2 + ["pretrain"] * 4 + ["sft"] * 4
    for each in records:
        assert each["tokens_per_sample"] == each["tokens"] / each["samples"] > 0
    (command,) = code_lines("A metric")
    run(copy, *command.split()[1:])
    assert "| `tokens_per_sample` |" in (copy / "docs" / "reference" / "metrics.md").read_text()
    assert "`1d_of`" in (copy / "docs" / "reference" / "recipe.md").read_text()
