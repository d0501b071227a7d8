import pytest
from transformers import GPT2Config

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    n_embd=60,
    n_head=5,
    n_layer=2,
    n_positions=64,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False, "n_head": 15, "n_inner": 52, "tie_word_embeddings": False},
        {"n_head": 1, "n_embd": 28, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    ],
    ids=["plain", "inverse-layer-scale", "unscaled-untied", "one-head"],
)
def test_parity(change: dict) -> None:
    check_causal(GPT2Config(**(SMALL | change)))


def test_published_names() -> None:
    names = ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.1.attn.bias", "h.1.attn.masked_bias", "ln_f.bias"]
    names += ["h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias", "h.1.mlp.c_proj.bias"]
    check_names(GPT2Config(**SMALL), names, bare=True)
    check_names(
        GPT2Config(**SMALL), ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"]
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [({"add_cross_attention": True}, "add_cross_attention"), ({"n_head": 7}, "num_attention_heads")],
)
def test_what_it_cannot_honour(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        family_for("gpt2").spec(GPT2Config(**(SMALL | change)))
