"""The sharding table: every parameter has a row, every mesh gives the numbers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from transmamba_jax import sharding
from transmamba_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from transmamba_jax.model import TransMamba


def _abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), (jax.sharding.AxisType.Auto,) * len(sizes))


@pytest.fixture(name="tree", scope="module")
def _tree():
    config = ModelConfig(num_layers=2, transpoints=(0, 4), d_model=16, mlp_dim=24, vocab_size=257, tie_embeddings=False)
    return jax.eval_shape(TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def test_every_parameter_has_its_place(tree):
    mesh = _abstract_mesh(data=1, fsdp=8)
    specs = {
        sharding.path_name(path): sharding.parameter_spec(sharding.path_name(path), leaf.shape, mesh)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    inward, outward = P(None, None, "fsdp"), P(None, "fsdp", None)
    assert specs == {
        "embedding": P(None, "fsdp"),  # 257 ids do not divide by 8
        "lm_head": P("fsdp", None),
        "final_norm/scale": P(),
        **{f"layers/mixer/{part}/kernel": inward for part in "qkvz"},
        "layers/mixer/dt/kernel": outward,
        "layers/mixer/out/kernel": outward,
        **{f"layers/mixer/conv_{part}/{leaf}": P() for part in "qkv" for leaf in ("kernel", "bias")},
        **{f"layers/mixer/{leaf}": P() for leaf in ("a_log", "dt_bias", "skip", "norm/scale")},
        **{f"layers/{part}_norm/scale": P() for part in ("mixer", "mlp")},
        **{f"layers/mlp/{part}/kernel": inward for part in ("gate", "up")},
        "layers/mlp/down/kernel": outward,
    }


def test_an_axis_that_divides_nothing_is_not_used():
    assert sharding.parameter_spec("embedding", (255, 17), _abstract_mesh(data=1, fsdp=8)) == P()


def test_a_parameter_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"layers/mixer/new/kernel of shape \(4, 4\) has no row"):
        sharding.parameter_spec("layers/mixer/new/kernel", (4, 4), _abstract_mesh(data=1, fsdp=2))


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (MeshConfig(data=3, fsdp=1), 1, "needs 3 devices, found 1"),
        (MeshConfig(data=-1, fsdp=2), 1, "needs a multiple of 2 devices, found 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, count, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(config, jax.devices()[:count])


def test_a_batch_that_does_not_divide_is_refused():
    config = Config(data=DataConfig(batch_size=24), train=TrainConfig(accumulation=2))
    sharding.check_batch(config, _abstract_mesh(data=2, fsdp=2))
    with pytest.raises(ValueError, match=r"batch_size=24 .* 12 rows each.* over 8 devices.* multiple of 16"):
        sharding.check_batch(config, _abstract_mesh(data=2, fsdp=4))


MESHES = r"""
import json
import jax
import numpy as np
from transmamba_jax import sharding
from transmamba_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.training.step import create_state, loss_and_gradient

model_config = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=2, num_groups=2, head_dim=8, state_dim=8,
                           mlp_dim=32, chunk_size=8, transpoints=(8,), dtype="float32")
config = Config(model=model_config, data=DataConfig(seq_len=16, batch_size=16),
                train=TrainConfig(accumulation=2, loss_chunk=64))
model = TransMamba(model_config)
rng = np.random.default_rng(0)
batch = {"tokens": rng.integers(0, 64, (16, 17), dtype=np.int32),
         "segment_ids": 1 + np.cumsum(rng.random((16, 17)) < 0.1, axis=1).astype(np.int32)}
def held(tree, mesh):  # the largest share of the numbers of a tree that one device holds
    leaves = jax.tree.leaves(tree)
    on = lambda device: sum(s.data.size for leaf in leaves for s in leaf.addressable_shards if s.device == device)
    return max(map(on, mesh.devices.flat)) / sum(leaf.size for leaf in leaves)

meshes = {f"{d}x{f}": sharding.make_mesh(MeshConfig(d, f), jax.devices()[: d * f]) for d, f in ((8, 1), (1, 8), (2, 4))}
state = create_state(config, model, meshes["2x4"])
report = {"born": held(state.params, meshes["2x4"]), "optimizer": held(state.opt_state, meshes["2x4"])}
params = jax.device_get(state.params)
# At the start the state is tiny beside D x, and the norm behind it takes away the scale: the gradient of D all but
# cancels, and changing every parameter by one rounding changes it by 1e-5. Here no leaf changes by more than 2e-6.
mixer = params["layers"]["mixer"]
mixer["dt_bias"] = np.full_like(mixer["dt_bias"], -2)
for name in ("q", "k"):
    mixer[name]["kernel"] = 3 * mixer[name]["kernel"]

def gradient(mesh):
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    run = jax.jit(lambda params, rows: loss_and_gradient(params, model, rows, mesh, 2, 64))
    found = jax.device_get(run(placed, sharding.place_batch(batch, mesh)))
    return held(placed, mesh), {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}

_, expected = gradient(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
for name, mesh in meshes.items():
    share, found = gradient(mesh)
    errors = [np.linalg.norm(found[leaf] - expected[leaf]) / np.linalg.norm(expected[leaf]) for leaf in expected]
    report[name] = {"error": float(max(errors)), "share": share}
print(json.dumps(report))
"""


def test_meshes_of_eight_devices_give_the_numbers_of_one():
    root = Path(__file__).parents[1]
    # Unoptimised machine code: compiling is most of this test's time, and the collectives are the same.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", MESHES], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert max(report[name]["error"] for name in ("8x1", "1x8", "2x4")) <= 1e-5
    assert report["8x1"]["share"] == 1
    assert report["1x8"]["share"] < 1 / 8 + 0.1  # vectors are copied to every device
    assert max(report["2x4"]["share"], report["born"], report["optimizer"]) < 1 / 4 + 0.1
