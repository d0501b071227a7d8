import pytest
from transformers import Phi3Config

from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=84,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=64,
    original_max_position_embeddings=64,
    pad_token_id=0,
)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 3.0, 6.0],
}


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "partial_rotary_factor": 0.4, "sliding_window": 4},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ],
    ids=["mha", "gqa-partial-rotary-window", "tied-mqa"],
)
def test_parity(change: dict) -> None:
    check_causal(Phi3Config(**(SMALL | change)))


@pytest.mark.parity
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_longrope_under_and_over_the_original_length(spelling: str) -> None:
    # Generation of 6 tokens crosses the original length in neither: there transformers recomputes the cache.
    config = Phi3Config(
        **SMALL | {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}, **{spelling: dict(LONGROPE)}
    )
    check_causal(config, lengths=(3, 9, 17, 29))
