"""The vision encoders whose weights are read, as a table: one row a layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nvlm_train.config.schema import VisionConfig
from nvlm_train.convert.family import Family, family_of, key_problems, read_config, tensor_problems
from nvlm_train.convert.headers import Headers, read_headers
from nvlm_train.convert.ignored import BOOKKEEPING, GENERATION
from nvlm_train.convert.keys import Config, Fixed, Place, Rule, Sized, edge
from nvlm_train.convert.problem import Problem, Problems, error
from nvlm_train.errors import ConfigError
from nvlm_train.geometry import patches_per_side

_LAYER = "encoder.layer.{n}."
PREFIX = "vision_tower."
"""Names inside a whole InternVL begin with it."""
FILE = "model.safetensors"


def _sizes(vision: VisionConfig) -> dict[str, int]:
    return {
        "layers": vision.num_layers,
        "hidden": vision.hidden_size,
        "ffn": vision.ffn_hidden_size,
        "patch": vision.patch_size,
        "positions": patches_per_side(vision) ** 2 + 1,
    }


_COMPUTED: tuple[Rule, ...] = (
    # The second is the name in OpenGVLab's own code, which converted files may keep.
    Fixed("architectures", (["InternVLVisionModel"], ["InternVisionModel"], None), None),
    Sized("num_hidden_layers", "num_layers", 24),
    Sized("hidden_size", "hidden_size", 1024),
    Sized("num_attention_heads", "num_heads", 16),
    Sized("intermediate_size", "ffn_hidden_size", 4096),
    Sized("layer_norm_eps", "norm_eps", 1e-6),
    Sized("image_size", "tile_size", [448, 448], read=edge),
    Sized("patch_size", "patch_size", [14, 14], read=edge),
    Fixed("num_channels", (3,), 3),
    Fixed("hidden_act", ("gelu",), "gelu"),
    Fixed("use_absolute_position_embeddings", (True,), True),
    Fixed("use_mask_token", (False,), False),
    # Without it a norm follows the last layer, which NVLM's encoder does not have.
    Fixed("use_mean_pooling", (True,), True),
    Fixed("quantization_config", (None,), None),
    Fixed("pruned_heads", ({}, None), None),
    Fixed("is_encoder_decoder", (False,), False),
    Fixed("add_cross_attention", (False,), False),
    Fixed("return_dict", (True,), True),
)
"""Keys that mean the same for both kinds. Defaults are those of transformers' InternVLVisionConfig."""

_IGNORED = (
    BOOKKEEPING
    | GENERATION
    # Dropout is off in a frozen encoder; a layer's scale is in its weights, this is their start.
    | {"hidden_dropout_prob", "projection_dropout", "layer_scale_init_value"}
    # Keys of OpenGVLab's configs that transformers' own converter keeps and its model does not read.
    | {"dropout", "drop_path_rate", "initializer_factor"}
    # An encoder has no words.
    | {"tie_word_embeddings", "pad_token_id", "is_decoder"}
)

_TENSORS: dict[str, tuple[str | int, ...]] = {
    "embeddings.cls_token": (1, 1, "hidden"),
    "embeddings.position_embeddings": (1, "positions", "hidden"),
    "embeddings.patch_embeddings.projection.weight": ("hidden", 3, "patch", "patch"),
    "embeddings.patch_embeddings.projection.bias": ("hidden",),
    f"{_LAYER}layernorm_before.weight": ("hidden",),
    f"{_LAYER}attention.q_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.k_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.v_proj.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.projection_layer.weight": ("hidden", "hidden"),
    f"{_LAYER}attention.projection_layer.bias": ("hidden",),
    f"{_LAYER}lambda_1": ("hidden",),
    f"{_LAYER}layernorm_after.weight": ("hidden",),
    f"{_LAYER}mlp.fc1.weight": ("ffn", "hidden"),
    f"{_LAYER}mlp.fc1.bias": ("ffn",),
    f"{_LAYER}mlp.fc2.weight": ("hidden", "ffn"),
    f"{_LAYER}mlp.fc2.bias": ("hidden",),
    f"{_LAYER}lambda_2": ("hidden",),
}
"""What both kinds have."""

INTERN_VIT_6B = Family(
    model_type="internvl_vision",
    keys=(
        *_COMPUTED,
        # transformers' norms of queries and keys have 1e-6 whatever this key says, InternViT's own
        # code takes it for them too: only with this value both compute the same.
        Fixed("layer_norm_eps", (1e-6,), 1e-6),
        Fixed("norm_type", ("rms_norm",), "layer_norm"),
        Fixed("use_qk_norm", (True,), False),
        Fixed("attention_bias", (False,), False),
    ),
    ignored=_IGNORED,
    tensors=_TENSORS
    | {f"{_LAYER}attention.{name}_norm.weight": ("hidden",) for name in ("q", "k")},
    sizes=_sizes,
    optional=lambda vision: frozenset(),
)

INTERN_VIT_300M = Family(
    model_type="internvl_vision",
    keys=(
        *_COMPUTED,
        Fixed("norm_type", ("layer_norm",), "layer_norm"),
        Fixed("use_qk_norm", (False,), False),
        Fixed("attention_bias", (True,), False),
    ),
    ignored=_IGNORED,
    tensors=_TENSORS
    | {f"{_LAYER}attention.{name}_proj.bias": ("hidden",) for name in ("q", "k", "v")}
    | {f"{_LAYER}layernorm_{place}.bias": ("hidden",) for place in ("before", "after")},
    sizes=_sizes,
    optional=lambda vision: frozenset(),
)

KINDS: Mapping[str, Family] = {
    "intern_vit_6b": INTERN_VIT_6B,
    "intern_vit_300m": INTERN_VIT_300M,
}
"""`model.vision.kind` to what its weights look like. `vision.encoder.KINDS` has the same keys."""


def kind_of(vision: VisionConfig) -> Family:
    """Looks up the encoder's tensors and the keys of its config.json.

    Raises:
        ConfigError: the recipe names a kind that is not in the table.
    """
    problems = [str(each) for each in kind_problems(vision)]
    if problems:
        raise ConfigError(problems)
    return KINDS[vision.kind]


def kind_problems(vision: VisionConfig) -> Problems:
    """Finds a kind that is not in the table."""
    if vision.kind not in KINDS:
        yield error(
            f"model.vision.kind={vision.kind} is no kind of vision encoder",
            f"use {' or '.join(KINDS)}",
        )


def vision_problems(vision: VisionConfig) -> Problems:
    """What keeps `model.vision.weights` from being what the recipe's encoder computes."""
    directory = Path(vision.weights or "")
    place = Place(
        setting=f"model.vision.weights={directory}",
        group="model.vision",
        config="config.json",
        model="the vision encoder of NVLM",
    )
    headers = read_headers(directory, place.setting)
    if not (directory / FILE).is_file():
        yield error(
            f"{place.setting}: no {FILE} there",
            "give the directory that save_pretrained of an InternVL vision model wrote, in one file",
        )
    else:
        yield from headers.problems
        yield from _file_problems(headers, place)
    config = read_config(directory / "config.json", place.setting)
    if isinstance(config, Problem):
        yield config
        return
    kind = kind_of(vision)
    family = family_of({kind.model_type: kind}, config, place)
    if isinstance(family, Problem):
        yield replace(family, text=f"{place.setting}: {family.text}")
        return
    yield from _other_kind(config, vision, place)
    for problem in key_problems(family, config, vision, place):
        yield replace(problem, text=f"{place.setting}: {problem.text}")
    if headers.tensors:
        yield from tensor_problems(family, _without_prefix(headers), config, vision, place)


def _other_kind(config: Config, vision: VisionConfig, place: Place) -> Problems:
    """Finds that the config.json is one of another kind in the table."""
    fitting = [
        name
        for name, kind in KINDS.items()
        if config.get("model_type") == kind.model_type
        and not any(key_problems(kind, config, vision, place))
    ]
    if fitting and vision.kind not in fitting:
        yield error(
            f"{place.setting}: config.json describes kind={fitting[0]}, not "
            f"model.vision.kind={vision.kind}",
            f"set model.vision.kind={fitting[0]}",
        )


def _file_problems(headers: Headers, place: Place) -> Problems:
    others = sorted({stored.path.name for stored in headers.tensors.values()} - {FILE})
    if others:
        yield error(
            f"{place.setting}: {others[0]} is there beside {FILE}, the only file that is read",
            "save the encoder in one file (save_pretrained with a larger max_shard_size)",
        )
    twice = [name for name in headers.tensors if PREFIX + name in headers.tensors]
    if twice:
        yield error(
            f"{place.setting}: {twice[0]} is there with and without {PREFIX}",
            "leave the tensors of one checkpoint in the file",
        )


def _without_prefix(headers: Headers) -> Headers:
    tensors = {name.removeprefix(PREFIX): stored for name, stored in headers.tensors.items()}
    return Headers(tensors, headers.problems, headers.unread)
