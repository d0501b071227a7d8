"""Attention of many queries as an operator."""

from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..operator import Implementation, Operator
from . import reference


def _bucket(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool = False,
) -> str:
    seen = reference.keys_in_sight(q, k, q_start, form)
    queries, keys = (1 << max(n - 1, 0).bit_length() for n in (q.shape[1], seen))
    kind = "causal" if form.causal else "full"
    extras = {
        "window": form.window is not None,
        "softcap": form.softcap is not None,
        "alibi": form.alibi is not None,
        "segments": q_segments is not None,
    }
    kind += "".join(f"+{name}" for name, there in extras.items() if there)
    return f"{kind} H={q.shape[2]}/{k.shape[1]} D={q.shape[3]}/{v.shape[3]} S={queries} L={keys} {q.dtype}"


PREFILL_ATTENTION = Operator(
    "prefill_attention", "jdsi.pallas_kernels.prefill_attention", reference.prefill_attention, _bucket
)


def prefill_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    form: AttentionForm,
    *,
    q_start: Int[Array, " B"] | None = None,
    k_lengths: Int[Array, " B"] | None = None,
    q_segments: Int[Array, "B S"] | None = None,
    k_segments: Int[Array, "B L"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """Attention of prompts, packed batches and continuations, exact and blockwise (FlashAttention, Dao et al. 2022).

    Query i of row b stands at index `q_start[b] + i` of the keys' axis, key j at index j; `form` compares indices.

    Args:
        q, k, v: query head h reads key/value head `h // (H // K)`. q and k are already rotated (`form.rotary` is not
            read). Where keys are hidden there must still be finite numbers in memory.
        form: scale, mask kind, bias.
        q_start: index of each row's first query, not negative; by default 0, and memory with room for more keys than
            queries may be given whole to a causal form: what lies behind the last query is not read.
        k_lengths: keys from this index on are hidden; all are there by default.
        q_segments, k_segments: packed sequences, both or neither: a query sees only keys of its own segment. A segment
            is contiguous, and negative numbers mark padding, which sees nothing and is not seen.
        return_lse: also return the natural logarithm of the sum of exponentials of each query's scores, float32,
            with which `attention.tile.combine` joins attentions to parts of the keys.
        implementation: see `Operator`.

    Returns:
        The weighted values in the dtype of `q`. A query that sees no key gets zeros, and -inf as its logarithm.

    Raises:
        ValueError: shapes that do not fit together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (batch, dim):
        raise ValueError(f"q has {batch} rows and head dim {dim}, k has {k.shape[0]} and {k.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k has rows, heads and keys {k.shape[:3]}, v has {v.shape[:3]}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments and k_segments go together; only one was given")
    expected = {
        "q_start": (q_start, (batch,)),
        "k_lengths": (k_lengths, (batch,)),
        "q_segments": (q_segments, (batch, queries)),
        "k_segments": (k_segments, (batch, keys)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    return PREFILL_ATTENTION(
        q,
        k,
        v,
        q_start,
        k_lengths,
        q_segments,
        k_segments,
        implementation=implementation,
        form=form,
        return_lse=return_lse,
    )
