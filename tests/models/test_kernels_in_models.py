"""A whole model on the GPU kernels: interpreted on small ones, compiled at real sizes, run where there is a GPU."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jaxtyping import Array

import jdsi
from accumulators import accumulators
from jdsi.kv_cache import ContiguousContext
from jdsi.models import Transformer, TransformerSpec
from jdsi.models.families import family_for
from jdsi.models.spec import AttentionSpec
from jdsi.pallas_kernels import default_implementation
from kernels import compile_for_h200, interpreted, relative_error, with_slow

Step = Callable[[list[Array], Array, ContiguousContext], tuple[Array, ContiguousContext]]

SMALL = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "gptj": {"rotary_dim": 16, "n_inner": 256},
    "gpt_neox": {"rotary_pct": 0.25},
    "bloom": {"n_head": 2, "n_layer": 1},
    "gemma2": {"num_key_value_heads": 1, "sliding_window": 6, "query_pre_attn_scalar": 64},
}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 128,
    "n_embd": 128,
    "num_attention_heads": 2,
    "n_head": 2,
    "head_dim": 64,
    "num_hidden_layers": 1,
    "n_layer": 1,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "n_positions": 64,
}


def spec_of(family: str, **settings: object) -> TransformerSpec:
    config = transformers.AutoConfig.for_model(family, **settings)
    return family_for(family).spec(config)


def step_of(spec: TransformerSpec) -> tuple[Step, list[jax.ShapeDtypeStruct]]:
    """A forward pass with a KV cache down to logits, over flat leaves, and what those are in bfloat16."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(spec, dtype=jnp.bfloat16)))
    leaves, structure = jax.tree.flatten(state)

    def step(leaves: list[Array], tokens: Array, context: ContiguousContext) -> tuple[Array, ContiguousContext]:
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        hidden, context = model.forward(tokens, context)
        return model.logits(hidden), context

    return step, leaves


# Gemma 2 has all of Llama's kernels and masks beside; BLOOM all of GPT-2's; GPT-J turns pairs and adds both halves.
@pytest.mark.parametrize("family", with_slow(SMALL, ["llama", "gpt2", "gpt_neox"]))
def test_a_small_model_interpreted_equals_xla(family: str) -> None:
    spec = spec_of(family, **(COMMON | SMALL[family]))
    step, abstract = step_of(spec)
    keys = jax.random.split(jax.random.key(0), len(abstract))
    scale = [1.0 if leaf.ndim == 1 else 0.15 for leaf in abstract]
    leaves = [
        (jax.random.normal(key, leaf.shape) * s).astype(leaf.dtype)
        for key, leaf, s in zip(keys, abstract, scale, strict=True)
    ]
    lengths = jnp.array([5, 3], jnp.int32)
    # 2 * 8 tokens: a prompt that tiles of 8 do not divide has two views of one memory, which the interpreter lacks.
    prompt = jnp.arange(16, dtype=jnp.int32) * 7 % 96

    def run() -> list[np.ndarray]:
        context = ContiguousContext.create(spec.kv_shapes, 2, 16, jnp.bfloat16).begin(lengths, 8)
        first, context = jax.jit(step)(leaves, prompt, context)
        context = context.begin(jnp.ones(2, jnp.int32), 1)
        second, _ = jax.jit(step)(leaves, jnp.array([3, 90], jnp.int32), context)
        real = np.arange(8) < np.asarray(lengths)[:, None]
        return [np.asarray(first).reshape(2, 8, -1)[real], np.asarray(second)]

    expected = run()
    with interpreted(), accumulators():
        for ours, theirs in zip(run(), expected, strict=True):
            assert relative_error(ours, theirs) < 2e-2


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8192,
}
GPT_J = {"n_embd": 4096, "n_head": 16, "n_layer": 2, "rotary_dim": 64, "vocab_size": 50400, "n_positions": 2048}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("family", "settings", "batch", "tokens"),
    [("llama", LLAMA_8B, 1, 1), ("llama", LLAMA_8B, 8, 1), ("llama", LLAMA_8B, 2, 512), ("gptj", GPT_J, 1, 1)],
)
def test_a_step_compiles_for_the_h200(family: str, settings: dict, batch: int, tokens: int) -> None:
    spec = spec_of(family, **settings)
    step, leaves = step_of(spec)
    context = jax.eval_shape(
        lambda: ContiguousContext.create(spec.kv_shapes, batch, 2048, jnp.bfloat16).begin(
            jnp.ones(batch, jnp.int32), tokens
        )
    )
    context = dataclasses.replace(context, empty=tokens > 1)
    compiled = compile_for_h200(step, leaves, jax.ShapeDtypeStruct((batch * tokens,), jnp.int32), context, donate=(2,))
    assert compiled.spills == 0
    kernels = compiled.text.count('custom_call_target="mosaic_gpu')
    # Per layer: four products, the write into the cache, attention; a gated product counts once.
    assert kernels >= (6 if tokens == 1 else 2) * len(spec.layers)
    # The cache is updated in place: nothing of its shape is copied.
    cache = f"{batch},{spec.kv_shapes[0][0]},2048,{spec.kv_shapes[0][1]}"
    assert not re.findall(rf"= bf16\[{cache}\]\S* (?:copy|fusion)\(", compiled.text)
    # The write reads q, k and v from the fused projection: no fusion takes that to cut it, and nothing copies it.
    attention = spec.layers[0].of(AttentionSpec)
    heads, dim = attention.num_heads + 2 * attention.num_kv_heads, attention.head_dim
    projection = rf"bf16\[{batch * tokens},(?:{heads * dim}|{heads},{dim}|{heads},{dim // 2},2)\]"
    writes = re.findall(rf"operand_layout_constraints={{(?:{projection}\S* ){{3}}s32", compiled.text)
    assert len(writes) == len(spec.layers)
    assert not re.findall(rf"= {projection}\S* (?:parameter|copy)\(", compiled.text)


@pytest.mark.gpu
@pytest.mark.parametrize("family", SMALL)
def test_engine_gives_the_same_tokens_with_and_without_kernels(family: str) -> None:
    spec = spec_of(family, **(COMMON | SMALL[family] | {"num_hidden_layers": 4, "n_layer": 4}))
    model = Transformer(spec, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    prompts = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10], [3]]
    with_kernels, without = (jdsi.init_inference(model, kernels=kernels) for kernels in (True, False))
    assert relative_error(with_kernels.forward(prompts), without.forward(prompts)) < 2e-2
    params = jdsi.SamplingParams(max_new_tokens=16, ignore_eos=True)
    tokens = [[c.token_ids for c in engine.generate(prompts, params)] for engine in (with_kernels, without)]
    agree = sum(a == b for x, y in zip(*tokens, strict=True) for a, b in zip(x, y, strict=True))
    assert agree >= 0.9 * 16 * len(prompts)  # a tie within rounding may turn a greedy path


@pytest.mark.gpu
def test_gradients_run_where_kernels_do() -> None:
    spec = spec_of("llama", **(COMMON | SMALL["llama"]))
    model = Transformer(spec, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    tokens = jnp.arange(12).reshape(2, 6)

    def loss(model: Transformer) -> Array:
        return model(tokens).astype(jnp.float32).var()

    def gradients() -> list[np.ndarray]:
        return [np.asarray(g, np.float32) for g in jax.tree.leaves(nnx.grad(loss)(model))]

    ours = gradients()
    with default_implementation("xla"):
        theirs = gradients()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
