"""Keys of a config.json that change nothing of what a model computes from ids or pixels.

A key stands here only when transformers does not read it in the forward pass of the models that
`convert/language.py` and `convert/vision.py` list. A key that is not listed anywhere is refused, so
a new one that matters is never passed over.
"""

from __future__ import annotations

BOOKKEEPING = frozenset({
    # Who wrote the file, from what, and for which tokenizer.
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class",
    # Published SmolLM2's: nanotron's name for Llama's config, and settings of its exports to ONNX.
    "is_llama_config", "transformers.js_config",
    # Unsloth's copies of Llamas and Qwens: who saved the file.
    "unsloth_fixed", "unsloth_version",
    # How attention is computed, not what: the kernels agree up to rounding.
    "attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    # What else a forward pass returns.
    "output_attentions", "output_hidden_states",
    # Heads of classifiers; a classifier's weights are refused by their tensors.
    "id2label", "label2id", "num_labels", "finetuning_task", "problem_type", "task_specific_params",
    # The range of random initial weights.
    "initializer_range",
    # Export and training settings of transformers 4 that its models do not read in forward.
    "torchscript", "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder",
    "cross_attention_hidden_size", "prefix",
    # A feed-forward in chunks gives the same numbers; no model listed here reads it.
    "chunk_size_feed_forward",
    # Dropout belongs to the recipe (stages.NAME.attention_dropout), and is off where nothing trains.
    "attention_dropout",
})  # fmt: skip

GENERATION = frozenset({
    # How text is drawn from logits. transformers 5 drops these when it reads a config.json.
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
    "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
    # Keys and values of earlier tokens are kept or computed again: the same logits.
    "use_cache",
    # Which ids begin, end and fill texts: the recipe's tokenizer says so (model.tokenizer).
    "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
})  # fmt: skip
