"""Several processes on this machine: the same numbers as one, and one process's trouble is everyone's, soon and said.

`python -m tests.runtime.test_hosts` serves the processes of one run after another (tests/forks.py), eight simulated
devices in all.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
import traceback

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

import train
from tests.forks import Server, serve, write_text
from tests.training.support import Little, little_config
from transmamba_jax import checkpoint, config_io, data, sharding
from transmamba_jax.config import HostsConfig, MeshConfig
from transmamba_jax.runtime import hosts
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training.preemption import EXIT_PREEMPTED

DEVICES = 8
HEARTBEAT = 10  # of the process that is killed; on a busy machine a healthy one may be silent for as long
ABORTED = -signal.SIGABRT


def _at_batch(step, action):
    """Act when this process asks for the batch of a step."""
    original, count = data.BatchIterator.__next__, 0

    def struck(batches):
        nonlocal count
        count += 1
        if count == step:
            action()
        return original(batches)

    data.BatchIterator.__next__ = struck


def _forbid_files():
    """Let this process write no byte to a file until a save has failed."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    original = checkpoint.Checkpointer._failure

    def failure(writer, step, error):
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return original(writer, step, error)

    checkpoint.Checkpointer._failure = failure


def _count_down():
    """End this process with a code of its own when it is there after three heartbeats."""

    def wait():
        # A second at a time: a machine that stands still meanwhile costs one of them.
        for _ in range(3 * HEARTBEAT):
            time.sleep(1)
        os._exit(99)

    threading.Thread(target=wait, daemon=True).start()


ACCIDENTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "forbid files": _forbid_files,
    "count down": _count_down,
}


def run_process(arguments, accidents, little):
    for accident, step in accidents.items():
        _at_batch(step, ACCIDENTS[accident])
    try:
        return train.main(arguments, model=Little if little else None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        # What an interpreter does at its end, after an error too: this process waits here for the others.
        jax.distributed.shutdown()


class Runs(Server):
    """Runs train.py in one or more processes of a run."""

    def __init__(self, folder, **environment):
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        super().__init__("tests.runtime.test_hosts", folder, **compiled, **environment)
        config = little_config(
            model={"vocab_size": 256},
            data={"source": write_text(folder / "text"), "streams": 2},
            train={"steps": 12, "sample_tokens": 0},
            checkpoint={"every": 4, "keep_latest": 9},
            eval={"every": 4, "windows": 8},
            mesh=MeshConfig(data=1, fsdp=-1),
        )
        self.config = folder / "little.yaml"
        self.config.write_text(config_io.to_yaml(config), encoding="utf-8")

    def run(self, workdir, *processes, options=(), expect=(0,), little=True):
        """Run a process for each dict of accidents, in one run; return what each of them printed."""
        addresses = _free_addresses(2)
        tasks = []
        for index, accidents in enumerate(processes):
            own = ["--hosts.coordinator", addresses[accidents.pop("lost", 0)], "--hosts.num-processes", len(processes)]
            own += ["--hosts.process-id", index, *accidents.pop("options", ())]
            arguments = [
                "--config",
                self.config,
                "--workdir",
                workdir if "://" in workdir else self.folder / workdir,
                *options,
            ]
            arguments += own if len(processes) > 1 else []
            tasks.append({"arguments": [str(each) for each in arguments], "accidents": accidents, "little": little})
        self.send("process", *tasks, devices=DEVICES // len(tasks))
        return self.receive(*expect)


def _free_addresses(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [f"localhost:{probe.getsockname()[1]}" for probe in probes]


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory, bucket):
    server = Runs(tmp_path_factory.mktemp("hosts"), **bucket.environment)
    yield server
    server.stop()


@pytest.fixture(name="one", scope="module")
def _one(server):
    """Return the work directory of a run of one process."""
    server.run("one", {})
    return server.folder / "one"


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("loss", "eval/loss") if name in line}


@pytest.mark.slow
def test_two_processes_are_one_run_through_a_failing_save_a_signal_and_another_number_of_them(server, one):
    workdir = server.folder / "two"
    steps = lambda: checkpoint.complete_steps(workdir / "checkpoints")

    # One of two cannot write at step 4 and is asked to stop in step 6: both lose that save, and stop behind one step.
    ends = (EXIT_PREEMPTED, EXIT_PREEMPTED)
    first, second = server.run("two", {}, {"forbid files": 4, "terminate": 6}, expect=ends)
    assert "ALARM: checkpoint 4 was not saved: process 1: " in first
    assert "File too large" in first
    assert "stopped at step 7; the same command continues from there" in first
    assert "step 5/12" in first
    assert "SIGTERM" not in first
    assert "step" not in second
    assert steps() == [7]

    (output,) = server.run("two", {"terminate": 3}, expect=(EXIT_PREEMPTED,))
    assert "continuing from step 7" in output
    assert steps() == [7, 8, 10]
    first, _ = server.run("two", {}, {}, expect=(0, 0))
    assert "continuing from step 10" in first
    assert "complete: step 12 of 12" in first
    for step in steps():
        checkpoint.verify(workdir / "checkpoints" / str(step))

    expected, found = losses(one), losses(workdir)
    assert len(expected) == 15
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6, atol=0)
    arrays = [checkpoint.restore(folder / "checkpoints") for folder in (one, workdir)]
    for left, right in zip(*(jax.tree.leaves((saved.params, saved.state)) for saved in arrays), strict=True):
        np.testing.assert_allclose(np.float64(left), np.float64(right), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_share_a_bucket_and_no_disk(server, one, bucket):
    """The work directory and the text are in a bucket; one of two processes is asked to stop, and both resume."""
    for file in (server.folder / "text").iterdir():
        bucket.put(f"text/{file.name}", file.read_bytes())
    workdir = expand_path("gs://bucket/two")
    options = "--data.source", "text:gs://bucket/text/*.txt", "--data.cache-dir", server.folder / "copies"
    ends = (EXIT_PREEMPTED, EXIT_PREEMPTED)
    first, second = server.run(str(workdir), {}, {"terminate": 6}, options=options, expect=ends)
    assert "stopped at step 7; the same command continues from there" in first
    assert "step" not in second
    first, _ = server.run(str(workdir), {}, {}, options=options, expect=(0, 0))
    assert "continuing from step 7" in first
    assert "complete: step 12 of 12" in first
    steps = checkpoint.complete_steps(workdir / "checkpoints")
    assert steps == [4, 7, 8, 12]
    for step in steps:
        checkpoint.verify(workdir / "checkpoints" / str(step))
    expected, found = losses(one), losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_model_itself_is_cut_across_processes_and_the_first_one_samples(server):
    sizes = {"d_model": 16, "num_heads": 8, "num_groups": 4, "head_dim": 4, "state_dim": 4, "mlp_dim": 16}
    sizes |= {"dtype": "float32"}
    model = [part for name, size in sizes.items() for part in (f"--model.{name.replace('_', '-')}", size)]
    # Both halves of a row, and with them the states between them and the prefix, are on another process.
    mesh = "--mesh.fsdp", 1, "--mesh.context", 2, "--mesh.tensor", 4
    length = "--model.num-layers", 1, "--model.transpoints", 8, "--train.steps", 3
    options = *model, *mesh, *length, "--kernels.chunk-size", 4, "--eval.every", 0, "--train.sample-tokens", 8
    for name, processes in (("model-one", ({},)), ("model-two", ({}, {}))):
        first, *_ = server.run(name, *processes, options=options, expect=[0] * len(processes), little=False)
        assert "complete: step 3 of 3" in first
    one, two = server.folder / "model-one", server.folder / "model-two"
    expected, found = losses(one), losses(two)
    assert len(expected) == 3
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6, atol=0)
    samples = [(folder / "report" / "sample.txt").read_text(encoding="utf-8") for folder in (one, two)]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_message(server):
    options = ["--hosts.heartbeat", HEARTBEAT]
    accidents = {"count down": 2}, {"kill": 2}
    first, _ = server.run("killed", *accidents, options=options, expect=(ABORTED, -signal.SIGKILL))
    assert f"2 processes; when one is silent for {HEARTBEAT} s the others end too" in first
    assert "Terminating process because the JAX distributed service detected fatal errors" in first


@pytest.mark.slow
def test_processes_that_differ_are_refused_everywhere(server):
    different = {"options": ["--data.seed", 1, "--mesh.data", 2]}
    for output in server.run("differ", {}, different, expect=(2, 2)):
        assert "the processes of this run differ:\n" in output
        assert "  data.seed: 0 in process 0; 1 in process 1\n" in output
        assert "  mesh.data: 1 in process 0; 2 in process 1\n" in output
        assert "code" not in output


@pytest.mark.slow
def test_a_process_that_is_left_alone_says_so_in_time(server):
    first, second = server.run("alone", {}, {"lost": 1}, options=["--hosts.timeout", 2], expect=(2, 2))
    assert "process 0 of 2: the coordinator localhost:" in first
    assert "this process, waited 2 s and not every process came" in first
    assert "process 1 of 2: the coordinator localhost:" in second
    assert "was not reached within 2 s; start every process" in second


def test_whole_slices_lie_along_data_then_fsdp_and_hosts_read_the_rows_of_their_devices():
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    for sizes in ({}, {"data": 1, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
        assert [device.slice_index for device in mesh.devices.flat] == [0] * 4 + [1] * 4
        assert hosts.row_share(mesh, 16) == (0, 2)
    with pytest.raises(ValueError, match=r"in 2 slices, which do not divide over mesh\.data=1 and mesh\.fsdp=1"):
        sharding.make_mesh(MeshConfig(data=1, tensor=8), devices)
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices  # 4 hosts of 2 x 2 chips
    for sizes, parts in (({}, 4), ({"data": 4, "tensor": 4}, 2), ({"data": 1, "tensor": 16}, 1)):
        assert hosts.row_share(sharding.make_mesh(MeshConfig(**sizes), devices), 16) == (0, parts)
    crossed = Mesh(np.roll(np.array(devices), 1).reshape(8, 1, 1, 2), ("data", "fsdp", "context", "tensor"))
    with pytest.raises(ValueError, match=r"cuts rows across processes; make mesh\.data"):
        hosts.row_share(crossed, 16)


def test_several_are_asked_for_and_the_environment_does_not_say_where(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def nothing_found(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_found)
    hosts.start(HostsConfig())
    for asked in (HostsConfig(num_processes=2), HostsConfig(process_id=0)):
        with pytest.raises(ValueError, match=r"coordinator=None, .* --hosts.num-processes 1 trains with this process"):
            hosts.start(asked)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match="SLURM_NTASKS=4, but only a process that srun starts knows the others"):
        hosts.start(HostsConfig())
    hosts.start(HostsConfig(num_processes=1))


def test_every_part_of_the_program_and_its_runtime_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / "transmamba_jax" / "runtime" / "hosts.py"))
    assert {"code", "jax", "jaxlib", "libtpu", "local devices"} == hosts.machine_facts().keys()
    seen = set()
    for name in ("transmamba_jax/training/step.py", "pallas_kernels/ssd/api.py", "train.py", "notes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("changed", encoding="utf-8")
        seen.add(hosts.machine_facts()["code"])
    assert len(seen) == 3  # notes.py is not part of the program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "localhost"}, "hosts.coordinator must be HOST:PORT, found 'localhost'"),
        ({"num_processes": 0}, "hosts.num_processes must be >= 1"),
        (
            {"process_id": 2, "num_processes": 2},
            "hosts.process_id must be from 0 to hosts.num_processes - 1, found 2 of 2",
        ),
        ({"timeout": 0}, "hosts.timeout must be >= 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HostsConfig(**options)


if __name__ == "__main__":
    serve({"process": run_process})
