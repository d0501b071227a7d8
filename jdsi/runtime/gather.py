"""Parameters that lie on the devices of several processes, brought to the first of them one share at a time.

Process 0 leads: it runs what wants the parameters, and before it reads a share tells the others which one it is. They
give it, and otherwise wait. So there is one order, whoever reads, and an error in process 0 is known to all.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.converters import ParameterSource
from jdsi.converters.boxes import Piece, whole
from jdsi.converters.buffers import aligned_empty, check_cast, copy_blocks, on_host
from jdsi.converters.shares import pieces_in_shares
from jdsi.converters.sources import ShareReader, Watch
from jdsi.errors import CheckpointError, ConfigError, PeerError
from jdsi.models import TransformerSpec, parameters_of, shapes_of, splits_of
from jdsi.sharding import PIPE, TENSOR

from . import peers

_CALL = {"call": "save"}
_ERRORS = {error.__name__: error for error in (CheckpointError, ConfigError)}


class Gathering:
    """Lets one process use all parameters of a model that a mesh of several processes holds.

    Args:
        spec: the model's.
        mesh: with our axes; of all processes.
        stages: the names of the parameters of each stage.
        parameters: those on this process's devices, divided as `splits_of` says.
        dtype: that the model runs in.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        mesh: Mesh,
        stages: Sequence[Sequence[str]],
        parameters: Mapping[str, Array],
        dtype: np.dtype,
    ) -> None:
        self._spec, self._mesh, self._dtype, self._parameters = spec, mesh, dtype, parameters
        self._infos = parameters_of(spec)
        self._stage = {name: stage for stage, names in reversed(list(enumerate(stages))) for name in names}
        self._led = True

    def run(self, use: Callable[[ParameterSource], object]) -> None:
        """Calls `use` with the parameters in process 0, and helps it in the others; all return when it is done.

        Raises:
            CheckpointError, ConfigError: `use` raised it, or in the others anything else; in every process.
            PeerError: a process died or hangs.
        """
        if jax.process_index() == 0:
            self._lead(use)
        else:
            self._follow()

    def _lead(self, use: Callable[[ParameterSource], object]) -> None:
        try:
            use(_Gathered(self._spec, self._mesh.shape[TENSOR], self._dtype, self._ask))
        except BaseException as error:
            if self._led and not isinstance(error, PeerError):  # else the others have left
                self._tell(error=type(error).__name__, message=str(error))
            raise
        self._tell()

    def _ask(self, name: str, rank: int) -> np.ndarray:
        self._tell(name=name, rank=rank)
        return on_host(self._share(name, rank))

    def _tell(self, **what: Any) -> None:
        self._led = False
        peers.agree(_CALL, offer=json.dumps(what))
        self._led = True

    def _follow(self) -> None:
        while what := json.loads(peers.agree(_CALL)):
            if error := what.get("error"):
                raise _ERRORS.get(error, CheckpointError)(f"in process 0, {error}: {what['message']}")
            self._share(what["name"], what["rank"])

    def _share(self, name: str, rank: int) -> Array:
        """A rank's share, or all of a parameter that is not split, on a device of this process."""
        info, stage = self._infos[name], self._stage[name]
        split, dtype = info.split(self._mesh.shape[TENSOR]), info.dtype_in(self._dtype)
        local = info.shape if split is None else split.local_shape(info.shape)
        sharding = NamedSharding(self._mesh, PartitionSpec((PIPE, TENSOR)))
        have = {}
        if name in self._parameters:
            have = {shard.device: shard.data for shard in self._parameters[name].addressable_shards}
        with peers.turn():
            shards = [
                have[device] if device in have else jnp.zeros(local, dtype, device=device)
                for device in self._mesh.local_devices
            ]
            blocks = self._mesh.shape[PIPE] * self._mesh.shape[TENSOR]
            shape = (blocks * local[0], *local[1:])
            joined = jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)
            found = _everywhere(self._mesh)(joined, np.int32(stage), np.int32(rank)).addressable_data(0)
            return found.block_until_ready()


@functools.cache
def _everywhere(mesh: Mesh) -> Any:
    def body(x: Array, stage: Array, rank: Array) -> Array:
        """A sum of the bits, to which only one stage and rank adds any: a sum of values would lose a zero's sign."""
        wanted = (lax.axis_index(PIPE) == stage) & (lax.axis_index(TENSOR) == rank)
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        # Collectives do not add 16 bits on every backend.
        total = lax.psum(jnp.where(wanted, bits, 0).astype(jnp.uint32), (PIPE, TENSOR))
        return lax.bitcast_convert_type(total.astype(bits.dtype), x.dtype)

    specs = (PartitionSpec((PIPE, TENSOR)), PartitionSpec(), PartitionSpec())
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))


class _Gathered(ShareReader):
    """A `ParameterSource` that fetches the shares which a parameter is made of."""

    def __init__(
        self, spec: TransformerSpec, ranks: int, dtype: np.dtype, fetch: Callable[[str, int], np.ndarray]
    ) -> None:
        self._fetch = fetch
        self.shapes, self._splits = shapes_of(spec), splits_of(spec, ranks)
        self.dtypes = {name: info.dtype_in(dtype) for name, info in parameters_of(spec).items()}

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """See `ParameterSource.read`."""
        out = aligned_empty(self.shapes[name], dtype)
        self.read_boxes(name, [(whole(out.shape), out)], watch)
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """See `ShareReader.read_boxes`."""
        split = self._splits[name]
        found = {0: list(pieces)} if split is None else pieces_in_shares(split, pieces, range(split.ranks))[0]
        for rank, parts in found.items():
            share = self._fetch(name, rank)
            for box, target in parts:
                check_cast(share.dtype, target.dtype, name)
                copy_blocks(target, share[box], functools.partial(watch, name))
