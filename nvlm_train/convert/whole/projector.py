"""The projector of a released NVLM-D (`mlp1`): LayerNorm, linear, GELU, linear, without biases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.convert.family import Family, tensor_problems
from nvlm_train.convert.headers import Headers
from nvlm_train.convert.keys import Place, shown
from nvlm_train.convert.problem import Problem, Problems, error
from nvlm_train.convert.whole.parts import WHOLES, Part, open_part, whole_of
from nvlm_train.geometry import tile_feature_size

_NORM_EPS = 1e-5
"""torch's, which the released code leaves as it is."""


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "layers": 0,
        "features": tile_feature_size(model.vision),
        "ffn": model.projector.ffn_hidden_size or 0,
        "hidden": model.language.hidden_size,
    }


_MLP1 = Family(
    model_type="",
    keys=(),
    ignored=frozenset(),
    tensors={
        "mlp1.0.weight": ("features",),
        "mlp1.0.bias": ("features",),
        "mlp1.1.weight": ("ffn", "features"),
        "mlp1.3.weight": ("hidden", "ffn"),
    },
    sizes=_sizes,
    optional=lambda model: frozenset(),
)


def projector_problems(model: ModelConfig) -> Problems:
    """What keeps `model.projector.weights` from being what the recipe's projector computes."""
    part = open_projector(model)
    yield from part.headers.problems
    yield from part.problems
    if isinstance(part.config, Problem):
        yield part.config
        return
    whole = whole_of(part.config)
    if whole is None or "projector" not in whole.sections:
        named = shown(part.config.get("model_type"))
        readable = (name for name, each in WHOLES.items() if "projector" in each.sections)
        yield error(
            f"{part.place.setting}: config.json has model_type={named}, a projector is read out of "
            f"model_type={' or '.join(readable)}",
            "give the directory of NVLM-D 72B, or null for a projector that starts random",
        )
        return
    yield from _recipe_problems(model, part.place)
    if part.headers.tensors and model.projector.ffn_hidden_size is not None:
        yield from tensor_problems(_MLP1, part.headers, part.config, model, part.place)


def _recipe_problems(model: ModelConfig, place: Place) -> Problems:
    """What the recipe must say, whatever the files have."""
    projector = model.projector
    if projector.ffn_hidden_size is None:
        yield error(
            f"{place.setting}: model.projector.ffn_hidden_size=null is one linear (NVLM-X), mlp1 has two",
            "set it to the rows of mlp1.1.weight, or model.projector.weights=null",
        )
    if projector.norm_eps != _NORM_EPS:
        yield error(
            f"{place.setting}: model.projector.norm_eps={projector.norm_eps}, mlp1's LayerNorm has "
            f"{_NORM_EPS}",
            f"set model.projector.norm_eps={_NORM_EPS}",
        )


def open_projector(model: ModelConfig) -> Part:
    """Reads the headers of `projector.weights`, by the names that the files have."""
    directory = Path(model.projector.weights or "")
    place = Place(
        setting=f"model.projector.weights={directory}",
        group="model.projector",
        config="config.json",
        model="the projector of NVLM-D",
    )
    part = open_part("projector", directory, model, place)
    # Numbers alone say little: messages have the names of the files.
    named = {
        stored.prefix + name: replace(stored, prefix="")
        for name, stored in part.headers.tensors.items()
    }
    return replace(part, headers=Headers(named, part.headers.problems, part.headers.unread))
