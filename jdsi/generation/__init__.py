"""From logits to tokens, and from tokens to text: sampling, beam search, stopping, detokenisation; and to labels."""

from jdsi.generation import beam
from jdsi.generation.chat import Chat
from jdsi.generation.classification import Classification
from jdsi.generation.completion import Completion, CompletionBuilder, FinishReason, TokenLogprob
from jdsi.generation.detokenizer import Detokenizer
from jdsi.generation.features import SamplerFeatures
from jdsi.generation.padding import pad_rows
from jdsi.generation.sampler import SampledTokens, process, sample
from jdsi.generation.sampler_state import FinishCode, SamplerState, init_state
from jdsi.generation.sampling_params import SamplingParams, check_vocabulary
from jdsi.generation.stopping import StopStrings
from jdsi.generation.token_automaton import TokenAutomaton

__all__ = [
    "Chat",
    "Classification",
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
    "TokenAutomaton",
    "TokenLogprob",
    "beam",
    "check_vocabulary",
    "init_state",
    "pad_rows",
    "process",
    "sample",
]
