import pytest
from transformers import LlamaConfig

from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=84,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=12,
    max_position_embeddings=64,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 6, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["gqa", "mha-tied", "mqa-biases"],
)
def test_parity(change: dict) -> None:
    check_causal(LlamaConfig(**(SMALL | change)))
