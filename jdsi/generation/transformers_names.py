"""What `transformers` and others call the fields of `SamplingParams`, and which options of theirs are none of these."""

from typing import Any

IN_FILES = {
    "early_stopping": "early_stopping",
    "length_penalty": "length_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "min_p": "min_p",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "num_beams": "num_beams",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Options of a `GenerationConfig` that are fields of ours, with their names here."""

RENAMED = {theirs: ours for theirs, ours in IN_FILES.items() if theirs != ours} | {
    "do_sample": "temperature",
    "eos_token_id": "stop_token_ids",
    "eos_token_ids": "stop_token_ids",
    "ignore_eos_token": "ignore_eos",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "top_logprobs": "logprobs",
}
"""Names that callers try, with ours."""

UNSUPPORTED: dict[str, Any] = {
    "assistant_early_exit": None,
    "assistant_ensemble_weight": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "force_words_ids": None,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "token_healing": False,
    "top_h": None,
    "use_mtp": False,
    "watermarking_config": None,
}
"""Options that change tokens and that there is nothing for here, with the values that ask for nothing."""

IMMATERIAL = {
    "_commit_hash",
    "_from_model_config",
    "_original_object_hash",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "eos_token_id",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
"""Options of a `GenerationConfig` that only say how, or that are read elsewhere."""
