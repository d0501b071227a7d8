import pytest
from transformers import MistralConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=50,
    intermediate_size=84,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    max_position_embeddings=64,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"sliding_window": 5, "tie_word_embeddings": True},
        {"sliding_window": 2, "num_key_value_heads": 1},
        {"head_dim": None, "hidden_size": 72, "sliding_window": 64},
    ],
    ids=["full", "window-tied", "window-of-two-mqa", "head-dim-from-width"],
)
def test_parity(change: dict) -> None:
    check_causal(MistralConfig(**(SMALL | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "siluu"}, "hidden_act: unknown 'siluu' .did you mean 'silu'"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"is_causal": False}, "is_causal"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(change: dict, message: str) -> None:
    config = MistralConfig(**(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        family_for("mistral").spec(config)


def test_dropout_means_nothing_at_inference() -> None:
    plain, dropping = MistralConfig(**SMALL), MistralConfig(**SMALL, attention_dropout=0.5)
    assert family_for("mistral").spec(plain) == family_for("mistral").spec(dropping)
