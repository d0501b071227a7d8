"""Partition rules, and a model spread over a mesh under plain `jax.jit`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from checkpoints import save_llama
from jdsi import ConfigError
from jdsi.sharding import AxisRules

ON_FOUR_DEVICES = """
import json, sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from flax import nnx
import jdsi
from jdsi.models import parameters
from jdsi.sharding import AxisRules
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tokens = np.array([[5, 9, 2, 7], [3, 3, 8, 1]], np.int32)
run = jax.jit(lambda model, tokens: model(tokens))
whole = jdsi.load_model(sys.argv[1])
spread = jdsi.load_model(sys.argv[1], sharding=AxisRules(mesh))
error = float(abs(run(whole, tokens) - run(spread, tokens)).max())
specs = {name: [str(axis) for axis in p.sharding.spec] for name, p in parameters(spread).items()}
local = parameters(spread)["layers.0.feed_forward.up.weight"].addressable_shards[0].data.shape
print(json.dumps({"error": error, "specs": specs, "local": local}))
"""


def one_device_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))


def test_rules_name_axes_and_reject_collisions() -> None:
    mesh = one_device_mesh()
    rules = AxisRules(mesh)
    assert rules.sharding(("heads", "width"), (6, 4)).spec == PartitionSpec("tensor", None)
    assert rules.sharding((None,), (6,)).spec == PartitionSpec(None)
    with pytest.raises(ConfigError, match="same mesh axis"):
        rules.sharding(("heads", "feed_forward"), (6, 4))
    with pytest.raises(ConfigError, match="shape"):
        rules.sharding(("heads",), (6, 4))
    with pytest.raises(ConfigError, match=r"'tensro'.*did you mean 'tensor'"):
        AxisRules(mesh, {"heads": "tensro"})


def test_a_model_spread_over_four_devices_gives_the_same_logits(tmp_path: Path) -> None:
    save_llama(tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["error"] < 1e-4
    assert report["specs"]["layers.1.attention.out.weight"] == ["None", "tensor"]
    assert report["specs"]["embedding.tokens.weight"] == ["tensor", "None"]
    assert report["specs"]["norm.weight"] == ["None"]
    assert report["local"] == [80, 48]
