"""Regular tiles have regular tags, thumbnails the thumbnail's: in every style, on every way to the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from nvlm_train.batch import SampleInfo
from nvlm_train.config.schema import TileTags, TilingConfig
from nvlm_train.data.index.lengths import load_lengths
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.samples.messages import Message
from nvlm_train.data.shards.tar import LocalShard, write_shards
from nvlm_train.data.viewing.samples import view_sample
from nvlm_train.data.viewing.token_runs import token_runs
from nvlm_train.evaluation.prompts import encode_messages
from nvlm_train.routes import ROUTES
from nvlm_train.tiling import candidate_grids, lay_out, tile_limits
from nvlm_train.tokens import tile_tags
from tests.data.conftest import SLOTS, TILE, chat, draw_image, encoded

Make = Callable[..., SampleEncoder]
THUMBNAIL = "<tile_global_thumbnail>"
TWO_TILES, ONE_TILE, SIX_TILES = (2 * TILE, TILE), (TILE, TILE), (6 * TILE, 4 * TILE)
STYLES: tuple[TileTags, ...] = get_args(TileTags)
TWO: dict[TileTags, list[str]] = {
    "none": ["", ""],
    "1d": ["<tile_1>", "<tile_2>"],
    "2d_grid": ["<tile_x0_y0>", "<tile_x1_y0>"],
    "2d_bbox": ["<box>(0,0),(500,1000)</box>", "<box>(500,0),(1000,1000)</box>"],
}
ONE: dict[TileTags, list[str]] = {
    "none": [""],
    "1d": ["<tile_1>"],
    "2d_grid": ["<tile_x0_y0>"],
    "2d_bbox": ["<box>(0,0),(1000,1000)</box>"],
}


def text_of(encoder: SampleEncoder, sample: EncodedSample) -> str:
    """All text; slots hold the pad id, which is special and left out."""
    return encoder.tokenizer.decode(sample.token_ids.tolist())


def record(question: str) -> bytes:
    return json.dumps(chat(question, "a")).encode()


@pytest.mark.parametrize("architecture", ["d", "x"])
@pytest.mark.parametrize("style", STYLES)
def test_without_thumbnails_no_tile_is_called_one(
    make_encoder: Make, architecture: str, style: TileTags
) -> None:
    encoder = make_encoder(
        routes=ROUTES[architecture],  # type: ignore[index]
        tiling=TilingConfig(tags=style, thumbnail=False),
        sequence_length=400,
    )
    sample = encoder.encode("k", record("<image> and <image>"), [TWO_TILES, ONE_TILE])
    assert sample.tiles_per_image == (2, 1)
    two, one = "".join(TWO[style]), "".join(ONE[style])
    expected = f"user\n<Image>{two}</Image> and <Image>{one}</Image>\nassistant\na\n"
    assert text_of(encoder, sample) == expected


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
@pytest.mark.parametrize("style", STYLES)
def test_with_thumbnails_the_last_tile_is_one(
    make_encoder: Make, architecture: str, style: TileTags
) -> None:
    encoder = make_encoder(
        routes=ROUTES[architecture],  # type: ignore[index]
        tiling=TilingConfig(tags=style),
        sequence_length=400,
    )
    sample = encoder.encode("k", record("<image> and <image>"), [TWO_TILES, ONE_TILE])
    assert sample.tiles_per_image == (3, 1)
    thumbnail = "" if style == "none" else THUMBNAIL
    regular, crossing = "".join(TWO[style]), ""
    if architecture == "h":
        regular, crossing = "", regular
    expected = f"<Image>{regular}{thumbnail}</Image> and <Image>{thumbnail}</Image>"
    assert text_of(encoder, sample) == f"user\n{expected}\nassistant\na\n"
    tags = (encoder.tokenizer.decode(tag.tolist()) for tag in sample.cross.tags)
    assert "".join(tags) == crossing


def test_slots_stand_behind_their_tile_and_tag(make_encoder: Make) -> None:
    encoder = make_encoder(tiling=TilingConfig(thumbnail=False))
    tokenizer = encoder.tokenizer
    sample = encoder.encode("k", record("<image>"), [TWO_TILES])
    slots = [tokenizer.pad] * SLOTS
    expected = [tokenizer.turn_start, *tokenizer.encode("user\n<Image><tile_1>"), *slots]
    expected += [*tokenizer.encode("<tile_2>"), *slots, *tokenizer.encode("</Image>")]
    assert sample.token_ids.tolist()[: len(expected)] == expected


def test_a_regular_tag_sees_its_own_tile(make_encoder: Make) -> None:
    encoder = make_encoder(
        routes=ROUTES["x"], tiling=TilingConfig(thumbnail=False), sequence_length=400
    )
    sample = encoder.encode("k", record("<image> q <image>"), [TWO_TILES, ONE_TILE])
    seen = [(run.text, run.span) for run in token_runs(sample, encoder.tokenizer)]
    assert [each for each in seen if each[0].startswith("<tile")] == [
        ("<tile_1>", (0, 1)), ("<tile_2>", (1, 2)), ("<tile_1>", (2, 3)),
    ]  # fmt: skip
    assert seen[-1][1] == (0, 3)
    context = pack_samples([sample], [SampleInfo(0, "s", "k")], 400, pad_id=0).context
    assert context is not None and context.length == 3 * SLOTS


@pytest.mark.parametrize("num_thumbnails", [0, 1])
def test_fewer_tiles_are_tagged_anew(make_encoder: Make, num_thumbnails: int) -> None:
    """The whole ladder, down to one tile."""
    tiling = TilingConfig(thumbnail=bool(num_thumbnails))
    full = make_encoder(tiling=tiling, sequence_length=1000)
    found = {}
    for length in range(len(full.encode("k", record("<image>"), [SIX_TILES]).token_ids), 24, -1):
        encoder = make_encoder(tiling=tiling, sequence_length=length)
        try:
            sample = encoder.encode("k", record("<image>"), [SIX_TILES])
        except ValueError:
            break
        found[sample.num_tiles] = text_of(encoder, sample)
    counts = {limit: lay_out(grid, num_thumbnails) for limit, grid in [
        (6, (3, 2)), (4, (2, 2)), (2, (2, 1)), (1, (1, 1)),
    ]}  # fmt: skip
    assert tuple(counts) == tile_limits(6)
    assert set(found) == {image.num_tiles for image in counts.values()}
    for image in counts.values():
        tags = "".join(f"<tile_{n + 1}>" for n in range(image.num_regular))
        assert f"<Image>{tags}{THUMBNAIL * num_thumbnails}</Image>" in found[image.num_tiles]


@pytest.mark.parametrize("style", STYLES)
def test_a_question_is_asked_as_it_was_trained(make_encoder: Make, style: TileTags) -> None:
    encoder = make_encoder(tiling=TilingConfig(tags=style, thumbnail=False), sequence_length=400)
    sizes = [TWO_TILES, ONE_TILE]
    trained = encoder.encode("k", record("<image><image>?"), sizes)
    images = [encoded(draw_image(*size), "PNG") for size in sizes]
    asked = encode_messages(encoder, [Message("user", "<image><image>?")], images, 4)
    before = trained.label_positions[0] + 1
    assert asked.encoded.token_ids.tolist() == trained.token_ids[:before].tolist()
    assert len(asked.tiles_TCEE) == 3


def test_a_page_names_tiles_as_the_model_does(tmp_path: Path, make_encoder: Make) -> None:
    image = ("png", encoded(draw_image(*TWO_TILES), "PNG"))
    write_shards([("k", chat("<image>", "a"), [image])], str(tmp_path / "s-%06d.tar"))
    shard = LocalShard(str(tmp_path / "s-000000.tar"))
    reader = ShardReader("s", shard, load_index(shard))
    (plain,) = view_sample(
        "s", reader, 0, make_encoder(tiling=TilingConfig(thumbnail=False))
    ).images
    assert plain.tags == ("<tile_1>", "<tile_2>") and plain.routes == ("decoder", "decoder")
    (whole,) = view_sample("s", reader, 0, make_encoder()).images
    assert whole.tags == ("<tile_1>", "<tile_2>", THUMBNAIL)


def test_lengths_of_before_are_made_anew(
    tmp_path: Path, make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 3 called the last regular tile a thumbnail, which is more tokens here."""
    image = ("png", encoded(draw_image(*TWO_TILES), "PNG"))
    write_shards([("k", chat("<image>", "a"), [image])], str(tmp_path / "s-%06d.tar"))
    shard = LocalShard(str(tmp_path / "s-000000.tar"))
    reader = ShardReader("s", shard, load_index(shard))
    tiling = TilingConfig(thumbnail=False)
    with monkeypatch.context() as old:
        old.setattr("nvlm_train.data.samples.encoder.ENCODING_VERSION", 3)
        old.setattr(
            "nvlm_train.data.samples.chat_format.tile_tags",
            lambda style, grid, regular, thumbnails, tag: ["<tile_1>", tag],
        )
        wrong = load_lengths(reader, make_encoder(tiling=tiling)).num_tokens[0]
    encoder = make_encoder(tiling=tiling)
    right = load_lengths(reader, encoder).num_tokens[0]
    sample = encoder.encode("k", reader.record(0), [TWO_TILES])
    assert right == len(sample.token_ids) != wrong


@pytest.mark.parametrize("style", [style for style in STYLES if style != "none"])
def test_no_two_tiles_of_an_image_share_a_tag(style: TileTags) -> None:
    for grid, num_thumbnails in product(candidate_grids(12), (0, 1)):
        image = lay_out(grid, num_thumbnails)
        tags = tile_tags(style, *image, THUMBNAIL)
        assert len(set(tags)) == len(tags) == image.num_tiles
        assert (THUMBNAIL in tags) == bool(num_thumbnails)


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
def test_separate_tags_are_tokenised_each_by_itself(make_encoder: Make, architecture: str) -> None:
    """As in Megatron-LM's training code; joined, the first is one text with what stands before it."""
    separate = make_encoder(routes=ROUTES[architecture], tiling=TilingConfig(tag_tokens="separate"))
    joined = make_encoder(routes=ROUTES[architecture], tiling=TilingConfig())
    messages = separate.messages("k", record("look at <image> well"), [TWO_TILES])
    tags = {tile.tag for tile in separate.format.tiles(lay_out((2, 1), 1))}
    apart, together = (
        [piece.text for piece in next(each.layouts(messages, [TWO_TILES])).pieces]
        for each in (separate, joined)
    )
    assert "".join(apart) == "".join(together)
    assert not [text for text in apart if text not in tags and any(tag in text for tag in tags)]
    in_decoder = [
        tile for tile in separate.format.tiles(lay_out((2, 1), 1)) if tile.route == "decoder"
    ]
    assert len(apart) == len(together) + bool(in_decoder)
    assert separate.fingerprint != joined.fingerprint
