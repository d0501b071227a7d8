import pytest
from transformers import OPTConfig

from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_attention_heads=5,
    num_hidden_layers=2,
    ffn_dim=84,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
POST_NORM = SMALL | {"do_layer_norm_before": False, "word_embed_proj_dim": 36}  # what the 350M model does


@pytest.mark.parity
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        POST_NORM,
        SMALL | {"word_embed_proj_dim": 76, "enable_bias": False, "tie_word_embeddings": False},
        SMALL | {"layer_norm_elementwise_affine": False, "num_attention_heads": 3, "activation_function": "gelu"},
        SMALL | {"_remove_final_layer_norm": True, "num_attention_heads": 1},
    ],
    ids=["pre-norm", "post-norm-projected", "no-bias-untied-projected", "no-affine", "no-final-norm"],
)
def test_parity(config: dict) -> None:
    check_causal(OPTConfig(**config))


def test_published_names() -> None:
    norms = ["model.decoder.final_layer_norm.weight", "model.decoder.layers.1.final_layer_norm.bias"]
    check_names(OPTConfig(**SMALL), ["lm_head.weight", "model.decoder.embed_tokens.weight", *norms])
    check_names(
        OPTConfig(**POST_NORM),
        ["decoder.project_in.weight", "decoder.project_out.weight", "decoder.layers.1.self_attn.q_proj.bias"],
        bare=True,
    )
