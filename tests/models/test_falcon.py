import pytest
from transformers import FalconConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_attention_heads=5,
    num_hidden_layers=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
GROUPED = {"new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 3}


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
        {"multi_query": False, "ffn_hidden_size": 44, "activation": "relu"},
        {"parallel_attn": False, "num_attention_heads": 3, "rope_theta": 500.0},
        {**GROUPED, "bias": True},
        {**GROUPED, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ],
    ids=["7b", "serial-bias-untied", "multi-head-ffn", "serial-multi-query", "grouped-bias", "grouped-one-norm"],
)
def test_parity(change: dict) -> None:
    check_causal(FalconConfig(**(SMALL | change)))


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {"multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 12, "hidden_size": 48},
        {**GROUPED, "num_attention_heads": 12, "hidden_size": 48},
        {"num_attention_heads": 3, "hidden_size": 12},
    ],
    ids=["1b", "grouped", "multi-query"],
)
def test_alibi(change: dict) -> None:
    # Twelve heads have slopes that bfloat16 does not hold exactly. The eager attention of transformers adds the biases
    # twice; what it runs by default adds them once.
    check_causal(FalconConfig(**(SMALL | change), alibi=True), attention="sdpa", lengths=(3, 40, 21))


def test_published_names() -> None:
    names = ["lm_head.weight", "transformer.h.1.self_attention.rotary_emb.inv_freq"]
    names += ["transformer.h.0.ln_mlp.bias", "transformer.h.1.ln_attn.weight", "transformer.ln_f.bias"]
    check_names(FalconConfig(**(SMALL | GROUPED)), names)


def test_bare_model_has_no_head() -> None:
    config = FalconConfig(**SMALL, architectures=["FalconModel"], tie_word_embeddings=False)
    assert family_for("falcon").spec(config).head is None
    check_names(config, ["word_embeddings.weight", "h.0.input_layernorm.bias"], bare=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({**GROUPED, "num_kv_heads": 4}, "num_kv_heads"),
        ({**GROUPED, "parallel_attn": False}, "parallel_attn"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ({"architectures": ["FalconForTokenClassification"]}, "FalconForTokenClassification"),
    ],
)
def test_what_it_cannot_honour(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        family_for("falcon").spec(FalconConfig(**(SMALL | change)))
