import pytest
from transformers import Qwen3Config

from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=46,
    intermediate_size=84,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=14,
    max_position_embeddings=64,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_key_value_heads": 6},
    ],
    ids=["gqa", "biases-tied-mqa", "window-mha"],
)
def test_parity(change: dict) -> None:
    check_causal(Qwen3Config(**(SMALL | change)))
