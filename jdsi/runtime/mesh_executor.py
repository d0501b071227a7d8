"""The executor for models spread over a mesh: tensor, pipeline and data parallelism."""

import contextlib
import functools
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jdsi.converters import ParameterSource, ShardedParameters
from jdsi.errors import ConfigError
from jdsi.kv_cache import Cache, CacheSpec, Contiguous, StagedCache
from jdsi.models import TransformerSpec
from jdsi.pallas_kernels.operator import Implementation
from jdsi.planning.search import Choice
from jdsi.sharding import EXPERT, PIPE, Parallelism, stage_meshes, wavefront

from . import peers
from .epilogue import Epilogue
from .executor import Step
from .gather import Gathering
from .stage_program import StageInput, StageProgram
from .transfer import Link, all_here, is_here, part_on, replicate, spread

_CONTIGUOUS = Contiguous()
Loader = Callable[[Mesh, Sequence[str]], dict[str, Array]]
"""Gives the named parameters on a stage's mesh, divided as `jdsi.models.splits_of` says."""


class MeshExecutor:
    """See `Executor`. Every stage of the pipeline is one program on its part of the mesh.

    The batches given to `steps` are the pipeline's micro-batches: each stage starts on one as soon as the stage before
    is done with it, and a batch's next step as soon as its last one is, for all of that is queued on the devices.

    Where the mesh has devices of several processes, each makes the same calls with the same arguments, and gets the
    same results: the computations are those of all, and each of them has to start its part. What the calls are given is
    compared before a device is used, and a process that gets stuck ends the others, see `peers`.

    Args:
        spec: the model's.
        mesh: with our axes, see `jdsi.sharding.make_mesh`.
        load: gives the parameters.
        dtype: of weights and activations.
        stages: the layers of each stage, one range for each device on the axis "pipe".
        implementation: what operators run, see `default_implementation`.
        sequence_parallel: divide the tokens of the residual stream over "tensor"; by default where they are many.
        micro_batches: how many batches share a pass; by default one for each stage.
        prompt_pieces: into how many a batch is cut while its prompts are read.
        choice: how the mesh's degrees were found, if they were not given.
        cache: the kind of KV memory.

    Raises:
        ConfigError: a process has no device in the mesh, or another process has other arguments.

    Attributes:
        parallelism: degrees.
        programs: one for each stage.
        choice: as given.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        mesh: Mesh,
        load: Loader,
        *,
        dtype: Any,
        stages: Sequence[range],
        implementation: Implementation | None = None,
        sequence_parallel: bool | None = None,
        micro_batches: int | None = None,
        prompt_pieces: int = 1,
        choice: Choice | None = None,
        cache: CacheSpec = _CONTIGUOUS,
    ) -> None:
        _check(spec, mesh, stages)
        self.mesh, self.parallelism, self.choice = mesh, Parallelism.of(mesh), choice
        self._spec, self._dtype = spec, jnp.dtype(dtype)
        self._micro_batches, self._prompt_pieces = micro_batches or len(stages), prompt_pieces
        meshes = stage_meshes(mesh)
        self._one_process = all_here(mesh)
        self._turn = contextlib.nullcontext if self._one_process else peers.turn
        if not self._one_process:
            _check_processes(mesh)
            peers.agree(
                {
                    "call": "MeshExecutor",
                    "model": spec,
                    "tensor_parallel": self.parallelism.tensor,
                    "pipeline_parallel": self.parallelism.pipeline,
                    "data_parallel": self.parallelism.data,
                    "devices": [device.id for device in mesh.devices.flat],
                    "layers of the stages": [(layers.start, layers.stop) for layers in stages],
                    "dtype": self._dtype,
                    "implementation": implementation,
                    "sequence_parallel": sequence_parallel,
                    "micro_batches": self._micro_batches,
                    "prompt_pieces": prompt_pieces,
                    "cache": cache,
                }
            )
        self.programs = [
            StageProgram(
                spec,
                layers,
                part,
                dtype,
                implementation=implementation,
                sequence_parallel=sequence_parallel,
                cache=cache,
            )
            for layers, part in zip(stages, meshes, strict=True)
        ]
        self._here = [is_here(part) for part in meshes]
        self._links = [Link(a, b) for a, b in itertools.pairwise(meshes)]
        self._leaves = [
            program.parameters(load(program.mesh, program.names)) if here else []
            for program, here in zip(self.programs, self._here, strict=True)
        ]

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        return self._spec

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and activations."""
        return self._dtype

    @property
    def runs_ahead(self) -> bool:
        """See `Executor.runs_ahead`."""
        return True

    @property
    def batches_per_pass(self) -> int:
        """See `Executor.batches_per_pass`: the micro-batches of the pipeline."""
        return self._micro_batches

    @property
    def micro_batches(self) -> int:
        """See `Executor.micro_batches`."""
        return self._micro_batches

    @property
    def prompt_pieces(self) -> int:
        """See `Executor.prompt_pieces`."""
        return self._prompt_pieces

    @property
    def row_multiple(self) -> int:
        """See `Executor.row_multiple`: every group of the axis "data" has as many rows."""
        return self.parallelism.data

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """See `Executor.new_cache`."""
        if len(self.programs) == 1:
            return self.programs[0].new_cache(rows, tokens)
        caches = (
            program.new_cache(rows, tokens) if here else None
            for program, here in zip(self.programs, self._here, strict=True)
        )
        return StagedCache(tuple(caches))

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`."""
        with self._turn():
            passes = [_Pass(self, batch) for batch in batches]
            for stage, index in wavefront(len(self.programs), len(batches)):
                passes[index].run(stage)
            return [one.outcome() for one in passes]

    def agree(self, requests: Mapping[str, Any]) -> int | None:
        """See `Executor.agree`."""
        if self._one_process:
            return None
        return int(peers.agree(requests, offer=str(secrets.randbits(64))))

    def on_host(self, carry: Any) -> Any:
        """See `Executor.on_host`."""
        if self._one_process:
            return jax.device_get(carry)
        with self._turn():
            abstract = jax.tree.map(_abstract, carry)
            whole = replicate(self.programs[-1].mesh)(carry) if self._here[-1] else None
            return jax.device_get(self._known_to_all(whole, abstract))

    def parameters(self) -> dict[str, Array]:
        """The parameters on this process's devices, divided as `splits_of` says, each on the mesh of its stage."""
        found: dict[str, Array] = {}
        for program, leaves in zip(self.programs, self._leaves, strict=True):
            for name, leaf in zip(program.names, leaves, strict=False):  # no leaves where the stage is elsewhere
                found.setdefault(name, leaf)
        return found

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`. Where processes share it, every device takes a few times one share."""
        if self._one_process:
            use(ShardedParameters(self.parameters(), self._spec, self.parallelism.tensor))
            return
        names = [program.names for program in self.programs]
        Gathering(self._spec, self.mesh, names, self.parameters(), self._dtype).run(use)

    def stream_report(self) -> None:
        """See `Executor.stream_report`."""
        return None

    def close(self) -> None:
        """See `Executor.close`; there is no background work."""

    def _passed_on(self, stage: int, hidden: Array | None, tokens: int) -> Array | None:
        """Hidden states of a stage on the next one's devices."""
        abstract = jax.ShapeDtypeStruct((tokens, self._spec.width), self._dtype)
        return self._links[stage].send(hidden, self.programs[stage].hidden_spec(tokens), abstract)

    def _known_to_all(self, result: Any, abstract: Any) -> Any:
        """What the last stage found, on its devices, where every process can read it."""
        if self._one_process or len(self.programs) == 1:
            return result
        return spread(result, abstract, len(self.programs) - 1, self.mesh)

    def _on_first(self, x: Any) -> Any:
        """Tokens that the last stage sampled, on the first stage; anything else as it is."""
        first = self.programs[0].mesh
        if len(self.programs) == 1 or not isinstance(x, jax.Array) or not self._here[0]:
            return x
        if self._one_process:
            return jax.device_put(x, self.programs[0].sharding())
        return part_on(x, first)


def _check(spec: TransformerSpec, mesh: Mesh, stages: Sequence[range]) -> None:
    """What can be told wrong before anything is loaded."""
    if mesh.shape.get(EXPERT, 1) > 1:
        raise ConfigError(f"{mesh.shape[EXPERT]} devices on the axis {EXPERT!r}; this model has no experts")
    if len(stages) != mesh.shape.get(PIPE, 1):
        raise ConfigError(f"{len(stages)} stages for the {mesh.shape.get(PIPE, 1)} devices on the axis {PIPE!r}")
    if [layer for stage in stages for layer in stage] != list(range(len(spec.layers))) or not all(map(len, stages)):
        held = ", ".join(f"{stage.start} to {stage.stop - 1}" for stage in stages)
        raise ConfigError(f"stages of layers {held} are not the model's {len(spec.layers)} layers, in order")


class _Pass:
    """One batch on its way through the stages."""

    def __init__(self, executor: MeshExecutor, step: Step) -> None:
        self._executor, self._step = executor, step
        self._contexts = list(step.context.on_stages(len(executor.programs)))
        self._tokens = len(step.tokens)
        self._x: Any = executor._on_first(step.tokens)
        self._carry = step.carry
        self._result: Any = None

    def run(self, stage: int) -> None:
        """Issues one stage, and the transfer to the next."""
        executor, program = self._executor, self._executor.programs[stage]
        out = None
        if executor._here[stage]:
            given = StageInput(
                self._x,
                self._contexts[stage],
                token_types=self._step.token_types if program.first else None,
                wanted=self._step.wanted if program.last else None,
                carry=self._carry if program.last else (),
            )
            out, self._contexts[stage], carry = program.step(
                executor._leaves[stage], given, self._step.epilogue, classify=self._step.classify
            )
            if program.last:
                self._carry = carry
        if not program.last:
            self._x = executor._passed_on(stage, out, self._tokens)
            return
        self._result = executor._known_to_all(out, self._abstract_result())

    def outcome(self) -> tuple[Any, Any, Any]:
        """What `Executor.steps` returns for the batch."""
        return self._result, self._step.context.from_stages(self._contexts), self._carry

    def _abstract_result(self) -> Any:
        if self._executor._one_process:
            return None
        rows = self._tokens if self._step.wanted is None else len(self._step.wanted)
        leaves, structure = jax.tree.flatten(self._carry)
        spec = self._executor.spec
        outputs = jax.ShapeDtypeStruct((rows, spec.vocab_size), jnp.float32)
        if self._step.classify:
            outputs = jax.ShapeDtypeStruct((rows, spec.classifier_outputs), jnp.float32)
        elif spec.head is None:
            outputs = jax.ShapeDtypeStruct((rows, spec.width), self._executor.dtype)
        return _result_shapes(self._step.epilogue, outputs, tuple(map(_abstract, leaves)), structure)


@functools.lru_cache(maxsize=256)
def _result_shapes(epilogue: Epilogue, outputs: Any, leaves: tuple[Any, ...], structure: Any) -> Any:
    """Shapes of an epilogue's result; kept, for finding them takes longer than a step."""
    return jax.eval_shape(epilogue, outputs, jax.tree.unflatten(structure, leaves))[0]


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _check_processes(mesh: Mesh) -> None:
    missing = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if missing:
        raise ConfigError(
            f"the mesh has devices of several processes and none of process {min(missing)}; it must have some of each"
        )
