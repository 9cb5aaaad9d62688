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

from tests.data.conftest import draw_image, encoded
from tests.train.smoke import make_smoke_data, overrides

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
HEADINGS = tuple(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
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


SAVE_ENCODER = """
import json, sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.costs import vision_parameters
from nvlm_train.vision.build import build_vision_encoder

config = VisionConfig(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=64, tile_size=32, patch_size=8,
    kind="plain_vit",
)
stored = {name: value for name, value in vars(config).items() if name in {
    "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "tile_size", "patch_size"}}
where = Path(sys.argv[1])
where.mkdir()


def build(**fields):
    return build_vision_encoder(replace(config, **fields), torch.float32, torch.device("cpu"), 1)


encoder = build()
assert sum(each.numel() for _, each in encoder.named_parameters()) == vision_parameters(config)
save_file(dict(encoder.state_dict()), where / "model.safetensors")
(where / "config.json").write_text(json.dumps({"model_type": "plain_vit", **stored}))
tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
assert torch.equal(build(weights=str(where))(tiles), encoder(tiles))
assert encoder(tiles).shape == (3, 4, 128)
(where / "config.json").write_text(json.dumps({"model_type": "plain_vit", **stored, "window": 7}))
try:
    build(weights=str(where))
except Exception as error:
    print(error)
"""
SAVE_SEED_OSS = """
import sys
from transformers import SeedOssConfig, SeedOssForCausalLM

SeedOssForCausalLM(SeedOssConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, head_dim=16, pad_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)).save_pretrained(sys.argv[1])
"""


def test_a_vision_encoder(copy: Path) -> None:
    """The weights that it saved give the same features; a key that its row does not name is refused."""
    follow("A vision encoder", copy)
    output = run(copy, "-c", SAVE_ENCODER, copy / "encoder")
    assert "window=7, a key that is not known here" in output


@pytest.mark.slow
def test_a_language_family(copy: Path) -> None:
    """The check of weights accepts what transformers wrote, and refuses another bias."""
    follow("A language family", copy)
    run(copy, "-c", SAVE_SEED_OSS, copy / "seed_oss")
    code = """
from dataclasses import replace
from nvlm_train.recipe.load import load_recipe
from nvlm_train.convert.language import language_problems
language = load_recipe(["experiment=smoke", "language=seed_oss_smoke"]).model.language
language = replace(language, vocab_size=512, weights="seed_oss")
print(*language_problems(language, {}), sep="\\n")
"""
    assert run(copy, "-c", code).strip() == ""
    stored = copy / "seed_oss" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"attention_out_bias": True}))
    assert "attention_out_bias=true" in run(copy, "-c", code)


def test_an_input_format(copy: Path) -> None:
    follow("An input format", copy)
    (copy / "photos").mkdir()
    (copy / "photos" / "a.png").write_bytes(encoded(draw_image(40, 30), "PNG"))
    (copy / "pairs.tsv").write_text("a.png\tA red cat.\na.png\tA cat, again.\nno tab\n")
    (command,) = code_lines("An input format")
    output = run(copy, "-m", "nvlm_train", *command.split()[1:], "--max-bad", "1", "--workers", "1")
    assert "2 samples, 2 images" in output and "1 bad entries left out" in output
    manifest = json.loads((copy / "shards" / "pairs.manifest.json").read_text())
    assert "it has no tab between image and caption" in json.dumps(manifest)


def test_a_style_of_tile_tags(copy: Path) -> None:
    follow("A style of tile tags", copy)
    (command,) = code_lines("A style of tile tags")
    code = f"""
from nvlm_train.recipe.load import load_recipe
from nvlm_train.tokens import tile_tags
style = load_recipe({command.split()[2:]!r}).stages["sft"].tiling.tags
print(*tile_tags(style, (2, 1), 2, 1, "<all>"))
"""
    assert run(copy, "-c", code).split() == ["<tile_1_of_2>", "<tile_2_of_2>", "<all>"]


def test_the_page_has_a_section_for_each_kind() -> None:
    assert len(HEADINGS) == 6 and all(list(blocks(heading)) for heading in HEADINGS)


@pytest.mark.slow
def test_everything_in_one_run(copy: Path) -> None:
    """Stage, tags, encoder and language model of the page train, and report the page's metric."""
    for heading in HEADINGS:
        follow(heading, copy)
    run(copy, "-c", SAVE_SEED_OSS, copy / "seed_oss")
    make_smoke_data(copy)
    _, *settings = overrides(copy, copy / "run", "stages.sft.tiling.tags=1d_of")
    settings += ["vision=plain_vit_smoke", "language=seed_oss_smoke"]
    settings += ["model.language.weights=seed_oss"]
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
