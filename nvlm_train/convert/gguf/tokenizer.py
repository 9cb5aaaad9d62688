"""The byte-level BPE in a GGUF file's metadata, as a tokenizer.json.

How text is split before merging stands there by a name only (`tokenizer.ggml.pre`), so that each name
is a row here. Other vocabularies, SentencePiece's among them, are taken from the model's own files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nvlm_train.convert.gguf.file import GgufFile
from nvlm_train.convert.problem import Problems, error, refuse

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_OWN = "give the model's own tokenizer.json: --tokenizer FILE"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Of `tokenizer.ggml.token_type` (llama.cpp, `llama_token_type`)."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> str:
    """The expression that Qwen2 and Llama 3 split by; they differ in how many digits stay together."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _gpt2() -> PreTokenizer:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> PreTokenizer:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by(expression: str) -> Callable[[], PreTokenizer]:
    def split() -> PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = [pre_tokenizers.Split(Regex(expression), behavior="isolated"), bytes_only]
        return pre_tokenizers.Sequence(parts)

    return split


_LLAMA_3 = _by(_words(r"\p{N}{1,3}"))
SPLITS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "qwen2": _by(_words(r"\p{N}")),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
}
"""By `tokenizer.ggml.pre`. As the published tokenizer.json of GPT-2, SmolLM2, Qwen2 and Llama 3 split."""


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """Builds the tokenizer.

    Raises:
        CheckpointError: the vocabulary is of another kind, is split in an unknown way, or is torn.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    refuse(_problems(file))
    kinds, tokens = _get(file, "token_type"), _get(file, "tokens")
    pre = _get(file, "pre")
    vocabulary = {token: n for n, token in enumerate(tokens) if kinds[n] != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in _get(file, "merges")]
    # Llama 3 takes a word that is in the vocabulary whole, whatever its merges would give.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=SPLITS[pre] is _LLAMA_3))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = SPLITS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        special = kind == _CONTROL
        own = [token for token, found in zip(tokens, kinds, strict=True) if found == kind]
        add([AddedToken(token, normalized=False, special=special) for token in own])
    _begin(tokenizer, file)
    return tokenizer


def _begin(tokenizer: Tokenizer, file: GgufFile) -> None:
    """Has transformers begin a text with the token that the file says begins one."""
    from tokenizers import processors

    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    number = _get(file, "bos_token_id")
    if _get(file, "add_bos_token") and number is not None:
        token = _get(file, "tokens")[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A",
            pair=f"{token} $A {token}:1 $B:1",
            special_tokens=[(token, number)],
        )


def _problems(file: GgufFile) -> Problems:
    model, pre = _get(file, "model"), _get(file, "pre")
    if model != "gpt2":
        yield error(
            f"{file.path} has tokenizer.ggml.model={model}, byte-level BPE (gpt2) is converted",
            _OWN,
        )
        return
    if pre not in SPLITS:
        yield error(
            f"{file.path} has tokenizer.ggml.pre={pre}, texts are split as {', '.join(SPLITS)} do",
            _OWN,
        )
    for key in ("tokens", "token_type", "merges"):
        if not isinstance(_get(file, key), list):
            yield error(f"{file.path} lacks the list tokenizer.ggml.{key}", _OWN)
            return
    tokens, kinds = len(_get(file, "tokens")), len(_get(file, "token_type"))
    if tokens != kinds:
        yield error(f"{file.path} has {tokens} tokens but {kinds} types of them", _OWN)
    vocabulary = set(_get(file, "tokens"))
    torn = [each for each in _get(file, "merges") if not _is_merge(each.split(" "), vocabulary)]
    if torn:
        yield error(
            f"{file.path} merges {torn[0]!r}, which are no two tokens that make a third", _OWN
        )


def _is_merge(parts: list[str], vocabulary: set[str]) -> bool:
    return len(parts) == 2 and vocabulary.issuperset([*parts, "".join(parts)])


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The tokenizer_config.json: the names of special tokens, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens: list[str] = _get(file, "tokens") or []
    numbers = {name: _get(file, f"{key}_token_id") for name, key in names.items()}
    config: dict[str, Any] = {
        f"{name}_token": tokens[number]
        for name, number in numbers.items()
        if number is not None and number < len(tokens)
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if length := file.metadata.get(f"{file.architecture}.context_length"):
        config["model_max_length"] = length
    if template := file.metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _get(file: GgufFile, key: str) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}")
