"""Checkpoints: what comes back is what was saved, and nothing else ever comes back."""

import math
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transmamba_jax import checkpoint
from transmamba_jax.config import CheckpointConfig, Config, ModelConfig
from transmamba_jax.config_io import to_yaml

ROOT = Path(__file__).parents[2]
CONFIG = Config(model=ModelConfig(num_layers=9), workdir="runs/päck")
DEFAULT = CheckpointConfig()
TOKENIZER = '{"tokenizer": "bytes", "é": "\\u0000"}'
ODD = np.float32([np.nan, -0.0, 1e-40])


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    step: Any
    key: Any


def make_state(seed: int = 0, kind: str = "threefry2x32") -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embedding": jnp.float32(rng.standard_normal((7, 4))).at[0, :3].set(ODD),
        "layers": {
            "kernel": jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.bfloat16),
            "ids": jnp.asarray(rng.integers(-9, 9, 3), jnp.int32),
        },
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
    floats = {"embedding": params["embedding"], "kernel": params["layers"]["kernel"]}
    opt_state = tx.update(jax.tree.map(jnp.ones_like, floats), tx.init(floats), floats)[1]
    return State(params, opt_state, jnp.int32(seed), jax.random.key(seed, impl=kind))


def raw(tree: Any) -> list[tuple[str, Any, Any, bytes]]:
    """Path, shape, dtype and bytes of every leaf: equality is bit for bit, NaN included."""
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        leaves.append((jax.tree_util.keystr(path), leaf.shape, leaf.dtype, np.asarray(data).tobytes()))
    return leaves


def save(folder: Path, *steps: int, losses: tuple[float | None, ...] = (), config=DEFAULT) -> None:
    writer = checkpoint.Checkpointer(folder, config)
    for step, loss in zip(steps, losses or [None] * len(steps), strict=True):
        writer.save(step, make_state(step), {"position": [step, {"a": None}]}, to_yaml(CONFIG), TOKENIZER, loss)
    writer.close()


def run(code: str, *arguments: Any, devices: int = 1) -> subprocess.CompletedProcess:
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(5)
    writer = checkpoint.Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    assert writer.restore_newest(state) is None
    writer.save(5, state, {"position": [5, {"a": None}]}, to_yaml(CONFIG), TOKENIZER, eval_loss=2.5)
    restored = writer.restore_newest(jax.eval_shape(lambda: state))
    writer.close()
    assert raw(restored.state) == raw(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert jax.random.bits(restored.state.key) == jax.random.bits(state.key)
    assert (restored.step, restored.data_state) == (5, {"position": [5, {"a": None}]})
    assert (restored.config_yaml, restored.tokenizer_json) == (to_yaml(CONFIG), TOKENIZER)


def test_other_kinds_of_keys_round_trip(tmp_path):
    state = make_state(1, kind="rbg")
    writer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
    writer.save(1, state, {}, "", "")
    assert raw(writer.restore_newest(state).state) == raw(state)
    with pytest.raises(ValueError, match=r"missing: state/key/unsafe_rbg uint32\[4\]"):
        writer.restore_newest(state.replace(key=jax.random.key(1, impl="unsafe_rbg")))
    writer.close()


def test_donating_the_state_after_save_does_not_change_what_is_written(tmp_path):
    state = State({"w": jnp.arange(4_000_000, dtype=jnp.float32)}, (), jnp.int32(0), jax.random.key(0))
    expected = np.arange(4_000_000, dtype=np.float32)
    step = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda w: -w - 1, s.params)), donate_argnums=0)
    writer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
    writer.save(1, state, {}, "", "")
    for _ in range(3):
        state = step(state)
    restored = writer.restore_newest(state)
    writer.close()
    np.testing.assert_array_equal(restored.state.params["w"], expected)


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = (3.0, 1.0, 2.0, None, math.nan, 1.5)
    save(tmp_path, *range(1, 7), losses=losses, config=CheckpointConfig(keep_latest=2, keep_best=1))
    assert checkpoint.complete_steps(tmp_path) == [2, 5, 6]
    # A new process knows the losses of the steps that it finds.
    save(tmp_path, 7, 8, losses=(1.2, 9.0), config=CheckpointConfig(keep_latest=1, keep_best=2))
    assert checkpoint.complete_steps(tmp_path) == [2, 7, 8]
    save(tmp_path, 9, losses=(0.5,), config=CheckpointConfig(keep_latest=2, keep_best=0))
    assert checkpoint.complete_steps(tmp_path) == [8, 9]


REFUSALS = {
    "dtype": (
        lambda s: s.replace(params={**s.params, "embedding": s.params["embedding"].astype(jnp.bfloat16)}),
        ["shape or dtype mismatch: params/embedding: expected bfloat16[7,4], found float32[7,4]"],
    ),
    "shape": (
        lambda s: s.replace(params={**s.params, "embedding": jnp.zeros((8, 4))}),
        ["shape or dtype mismatch: params/embedding: expected float32[8,4], found float32[7,4]"],
    ),
    "missing": (
        lambda s: s.replace(params={**s.params, "head": jnp.zeros((4, 7))}),
        ["missing: params/head float32[4,7]"],
    ),
    "extra": (
        lambda s: s.replace(params={"embedding": s.params["embedding"]}),
        [
            "unexpected: params/layers/ids int32[3]",
            "unexpected: params/layers/kernel bfloat16[2,4,5]",
        ],
    ),
    "optimizer": (
        lambda s: s.replace(opt_state=optax.sgd(0.1, momentum=0.9).init({"embedding": s.params["embedding"]})),
        [
            "missing: state/opt_state/0/trace/embedding float32[7,4]",
            "unexpected: state/opt_state/1/0/mu/embedding float32[7,4]",
        ],
    ),
    "step": (
        lambda s: s.replace(step=jnp.uint32(0)),
        ["shape or dtype mismatch: state/step: expected uint32[], found int32[]"],
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 3, 8, losses=(2.0, 4.0))
    return folder


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_what_differs(saved, name):
    change, lines = REFUSALS[name]
    reader = checkpoint.Checkpointer(saved, CheckpointConfig())
    with pytest.raises(ValueError, match="does not fit") as caught:
        reader.restore_newest(jax.eval_shape(lambda: change(make_state())))
    assert {f"  {line}" for line in lines} <= set(str(caught.value).splitlines())
    reader.close()


def test_refuses_steps_that_are_not_new(saved):
    writer = checkpoint.Checkpointer(saved, CheckpointConfig())
    for step in (8, 5):
        with pytest.raises(ValueError, match=f"newer than the newest checkpoint 8, found {step}"):
            writer.save(step, make_state(), {}, "", "")
    writer.close()
    assert checkpoint.complete_steps(saved) == [3, 8]


def test_refuses_what_cannot_be_stored(tmp_path):
    writer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(ValueError, match="step must be an array, found 3 of type int"):
        writer.save(1, make_state().replace(step=3), {}, "", "")
    with pytest.raises(ValueError, match="data_state must be plain JSON"):
        writer.save(1, make_state(), {"position": np.zeros(2)}, "", "")
    writer.close()
    assert checkpoint.complete_steps(tmp_path) == []


def test_a_copy_that_is_not_complete_is_never_chosen(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "commit_success.txt").unlink()
    (tmp_path / "10").mkdir()
    assert checkpoint.complete_steps(tmp_path) == [1]
    assert checkpoint.restore(tmp_path, params_only=True).step == 1


KILLED = """
import os, signal, sys
import orbax.checkpoint as ocp
from tests.checkpoint.test_checkpointer import *

commit = ocp.path.atomicity.AtomicRenameTemporaryPath.finalize

async def die(self):
    if self.get_final().name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    await commit(self)

ocp.path.atomicity.AtomicRenameTemporaryPath.finalize = die
save(Path(sys.argv[1]), 1, 2)
"""


def test_a_save_that_was_killed_leaves_no_step(tmp_path):
    result = run(KILLED, tmp_path)
    assert result.returncode == -9, result.stderr
    assert len(list(tmp_path.iterdir())) == 3  # step 1, the remains of step 2, and the marker of its save
    assert checkpoint.complete_steps(tmp_path) == [1]
    writer = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
    restored = writer.restore_newest(make_state())
    assert restored.step == 1
    assert raw(restored.state) == raw(make_state(1))
    writer.save(2, make_state(2), {}, "", "")
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


DISK_FULL = """
import resource, signal, sys
from tests.checkpoint.test_checkpointer import *

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG, as on a full disk
state = State({"w": jnp.asarray(np.random.default_rng(0).random(1_000_000))}, (), jnp.int32(0), jax.random.key(0))
writer = checkpoint.Checkpointer(Path(sys.argv[1]), CheckpointConfig())
writer.save(1, state, {}, "", "")
writer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for step, report in ((2, writer.wait), (3, lambda: writer.save(4, state, {}, "", ""))):
    writer.save(step, state, {}, "", "")
    try:
        report()
    except checkpoint.SaveError as error:
        print("raised", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.save(5, state, {}, "", "")
writer.close()
print(writer.steps())
"""


@pytest.mark.slow
def test_an_error_in_the_background_is_raised_by_wait_and_by_the_next_save(tmp_path):
    result = run(DISK_FULL, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("raised") == result.stdout.count("File too large") == 2
    assert result.stdout.splitlines()[-1] == "[1, 5]"


PLAIN_ORBAX = """
import sys
sys.modules["transmamba_jax"] = None  # an import of it would fail
import numpy as np
import orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as reader:
    params = reader.restore(sys.argv[1] + "/8/params")
np.savez(sys.argv[2], embedding=params["embedding"], kernel=np.asarray(params["layers"]["kernel"], np.float32))
"""


def test_plain_orbax_restores_the_parameters(saved, tmp_path):
    result = run(PLAIN_ORBAX, saved, tmp_path / "params.npz")
    assert result.returncode == 0, result.stderr
    params, expected = np.load(tmp_path / "params.npz"), make_state(8).params
    assert params["embedding"].tobytes() == np.asarray(expected["embedding"]).tobytes()
    np.testing.assert_array_equal(params["kernel"], np.asarray(expected["layers"]["kernel"], np.float32))


EIGHT_DEVICES = """
import sys
from tests.checkpoint.test_checkpointer import *
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
state = make_state(4)
layouts = {"w": P("fsdp", None), "v": P("fsdp"), "s": P()}
state = state.replace(params={
    name: jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, spec)) for name, spec in layouts.items()
})
writer = checkpoint.Checkpointer(Path(sys.argv[1]), CheckpointConfig())
writer.save(4, state, {}, to_yaml(CONFIG), TOKENIZER)
other = {"w": P(None, "fsdp"), "v": P("data", "fsdp"), "s": P(("data", "fsdp"))}
everywhere = NamedSharding(mesh, P())
shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), jax.eval_shape(lambda: state)
)
asked = shapes.replace(params={
    name: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec)) for name, spec in other.items()
})
restored = writer.restore_newest(asked).state
writer.close()
assert raw(restored) == raw(state)
for found, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(asked), strict=True):
    assert found.sharding == wanted.sharding, (found.sharding, wanted.sharding)
assert restored.params["s"].addressable_shards[0].data.shape == (1, 8)
copied = checkpoint.restore(sys.argv[1]).params["w"]
assert copied.is_fully_replicated and len(copied.sharding.device_set) == 8
"""


@pytest.mark.slow
def test_shardings_asked_for_are_honoured_and_one_device_reads_what_eight_wrote(tmp_path):
    result = run(EIGHT_DEVICES, tmp_path, devices=8)
    assert result.returncode == 0, result.stderr
    restored = checkpoint.restore(tmp_path)
    assert restored.step == 4
    for leaf in jax.tree.leaves(restored.params):
        np.testing.assert_array_equal(leaf, np.arange(64.0).reshape(8, 8))
        assert leaf.sharding.device_set == {jax.devices()[0]}


TWO_PROCESSES = """
import sys
from tests.checkpoint.test_checkpointer import *
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

index = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=index)
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
cut, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
make = lambda: State({"w": jnp.arange(6.0)}, (), jnp.int32(3), jax.random.key(0))
shapes = jax.eval_shape(make)
shardings = jax.tree.map(lambda _: everywhere, shapes).replace(params={"w": cut})
state = jax.jit(make, out_shardings=shardings)()
asked = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)
writer = checkpoint.Checkpointer(Path(sys.argv[1]), CheckpointConfig())
writer.save(3, state, {"process": index, "of different length": "x" * index}, to_yaml(CONFIG), TOKENIZER)
restored = writer.restore_newest(asked)
writer.close()
assert restored.data_state == {"process": index, "of different length": "x" * index}
(shard,) = restored.state.params["w"].addressable_shards
np.testing.assert_array_equal(shard.data, np.arange(6.0).reshape(2, 3)[index])
"""


@pytest.mark.slow
def test_each_process_gets_its_own_data_state_back(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda index: run(TWO_PROCESSES, tmp_path, index, port), range(2)))
    for result in results:
        assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(checkpoint.restore(tmp_path).params["w"], np.arange(6.0))
    reader = checkpoint.Checkpointer(tmp_path, CheckpointConfig())
    restored = reader.restore_newest(State({"w": jnp.arange(6.0)}, (), jnp.int32(3), jax.random.key(0)))
    reader.close()
    assert [state["process"] for state in restored.data_states] == [0, 1]


def test_restore_reads_the_newest_or_the_step_asked_for(saved):
    newest = checkpoint.restore(saved)
    assert (newest.step, newest.config, newest.tokenizer_json) == (8, CONFIG, TOKENIZER)
    assert newest["params"] is newest.params
    assert raw(newest.params) == raw(make_state(8).params)
    assert newest.data_states == [{"position": [8, {"a": None}]}]
    expected = make_state(8)
    adam = expected.opt_state[1][0]
    np.testing.assert_array_equal(newest.state["opt_state"]["1"]["0"]["mu"]["kernel"], adam.mu["kernel"])
    np.testing.assert_array_equal(newest.state["key"]["threefry2x32"], jax.random.key_data(expected.key))
    older = checkpoint.restore(str(saved), 3, params_only=True)
    assert (older.step, older.state, raw(older.params)) == (3, {}, raw(make_state(3).params))
    with pytest.raises(KeyError):
        newest["nothing"]


def test_what_is_restored_prints_a_few_lines(saved):
    assert repr(checkpoint.restore(saved)) == "Checkpoint of step 8\n  params: 3 arrays, 71 numbers\n  state: 8 arrays"
    assert repr(checkpoint.restore(saved, params_only=True)).endswith("\n  state: not read")
    reader = checkpoint.Checkpointer(saved, CheckpointConfig())
    target = jax.eval_shape(lambda: make_state().replace(params={"embedding": jnp.zeros((7, 4))}))
    restored = reader.restore_newest(target, partial=True)
    reader.close()
    # 28 numbers of the embedding, 2 x 68 moments, two counts, the step, the key.
    assert repr(restored) == "Restored of step 8\n  state: 9 arrays, 168 numbers\n  differences: 2"


def test_restore_says_what_is_there(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 4 .* complete steps are 3, 8$"):
        checkpoint.restore(saved, 4)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*: there is no such folder"):
        checkpoint.restore(tmp_path / "nowhere")
    (tmp_path / "checkpoints").symlink_to(saved)
    assert checkpoint.restore(tmp_path).step == 8
