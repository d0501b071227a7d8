"""What model a checkpoint's tensors make, where its config leaves that open or says otherwise."""

import dataclasses
import warnings
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from jdsi.errors import JdsiWarning
from jdsi.models import TransformerSpec
from jdsi.models.families import Family
from jdsi.models.families.architecture import with_stored_heads

from .buffers import BLOCK_BYTES
from .matching import by_table_name
from .safetensors_file import TensorInfo
from .sources import TensorStore


def fit(family: Family, spec: TransformerSpec, store: TensorStore) -> tuple[TransformerSpec, dict[str, TensorInfo]]:
    """The spec that a Hugging Face checkpoint has, and its tensors by the names of that spec's table.

    Of two tensors that the config ties, `transformers` takes whichever is stored; where both are, they are one only if
    they are equal. So does this: a projection that differs from the embedding makes the model an untied one.

    Args:
        family, spec: what the config says.
        store: the checkpoint; tied tensors are read and compared if both are stored.

    Warns:
        JdsiWarning: the config says that a projection is tied, and it differs.
    """
    table = family.weight_map(spec)
    stored = by_table_name(store.tensors, table)
    sources = {entry.ours: [source.name for source in entry.sources] for entry in table.entries}
    spec = with_stored_heads(spec, lambda ours: all(name in stored for name in sources[ours]))
    for copy, original in table.tied:
        if copy not in stored:
            continue
        if original not in stored or equal(store, stored[copy], stored[original]):
            stored.setdefault(original, stored[copy])
            del stored[copy]
        else:
            warnings.warn(
                f"{store.label}: the config says tie_word_embeddings, but {stored[copy].name} differs from "
                f"{stored[original].name}: they are not tied, and the former is used",
                JdsiWarning,
                stacklevel=2,
            )
    if spec.head is None or not table.tied:
        return spec, stored
    untied = table.tied[0][0] in stored
    if untied:
        spec = dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=False))
    for copy, original in table.tied[1:]:
        wanted, other = (copy, original) if untied else (original, copy)
        if copy in stored:  # it differs, and is what the module computes with
            stored[wanted] = stored[copy]
            stored.pop(other)
        elif original in stored:
            stored[wanted] = stored.pop(original)
    return spec, stored


def fit_names(spec: TransformerSpec, names: Collection[str]) -> TransformerSpec:
    """The spec of a model that has the parameters `names`, of our layout, and `spec` according to its config."""
    spec = with_stored_heads(spec, names.__contains__)
    if spec.head is not None and spec.head.tied and "head.weight" in names:
        return dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=False))
    return spec


def same_but_for_ties(a: TransformerSpec, b: TransformerSpec) -> bool:
    """Whether two specs differ in no more than whether the head is the embedding, which is up to the weights."""
    untied = [
        spec if spec.head is None else dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=False))
        for spec in (a, b)
    ]
    return untied[0] == untied[1]


def equal(store: TensorStore, a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors have the same shape and values; reads no further than where they differ."""
    if a.shape != b.shape:
        return False
    common = a.dtype if a.dtype == b.dtype else np.dtype(jnp.promote_types(a.dtype, b.dtype))
    if not a.shape:
        a_whole, b_whole = np.empty((), common), np.empty((), common)
        store.read_into(a, a_whole)
        store.read_into(b, b_whole)
        return a_whole.tobytes() == b_whole.tobytes()
    rows = max(1, BLOCK_BYTES * a.shape[0] // max(1, max(a.nbytes, b.nbytes)))
    for start in range(0, a.shape[0], rows):
        span = (start, min(start + rows, a.shape[0]))
        blocks = [np.empty((span[1] - span[0], *a.shape[1:]), common) for _ in range(2)]
        for info, block in zip((a, b), blocks, strict=True):
            store.read_into(info, block, rows=span)
        ours, theirs = (block.reshape(-1).view(np.uint8) for block in blocks)
        if not np.array_equal(ours, theirs):
            return False
    return True
