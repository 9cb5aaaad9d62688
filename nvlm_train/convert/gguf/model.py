"""The model in a GGUF file's metadata, as transformers' config.json describes it.

A key of the metadata that no rule names is refused: it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.gguf.file import GgufFile
from nvlm_train.convert.problem import Problem, Problems, error, refuse

_OTHER = "give a file of such a model, or the original weights"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a family of transformers' models."""

    model_type: str
    causal: str
    """transformers' class."""
    interleaves: bool
    """Whether rows of query and key heads are stored in pairs (0, half, 1, half + 1, ...), as Meta's RoPE
    turns them; transformers keeps both halves of a head apart (llama.cpp, convert_hf_to_gguf.py,
    `permute`)."""
    qkv_bias: bool


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, False),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False, True),
}
"""By `general.architecture`."""

_SIZES = {
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
"""Keys behind the architecture's name that must be there, to fields of `LanguageConfig`."""
_OTHERS = {
    "context_length", "vocab_size", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor",
}  # fmt: skip
"""Keys that may be there, and are read."""
_NOT_THE_MODEL = ("GGUF", "general", "tokenizer", "quantize", "split")
"""Groups of keys that describe the file, its history and its vocabulary."""
ROPE_FACTORS = "rope_freqs.weight"
"""What each frequency of RoPE is divided by; Llama 3.1 and later have it."""
_LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Every Llama 3.1, 3.2 and 3.3 has these; only the factor differs. GGUF stores none of them."""


@dataclass(frozen=True)
class Model:
    """A file's model."""

    architecture: Architecture
    language: LanguageConfig
    config: Mapping[str, Any]
    """The config.json."""


def read_model(file: GgufFile) -> Model:
    """Finds the model that a file describes.

    Raises:
        CheckpointError: it is of another kind, or its metadata say what nothing here computes.
    """
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        refuse([_other_kind(file)])
        raise AssertionError("an error is refused")
    refuse(_key_problems(file))
    language = _language(file, architecture)
    refuse(_value_problems(file, language))
    return Model(architecture, language, _config(file, architecture, language))


def _other_kind(file: GgufFile) -> Problem:
    return error(
        f"{file.path} has general.architecture={file.architecture}, "
        f"{' and '.join(ARCHITECTURES)} are converted",
        _OTHER,
    )


def _key_problems(file: GgufFile) -> Problems:
    name = file.architecture
    for key in _SIZES:
        if f"{name}.{key}" not in file.metadata:
            yield error(f"{file.path} lacks {name}.{key}", _OTHER)
    for table in ("token_embd.weight",):
        if table not in file.tensors:
            yield error(f"{file.path} lacks the tensor {table}", _OTHER)
    for key, value in file.metadata.items():
        group, _, rest = key.partition(".")
        known = group in _NOT_THE_MODEL or (group == name and rest in _SIZES.keys() | _OTHERS)
        if not known:
            yield error(
                f"{file.path} has {key}={value}, which may change what the model computes", _OTHER
            )
        elif isinstance(value, list) and group == name:
            yield error(
                f"{file.path} has {key}={value}: layers that differ are not computed here", _OTHER
            )


def _language(file: GgufFile, architecture: Architecture) -> LanguageConfig:
    own = {key: file.metadata[f"{file.architecture}.{key}"] for key in _SIZES}
    sizes = {field: own[key] for key, field in _SIZES.items()}
    return LanguageConfig(
        **sizes,
        num_kv_heads=_get(file, "attention.head_count_kv", sizes["num_heads"]),
        vocab_size=file.shape("token_embd.weight")[0],
        head_dim=_get(
            file, "attention.key_length", sizes["hidden_size"] // max(sizes["num_heads"], 1)
        ),
        rope_theta=_get(file, "rope.freq_base", 10_000.0),
        qkv_bias=architecture.qkv_bias,
        tied_embeddings="output.weight" not in file.tensors,
    )


def _get(file: GgufFile, key: str, default: Any) -> Any:
    """A value of the model's own keys; llama.cpp's default where there is none."""
    return file.metadata.get(f"{file.architecture}.{key}", default)


def _value_problems(file: GgufFile, language: LanguageConfig) -> Problems:
    name, head = file.architecture, language.head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        found = _get(file, key, head)
        if found != head:
            yield error(
                f"{file.path} has {name}.{key}={found}, but heads of {head} channels, all of which "
                "must be there in values and turned by RoPE",
                _OTHER,
            )
    rows = _get(file, "vocab_size", language.vocab_size)
    if rows != language.vocab_size:
        yield error(
            f"{file.path} has {name}.vocab_size={rows}, but token_embd.weight has "
            f"{language.vocab_size} rows",
            "fetch it again",
        )
    for key in (name_of for name_of in _SIZES.values() if name_of != "norm_eps"):
        if getattr(language, key) < 1:
            yield error(
                f"{file.path}: its {key}={getattr(language, key)} must be at least 1", _OTHER
            )
    if language.num_kv_heads < 1 or language.num_heads % language.num_kv_heads:
        yield error(
            f"{file.path} has {name}.attention.head_count_kv={language.num_kv_heads}, which does not "
            f"divide head_count={language.num_heads}",
            _OTHER,
        )
    kind = _get(file, "rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        yield error(
            f"{file.path} has {name}.rope.scaling.type={kind}, none and linear are converted",
            _OTHER,
        )
    if kind == "linear" and f"{name}.rope.scaling.factor" not in file.metadata:
        yield error(f"{file.path} lacks {name}.rope.scaling.factor", _OTHER)
    if ROPE_FACTORS in file.tensors and _llama_3(file, language) is None:
        yield error(
            f"{file.path} has {ROPE_FACTORS}, which is not that of Llama 3.1, 3.2 or 3.3",
            _OTHER,
        )


def _config(file: GgufFile, architecture: Architecture, language: LanguageConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [architecture.causal],
        "model_type": architecture.model_type,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": _get(file, "context_length", 2048),
        "num_attention_heads": language.num_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tied_embeddings,
        "vocab_size": language.vocab_size,
        **{f"{each}_token_id": number for each, number in token_ids(file).items()},
    }
    if architecture.model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False, "head_dim": language.head_dim}
    scaling = _scaling(file, language)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _scaling(file: GgufFile, language: LanguageConfig) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if ROPE_FACTORS in file.tensors:
        return _llama_3(file, language)
    if _get(file, "rope.scaling.type", "none") == "linear":
        return {"rope_type": "linear", "factor": _get(file, "rope.scaling.factor", 1.0)}
    return None


def _llama_3(file: GgufFile, language: LanguageConfig) -> dict[str, Any] | None:
    """The parameters that give the stored factors; None where those of Llama 3 do not.

    Follows transformers' `_compute_llama3_parameters`.
    """
    stored = file.values(ROPE_FACTORS)
    head = language.head_dim or 0
    powers = np.arange(0, head, 2, dtype=np.float64) / head
    turns = _LLAMA_3["original_max_position_embeddings"] / (2 * np.pi * language.rope_theta**powers)
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    factor = float(stored.max())
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - share) / factor + share)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        return None
    return {"rope_type": "llama3", "factor": factor, **_LLAMA_3}


def token_ids(file: GgufFile) -> dict[str, int]:
    """Returns those of `bos`, `eos` and `pad` that the file names, with their ids."""
    return dict(_token_ids(file))


def _token_ids(file: GgufFile) -> Iterator[tuple[str, int]]:
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            yield name, int(number)
