import pytest
from transformers import Qwen2Config

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from jdsi.models.spec import AttentionSpec
from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=84,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4},
        {**WINDOWED, "max_window_layers": 2, "tie_word_embeddings": True},
        {**WINDOWED, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 62},
    ],
    ids=["window-off", "window-in-last-layer-tied", "alternating", "heads-that-do-not-tile-the-width"],
)
def test_parity(change: dict) -> None:
    check_causal(Qwen2Config(**(SMALL | change)))


def test_windows_follow_the_config() -> None:
    spec = family_for("qwen2").spec(Qwen2Config(**SMALL, **WINDOWED, max_window_layers=1))
    assert [layer.of(AttentionSpec).window for layer in spec.layers] == [None, 4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(change: dict, message: str) -> None:
    config = Qwen2Config(**(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        family_for("qwen2").spec(config)
