import pytest
from transformers import GPTNeoConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_heads=5,
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_types": [[["local"], 1], [["global"], 1]], "window_size": 1, "tie_word_embeddings": False},
        {"num_heads": 3, "intermediate_size": 44, "activation_function": "gelu", "window_size": 256},
    ],
    ids=["window-4", "window-1-untied", "window-past-the-end"],
)
def test_parity(change: dict) -> None:
    check_causal(GPTNeoConfig(**(SMALL | change)))


def test_published_names() -> None:
    buffers = ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"]
    weights = ["transformer.h.1.attn.attention.out_proj.bias", "transformer.h.1.attn.attention.k_proj.weight"]
    check_names(GPTNeoConfig(**SMALL), ["lm_head.weight", *buffers, *weights])


def test_unknown_attention_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match="attention_types"):
        family_for("gpt_neo").spec(GPTNeoConfig(**(SMALL | {"attention_types": [[["global", "sparse"], 1]]})))
