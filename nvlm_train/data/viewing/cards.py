"""One sample as HTML: its tiles with their tags, its tokens, and who sees which tile."""

from __future__ import annotations

import base64
import html
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm_train.data.viewing.samples import ImageView, SampleView
from nvlm_train.data.viewing.token_runs import Token, TokenRun

_SMALL_TILE = 128
"""Tiles up to this edge are shown with their pixels as squares, and stored without loss."""
_TILE_WIDTH, _LEAST_TILE_WIDTH = 190, 64
_GRID_WIDTH, _TAG_WIDTH = 760, 172
_MINI = 44
_ZERO_WIDTH = {"\n": '<span class="end">↵</span>\n', "\t": '<span class="end">⇥</span>\t'}


def card(view: SampleView, anchor: str, colour: str, place: str) -> str:
    """Returns the sample's article; `place` says where it stands in a step, empty outside one."""
    where = f"{view.shard}{' · ' + place if place else ''}"
    head = (
        f'<header><b><i class="dot" style="--c:{colour}"></i>{html.escape(view.source)} '
        f'<code>{html.escape(view.key)}</code></b><span class="where">{html.escape(where)}</span></header>'
    )
    if view.encoded is None:
        body = f'<p class="flag">left out: {html.escape(view.reason)}</p>'
        return f'<article class="sample" id="{anchor}">{head}{body}</article>'
    small = bool(view.images) and view.images[0].tiles_TCEE.shape[-1] <= _SMALL_TILE
    style = ' style="--rendering:pixelated"' if small else ""
    parts = [head, _counts(view), _flags(view)]
    if view.images:
        parts.append("<h3>Tiles</h3>" + "".join(_image(image) for image in view.images))
    minis = [_mini(tile) for image in view.images for tile in image.tiles_TCEE]
    parts.append(f'<h3>Tokens</h3><div class="tokens">{_tokens(view, minis)}</div>')
    parts.append(_sight(view, minis))
    return f'<article class="sample" id="{anchor}"{style}>{"".join(parts)}</article>'


def _counts(view: SampleView) -> str:
    assert view.encoded is not None
    encoded = view.encoded
    counts = [
        (len(encoded.token_ids), "tokens"),
        (len(encoded.label_ids), "trained"),
        (len(encoded.image_positions), "image slots"),
        (encoded.num_tiles, "tiles" if encoded.num_tiles > 1 else "tile"),
    ]
    if encoded.cross.is_cross_T.any():
        counts.append((int(encoded.cross.is_cross_T.sum()), "read by cross-attention"))
    return (
        '<p class="counts">'
        + "".join(f"<span><b>{count:,}</b> {name}</span>" for count, name in counts if count)
        + "</p>"
    )


def _flags(view: SampleView) -> str:
    assert view.encoded is not None
    texts = [f"not trained: {image.problem}" for image in view.images if image.problem]
    if view.encoded.is_truncated:
        texts.append("cut at the end: the sample is longer than the stage's sequence length")
    return "".join(f'<p class="flag">{html.escape(text)}</p>' for text in texts)


def _image(image: ImageView) -> str:
    columns, rows = image.grid
    edge = image.tiles_TCEE.shape[-1]
    width = max(min(_TILE_WIDTH, _GRID_WIDTH // columns), _LEAST_TILE_WIDTH)
    tiles = [
        _tile(pixels, tag, route)
        for pixels, tag, route in zip(image.tiles_TCEE, image.tags, image.routes, strict=True)
    ]
    grid = (
        f'<div class="grid" style="--columns:{columns};--width:{columns * width + 3 * (columns - 1)}px">'
        f"{''.join(tiles[: columns * rows])}</div>"
    )
    thumbnail = ""
    if len(tiles) > columns * rows:
        thumbnail = (
            f'<div class="thumbnail" style="--width:{max(width, _TAG_WIDTH)}px">{tiles[-1]}</div>'
        )
    squashed = f"{columns * edge} × {rows * edge}"
    caption = (
        f"{image.size[0]} × {image.size[1]} pixels, resized to {squashed}: "
        f"{columns} × {rows} tile{'s' if columns * rows > 1 else ''} of {edge}"
        f"{' and a thumbnail' if thumbnail else ''}"
    )
    return f'<div class="image">{grid}{thumbnail}</div><p class="caption">{caption}</p>'


def _tile(pixels_CEE: NDArray[np.uint8], tag: str, route: str) -> str:
    label = f"<figcaption>{html.escape(tag)}</figcaption>" if tag else ""
    kind = "tile cross" if route == "cross" else "tile"
    return f'<figure class="{kind}">{label}<img src="{_embed(pixels_CEE)}" alt=""></figure>'


def _tokens(view: SampleView, minis: list[str]) -> str:
    parts: list[str] = []
    for run in view.runs:
        if run.tile is not None:
            parts.append(
                f'<span class="slots" title="positions {run.start} to {run.stop - 1}">'
                f'<img src="{minis[run.tile]}" alt="">{len(run.tokens)} slots</span>'
            )
        else:
            parts += [_token(token, run.role) for token in run.tokens]
    return "".join(parts)


def _token(token: Token, role: str) -> str:
    kinds = ["tok"]
    kinds += ["trained"] if role == "trained" else []
    kinds += ["special"] if token.is_special else []
    kinds += ["odd"] if token.position % 2 else []
    text = html.escape(token.text) or '<span class="end">·</span>'
    for character, shown in _ZERO_WIDTH.items():
        text = text.replace(character, shown)
    return (
        f'<span class="{" ".join(kinds)}" title="position {token.position}, id {token.number}">'
        f"{text}</span>"
    )


def _sight(view: SampleView, minis: list[str]) -> str:
    """Shows what stands before the features of cross-routed tiles, and which tokens see which."""
    assert view.encoded is not None
    cross = view.encoded.cross
    numbers = np.flatnonzero(cross.is_cross_T).tolist()
    if not numbers:
        return ""
    labels = [tag for image in view.images for tag in image.tags]
    head = "".join(
        f'<th class="cell" title="{html.escape(labels[tile])}">{index + 1}</th>'
        for index, tile in enumerate(numbers)
    )
    rows = [_sight_row(same, numbers, minis) for same in _same_span(view.runs)]
    keys = sum(len(tag) + cross.tokens_per_tile for tag in cross.tags)
    chips = "".join(
        f'<span class="slots cross"><img src="{minis[tile]}" alt="">'
        f"{html.escape(labels[tile]) + ' + ' if len(tag) else ''}{cross.tokens_per_tile}</span>"
        for tile, tag in zip(numbers, cross.tags, strict=True)
    )
    return (
        f"<h3>Cross-attention context, {keys:,} positions</h3><div>{chips}</div>"
        '<h3>Which tokens see which tiles</h3><div class="scroll"><table class="sight">'
        f"<tr><th>tokens</th><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _same_span(runs: tuple[TokenRun, ...]) -> list[list[TokenRun]]:
    """Groups neighbouring runs that see the same tiles, whatever their role."""
    groups: list[list[TokenRun]] = []
    for run in runs:
        if groups and groups[-1][-1].span == run.span:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _sight_row(same: list[TokenRun], numbers: list[int], minis: list[str]) -> str:
    first, last = same[0].span
    shown = " ".join(
        f"[{len(run.tokens)} slots]" if run.tile is not None else run.text for run in same
    )
    cells = "".join(
        f'<td class="cell"><img src="{minis[tile]}" alt="sees"></td>'
        if first <= index < last
        else '<td class="cell"><i></i></td>'
        for index, tile in enumerate(numbers)
    )
    text = html.escape(shown.replace("\n", "↵"))
    return (
        f'<tr><td class="range">{same[0].start}–{same[-1].stop - 1}</td>'
        f'<td class="text" title="{text}">{text}</td>{cells}</tr>'
    )


def _mini(pixels_CEE: NDArray[np.uint8]) -> str:
    return _data_url(_as_image(pixels_CEE).resize((_MINI, _MINI)), "PNG")


def _embed(pixels_CEE: NDArray[np.uint8]) -> str:
    image = _as_image(pixels_CEE)
    return _data_url(image, "PNG" if image.width <= _SMALL_TILE else "JPEG")


def _as_image(pixels_CEE: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels_CEE.transpose(1, 2, 0)))


def _data_url(image: Image.Image, image_format: str) -> str:
    stream = BytesIO()
    image.save(stream, image_format, quality=88, optimize=True)
    kind = image_format.lower()
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
