"""The tokenizer against the model: control tokens, tile tags, ids and rows of the embedding table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from nvlm_train.config.schema import Recipe, StageConfig
from nvlm_train.convert.language import stored_rows
from nvlm_train.convert.problem import Problems, error, warning
from nvlm_train.errors import ConfigError
from nvlm_train.tiling import candidate_grids, lay_out
from nvlm_train.tokens import IMAGE_END, IMAGE_START, Tokenizer, tile_tags

_OWN = "use the tokenizer.json that belongs to model.language.weights"


def tokenizer_problems(recipe: Recipe) -> Problems:
    """What keeps a recipe's tokenizer from being usable with its model, whatever the weights are."""
    try:
        tokenizer = Tokenizer(recipe.model.tokenizer)
    except ConfigError as problems:
        for problem in problems.problems:
            yield error(problem, "correct model.tokenizer")
        return
    yield from _control_problems(tokenizer)
    language = recipe.model.language
    sizes = {"vocab_size": language.vocab_size, "num_tokens": language.num_tokens}
    for field, rows in sizes.items():
        if rows is not None and tokenizer.vocab_size > rows:
            lack = "no row" if field == "vocab_size" else "only padding"
            yield error(
                f"model.tokenizer.path={tokenizer.config.path}: the tokenizer has "
                f"{tokenizer.vocab_size} ids, model.language.{field}={rows}: ids from {rows} on have "
                f"{lack} in the embedding table",
                "use the tokenizer that belongs to the model, or raise model.language."
                f"{field} to at least {tokenizer.vocab_size}",
            )
    for name in recipe.schedule:
        yield from tag_problems(name, recipe.stages[name], tokenizer)


def _control_problems(tokenizer: Tokenizer) -> Problems:
    settings = tokenizer.config
    names = {
        "pad": (settings.pad, tokenizer.pad),
        "turn_start": (settings.turn_start, tokenizer.turn_start),
        "turn_end": (settings.turn_end, tokenizer.turn_end),
    }
    if tokenizer.template.bos is not None:
        names["template"] = (tokenizer.template.bos, tokenizer.opening[0])
    for (first, (token, number)), (second, (_, other)) in combinations(names.items(), 2):
        if number == other:
            yield error(
                f"model.tokenizer.{first} and model.tokenizer.{second} share an id: "
                f"{token} is {number}",
                "name different tokens in model.tokenizer",
            )
    for token, number in dict(names.values()).items():
        if number in tokenizer.encode(token):
            yield error(
                f"the text {token!r} inside a sample becomes the control token {number}",
                f"mark {token} as special in {settings.path}",
            )


def tag_problems(name: str, stage: StageConfig, tokenizer: Tokenizer) -> Problems:
    """Texts around tiles that do not come back from their ids: the model would read other ones."""
    texts = [IMAGE_START, *stage_tags(stage, tokenizer), IMAGE_END]
    back_of = {text: tokenizer.decode(tokenizer.encode(text)) for text in texts}
    # SentencePiece vocabularies put a space mark before what begins a text; it is no part of the tag.
    lost = [text for text, back in back_of.items() if back.removeprefix(" ") != text]
    if lost:
        back = back_of[lost[0]]
        yield error(
            f"stage {name}: {lost[0]!r} comes back as {back!r}",
            "use a byte-level tokenizer, or another tiling.tags",
        )


def stage_tags(stage: StageConfig, tokenizer: Tokenizer) -> list[str]:
    """Every tag that an image of the stage can have, each once."""
    tiling, thumbnail = stage.tiling, tokenizer.thumbnail_tag
    images = [lay_out(grid, int(tiling.thumbnail)) for grid in candidate_grids(tiling.max_tiles)]
    tags = (tag for image in images for tag in tile_tags(tiling.tags, *image, thumbnail))
    return [tag for tag in dict.fromkeys(tags) if tag]


def tokenizer_and_weights(recipe: Recipe) -> Problems:
    """Ids that the language model's weights have no row for, or know as other tokens.

    Only where training starts from `model.language.weights`; says nothing of a tokenizer that cannot
    be read, which `tokenizer_problems` does.
    """
    language = recipe.model.language
    try:
        tokenizer = Tokenizer(recipe.model.tokenizer)
    except ConfigError:
        return
    rows = stored_rows(language)
    if rows is not None and rows < tokenizer.vocab_size <= language.vocab_size:
        names = [token for token, number in tokenizer.vocabulary.items() if number >= rows]
        yield error(
            f"model.tokenizer.path={tokenizer.config.path}: {len(names)} tokens such as "
            f"{sorted(names)[0]!r} have ids from {rows} on, model.language.weights={language.weights} has "
            f"{rows} rows: the recipe's padding would be used as tokens, rows of zeros that nothing trained",
            f"{_OWN}, or give the new tokens rows: resize_token_embeddings of transformers, then "
            "save_pretrained",
        )
    yield from _against_own(tokenizer, Path(language.weights or "") / "tokenizer.json")


def _against_own(tokenizer: Tokenizer, path: Path) -> Problems:
    if not path.is_file() or path.read_bytes() == tokenizer.path.read_bytes():
        return
    own = vocabulary_of(path)
    if own is None:
        yield warning(
            f"{path} cannot be read, so that model.tokenizer is not compared with it",
            "copy the directory again",
        )
        return
    yield from _moved(tokenizer, own, path)
    meanings = {number: token for token, number in own.items()}
    for token, number in tokenizer.control_tokens.items():
        if token not in own:
            there = f"which is {meanings[number]!r} there" if number in meanings else "a new one"
            yield warning(
                f"{path} does not know the control token {token}; its id {number} is {there}: the weights "
                "have not seen it in its place",
                f"{_OWN} and name its control tokens in model.tokenizer, or let SFT teach them",
            )


def _moved(tokenizer: Tokenizer, own: Mapping[str, int], path: Path) -> Problems:
    moved = [
        token for token, number in tokenizer.vocabulary.items() if own.get(token, number) != number
    ]
    if moved:
        first = min(moved, key=lambda token: (token not in tokenizer.control_tokens, token))
        yield error(
            f"model.tokenizer.path={tokenizer.config.path}: {len(moved)} tokens have other ids than in "
            f"{path}: {first!r} is {tokenizer.vocabulary[first]}, there {own[first]}: the weights would "
            "read other words",
            _OWN,
        )


def vocabulary_of(path: Path) -> dict[str, int] | None:
    """Every token of a tokenizer.json and its id; None where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = content["model"]["vocab"]
        # Unigram models list [token, score] by id, the others map tokens to ids.
        pairs = tokens.items() if isinstance(tokens, dict) else _numbered(tokens)
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
        return dict(pairs) | added
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _numbered(tokens: list[list[Any]]) -> Iterator[tuple[str, int]]:
    return ((token, number) for number, (token, _) in enumerate(tokens))
