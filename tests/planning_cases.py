"""Models to plan for, and a program with collectives of every kind."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH = {"data": 2, "expert": 1, "tensor": 4}

LARGE = {
    "llama-2-70b": ("llama", (8192, 28672, 64, 8, 32000, 80)),
    "llama-3-70b": ("llama", (8192, 28672, 64, 8, 128256, 80)),
    "llama-3-405b": ("llama", (16384, 53248, 128, 8, 128256, 126)),
    "lm-530b": ("gpt_neox", (20480, 81920, 128, 128, 51200, 105)),  # MT-NLG, arXiv:2201.11990
}
"""Width, feed-forward width, heads, KV heads, vocabulary, layers."""

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "n_embd": 128,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "intermediate_size": 320,
    "max_position_embeddings": 256,
    "n_positions": 256,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "gptj": {"rotary_dim": 16},
    "gpt_neox": {"rotary_pct": 0.25},
    "bloom": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16},
    "opt": {"ffn_dim": 320},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
}


def spec_of(family: str, **settings: Any) -> Any:
    """The spec of a family's config; nothing is downloaded."""
    import transformers  # slow to import, and the program below does without

    from jdsi.models.families import family_for

    return family_for(family).spec(transformers.AutoConfig.for_model(family, **settings))


def small(family: str, **changes: Any) -> Any:
    """A small model of a family."""
    return spec_of(family, **(SMALL | FAMILIES[family] | changes))


def large(name: str) -> Any:
    """A model of `LARGE`."""
    family, (width, hidden, heads, kv_heads, vocabulary, layers) = LARGE[name]
    return spec_of(
        family,
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=2048 if family == "gpt_neox" else 131072,
        use_parallel_residual=False,
    )


def program_text(devices: Sequence[Any]) -> str:
    """The compiled text of a program on 8 devices, with the mesh `MESH`."""
    mesh = Mesh(np.array(devices).reshape(tuple(MESH.values())), tuple(MESH), axis_types=(AxisType.Auto,) * 3)

    def body(x: Any, y: Any) -> Any:
        summed, other = lax.psum((x, y * 2 + 1), "tensor")  # combined into one
        gathered = lax.all_gather(x, "tensor", axis=1, tiled=True)
        scattered = lax.psum_scatter(jnp.sin(gathered), "tensor", scatter_dimension=1, tiled=True)
        passed = lax.ppermute(scattered, "data", [(0, 1)])
        exchanged = lax.all_to_all(x.reshape(4, -1, 128), "tensor", 0, 0).reshape(x.shape)
        everywhere = lax.psum(jnp.sum(x), ("data", "tensor"))
        looped, _ = lax.scan(lambda z, _: (lax.pmax(jnp.sin(z), "data") * 0.1, None), x, None, length=5)
        return summed + passed + looped, exchanged + everywhere, other

    rows = PartitionSpec("data")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(rows, rows), out_specs=(rows,) * 3, check_vma=False)
    argument = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=NamedSharding(mesh, rows))
    text = jax.jit(mapped).lower(argument, argument).compile().as_text()
    assert text is not None
    return text


if __name__ == "__main__":  # in a process of its own, where JAX_NUM_CPU_DEVICES=8 has an effect
    sys.stdout.write(program_text(jax.devices("cpu")))
