"""Our own checkpoint folder, stored with Orbax.

    DST/jdsi.json           manifest: format and version, and type and shape of every parameter, by group; written
                            last, so a folder without it is not a checkpoint
    DST/config.json         the Hugging Face config, as it was
    DST/tokenizer.json ...  tokenizer and generation files, as they were
    DST/orbax/GROUP/        one plain Orbax checkpoint per group: embedding, layers.0, layers.1, ..., norm, head

One Orbax save would need the whole model in memory; one per group needs the largest group. Each group restores with
plain Orbax, `orbax.checkpoint.experimental.v1.load("DST/orbax/layers.0")`, to a dict from our full parameter names to
arrays; give it a dict of `jax.ShapeDtypeStruct`s with shardings to place them. Chunks are uncompressed (weights do not
compress) and of at most 32 MiB, so that a sharded restore reads little more than its shards.

We read the same files through tensorstore, chunk by chunk into the final buffer: Orbax's own restore assembles a group
beside its chunks and hands JAX unaligned memory, which is copied again (measured: 1.2 to 1.5 times the weights).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models import TransformerSpec, groups_of
from jdsi.models.weight_map import Box, Shape

from .boxes import Piece, whole
from .buffers import aligned_empty, cast, check_cast
from .config import read_config
from .manifest import MANIFEST, read_manifest, write_manifest
from .sources import ParameterSource, ShareReader, Watch, check_shapes

FORMAT = "jdsi-orbax"
VERSION = 1

_CHUNK = 32 << 20


def _context() -> Any:
    import orbax.checkpoint.experimental.v1 as ocp  # slow to import

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    # Nothing writes to the arrays while they are being saved, so the copy that guards against it is not needed.
    context.memory.deepcopy_host_arrays = False
    return context


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    if jax.process_count() == 1:
        with _context():
            ocp.save(str(path.absolute()), arrays)
    else:
        _save_alone(path, arrays)


def _save_alone(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """What `_save` does, in one process of several: the newer interface insists that all of them save (0.12.8)."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"jdsi-{own}"
    )
    uncopied = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    state = ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        multiprocessing_options=alone,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, uncopied)),
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone), state=state
    )
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK) for name in arrays}
    content = ocp.args.Composite(state=ocp.args.PyTreeSave(dict(arrays), save_args=chunks))
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), content)


def write_orbax(
    source: ParameterSource, spec: TransformerSpec, folder: Path, *, dtype: np.dtype | None, watch: Watch
) -> None:
    """Write every parameter below an existing `folder`, then the manifest. Memory: the largest group.

    Args:
        spec: says what is stored together.
        dtype: cast every parameter; `None` keeps each as stored.
        watch: sees every block read.
    """
    table: dict[str, dict[str, Any]] = {}
    for group, names in groups_of(spec, tuple(source.shapes)).items():
        arrays = {name: source.read(name, dtype or source.dtypes[name], watch) for name in names}
        table[group] = {name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in arrays.items()}
        _save(folder / "orbax" / group, arrays)
        del arrays
    write_manifest(folder, FORMAT, VERSION, groups=table)


class OrbaxCheckpoint(ShareReader):
    """A folder that `write_orbax` made.

    Attributes:
        path: the folder.
        shapes, dtypes: of every parameter, by dotted path.

    Raises:
        CheckpointError: the manifest or a group is absent, or the former damaged, unfinished or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._groups: dict[str, str] = {}
        manifest = read_manifest(path, FORMAT, VERSION)
        try:
            for group, parameters in manifest["groups"].items():
                for name, entry in parameters.items():
                    self._groups[name] = group
                    self.shapes[name] = tuple(int(n) for n in entry["shape"])
                    self.dtypes[name] = jnp.dtype(entry["dtype"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: damaged: {error!r}") from error
        if absent := [group for group in dict.fromkeys(self._groups.values()) if not (path / "orbax" / group).is_dir()]:
            raise CheckpointError(f"{path}: groups are missing below orbax/: {', '.join(absent[:20])}")
        read_config(path)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise `CheckpointError` unless the parameters have exactly the names and shapes given."""
        check_shapes(self.path, self.shapes, shapes)

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """A parameter on the host, read and cast chunk by chunk into its final buffer."""
        out = aligned_empty(self.shapes[name], dtype)
        self.read_boxes(name, [(whole(out.shape), out)], watch)
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """See `ShareReader.read_boxes`; tensorstore reads whole chunks, of at most 32 MiB, and keeps one at a time."""
        where = f"{self.path}: parameter {name!r}"
        try:
            stored = self._open(name)
            if (tuple(stored.shape), stored.dtype.numpy_dtype) != (self.shapes[name], self.dtypes[name]):
                raise CheckpointError(f"{where} is {stored.dtype.name}{stored.shape}, {MANIFEST} says otherwise")
            for box, target in pieces:
                check_cast(self.dtypes[name], target.dtype, where)
                for cell, inside in _cells(box, stored.chunk_layout.read_chunk.shape or self.shapes[name]):
                    values = np.ascontiguousarray(stored[cell].read().result())
                    cast(target[inside], values)
                    watch(name, values if values.dtype == target.dtype else np.ascontiguousarray(target[inside]))
        except ValueError as error:  # tensorstore's report of a damaged or absent file
            raise CheckpointError(f"{where} cannot be read from orbax/{self._groups[name]}: {error}") from error

    def _open(self, name: str) -> Any:
        import tensorstore

        base = (self.path / "orbax" / self._groups[name] / "state").absolute().as_uri() + "/"
        return tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        ).result()


def _cells(box: Box, chunk: Shape) -> Iterator[tuple[Box, Box]]:
    """Parts of a box, each inside one stored chunk, in the stored array and counted from the box's start."""
    axes = []
    for part, step in zip(box, chunk, strict=True):
        starts = range(part.start // step * step, part.stop, step)
        axes.append([(max(start, part.start), min(start + step, part.stop)) for start in starts])
    origin = [part.start for part in box]
    for bounds in itertools.product(*axes):
        inside = tuple(slice(first - at, last - at) for (first, last), at in zip(bounds, origin, strict=True))
        yield tuple(slice(first, last) for first, last in bounds), inside
