import pytest
from transformers import GPTJConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    n_embd=60,
    n_head=5,
    n_layer=2,
    n_positions=64,
    rotary_dim=6,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rotary_dim": 12, "tie_word_embeddings": True},
        {"n_head": 3, "rotary_dim": 2, "n_inner": 44, "activation_function": "silu"},
    ],
    ids=["half-rotary", "full-rotary-tied", "two-dims"],
)
def test_parity(change: dict) -> None:
    check_causal(GPTJConfig(**(SMALL | change)))


def test_published_names() -> None:
    buffers = ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    check_names(GPTJConfig(**SMALL), ["lm_head.weight", "lm_head.bias", "transformer.h.1.mlp.fc_in.bias", *buffers])


@pytest.mark.parametrize("rotary_dim", [0, 5, 14])
def test_rotary_dim_that_fits_no_head_is_an_error(rotary_dim: int) -> None:
    with pytest.raises(ConfigError, match="rotary_dim"):
        family_for("gptj").spec(GPTJConfig(**(SMALL | {"rotary_dim": rotary_dim})))
