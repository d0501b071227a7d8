"""Random ragged batches over paged memory, and what attention to them is, in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.pallas_kernels.attention import AttentionForm
from kernels import array


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of one call; `lengths` says for each sequence its new tokens and its keys."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    block_tables: np.ndarray
    q_offsets: np.ndarray
    k_lengths: np.ndarray
    lengths: tuple[tuple[int, int], ...]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """In the operator's order."""
        return self.q, self.k_pages, self.v_pages, self.block_tables, self.q_offsets, self.k_lengths


def make_batch(
    lengths: tuple[tuple[int, int], ...],
    *,
    heads: tuple[int, int] = (4, 1),
    dim: int | tuple[int, int] = 64,
    page: int = 16,
    padding: int = 0,
    holes: float = 0.0,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> Batch:
    """A batch whose `lengths` are (new tokens, keys); memory that nobody may look at is NaN.

    Args:
        heads: query heads, key/value heads.
        padding: tokens behind the last sequence.
        holes: share of the pages that are missing.
    """
    rng = np.random.default_rng(seed)
    dim, v_dim = (dim, dim) if isinstance(dim, int) else dim
    needed = [-(-keys // page) for _, keys in lengths]
    columns = max(1, *needed) + 1
    pages = sum(needed) + 3
    tables = rng.choice([-1, pages, 2**31 - 1], size=(len(lengths), columns)).astype(np.int32)
    free = rng.permutation(pages)
    k = np.full((pages, heads[1], page, dim), np.nan)
    v = np.full((pages, heads[1], page, v_dim), np.nan)
    for b, (_, keys) in enumerate(lengths):
        for n in range(needed[b]):
            if rng.random() < holes:
                continue
            tables[b, n], free = free[0], free[1:]
            there = min(page, keys - n * page)
            k[tables[b, n], :, :there] = rng.standard_normal((heads[1], there, dim))
            v[tables[b, n], :, :there] = rng.standard_normal((heads[1], there, v_dim))
    new = [tokens for tokens, _ in lengths]
    q = rng.standard_normal((sum(new) + padding, heads[0], dim))
    return Batch(
        array(q, dtype),
        array(k, dtype),
        array(v, dtype),
        tables,
        np.cumsum([0, *new]).astype(np.int32),
        np.array([keys for _, keys in lengths], np.int32),
        lengths,
    )


def exact(batch: Batch, form: AttentionForm) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and logarithms of the denominators, token by token, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (batch.q, batch.k_pages, batch.v_pages))
    (tokens, heads, _), (pages, kv_heads, page, _) = q.shape, k.shape
    out, lse = np.zeros((tokens, heads, v.shape[3])), np.full((tokens, heads), -np.inf)
    for b, (new, keys) in enumerate(batch.lengths):
        for t in range(new):
            position = keys - new + t
            index = np.arange(keys)
            seen = np.array([0 <= batch.block_tables[b, j // page] < pages for j in index], bool)
            if form.causal:
                seen &= index <= position
            if form.window is not None:
                seen &= np.abs(index - position) < form.window
            index = index[seen]
            if not len(index):
                continue
            where = batch.block_tables[b, index // page], slice(None), index % page
            for h in range(heads):
                row = batch.q_offsets[b] + t, h
                scores = k[where][:, h // (heads // kv_heads)] @ q[row] * form.scale
                if form.softcap is not None:
                    scores = form.softcap * np.tanh(scores / form.softcap)
                if form.alibi is not None:
                    scores += form.alibi.slopes[h] * (index - position)
                lse[row] = np.logaddexp.reduce(scores)
                out[row] = np.exp(scores - lse[row]) @ v[where][:, h // (heads // kv_heads)]
    return out, lse
