"""What a streamed layer compiles to: one gathering of its bytes, the collectives of its layers, the kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from jdsi.converters.block_form import BlockForm, Dequantized, Field, Joined, Parameter
from jdsi.converters.block_store import Block
from jdsi.converters.quantization import Quantization, stored_arrays
from jdsi.kv_cache import ContiguousContext
from jdsi.models import TransformerSpec, groups_of
from jdsi.models.families import family_for
from jdsi.models.tensor_parallel import local_spec
from jdsi.models.weight_map import Identity
from jdsi.pallas_kernels.device import H200, target
from jdsi.planning import Collective, collectives_of
from jdsi.runtime.layer_programs import LayerPrograms
from jdsi.runtime.placement import streamed_weights
from jdsi.sharding import DATA, TENSOR, make_mesh
from jdsi.sharding.topology import topology_devices

ROWS, CAPACITY = 8, 256


def spec_of(family: str) -> TransformerSpec:
    """Of a single layer, whose sizes divide by the degrees below."""
    if family == "gptj":
        sizes = {"n_embd": 256, "n_head": 8, "n_inner": 512, "rotary_dim": 16, "n_layer": 1}
    else:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        sizes |= {"num_hidden_layers": 1}
    return family_for(family).spec(transformers.AutoConfig.for_model(family, vocab_size=1000, **sizes))


def first_layer(spec: TransformerSpec, dtype: Any, quantization: Quantization | None = None) -> Block:
    """Layer 0 as a streaming folder would have it, with the arrays of each type side by side."""
    arrays, parameters = [], []
    for leaf in groups_of(spec)["layers.0"].values():
        name, form = leaf.inner, quantization and quantization.format_of(leaf)
        recipe: Any = Joined(((name, Identity()),))
        if form is None:
            arrays.append((name, np.dtype(dtype), leaf.shape))
        else:
            stored = stored_arrays(form, leaf.shape)
            arrays += [(f"{name}:{part}", *what) for part, what in stored.items()]
            recipe = Dequantized(form, tuple((part, f"{name}:{part}") for part in stored))
        parameters.append((name, Parameter(leaf.shape, np.dtype(dtype), recipe)))
    fields, end = [], 0
    for name, kind, shape in sorted(arrays, key=lambda array: array[1].name):
        field = Field(kind, shape, -(-end // 128) * 128)
        fields.append((name, field))
        end = field.offset + field.nbytes
    return Block("layers.0", BlockForm(tuple(fields), tuple(parameters)), (), -(-end // 4096) * 4096)


def compiled(spec: TransformerSpec, block: Block, mesh: Any, dtype: Any) -> tuple[list[Collective], str]:
    """A decoding step's program of the layer: its collectives, and its text."""
    weights = streamed_weights(spec, block, mesh)
    rows = NamedSharding(mesh, PartitionSpec(DATA))

    def there(shape: tuple[int, ...], kind: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    devices = mesh.size
    stretches = [(devices * section.stretch(devices), section.dtype) for section in weights.sections]
    arrays = [there((n,), kind, place) for (n, kind), place in zip(stretches, weights.shardings("device"), strict=True)]
    ranks = mesh.shape[TENSOR]
    heads, key, value = local_spec(spec, ranks).kv_shapes[0]
    split = NamedSharding(mesh, PartitionSpec(DATA, TENSOR))
    memory = tuple(there((ROWS, heads * ranks, CAPACITY, dim), dtype, split) for dim in (key, value))
    numbers = there((ROWS,), jnp.int32, rows)
    run = LayerPrograms(spec, mesh, dtype, None).layer(weights, spec.layers[0])
    hidden = there((ROWS, spec.width), dtype, rows)
    text = run.lower(arrays, hidden, memory, ContiguousContext((), (), numbers, numbers)).compile().as_text()
    return collectives_of(text, dict(mesh.shape)), text


@pytest.mark.parametrize(("family", "sums"), [("llama", 2), ("gptj", 1)])
def test_a_layer_is_gathered_once(family: str, sums: int) -> None:
    spec = spec_of(family)
    block = first_layer(spec, jnp.float32)
    found, _ = compiled(spec, block, make_mesh(tensor=4), jnp.float32)
    gathered = [c for c in found if c.kind == "all-gather"]
    assert sum(c.count for c in gathered) == 1
    assert block.nbytes <= sum(c.bytes for c in gathered) + 4096 <= block.nbytes + 4096 + 4 * 128
    assert sum(c.count for c in found if c.kind == "all-reduce") == sums
    assert {c.bytes for c in found if c.kind == "all-reduce"} == {ROWS * spec.width * 4}


@pytest.mark.aot
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_layer_for_h200s_runs_on_kernels(quantize: str | None) -> None:
    spec = spec_of("llama")
    block = first_layer(spec, jnp.bfloat16, Quantization(quantize) if quantize else None)
    mesh = make_mesh(tensor=2, devices=topology_devices("h200", 1, 8))
    with target(H200):
        found, text = compiled(spec, block, mesh, jnp.bfloat16)
    gathered = sum(c.bytes * c.count for c in found if c.kind == "all-gather")
    whole = first_layer(spec, jnp.bfloat16).nbytes
    assert gathered <= {None: 1.01, "int8": 0.55, "int4": 0.3}[quantize] * whole
    # Four products, the write into the cache, attention.
    assert text.count('custom_call_target="mosaic_gpu') >= 6
