import pytest
from transformers import BloomConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from jdsi.models.families.alibi import alibi_slopes
from parity import check_causal, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    n_head=5,
    n_layer=2,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"apply_residual_connection_post_layernorm": True, "n_head": 3, "tie_word_embeddings": False},
        {"n_head": 12, "slow_but_exact": True, "layer_norm_epsilon": 0.1},
        {"n_head": 1, "hidden_size": 28, "n_layer": 3},
    ],
    ids=["five-heads", "residual-from-norm-untied", "twelve-heads-slow-but-exact", "one-head"],
)
def test_parity(change: dict) -> None:
    check_causal(BloomConfig(**(SMALL | change)))


@pytest.mark.parametrize("heads", [1, 2, 5, 6, 7, 16, 71, 112])
def test_slopes(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    assert alibi_slopes(heads) == pytest.approx(_get_alibi_slopes(heads, "cpu").tolist(), rel=1e-5)


def test_bare_model_has_no_head() -> None:
    config = BloomConfig(**SMALL, architectures=["BloomModel"])
    assert family_for("bloom").spec(config).head is None
    check_names(config, ["word_embeddings.weight", "h.1.mlp.dense_4h_to_h.bias", "ln_f.bias"], bare=True)


def test_unknown_architecture_is_an_error() -> None:
    config = BloomConfig(**SMALL, architectures=["BloomForQuestionAnswering"])
    with pytest.raises(ConfigError, match=r"BloomForQuestionAnswering.*BloomForCausalLM, .*BloomModel"):
        family_for("bloom").spec(config)
