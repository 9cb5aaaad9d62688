"""`nvlm data show`: what the page says is what the encoder and the plan say."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm_train.cli import main
from nvlm_train.config.paths import data_recipes_dir
from nvlm_train.data.dataset import build_data
from nvlm_train.data.images import cut_tiles, decode_image
from nvlm_train.data.prepare.write import prepare_shards
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.viewing.steps import view_step
from nvlm_train.data.viewing.token_runs import read_tokens, token_runs
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer
from tests.data.conftest import SLOTS, chat, draw_image, encoded
from tests.train.smoke import make_smoke_data, overrides, smoke_recipe


class _Page(HTMLParser):
    """Counts classes, collects images, and notes tags that were closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.classes += (values.get("class") or "").split()
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show")
    make_smoke_data(root)
    return root


def test_trained_tokens_are_those_that_labels_ask_for(
    make_encoder: Callable[..., SampleEncoder], tokenizer: Tokenizer
) -> None:
    encoder = make_encoder()
    record = json.dumps(chat("cat?", "dog")).encode()
    sample = encoder.encode("k", record, [(96, 32)])
    runs = token_runs(sample, tokenizer)
    assert [token.position for run in runs for token in run.tokens] == list(
        range(len(sample.token_ids))
    )
    trained = [run for run in runs if run.role == "trained"]
    assert "".join(run.text for run in trained) == "dog<|im_end|>\n"
    ids = [token.number for run in trained for token in run.tokens]
    assert ids == sample.label_ids.tolist()
    slots = [run for run in runs if run.role == "image"]
    assert [run.tile for run in slots] == [0, 1, 2, 3]
    assert all(len(run.tokens) == SLOTS for run in slots)
    assert all(run.span == (0, 0) for run in runs)


def test_cross_views_by_token(
    make_encoder: Callable[..., SampleEncoder], tokenizer: Tokenizer
) -> None:
    """In NVLM-X a tag sees its own tile, the text behind the image all of them."""
    encoder = make_encoder(routes=ROUTES["x"])
    record = json.dumps(chat("<image> q", "a")).encode()
    runs = token_runs(encoder.encode("k", record, [(64, 32)]), tokenizer)
    spans = {run.text: run.span for run in runs}
    assert spans["<tile_1>"] == (0, 1) and spans["<tile_2>"] == (1, 2)
    assert spans["<tile_global_thumbnail>"] == (2, 3)
    assert runs[0].span == (0, 0) and runs[-1].span == (0, 3)


@pytest.mark.parametrize("text", ["naïve Größe", "日本語 \U0001f600!", " two  spaces\n\ttab", "a"])
def test_token_texts_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    tokens = read_tokens([tokenizer.turn_start, *ids, tokenizer.turn_end], tokenizer)
    assert "".join(token.text for token in tokens) == f"<|im_start|>{text}<|im_end|>"
    assert len(tokens) == len(ids) + 2 and [t.is_special for t in tokens].count(True) == 2


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
def test_page_of_a_source(root: Path, tmp_path: Path, architecture: str) -> None:
    out = tmp_path / "page.html"
    more = () if architecture == "d" else (f"model=nvlm_{architecture}_smoke",)
    arguments = ["data", "show", "vqa", *overrides(root, tmp_path, *more)]
    assert main([*arguments, "--stage", "sft", "--samples", "4", "--out", str(out)]) == 0
    page = _Page(out.read_text())
    assert page.open == [] and page.classes.count("sample") == 4
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"https?://", out.read_text())
    assert ("sight" in page.classes) == (architecture != "d")


def test_tiles_on_the_page_are_the_models(root: Path, tmp_path: Path) -> None:
    """Small tiles are stored without loss, so they can be compared."""
    data = encoded(draw_image(70, 33, 5), "PNG")
    prepare_shards([("one", chat("<image>?", "a"), [("png", data)])], str(tmp_path), "one")
    (tmp_path / "one.yaml").write_text("sources: [{name: one, shards: one.manifest.json}]")
    more = (f"stages.sft.blend={tmp_path}/one.yaml", f"loader.data_root={tmp_path}")
    out = tmp_path / "page.html"
    assert main(["data", "show", "one", *overrides(root, tmp_path, *more), "--out", str(out)]) == 0
    recipe = smoke_recipe(root, tmp_path)
    edge = recipe.model.vision.tile_size
    tiles = cut_tiles(decode_image(data, 10**6), (2, 1), 3, edge).permute(0, 2, 3, 1).numpy()
    found = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        for source in _Page(out.read_text()).images[:3]
    ]
    assert all(np.array_equal(a, b) for a, b in zip(found, tiles, strict=True))


def test_page_of_a_step(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["data", "show", "--step", "2", "--dp", "2", *overrides(root, tmp_path)]
    assert main([*arguments, "--stage", "sft", "--samples", "3", "--out", str(out)]) == 0
    recipe = smoke_recipe(root, tmp_path)
    plan, _ = build_data(recipe.stages["sft"], recipe, str(data_recipes_dir()))
    step, page = plan.step(2, 2), _Page(out.read_text())
    packs = [pack for rank in step.packs for pack in rank]
    assert page.classes.count("rank") == 2 and page.classes.count("pack") == len(packs)
    assert page.classes.count("sample") == 3
    samples = [sample for pack in packs for sample in pack.samples]
    assert all(plan.info(sample).key in out.read_text() for sample in samples)
    anchors = [link for link in page.links if link.startswith("#")]
    assert len(anchors) == 3 and all(f'id="{link[1:]}"' in out.read_text() for link in anchors)


def test_page_of_longer_packs(root: Path, tmp_path: Path) -> None:
    """Both lengths are named; a pack is as wide as it is filled up to, not as the longest may be."""
    out = tmp_path / "page.html"
    longer = ["stages.sft.pack_length=4096", "stages.sft.batch.size=6"]
    arguments = ["data", "show", "--step", "2", "--dp", "2", *overrides(root, tmp_path), *longer]
    assert main([*arguments, "--stage", "sft", "--samples", "1", "--out", str(out)]) == 0
    recipe = smoke_recipe(root, tmp_path, *longer)
    plan, _ = build_data(recipe.stages["sft"], recipe, str(data_recipes_dir()))
    step, page = plan.step(2, 2), out.read_text()
    assert step.pack_length == 512 and [len(own) for own in step.packs] == [1, 1]
    assert "at most 128 tokens a sample and 4,096 a pack" in page
    tokens = sum(pack.num_tokens for own in step.packs for pack in own)
    assert f"of packs of 512 tokens used: {tokens:,}" in page and f"{tokens / 1024:.1%}" in page
    first = step.packs[0][0].samples[0].num_tokens / 512
    assert f"width:{first:.3%}" in page


def test_places_in_packs_are_the_batchs(root: Path, tmp_path: Path) -> None:
    recipe = smoke_recipe(root, tmp_path)
    plan, encoder = build_data(recipe.stages["sft"], recipe, str(data_recipes_dir()))
    view = view_step(plan, encoder, 1, 1, (), 99)
    for number, pack in enumerate(view.plan.packs[0]):
        placed = view.pack(0, number)
        assert [each.ref for each in placed] == list(pack.samples)
        ends = np.cumsum([sample.num_tokens for sample in pack.samples]).tolist()
        assert [each.offset for each in placed] == [0, *ends[:-1]]
        for each in placed:
            assert each.view is not None and each.view.encoded is not None
            assert len(each.view.encoded.token_ids) == each.ref.num_tokens


def test_unusable_and_damaged_samples_are_shown(root: Path, tmp_path: Path) -> None:
    whole = encoded(draw_image(64, 64), "JPEG")
    samples = [
        ("cut", chat("<image>?", "a"), [("jpg", whole[:-40])]),
        ("mute", {"messages": [{"role": "user", "content": "<b>hi</b>"}]}, []),
        ("html", chat("<script>alert(1)</script>", "&amp;"), []),
    ]
    prepare_shards(samples, str(tmp_path), "bad")
    (tmp_path / "bad.yaml").write_text("sources: [{name: bad, shards: bad.manifest.json}]")
    more = (f"stages.sft.blend={tmp_path}/bad.yaml", f"loader.data_root={tmp_path}")
    out = tmp_path / "page.html"
    assert main(["data", "show", "bad", *overrides(root, tmp_path, *more), "--out", str(out)]) == 0
    text = out.read_text()
    assert _Page(text).classes.count("flag") == 2
    assert "not trained: image cannot be read" in text
    assert "left out: every label is masked" in text
    assert "<script>" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqa", "--step", "1"], "SOURCE=vqa, --step=1: name one source of the blend, or a step"),
        ([], "SOURCE=none, --step=None: name one source"),
        (["--step", "-1"], "--step=-1: steps count from 0"),
        (["--step", "0", "--key", "nope"], "sample=nope in shard=step 0: the step has no such key"),
        (["vqa", "--stage", "sfft"], "stage=sfft: the recipe has pretrain, sft"),
        (["vqaa"], "source=vqaa: blend=blend has captions, vqa, text"),
        (["vqa", "--key", "nope"], "source=vqa has no such key; it has vqa0000, vqa0001"),
    ],
)
def test_wrong_arguments(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    source = [each for each in arguments[:1] if not each.startswith("-")]
    rest = arguments[len(source) :]
    out = tmp_path / "page.html"
    command = ["data", "show", *source, *overrides(root, tmp_path), *rest, "--out", str(out)]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_tags_none_leave_no_labels(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    more = ("stages.sft.tiling.tags=none",)
    assert (
        main(["data", "show", "captions", *overrides(root, tmp_path, *more), "--out", str(out)])
        == 0
    )
    assert "<figcaption" not in out.read_text()
