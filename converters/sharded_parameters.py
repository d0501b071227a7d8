"""Parameters spread over a mesh, read back as the plain ones: what saves a model that lives on many devices."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models import TransformerSpec, shapes_of, splits_of
from jdsi.sharding import Split

from .boxes import Piece, whole
from .buffers import aligned_empty, check_cast, copy_blocks, on_host
from .shares import pieces_in_shares
from .sources import MemoryParameters, ShareReader, Watch


class ShardedParameters(ShareReader):
    """Plain parameters out of split arrays, such as `load_sharded` makes; a `ParameterSource` for every writer.

    Only shards on this process's devices are read, one parameter at a time.

    Args:
        parameters: the arrays by dotted path; those of several pipeline stages may lie on meshes of their own.
        spec: of the whole model.
        ranks: of the tensor axis that they are split over.

    Raises:
        ValueError: an array is none of the model's, or is not split like that.
    """

    def __init__(self, parameters: Mapping[str, jax.Array], spec: TransformerSpec, ranks: int) -> None:
        plain, divided = shapes_of(spec), splits_of(spec, ranks)
        if unknown := sorted(parameters.keys() - plain.keys()):
            raise ValueError(f"not parameters of this {spec.family}: {', '.join(unknown[:20])}")
        self._parameters = parameters
        self._whole = MemoryParameters(parameters)
        self._splits = {name: divided[name] for name in parameters}
        self.shapes = {name: plain[name] for name in parameters}
        self.dtypes = self._whole.dtypes
        for name, split in self._splits.items():
            array, shape = parameters[name], plain[name]
            wanted = split.global_shape(shape) if split else shape
            local = split.local_shape(shape) if split else array.sharding.shard_shape(array.shape)
            if (array.shape, array.sharding.shard_shape(array.shape)) != (wanted, local):
                raise ValueError(f"{name} is {array.shape} in {array.sharding}; wanted are shards {local} of {wanted}")

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """See `ParameterSource.read`.

        Raises:
            CheckpointError: a share of it lies on no device of this process, or the cast is refused.
        """
        if self._splits[name] is None:
            self._check_whole(name)
            return self._whole.read(name, dtype, watch)
        out = aligned_empty(self.shapes[name], dtype)
        self.read_boxes(name, [(whole(out.shape), out)], watch)
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """See `ShareReader.read_boxes`; errors as `read`."""
        split = self._splits[name]
        if split is None:
            self._check_whole(name)
            self._whole.read_boxes(name, pieces, watch)
            return
        shares = _addressable_shares(self._parameters[name], split)
        found, missing = pieces_in_shares(split, pieces, shares)
        if missing:
            lacking = [
                rank
                for rank in range(split.ranks)
                if rank not in shares and any(r.start < b and a < r.stop for r in split.runs[rank] for a, b in missing)
            ]
            raise _elsewhere(name, f"the shares of tensor ranks {lacking}")
        for rank, parts in found.items():
            share = on_host(shares[rank])
            for box, target in parts:
                check_cast(share.dtype, target.dtype, name)
                copy_blocks(target, share[box], functools.partial(watch, name))

    def _check_whole(self, name: str) -> None:
        array = self._parameters[name]
        if not (array.is_fully_addressable or (array.is_fully_replicated and array.addressable_shards)):
            raise _elsewhere(name, "parts of it")


def _elsewhere(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what} lie on devices of other processes only; save from a process that reaches all tensor ranks"
    )


def _addressable_shares(array: jax.Array, split: Split) -> dict[int, jax.Array]:
    """The shares on this process's devices, one of each rank."""
    return {(shard.index[split.dim].start or 0) // split.size: shard.data for shard in array.addressable_shards}
