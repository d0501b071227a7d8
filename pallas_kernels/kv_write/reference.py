"""Rotary embedding and the write into the KV memory, reference form."""

from jaxtyping import Array, Float, Int

from ..rotary import Rotary, apply_rotary


def rotary_kv_write_reference(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"],
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L Dv"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    lengths: Int[Array, " T"],
    *,
    rotary: Rotary | None,
    ascending: bool,
) -> tuple[Float[Array, "T H D"], Float[Array, "R K L D"], Float[Array, "R K L Dv"]]:
    """See `rotary_kv_write`."""
    if rotary is not None:
        q, k = (apply_rotary(x, positions, lengths, rotary) for x in (q, k))
    keys, values = (_write(memory, new, rows, slots, ascending) for memory, new in ((keys, k), (values, v)))
    return q, keys, values


def _write(memory: Array, new: Array, rows: Array, slots: Array, ascending: bool) -> Array:
    return memory.at[rows, :, slots].set(
        new.astype(memory.dtype),
        mode="drop",
        unique_indices=ascending,
        indices_are_sorted=ascending,
        wrap_negative_indices=False,
    )
