"""Random arguments of prefill attention, and what it is, in float64, one head at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.pallas_kernels.attention import AttentionForm
from jdsi.pallas_kernels.prefill_attention import PREFILL_ATTENTION
from kernels import array, relative_error

_CAUSAL = AttentionForm(0.125)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and masks of one call; `segments` are the lengths of the sequences packed in every row."""

    queries: int
    keys: int
    heads: tuple[int, int] = (1, 1)
    dim: tuple[int, int] = (64, 64)
    form: AttentionForm = _CAUSAL
    batch: int = 1
    q_start: tuple[int, ...] | None = None
    k_lengths: tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None

    def arrays(self, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
        """In the order of the operator. Segments count down, so that none depends on being in order."""
        rng = np.random.default_rng(seed)
        heads, kv_heads = self.heads
        shapes = (
            (self.batch, self.queries, heads, self.dim[0]),
            (self.batch, kv_heads, self.keys, self.dim[0]),
            (self.batch, kv_heads, self.keys, self.dim[1]),
        )
        q, k, v = (array(rng.standard_normal(shape), dtype) for shape in shapes)
        q_segments = k_segments = None
        if self.segments is not None:
            numbers = np.arange(len(self.segments))[::-1]
            row = np.full(max(self.queries, self.keys), -1, np.int32)
            row[: sum(self.segments)] = np.repeat(numbers, self.segments)
            q_segments, k_segments = (jnp.asarray(np.tile(row[:n], (self.batch, 1))) for n in (self.queries, self.keys))
        start, lengths = (None if x is None else array(x, jnp.int32) for x in (self.q_start, self.k_lengths))
        return q, k, v, start, lengths, q_segments, k_segments

    def visible(self, arrays: tuple[Any, ...]) -> np.ndarray:
        """Which keys each query sees."""
        _, _, _, start, lengths, q_segments, k_segments = (None if x is None else np.asarray(x) for x in arrays)
        mask = np.ones((self.batch, self.queries, self.keys), bool)
        distance = self.distance(start)
        if self.form.causal:
            mask &= distance <= 0
        if self.form.window is not None:
            mask &= np.abs(distance) < self.form.window
        if lengths is not None:
            mask &= np.arange(self.keys) < lengths[:, None, None]
        if q_segments is not None and k_segments is not None:
            mask &= (q_segments[:, :, None] == k_segments[:, None]) & (q_segments[:, :, None] >= 0)
        return mask

    def distance(self, start: np.ndarray | None) -> np.ndarray:
        """Index of each key minus index of each query."""
        first = np.zeros(self.batch, int) if start is None else start
        return np.arange(self.keys) - first[:, None, None] - np.arange(self.queries)[:, None]

    def oracle(self, arrays: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Result and logarithms, in float64."""
        q, k, v = (np.asarray(x, np.float64) for x in arrays[:3])
        mask = self.visible(arrays)
        distance = self.distance(None if arrays[3] is None else np.asarray(arrays[3]))
        heads, kv_heads = self.heads
        out = np.zeros((self.batch, self.queries, heads, self.dim[1]))
        lse = np.full((self.batch, self.queries, heads), -np.inf)
        for b, h in np.ndindex(self.batch, heads):
            g = h // (heads // kv_heads)
            scores = q[b, :, h] @ k[b, g].T * self.form.scale
            if self.form.softcap is not None:
                scores = self.form.softcap * np.tanh(scores / self.form.softcap)
            if self.form.alibi is not None:
                scores = scores + self.form.alibi.slopes[h] * distance[b]
            seen = mask[b].any(-1)
            scores = np.where(mask[b], scores, -np.inf)[seen]
            top = scores.max(-1, keepdims=True, initial=-1e300)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out[b, seen, h] = weights @ v[b, g] / total
            lse[b, seen, h] = (top + np.log(total))[:, 0]
        return out, lse


def check(case: Case, dtype: str, tolerance: float, seed: int = 0, **how: Any) -> None:
    """Compares the operator with the oracle: relative norm of the result, absolute error of the logarithms."""
    arrays = case.arrays(dtype, seed)
    out, lse = jax.jit(lambda *arrays: PREFILL_ATTENTION(*arrays, form=case.form, return_lse=True, **how))(*arrays)
    expected, logarithms = case.oracle(arrays)
    assert out.dtype == jnp.dtype(dtype)
    assert lse.dtype == jnp.float32
    assert relative_error(out, expected) <= tolerance
    unseen = np.isneginf(logarithms)
    np.testing.assert_array_equal(np.isneginf(lse), unseen)
    assert not np.asarray(out)[unseen].any()
    np.testing.assert_allclose(np.asarray(lse)[~unseen], logarithms[~unseen], rtol=0, atol=1e-4)
