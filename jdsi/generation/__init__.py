"""From logits to tokens and from tokens to text: sampling, beam search, stopping and detokenisation."""

from jdsi.generation import beam
from jdsi.generation.completion import Completion, CompletionBuilder, FinishReason, TokenLogprob
from jdsi.generation.detokenizer import Detokenizer
from jdsi.generation.sampler import SampledTokens, process, sample
from jdsi.generation.sampler_state import (
    FinishCode,
    SamplerFeatures,
    SamplerState,
    finish_rows,
    init_state,
    replace_rows,
    take_rows,
)
from jdsi.generation.sampling_params import SamplingParams
from jdsi.generation.stopping import StopStrings

__all__ = [
    "Completion",
    "CompletionBuilder",
    "Detokenizer",
    "FinishCode",
    "FinishReason",
    "SampledTokens",
    "SamplerFeatures",
    "SamplerState",
    "SamplingParams",
    "StopStrings",
    "TokenLogprob",
    "beam",
    "finish_rows",
    "init_state",
    "process",
    "replace_rows",
    "sample",
    "take_rows",
]
