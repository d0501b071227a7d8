import pytest
from transformers import GPTNeoXConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_attention_heads=5,
    num_hidden_layers=2,
    intermediate_size=84,
    max_position_embeddings=64,
    rotary_pct=0.5,
    eos_token_id=None,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "rotary_emb_base": 500},
        {"num_attention_heads": 3, "rotary_pct": 0.2, "hidden_act": "gelu_new", "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rotary_pct": 0.5},
    ],
    ids=["parallel", "serial-full-rotary-no-bias", "three-heads-tied", "scaled-rotary"],
)
def test_parity(change: dict) -> None:
    check_causal(GPTNeoXConfig(**(SMALL | change)))


def test_published_names() -> None:
    layer = "gpt_neox.layers.1.attention"
    buffers = [f"{layer}.bias", f"{layer}.masked_bias", f"{layer}.rotary_emb.inv_freq"]
    weights = [f"{layer}.query_key_value.bias", f"{layer}.dense.bias", "embed_out.weight"]
    check_names(GPTNeoXConfig(**SMALL), buffers + weights)


def test_odd_rotary_width_is_an_error() -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        family_for("gpt_neox").spec(GPTNeoXConfig(**(SMALL | {"rotary_pct": 0.25})))
