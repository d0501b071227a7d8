"""Plans: what cannot be run is named, with degrees given or chosen; what is padded is what the engine pads."""

from typing import Any

import pytest
import transformers

from jdsi.errors import ConfigError
from jdsi.models import TransformerSpec
from jdsi.models.families import family_for
from jdsi.planning import make_plan
from jdsi.sharding import Parallelism


def spec_of(family: str, **settings: Any) -> TransformerSpec:
    return family_for(family).spec(transformers.AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize("degrees", [None, Parallelism(2)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": -3}, "batch=-3"),
        ({"context": 0}, "context=0"),
        ({"prompt": 0}, "prompt=0"),
        ({"context": 100, "prompt": 500}, "prompt=500 exceeds context=100"),
        ({"context": 5000}, "1024 positions"),
    ],
)
def test_what_cannot_be_run_is_named(degrees: Parallelism | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(spec_of("gpt2"), "h200:2", degrees, compiled=False, **({"context": 512} | arguments))


def test_encoders_and_degrees_beyond_the_machine_are_named() -> None:
    with pytest.raises(ConfigError, match="does not generate"):
        make_plan(spec_of("bert"), "h200:2", Parallelism(2), context=128, compiled=False)
    with pytest.raises(ConfigError, match="takes 16 devices, and h200:8 has 8"):
        make_plan(spec_of("gpt2"), "h200:8", Parallelism(16), context=128, compiled=False)


def test_a_plan_is_for_what_the_engine_pads_to() -> None:
    found = make_plan(spec_of("gpt2"), "h200:2", Parallelism(2), context=1000, prompt=900, compiled=False)
    assert "prompts to 1024 tokens, KV memory to 1152" in found.text()
    (stage,) = found.stages
    kv_heads, head_dim, layers = 12, 64, 12
    capacity = 1152  # 1024 for the prompt and 100 more, in steps of 128
    assert stage.memory.kv == 2 * capacity * kv_heads // 2 * head_dim * layers * 2
