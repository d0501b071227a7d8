import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Gemma2Config, Gemma2ForCausalLM

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from jdsi.models.transformer import InputEmbedding
from parity import check_causal

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=84,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=64,
    query_pre_attn_scalar=22,
    sliding_window=5,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.3},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
        {"attention_bias": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
    ids=["tight-softcaps", "no-softcaps-untied", "biases-other-order"],
)
def test_parity(change: dict) -> None:
    check_causal(Gemma2Config(**(SMALL | change)))


@pytest.mark.parity
def test_embedding_scale_is_rounded_to_the_model_dtype() -> None:
    # sqrt(3072) = 55.4256 becomes 55.5 in bfloat16.
    config = Gemma2Config(**(SMALL | {"hidden_size": 3072, "num_hidden_layers": 1, "intermediate_size": 8}))
    theirs = Gemma2ForCausalLM(config).to(torch.bfloat16).model.embed_tokens
    embedding = InputEmbedding(
        family_for("gemma2").spec(config).embedding, 97, 3072, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    embedding.tokens.weight[...] = jnp.asarray(theirs.weight.detach().float().numpy(), jnp.bfloat16)
    tokens = np.arange(3, 97)
    ours = embedding(jnp.asarray(tokens), jnp.zeros(tokens.size, jnp.int32), None)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).float().numpy()
    np.testing.assert_array_equal(np.asarray(ours, np.float32), expected)


def test_bidirectional_attention_is_an_error() -> None:
    config = Gemma2Config(**SMALL, use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        family_for("gemma2").spec(config)
