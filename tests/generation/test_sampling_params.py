"""Validation of sampling parameters."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdsi.errors import ConfigError
from jdsi.generation import SamplingParams, TokenAutomaton, check_vocabulary
from jdsi.generation.sampling_fields import FIELDS, NEUTRAL
from jdsi.generation.sampling_params import LEFT_OUT
from jdsi.generation.transformers_names import RENAMED

NAMES = [field.name for field in dataclasses.fields(SamplingParams)]

WRONG = {
    "max_new_tokens": st.integers(max_value=0) | st.integers(min_value=2**31) | st.booleans() | st.floats() | st.none(),
    "min_new_tokens": st.integers(max_value=-1) | st.integers(min_value=2**31) | st.booleans(),
    "n": st.integers(max_value=0) | st.booleans(),
    "guidance_scale": st.sampled_from([math.nan, math.inf, 1e31, "2", None]),
    "negative_prompt": st.sampled_from(["", [], [-1], [1.5], 3, [[1]]]),
    "temperature": st.floats(max_value=-1e-9) | st.sampled_from([math.nan, math.inf, 1e39, True, "1", None]),
    "top_k": st.integers(max_value=-1) | st.integers(min_value=2**31) | st.just(1.0),
    "top_p": st.floats(max_value=0.0) | st.floats(min_value=1.0, exclude_min=True) | st.just(math.nan),
    "min_p": st.floats(max_value=-1e-9) | st.floats(min_value=1.0, exclude_min=True),
    "repetition_penalty": st.floats(max_value=1e-31) | st.sampled_from([1e-45, 1e31, 1e39, math.inf]),
    "presence_penalty": st.floats(min_value=2.0, exclude_min=True) | st.just(math.nan),
    "frequency_penalty": st.floats(max_value=-2.0, exclude_max=True),
    "typical_p": st.floats(max_value=0.0) | st.floats(min_value=1.0, exclude_min=True),
    "epsilon_cutoff": st.floats(max_value=-1e-9) | st.floats(min_value=1.0),
    "eta_cutoff": st.floats(max_value=-1e-9) | st.floats(min_value=1.0),
    "min_tokens_to_keep": st.integers(max_value=0) | st.just(1.0),
    "logit_bias": st.sampled_from(
        [
            3,
            {-1: 0.5},
            {"a": 1.0},
            {5: math.inf},
            {5: 1e31},
            {5: "1"},
            {(): 1.0},
            [[[5], 1.0, 2]],
            {5: 1, (5,): 1},
            None,
        ]
    ),
    "bad_words_ids": st.sampled_from([3, [3], [[]], [[-1]], [["a"]], None]),
    "bad_words": st.sampled_from([[""], [1], 3, None, "\udfff"]),
    "suppress_tokens": st.sampled_from([[-1], 3, None]),
    "begin_suppress_tokens": st.sampled_from([["a"], 3, None]),
    "forced_bos_token_id": st.sampled_from([-1, 2**31, [3], True, "a"]),
    "forced_eos_token_id": st.sampled_from([-1, [True], "a", 2.5]),
    "exponential_decay_length_penalty": st.sampled_from([3, (1,), (-1, 1.5), (1, 0.0), (1, math.inf), (1.5, 2.0)]),
    "allowed_tokens": st.sampled_from([3, "x", [[5]], [0, 1], [[0.5]], [[-2]], [[0], [0, 1]]]),
    "logits_processor": st.sampled_from([3, "x", []]),
    "no_repeat_ngram": st.integers(max_value=-1) | st.integers(min_value=2**31),
    "stop": st.sampled_from([[""], [1], 3, None, "\ud800", ["a", "b\udcff"]]),
    "stop_token_ids": st.sampled_from([[-1], ["a"], 3, [True], [2**31]]),
    "ignore_eos": st.sampled_from([0, None, "no"]),
    "logprobs": st.integers(max_value=-1) | st.integers(min_value=2**31) | st.booleans(),
    "seed": st.integers(max_value=-1) | st.integers(min_value=2**64) | st.floats(),
    "num_beams": st.integers(max_value=0) | st.integers(min_value=2**31),
    "length_penalty": st.sampled_from([math.nan, math.inf, None]),
    "early_stopping": st.sampled_from([0, None, "always"]),
    "renormalize_logits": st.sampled_from([0, None]),
}


@given(st.data())
def test_a_wrong_value_is_named(data):
    assert set(WRONG) == set(NAMES)
    name = data.draw(st.sampled_from(NAMES))
    with pytest.raises(ConfigError, match=rf"sampling parameter {name}=.* must be "):
        SamplingParams(**{name: data.draw(WRONG[name])})


@given(
    temperature=st.floats(min_value=1e-30, max_value=1e30),
    top_k=st.integers(0, 10**9),
    top_p=st.floats(min_value=0, max_value=1, exclude_min=True),
    min_p=st.floats(min_value=0, max_value=1),
    repetition_penalty=st.floats(min_value=1e-3, max_value=1e3),
    stop=st.lists(st.text(min_size=1)) | st.text(min_size=1),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_right_values_are_kept_and_hashable(**options):
    params = SamplingParams.from_dict(options)
    stop = options.pop("stop")
    assert params.stop == ((stop,) if isinstance(stop, str) else tuple(stop))
    assert {name: getattr(params, name) for name in options} == options
    assert hash(params) == hash(dataclasses.replace(params))


CONTRADICTIONS = [
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
    ({"length_penalty": 2.0, "num_beams": 1}, "length_penalty"),
    ({"early_stopping": True, "num_beams": 1}, "early_stopping"),
    ({"num_beams": 2, "temperature": 0.5}, "temperature"),
    ({"num_beams": 2, "logprobs": 0}, "logprobs"),
    ({"num_beams": 2, "guidance_scale": 2}, "guidance_scale"),
    ({"num_beams": 2, "n": 3}, "n"),
    ({"num_beams": 1, "temperature": 0, "n": 2}, "n"),
    ({"guidance_scale": 1, "negative_prompt": "x"}, "negative_prompt"),
    ({"max_new_tokens": 128, "length_penalty": 1e30}, "length_penalty"),
    ({"suppress_tokens": [3, 4], "forced_eos_token_id": [4]}, "forced_eos_token_id"),
    ({"suppress_tokens": [3, 4], "forced_bos_token_id": 3}, "forced_bos_token_id"),
    ({"max_new_tokens": 10**6, "length_penalty": -5.0}, "length_penalty"),
]
WITH_NEUTRAL_VALUES = [
    ({"min_new_tokens": 129}, "min_new_tokens"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"top_k": 5}, "top_k"),
    ({"num_beams": 2, "top_p": 0.5}, "top_p"),
    ({"min_p": 0.5}, "min_p"),
    ({"n": 2}, "n"),
    ({"negative_prompt": [3]}, "negative_prompt"),
]


def test_what_would_have_no_effect_is_an_error_as_soon_as_it_is_known():
    for options, name in CONTRADICTIONS:
        with pytest.raises(ConfigError, match=f"sampling parameter {name}="):
            SamplingParams(**options)
    for options, name in WITH_NEUTRAL_VALUES:
        params = SamplingParams(**options)
        with pytest.raises(ConfigError, match=f"sampling parameter {name}="):
            params.filled()
    with pytest.raises(ConfigError, match=r"length_penalty=2.0 of the file must be 1.0 without beam search"):
        SamplingParams().filled({"length_penalty": 2.0}, "the file")


def test_truncation_beside_temperature_0_is_greedy():
    filled = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1, seed=3).filled()
    assert filled.greedy
    assert filled == SamplingParams(temperature=0, seed=3).filled()
    assert SamplingParams(num_beams=2, temperature=0, top_p=0.5, seed=3).filled().top_p == 1


@given(st.sets(st.sampled_from(NAMES)))
def test_what_is_left_out_stays_left_out_until_it_is_filled(names):
    params = SamplingParams(**{name: NEUTRAL[name] for name in names})
    assert dict(params.given) == {name: NEUTRAL[name] for name in NAMES if name in names}
    assert repr(params) == f"SamplingParams({', '.join(f'{n}={NEUTRAL[n]!r}' for n in NAMES if n in names)})"
    again = dataclasses.replace(params, max_new_tokens=7)
    assert again.given == {**params.given, "max_new_tokens": 7}
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    filled = params.filled()
    assert dict(filled.given) == NEUTRAL
    assert list(FIELDS) == NAMES
    assert filled.filled() is filled
    assert (filled == params) == (len(names) == len(NAMES))
    assert filled.changes == {}


def test_what_was_given_wins_over_defaults_also_where_it_is_neutral():
    filled = SamplingParams(repetition_penalty=1.0, stop=()).filled(
        {"repetition_penalty": 2.0, "stop": ("x",), "top_p": 1}
    )
    assert (filled.repetition_penalty, filled.stop) == (1.0, ())


def test_a_left_out_value_is_of_no_use_by_accident():
    left_out = SamplingParams().top_k
    uses = [bool, float, int, len, list, lambda x: x > 0, lambda x: x == 0, lambda x: x != 0, lambda x: x > 1]
    for use in uses:
        with pytest.raises(TypeError, match="left out"):
            use(left_out)
    assert left_out is LEFT_OUT
    assert repr(left_out) == "LEFT_OUT"


def test_numpy_scalars_become_pythons():
    params = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=[np.int32(7)])
    assert [type(x) for x in (params.max_new_tokens, params.temperature, *params.stop_token_ids)] == [int, float, int]
    assert SamplingParams(max_new_tokens=2**31 - 1, stop_token_ids=[2**31 - 1]).max_new_tokens == 2**31 - 1


def test_the_forms_that_values_are_kept_in():
    """Those of JSON and of transformers become one, which can be given again."""
    kept = SamplingParams(
        logit_bias={"5": -100, (1, np.int64(2)): 0.5},
        bad_words_ids=[[1, 2], (3,)],
        bad_words="no",
        forced_eos_token_id=7,
        exponential_decay_length_penalty=[5, 1.5],
        allowed_tokens=[[0, -1], [1, 0]],
        logits_processor=max,
    )
    assert kept.logit_bias == (((5,), -100.0), ((1, 2), 0.5))
    assert kept.bad_words_ids == ((1, 2), (3,))
    assert (kept.bad_words, kept.forced_eos_token_id) == (("no",), (7,))
    assert kept.exponential_decay_length_penalty == (5, 1.5)
    assert kept.allowed_tokens == TokenAutomaton(np.array([[0, -1], [1, 0]]))
    assert kept.allowed_tokens != TokenAutomaton([[0, -1], [1, 1]])
    assert dataclasses.replace(kept) == kept
    assert hash(dataclasses.replace(kept)) == hash(kept)
    assert SamplingParams(logit_bias=[[[5], -100.0], [[1, 2], 0.5]]).logit_bias == kept.logit_bias
    assert SamplingParams(forced_eos_token_id=None).forced_eos_token_id == ()
    described = repr(kept.filled().described)
    assert "'logits_processor': 'builtins.max'" in described
    assert "TokenAutomaton(2 states, 2 tokens, " in described
    for name in ("suppress_tokens", "begin_suppress_tokens", "stop_token_ids", "forced_eos_token_id"):
        with pytest.raises(ConfigError, match=f"sampling parameter {name} has 9; the vocabulary ends at 8"):
            check_vocabulary(SamplingParams(**{name: [3, 9]}), 9)
    for options in ({"bad_words_ids": [[9, 1]]}, {"logit_bias": {(1, 9): 1.0}}, {"forced_bos_token_id": 9}):
        with pytest.raises(ConfigError, match="has 9; the vocabulary ends at 8"):
            check_vocabulary(SamplingParams(**options), 9)
    with pytest.raises(ConfigError, match=r"allowed_tokens=.* must be a table of the 9 tokens there are"):
        check_vocabulary(kept, 9)


def test_unknown_keys_name_what_they_are_called_here():
    with pytest.raises(ConfigError, match=r"'max_tokens' \(did you mean 'max_new_tokens'\?\), 'temprature' \(did you"):
        SamplingParams.from_dict({"max_tokens": 3, "temprature": 1, "seed": 1})
    hints = {
        "stop_strings": "stop",
        "max_length": "max_new_tokens",
        "do_sample": "temperature",
        "no_repeat_ngram_size": "no_repeat_ngram",
        "eos_token_id": "stop_token_ids",
        "ignore_eos_token": "ignore_eos",
    }
    for theirs, ours in hints.items():
        with pytest.raises(ConfigError, match=rf"parameter '{theirs}' \(did you mean '{ours}'\?\);"):
            SamplingParams.from_dict({theirs: 1})
    assert set(RENAMED.values()) <= set(NAMES)
    assert not set(RENAMED) & set(NAMES)
    with pytest.raises(ConfigError, match=r"'diversity_penalty' \(not supported\);"):
        SamplingParams.from_dict({"diversity_penalty": 0.5})


def test_every_field_is_described():
    root = Path(__file__).resolve().parent.parent.parent
    table = (root / "docs" / "generation.md").read_text().split("## Fields")[1].split("## ")[0]
    rows = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert {name for name in NAMES if f"`{name}`" not in rows} == set()
    assert {name for name in NAMES if f"{name}: " not in str(SamplingParams.__doc__)} == set()
