"""Turns, ratios and limits, without looking at any clock."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.bench.limits import Chain, LargeMatmul, chain_products, product_weights, weight_bytes
from jdsi.bench.rounds import Ratio, interleave
from jdsi.bench.shapes import shape_config, sized_config
from jdsi.errors import ConfigError
from jdsi.models import Transformer, abstract_parameters
from jdsi.models.families import family_for


def test_every_contender_runs_once_per_round_and_the_first_one_changes() -> None:
    order: list[str] = []

    def contender(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = interleave({name: (lambda n=name: contender(n)) for name in "abc"}, rounds=4, warmups=2)
    assert "".join(order) == "abc" * 2 + "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in figures.items()} == {"a": 4, "b": 4, "c": 4}
    assert figures["a"][0] == 7  # nothing of the warm-up is kept


def test_a_round_is_needed() -> None:
    with pytest.raises(ConfigError, match="rounds=0"):
        interleave({}, rounds=0)


def test_ratios_are_taken_within_rounds() -> None:
    """The machine slows down tenfold in the second round; who is twice as fast stays twice as fast."""
    assert Ratio.of([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, 2.2, (2.0, 2.0, 2.2))


@pytest.mark.parametrize("tied", [False, True])
def test_the_limit_reads_what_a_step_reads(tied: bool) -> None:
    config = shape_config("llama-tiny")
    config.tie_word_embeddings = tied
    spec = family_for("llama").spec(config)
    weights = product_weights(Transformer(spec))
    layers = 2 * (48 * 48 * 2 + 2 * 16 * 48 + 3 * 48 * 80)
    assert weight_bytes(weights) == 4 * (layers + 300 * 48)
    assert weights[-1].shape == (300, 48)


@pytest.mark.parametrize("rows", [1, 2])
def test_no_product_of_the_chain_can_be_left_out(rows: int) -> None:
    """Every matrix has an influence on the result, which stays finite over many of them."""
    rng = np.random.default_rng(0)
    shapes = [(6, 4), (3, 6), (8, 3)]
    matrices = [jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for shape in shapes]
    x = jnp.asarray(rng.standard_normal((rows, 6)), jnp.float32)
    for gradient in jax.grad(chain_products, argnums=1)(x, matrices):
        assert jnp.abs(gradient).max() > 0
    assert jnp.isfinite(chain_products(x, [1e3 * m for m in matrices] * 30))
    Chain(matrices, rows).compiled()()


def test_a_large_product_runs() -> None:
    large = LargeMatmul(16)
    assert large.flops == 2 * 16**3
    large.compiled()()


@pytest.mark.parametrize(("gigabytes", "itemsize"), [(0.01, 2), (0.05, 4), (3, 2), (10, 4)])
def test_a_wanted_size_is_reached_and_not_by_much(gigabytes: float, itemsize: int) -> None:
    spec = family_for("llama").spec(sized_config(gigabytes, itemsize))
    values = sum(leaf.size for leaf in abstract_parameters(spec).values())
    assert gigabytes * 1e9 <= values * itemsize < gigabytes * 1.2e9


def test_an_unknown_shape_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="llama-125m"):
        shape_config("llama-125M")
