"""Sampling parameters that use all there is, for tests of what does not depend on it."""

from jdsi.generation import SamplerFeatures, SamplingParams

ALL_AT_ONCE = SamplingParams(
    temperature=1.0,
    top_k=1,
    top_p=0.5,
    min_p=0.5,
    typical_p=0.5,
    epsilon_cutoff=0.5,
    eta_cutoff=0.5,
    min_tokens_to_keep=2,
    repetition_penalty=2.0,
    presence_penalty=1.0,
    no_repeat_ngram=1,
    min_new_tokens=1,
    logit_bias={(0, 1): 1.0},
    bad_words_ids=[[0, 1]],
    suppress_tokens=[0],
    begin_suppress_tokens=[0],
    forced_bos_token_id=1,
    forced_eos_token_id=1,
    exponential_decay_length_penalty=(1, 1.5),
    logprobs=4,
)
EVERYTHING = SamplerFeatures.of([ALL_AT_ONCE])
"""Compiled for everything but what callers' functions and tables ask for."""
