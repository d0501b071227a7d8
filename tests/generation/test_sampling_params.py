"""Validation of sampling parameters."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdsi.errors import ConfigError
from jdsi.generation import SamplingParams

NAMES = [field.name for field in dataclasses.fields(SamplingParams)]

WRONG = {
    "max_new_tokens": st.integers(max_value=0) | st.integers(min_value=2**31) | st.booleans() | st.floats() | st.none(),
    "min_new_tokens": st.integers(max_value=-1) | st.integers(min_value=129) | st.booleans(),
    "temperature": st.floats(max_value=-1e-9) | st.sampled_from([math.nan, math.inf, True, "1", None]),
    "top_k": st.integers(max_value=-1) | st.integers(min_value=2**31) | st.just(1.0),
    "top_p": st.floats(max_value=0.0) | st.floats(min_value=1.0, exclude_min=True) | st.just(math.nan),
    "min_p": st.floats(max_value=-1e-9) | st.floats(min_value=1.0, exclude_min=True),
    "repetition_penalty": st.floats(max_value=0.0) | st.just(math.inf),
    "presence_penalty": st.floats(min_value=2.0, exclude_min=True) | st.just(math.nan),
    "frequency_penalty": st.floats(max_value=-2.0, exclude_max=True),
    "no_repeat_ngram": st.integers(max_value=-1) | st.integers(min_value=2**31),
    "stop": st.sampled_from([[""], [1], 3, None]),
    "stop_token_ids": st.sampled_from([[-1], ["a"], 3, [True], [2**31]]),
    "ignore_eos": st.sampled_from([0, None, "no"]),
    "logprobs": st.integers(max_value=-1) | st.integers(min_value=2**31) | st.booleans(),
    "seed": st.integers(max_value=-1) | st.integers(min_value=2**64) | st.floats(),
    "num_beams": st.integers(max_value=0) | st.integers(min_value=2**31),
    "length_penalty": st.sampled_from([math.nan, math.inf, None]),
    "early_stopping": st.sampled_from([0, None, "always"]),
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


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"min_p": 0.5}, "min_p"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"num_beams": 2, "stop": "x"}, "stop"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs"),
        ({"num_beams": 2, "presence_penalty": 1.0}, "presence_penalty"),
        ({"num_beams": 2, "seed": 0}, "seed"),
    ],
)
def test_what_would_have_no_effect_is_an_error(options, name):
    with pytest.raises(ConfigError, match=f"sampling parameter {name}="):
        SamplingParams(**options)


def test_a_seed_may_be_given_to_greedy_search():
    assert SamplingParams(seed=3).greedy


def test_numpy_scalars_become_pythons():
    params = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=[np.int32(7)])
    assert [type(x) for x in (params.max_new_tokens, params.temperature, *params.stop_token_ids)] == [int, float, int]
    assert SamplingParams(max_new_tokens=2**31 - 1, stop_token_ids=[2**31 - 1]).max_new_tokens == 2**31 - 1


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ConfigError, match=r"'max_tokens' \(did you mean 'max_new_tokens'\?\), 'temprature' \(did you"):
        SamplingParams.from_dict({"max_tokens": 3, "temprature": 1, "seed": 1})
