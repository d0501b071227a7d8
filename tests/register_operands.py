"""Teaches Pallas' GPU interpreter the one thing it lacks here: a `wgmma` whose left operand is in registers."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state.types import AbstractRef


@contextlib.contextmanager
def register_operands() -> Iterator[None]:
    """Within it the interpreter takes a `wgmma` whose left operand is an array; every other one goes its usual way."""
    owner = next(
        kind
        for kind in vars(jaxpr_interpret).values()
        if isinstance(kind, type) and hasattr(kind, "_interpret_wgmma_ref_p")
    )
    usual = owner._interpret_wgmma_ref_p
    with mock.patch.object(owner, "_interpret_wgmma_ref_p", partial_method(usual)):
        yield


def partial_method(usual: Callable[..., Any]) -> Callable[..., Any]:
    def interpret(self: Any, eqn: Any, token: jax.Array, values: Callable[[], Any]) -> Any:
        if isinstance(eqn.invars[1].aval, AbstractRef):
            return usual(self, eqn, token, values)
        acc, a, b, *leaves = values()
        trees = [eqn.params[name] or jax.tree.structure([]) for name in ("acc_transforms_tree", "b_transforms_tree")]
        acc_transforms, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
        b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
        place = {"mesh_location": self.mesh_location, "thread": self.thread}
        add = partial(_add_product, source_info=eqn.source_info)
        shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
        operands = {"acc": (acc, acc_transforms), "a": a, "b": (b, b_transforms)}
        return callback.io_callback(add, shape, token=token, operands=operands, **place), []

    return interpret


@gpu_callbacks.fail_on_exception
def _add_product(*, token: Any, mesh_location: Any, thread: Any, operands: dict[str, Any], source_info: Any) -> Any:
    memory = gpu_callbacks._get_shared_memory()
    place = {"logging_info": gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)}

    def locate(name: str) -> tuple[Any, Any]:
        key, transforms = operands[name]
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        return key, memory.access(key, transforms)

    b, *_ = memory.get_buffer_content(*locate("b"), thread, **place)
    acc, *_ = memory.get_buffer_content(*locate("acc"), thread, **place)
    total = acc + np.asarray(operands["a"], acc.dtype) @ np.asarray(b, acc.dtype)
    memory.store_buffer_content(*locate("acc"), total, thread, **place)
    return token
