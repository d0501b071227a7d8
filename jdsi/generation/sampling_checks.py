"""What the fields of `SamplingParams` must be beside each other, and beside a vocabulary."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jdsi.errors import ConfigError

from .sampling_fields import BEAMS, NEUTRAL
from .token_automaton import TokenAutomaton

_TOKENS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")

_NOT_WITH_BEAMS = {
    "temperature": "beams are not sampled",
    "logprobs": "a beam search has scores of whole sequences",
    "guidance_scale": "only sampling and greedy search are guided",
}


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What cannot stand beside the other values: a field's name, and what it must be. Of some or all fields."""

    def changed(name: str) -> bool:
        return name in values and values[name] != NEUTRAL[name]

    if "max_new_tokens" in values and values.get("min_new_tokens", 0) > values["max_new_tokens"]:
        yield "min_new_tokens", f"at most max_new_tokens={values['max_new_tokens']}"
    if "max_new_tokens" in values and "length_penalty" in values:
        # The length to this power, times the score of what must not win, has to stay in the range of float32.
        most = 28 / math.log10(max(2, values["max_new_tokens"]))
        if abs(values["length_penalty"]) > most:
            yield "length_penalty", f"from -{most:.3g} to {most:.3g} with max_new_tokens={values['max_new_tokens']}"
    suppressed = set(values.get("suppress_tokens", ()))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = values.get(name) if name.endswith("eos_token_id") else [values.get(name)]
        if forced and suppressed.issuperset(forced):
            yield name, "out of suppress_tokens, which leave nothing where it is forced"
    if changed("negative_prompt") and values.get("guidance_scale") == 1:
        yield "negative_prompt", "used with a guidance_scale, and not 1, which is off"
    if "num_beams" not in values:
        return
    beams, n = values["num_beams"], values.get("n", 1)
    if beams > 1:
        for name in filter(changed, _NOT_WITH_BEAMS):
            yield name, f"{NEUTRAL[name]} with num_beams={beams}: {_NOT_WITH_BEAMS[name]}"
    else:
        for name in filter(changed, BEAMS):
            yield name, f"{NEUTRAL[name]} without beam search (num_beams is 1)"
    if beams > 1 and n > beams:
        yield "n", f"at most num_beams={beams}"
    if beams == 1 and n > 1 and values.get("temperature") == 0:
        yield "n", "1 with temperature=0: greedy search has one result"


def check_values(given: Mapping[str, Any], vocab_size: int) -> None:
    """Raises `ConfigError` where fields ask for other tokens than the `vocab_size` there are."""
    if (given.get("logprobs") or 0) > vocab_size:
        raise wrong("logprobs", given["logprobs"], f"at most the {vocab_size} tokens there are")
    tokens = {name: given.get(name, ()) for name in _TOKENS}
    tokens["forced_bos_token_id"] = [i for i in [given.get("forced_bos_token_id")] if i is not None]
    tokens["bad_words_ids"] = [i for phrase in given.get("bad_words_ids", ()) for i in phrase]
    tokens["logit_bias"] = [i for phrase, _ in given.get("logit_bias", ()) for i in phrase]
    for name, ids in tokens.items():
        for token in ids:
            if token >= vocab_size:
                raise ConfigError(f"sampling parameter {name} has {token}; the vocabulary ends at {vocab_size - 1}")
    automaton = given.get("allowed_tokens")
    if isinstance(automaton, TokenAutomaton) and automaton.next_state.shape[1] != vocab_size:
        raise wrong("allowed_tokens", automaton, f"a table of the {vocab_size} tokens there are")


def wrong(name: str, value: Any, right: str, origin: str = "") -> ConfigError:
    """The error that says what a field must be."""
    return ConfigError(f"sampling parameter {name}={value!r}{origin} must be {right}")
