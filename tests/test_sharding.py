"""The sharding table: every parameter has a row, every mesh gives the numbers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from transmamba_jax import parallel, sharding
from transmamba_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from transmamba_jax.config_io import load_config
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import tree_paths


def _abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), (jax.sharding.AxisType.Auto,) * len(sizes))


_FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(set(_FOLDER.rglob("*.yaml")) - set(_FOLDER.glob("studies/*")))
GOLDEN = Path(__file__).parent / "golden" / "parameter_specs.json"


def parameter_specs(path: Path) -> dict[str, str]:
    """Spec of every parameter of a config, on a mesh that has every axis."""
    mesh = _abstract_mesh(data=2, fsdp=4, context=2, tensor=2)
    model = TransMamba(load_config(path).model)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    names = {tree_paths.path_name(leaf_path): leaf.shape for leaf_path, leaf in jax.tree.leaves_with_path(params)}
    return {name: str(sharding.parameter_spec(name, shape, mesh)) for name, shape in sorted(names.items())}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_parameter_has_its_place(path):
    """A change of the table shows in the golden file: `python -m tests.test_sharding` rewrites it."""
    assert parameter_specs(path) == json.loads(GOLDEN.read_text())[path.stem]


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = _abstract_mesh(data=1, fsdp=8, context=1, tensor=2)
    assert sharding.parameter_spec("embedding", (255, 16), mesh) == P(None, "fsdp")
    assert sharding.parameter_spec("embedding", (256, 17), mesh) == P("tensor", None)


def test_a_parameter_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"layers/mixer/new/kernel of shape \(4, 4\) has no row"):
        sharding.parameter_spec("layers/mixer/new/kernel", (4, 4), _abstract_mesh(data=1, fsdp=2, context=1, tensor=1))


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 4, 1, 1), r"batch_size=24 .* 12 rows each.* over 8 devices.* multiple of 16"),
        ((1, 1, 1, 3), r"mesh.tensor=3 does not divide model.num_groups=4"),
        ((1, 1, 3, 1), r"mesh.context=3 does not divide data.seq_len=512"),
        ((1, 1, 2, 4), r"mesh.context \* mesh.tensor=8 does not divide model.num_heads=4"),
    ],
)
def test_what_does_not_divide_is_refused(sizes, message):
    config = Config(data=DataConfig(batch_size=24), train=TrainConfig(accumulation=2))
    axes = ("data", "fsdp", "context", "tensor")
    sharding.check_divides(config, _abstract_mesh(data=2, fsdp=2, context=2, tensor=2))
    with pytest.raises(ValueError, match=message):
        sharding.check_divides(config, _abstract_mesh(**dict(zip(axes, sizes, strict=True))))


MESHES = r"""
import json
import sys
import jax
import numpy as np
from transmamba_jax import sharding
from transmamba_jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, TrainConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import tree_paths
from transmamba_jax.training.loss import loss_and_gradient
from transmamba_jax.training.step import TrainState

ROWS, TIME = 16, 32
model_config = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=8, num_groups=4, head_dim=4, state_dim=4,
                           mlp_dim=32, transpoints=tuple(json.loads(sys.argv[2])), dtype="float32")
config = Config(model=model_config, data=DataConfig(seq_len=TIME, batch_size=ROWS),
                train=TrainConfig(accumulation=int(sys.argv[3]), loss_chunk=64))
model = TransMamba(model_config, KernelsConfig(chunk_size=8))
rng = np.random.default_rng(0)
# Documents of all lengths, with padding before, between (over a whole part of the sequence) and after them.
ids = 1 + np.cumsum(rng.random((ROWS, TIME + 1)) < 0.1, axis=1).astype(np.int32)
ids[0, :5], ids[1, 6:15], ids[2, 20:] = 0, 0, 0
ids[3] = 1
ids[4, 8:12] = 0
ids[4, 12:] = ids[4, 7]
batch = {"tokens": rng.integers(0, 64, (ROWS, TIME + 1), dtype=np.int32), "segment_ids": ids}

def held(tree, mesh):  # the largest share of the numbers of a tree that one device holds
    leaves = jax.tree.leaves(tree)
    on = lambda device: sum(s.data.size for leaf in leaves for s in leaf.addressable_shards if s.device == device)
    return max(map(on, mesh.devices.flat)) / sum(leaf.size for leaf in leaves)

def mesh_of(sizes):
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])

state = TrainState.create(config, model, mesh_of((2, 4, 1, 1)))
report = {"born": held(state.params, mesh_of((2, 4, 1, 1))), "optimizer": held(state.opt_state, mesh_of((2, 4, 1, 1)))}
params = jax.device_get(state.params)
# At the start the state is tiny beside D x, and the norm behind it takes away the scale: the gradient of D all but
# cancels, and changing every parameter by one rounding changes it by 1e-5. Here no leaf changes by more than 2e-6.
mixer = params["layers"]["mixer"]
mixer["dt_bias"] = np.full_like(mixer["dt_bias"], -2)
for name in ("q", "k"):
    mixer[name]["kernel"] = 3 * mixer[name]["kernel"]

def gradient(sizes):
    mesh = mesh_of(sizes)
    sharding.check_divides(config, mesh)
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, rows: loss_and_gradient(params, model, rows, config.train.accumulation, 64))
        loss, found = jax.device_get(run(placed, sharding.place_batch(batch, mesh)))
    found = {tree_paths.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}
    return held(placed, mesh), {"loss": loss, **found}

_, expected = gradient((1, 1, 1, 1))
for sizes in json.loads(sys.argv[1]):
    share, found = gradient(sizes)
    errors = {leaf: np.linalg.norm(found[leaf] - expected[leaf]) / np.linalg.norm(expected[leaf]) for leaf in expected}
    worst = max(errors, key=errors.get)
    report[str(tuple(sizes))] = {"error": float(errors[worst]), "leaf": worst, "share": share}
print(json.dumps(report))
"""

# data, fsdp, context, tensor
ALONE = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 4))
PAIRS = ((2, 4, 1, 1), (2, 1, 4, 1), (4, 1, 1, 2), (1, 2, 4, 1), (1, 4, 1, 2), (1, 1, 4, 2))
TRIPLES = ((1, 2, 2, 2), (2, 1, 2, 2))


def run_on_eight_devices(code: str, *arguments: str) -> dict:
    root = Path(__file__).parents[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # The compiler says so where two neighbours are cut in ways that only a copy of the whole array brings together.
    assert "Involuntary full rematerialization" not in result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "transpoints", "accumulation"),
    [(ALONE + TRIPLES, (13,), 1), (PAIRS, (13,), 1), (((1, 1, 4, 2),), (0, 32), 2)],
    ids=["alone and triples", "pairs", "ssm and attention"],
)
def test_meshes_of_eight_devices_give_the_numbers_of_one(meshes, transpoints, accumulation):
    report = run_on_eight_devices(MESHES, json.dumps(meshes), json.dumps(transpoints), str(accumulation))
    errors = {name: found for name, found in report.items() if name.startswith("(") and found["error"] > 1e-5}
    assert not errors
    assert max(report["born"], report["optimizer"]) < 1 / 4 + 0.1
    for sizes in meshes:
        kept = sizes[1] * sizes[3]  # vectors are copied to every device, embedding and matrices are cut by both
        assert report[str(sizes)]["share"] < 1 / kept + 0.1


MEMORY = r"""
import json
import jax
import numpy as np
from transmamba_jax import sharding
from transmamba_jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, TrainConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.training.optimizer import make_optimizer
from transmamba_jax.training.step import abstract_batch, abstract_state, make_train_step

sizes = {"d_model": 128, "num_heads": 4, "num_groups": 4, "head_dim": 16, "state_dim": 16, "mlp_dim": 256}
model_config = ModelConfig(vocab_size=128, num_layers=64, transpoints=(0,), remat="full", **sizes)
config = Config(model=model_config, data=DataConfig(seq_len=16, batch_size=8), train=TrainConfig(loss_chunk=64))
model, report = TransMamba(model_config, KernelsConfig(chunk_size=8)), {}
for parts in (1, 2, 8):
    mesh = sharding.make_mesh(MeshConfig(1, parts, 1, 1), jax.devices()[:parts])
    with jax.set_mesh(mesh):
        step = make_train_step(config, model, make_optimizer(config), mesh)
        lowered = step.lower(abstract_state(config, model, mesh), abstract_batch(config, mesh))
    memory = lowered.compile().memory_analysis()
    report[parts] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
print(json.dumps(report))
"""


@pytest.mark.slow
def test_memory_of_a_step_falls_as_the_parts_of_fsdp():
    """State, gradients and what is kept for the backward pass; but for one layer at a time, which is gathered."""
    report = run_on_eight_devices(MEMORY)
    for parts in (2, 8):
        assert report[str(parts)] < (1 / parts + 0.03) * report["1"], report


EXCHANGE = r"""
import json
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transmamba_jax import parallel, sharding
from transmamba_jax.config import MeshConfig
from transmamba_jax.compile_only.program import read_program

mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, context=4, tensor=1))

def exchanged(length):
    where = lambda axes: NamedSharding(mesh, P(*axes))
    on = lambda shape, *axes, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=where(axes))
    tokens = lambda *shape, dtype="float32": on((4, length, *shape), "data", "context", dtype=dtype)
    ids = tokens(dtype="int32")
    floats = tokens(4, 8), tokens(4), on((4,)), tokens(2, 16), tokens(2, 16), on((4, 32)), on((32,))

    def run(x, dt, a, b, c, kernel, bias, ids):
        x = parallel.convolve(x.reshape(4, length, 32), kernel, bias, ids).reshape(x.shape)
        return parallel.scan(x, dt, a, b, c, None, None, ids, chunk_size=16, implementation="sequential")

    def both(ids, *floats):
        out, back = jax.vjp(lambda *floats: run(*floats, ids), *floats)
        return back(out)

    with jax.set_mesh(mesh):
        return read_program(jax.jit(both).lower(ids, *floats).compile().as_text()).collectives

print(json.dumps({length: exchanged(length) for length in (64, 512)}))
"""


@pytest.mark.slow
def test_what_parts_of_the_sequence_exchange_does_not_depend_on_its_length():
    """Convolution and SSM, forward and backward, of 2 rows per device in 4 parts; H 4, P 8, N 16, K 4; 4 bytes each."""
    short, long = run_on_eight_devices(EXCHANGE).values()
    assert short == long
    states, decays, edges = 4 * 2 * 4 * 8 * 16, 4 * 2 * 4, 2 * 4 * 2  # of every part, and the first and last document
    halo, its_ids = 2 * 3 * 32, 2 * 3
    sizes = {kind: size for kind, (_, size) in long.items()}
    assert sizes == {
        "all-gather": 4 * (states + decays + edges),
        "reduce-scatter": 4 * (states + decays) / 4,
        "collective-permute": 4 * (2 * halo + its_ids),
        "all-reduce": 4 * (4 + 4 * 32 + 32),  # gradients of a, the convolution's kernel and its bias
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": 3}, "output_start must be 0 where mesh.context splits the rows, found 3"),
        ({"state": True}, "initial_state"),
    ],
)
def test_rows_that_are_split_have_no_state_and_no_start(given: dict[str, Any], message: str) -> None:
    mesh = AbstractMesh((1, 1, 2, 1), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    x, dt, a = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 2)), -jnp.ones(2)
    state = jnp.zeros((1, 2, 4, 4)) if "state" in given else None
    options: dict[str, Any] = {"chunk_size": 4, "implementation": "sequential", "output_start": given.get("start", 0)}
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        parallel.scan(x, dt, a, x, x, None, state, None, **options)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({path.stem: parameter_specs(path) for path in CONFIGS}, indent=1) + "\n")
