"""What crosses: tags, spans and contexts of X and H, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from nvlm_train.batch import SampleInfo
from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import tile_tags
from tests.data.conftest import SLOTS, TILE

Make = Callable[..., SampleEncoder]
TWO_TILES, ONE_TILE = (2 * TILE, TILE), (TILE, TILE)
RECORD = json.dumps(
    {
        "conversations": [
            {"from": "human", "value": "a <image> b <image> c"},
            {"from": "gpt", "value": "answer"},
        ]
    }
).encode()


def text_of(encoder: SampleEncoder, sample: EncodedSample, start: int, stop: int) -> str:
    return encoder.tokenizer.decode(sample.token_ids[start:stop].tolist())


def test_x_tags_see_their_tile_and_text_what_ended_before(make_encoder: Make) -> None:
    encoder = make_encoder(routes=ROUTES["x"], sequence_length=400)
    sample = encoder.encode("k", RECORD, [TWO_TILES, ONE_TILE])
    assert sample.cross.is_cross_T.tolist() == [True] * 4
    assert len(sample.image_positions) == 0
    assert [len(tag) for tag in sample.cross.tags] == [0] * 4
    seen = [
        (text_of(encoder, sample, start, stop), (first, last))
        for start, stop, first, last in sample.cross.spans.tolist()
    ]
    assert seen[:5] == [
        ("<tile_1>", (0, 1)),
        ("<tile_2>", (1, 2)),
        ("<tile_global_thumbnail>", (2, 3)),
        ("</Image> b <Image>", (0, 3)),
        ("<tile_global_thumbnail>", (3, 4)),
    ]
    rest, span = seen[5]
    assert rest.startswith("</Image> c") and rest.endswith("answer\n") and span == (0, 4)
    assert (
        len(seen) == 6
        and sample.cross.spans[0, 0] > 0
        and sample.cross.spans[-1, 1] == len(sample.token_ids)
    )


def test_x_without_tags(make_encoder: Make) -> None:
    encoder = make_encoder(
        routes=ROUTES["x"], tiling=TilingConfig(tags="none"), sequence_length=400
    )
    sample = encoder.encode("k", RECORD, [TWO_TILES, ONE_TILE])
    assert sample.cross.spans[:, 2:].tolist() == [[0, 3], [0, 4]]


def test_h_keeps_thumbnails_and_moves_tags(make_encoder: Make) -> None:
    encoder = make_encoder(routes=ROUTES["h"], sequence_length=400)
    sample = encoder.encode("k", RECORD, [TWO_TILES, ONE_TILE])
    assert sample.cross.is_cross_T.tolist() == [True, True, False, False]
    assert len(sample.image_positions) == 2 * SLOTS
    tags = [encoder.tokenizer.decode(tag.tolist()) for tag in sample.cross.tags]
    assert tags == ["<tile_1>", "<tile_2>"]
    assert sample.cross.spans[:, 2:].tolist() == [[0, 2]]
    assert text_of(encoder, sample, *sample.cross.spans[0, :2]).startswith("</Image> b <Image>")


def test_h_of_one_tile_is_d_of_one_tile(make_encoder: Make) -> None:
    d, h = (
        make_encoder(routes=ROUTES[name]).encode("k", RECORD, [ONE_TILE, ONE_TILE])
        for name in ("d", "h")
    )
    assert np.array_equal(d.token_ids, h.token_ids)
    assert np.array_equal(d.image_positions, h.image_positions)
    assert not h.cross.is_cross_T.any() and len(h.cross.spans) == 0


def test_contexts_of_a_pack(make_encoder: Make) -> None:
    encoder = make_encoder(routes=ROUTES["h"], sequence_length=400)
    samples = [
        encoder.encode("a", RECORD, [ONE_TILE, TWO_TILES]),
        encoder.encode("b", RECORD, [TWO_TILES, ONE_TILE]),
    ]
    infos = [SampleInfo(0, "s", key) for key in "ab"]
    pack = pack_samples(samples, infos, 800, pad_id=0)
    context = pack.context
    assert context is not None
    assert context.decoder_tiles.tolist() == [0, 3, 6, 7]
    assert context.cross_tiles.tolist() == [1, 2, 4, 5]
    tag = len(samples[0].cross.tags[0])
    tile = tag + SLOTS
    assert context.length == 4 * tile
    assert context.tag_positions.tolist() == [
        number * tile + place for number in range(4) for place in range(tag)
    ]
    offset = len(samples[0].token_ids)
    assert context.spans.tolist() == [
        [*samples[0].cross.spans[0, :2].tolist(), 0, 2 * tile],
        [*(samples[1].cross.spans[0, :2] + offset).tolist(), 2 * tile, 4 * tile],
    ]


def test_a_pack_of_one_tile_images_has_no_context_in_h(make_encoder: Make) -> None:
    sample = make_encoder(routes=ROUTES["h"]).encode("a", RECORD, [ONE_TILE, ONE_TILE])
    pack = pack_samples([sample], [SampleInfo(0, "s", "a")], 400, pad_id=0)
    assert pack.context is None


def test_truncation_cuts_views(make_encoder: Make) -> None:
    whole = make_encoder(routes=ROUTES["x"], sequence_length=400)
    length = len(whole.encode("k", RECORD, [TWO_TILES, ONE_TILE]).token_ids)
    one_each = len(whole.encode("k", RECORD, [ONE_TILE, ONE_TILE]).token_ids)
    assert one_each < length
    cut = make_encoder(routes=ROUTES["x"], sequence_length=one_each - 2)
    sample = cut.encode("k", RECORD, [TWO_TILES, ONE_TILE])
    assert sample.is_truncated and sample.tiles_per_image == (1, 1)
    assert sample.cross.spans[-1, 1] == one_each - 2


def test_room_sees_what_the_last_token_sees(make_encoder: Make) -> None:
    sample = make_encoder(routes=ROUTES["x"], sequence_length=400).encode(
        "k", RECORD, [TWO_TILES, ONE_TILE]
    )
    longer = sample.with_room(7)
    assert len(longer.token_ids) == len(sample.token_ids) + 7
    assert longer.cross.spans[-1, 1] == len(longer.token_ids)
    assert sample.cross.spans[-1, 1] == len(sample.token_ids)


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
@pytest.mark.parametrize("tags", ["2d_grid", "2d_bbox"])
def test_two_dimensional_tags_reach_the_text(
    make_encoder: Make, architecture: str, tags: str
) -> None:
    encoder = make_encoder(
        routes=ROUTES[architecture],  # type: ignore[index]
        tiling=TilingConfig(tags=tags),  # type: ignore[arg-type]
        sequence_length=400,
    )
    sample = encoder.encode("k", RECORD, [(TILE, 3 * TILE), ONE_TILE])
    shown = encoder.tokenizer.decode(sample.token_ids.tolist())
    crossing = "".join(encoder.tokenizer.decode(tag.tolist()) for tag in sample.cross.tags)
    expected = tile_tags(tags, (1, 3), 3, 0, "")  # type: ignore[arg-type]
    assert all(tag in (crossing if architecture == "h" else shown) for tag in expected)
    assert (
        expected[2]
        == {"2d_grid": "<tile_x0_y2>", "2d_bbox": "<box>(0,667),(1000,1000)</box>"}[tags]
    )
