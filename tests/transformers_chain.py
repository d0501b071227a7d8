"""The processors that transformers would apply for parameters of ours, in the order that it applies them."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from jdsi.generation import SamplingParams


@functools.cache
def _model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))


def generation_options(params: SamplingParams) -> dict[str, Any]:
    """Filled parameters by transformers' names, without what it does not have."""
    names = {"no_repeat_ngram": "no_repeat_ngram_size", "n": "num_return_sequences"}
    ours = {
        "stop", "stop_token_ids", "ignore_eos", "logprobs", "seed", "presence_penalty", "frequency_penalty",
        "min_tokens_to_keep", "logit_bias", "allowed_tokens", "logits_processor", "bad_words", "negative_prompt",
    }  # fmt: skip
    options = {names.get(key, key): value for key, value in params.changes.items() if key not in ours}
    options["max_new_tokens"] = params.max_new_tokens
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [list(phrase) for phrase in params.bad_words_ids]
    if params.logit_bias:
        options["sequence_bias"] = [[list(phrase), bias] for phrase, bias in params.logit_bias]
    for key in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        if key in options:
            options[key] = list(options[key])
    return options | {"do_sample": not params.greedy, "top_k": params.top_k}


def chain(params: SamplingParams, prompt: Sequence[int], eos: Sequence[int], **more: Any) -> LogitsProcessorList:
    """What `generate` would set up for a prompt."""
    model = _model()
    model.generation_config = GenerationConfig()
    config, _ = model._prepare_generation_config(
        None, **generation_options(params.filled()), eos_token_id=list(eos) or None
    )
    model._prepare_special_tokens(config)
    length, ids = len(prompt), torch.tensor([list(prompt)])
    config = model._prepare_generated_length(config, True, True, "input_ids", length, ids)
    made = model._get_logits_processor(config, input_ids_seq_length=length, device="cpu", **more)
    for processor in made:
        if hasattr(processor, "min_tokens_to_keep"):
            processor.min_tokens_to_keep = params.filled().min_tokens_to_keep
        if hasattr(processor, "top_k"):
            processor.top_k = max(processor.top_k, params.filled().min_tokens_to_keep)
    return made


def processed(
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    logits: np.ndarray,
    eos: Sequence[int] = (),
    **more: Any,
) -> np.ndarray:
    """The logits of one sequence behind all of them."""
    tokens = torch.tensor([[*prompt, *output]])
    return chain(params, prompt, eos, **more)(tokens, torch.tensor(np.asarray(logits)[None]))[0].numpy()
