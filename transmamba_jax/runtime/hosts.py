"""Connect the processes of a run on several hosts: agree, fail together, split the rows of a batch.

The only module that touches `jax.distributed`. Every process runs the same program on the same config. An event that
one process alone sees (a signal, a full disk, a missing file) is told to the others here: a process that took another
branch would leave them in a collective for ever. With one process every function returns at once.

Texts travel through the key-value store of JAX's coordination service. Any thread may use it, and it needs no device.
The flag "was any process asked to stop?" is needed at every step. It is reduced on the devices and read a step late.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # no public name up to jax 0.12: look again in 0.13; orbax imports it too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transmamba_jax import sharding
from transmamba_jax.config import Config, HostsConfig

BARRIER_SECONDS = 600
"""Timeout of a barrier: a healthy process may be busy as long as this with a checkpoint or with data."""

_LOGGER = logging.getLogger("transmamba_jax.hosts")
_calls = itertools.count()  # makes keys unique: every process calls the functions below in the same order


def start(config: HostsConfig) -> None:
    """Join the processes of this run, if it has several. Call it before JAX is used.

    `hosts.coordinator`, `hosts.num_processes` and `hosts.process_id` say where they are. The environment fills in what
    is None: that of Cloud TPU, Slurm, Open MPI or JAX_COORDINATOR_ADDRESS. Kubernetes (`jax[k8s]`) is asked only where
    one of the options is set. JAX ends the other processes when one is silent for `hosts.heartbeat` seconds.

    A process that is alone after `hosts.timeout` seconds prints the reason and exits with code 2.

    Raises:
        ValueError: an option is None and the environment does not give it.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    asked = coordinator is not None or config.num_processes is not None or config.process_id is not None
    if config.num_processes == 1 or not (asked or _environment_has_several()):
        return
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, found {coordinator!r}; or set hosts.coordinator")
    # Its handler of SIGTERM would take the place of the run's own, and orbax asks it
    # on one process only (to orbax 0.12: look again in 0.13).
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime ends a process that waits too long in the middle of C++, with a stack trace; this is earlier.
    alarm = threading.Timer(config.timeout, _give_up, [config.timeout])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=config.num_processes,
            process_id=config.process_id,
            initialization_timeout=config.timeout + 60,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"this process cannot join the others: {error} (hosts.coordinator={coordinator}, "
            f"hosts.num_processes={config.num_processes}, hosts.process_id={config.process_id}). The environment "
            f"must give what is None{_outside_srun()}; --hosts.num-processes 1 trains with this process alone"
        ) from error
    finally:
        alarm.cancel()
    log_first(f"{jax.process_count()} processes; when one is silent for {config.heartbeat} s the others end too")


def _environment_has_several() -> bool:
    """Tell whether the environment names several processes, by the variables that JAX's own detection reads."""
    counts = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    # JAX puts the TPU among its platforms on a Cloud TPU VM; only the VM's metadata names the other hosts.
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return any(count != "1" for count in counts) or "tpu" in (platforms or "")


def _outside_srun() -> str:
    """Describe the mistake of a process that a Slurm job with several tasks starts without srun."""
    if "SLURM_NTASKS" not in os.environ or "SLURM_STEP_NODELIST" in os.environ:
        return ""
    return f": SLURM_NTASKS={os.environ['SLURM_NTASKS']}, but only a process that srun starts knows the others"


def _give_up(seconds: int) -> None:
    """End the process from another thread: the main one is inside the runtime and cannot be interrupted."""
    state = distributed.global_state
    address = state.coordinator_address or "of this cluster"
    if state.process_id == 0:
        what = f"the coordinator {address}, this process, waited {seconds} s and not every process came"
    elif _reachable(address):
        what = f"the coordinator {address} is there, but after {seconds} s not every process came"
    else:
        what = f"the coordinator {address} was not reached within {seconds} s"
    print(
        f"process {state.process_id} of {state.num_processes}: {what}; start every process, with the "
        "same hosts.coordinator and hosts.num_processes and its own hosts.process_id, see that the port is open, or "
        "raise hosts.timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def is_first() -> bool:
    """Tell whether this is process 0, which logs and writes files."""
    return jax.process_index() == 0


def log_first(*lines: str, level: int = logging.INFO) -> None:
    """Log one record of these lines from process 0; none where there are no lines."""
    if lines and is_first():
        _LOGGER.log(level, "%s", "\n  ".join(lines))


def all_gather_text(key: str, text: str, seconds: float = BARRIER_SECONDS) -> list[str]:
    """Return the texts of all processes, in the order of their ids. Any thread may call it; a key is used once.

    Raises:
        TimeoutError: a process did not call it within `seconds`.
    """
    if jax.process_count() == 1:
        return [text]
    client = distributed.global_state.client
    if client is None:
        raise ValueError(
            f"jax has {jax.process_count()} processes that did not join; call hosts.start first, as train.py does"
        )
    folder = f"transmamba_jax/{key}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    try:
        client.wait_at_barrier(folder, math.ceil(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"not every process reached {key!r} within {seconds:.0f} s: {one_line(error)}") from error
    found = {int(name.rpartition("/")[2]): value for name, value in client.key_value_dir_get(folder)}
    return [found[index] for index in range(jax.process_count())]


def broadcast_from_first(value: Any) -> Any:
    """Return the value of process 0, as JSON keeps it. Every process calls it, from its main thread."""
    return json.loads(all_gather_text(f"value-{next(_calls)}", json.dumps(value if is_first() else None))[0])


@contextlib.contextmanager
def collective_errors(error_type: type[Exception] = ValueError) -> Iterator[None]:
    """Raise in every process when the body raises in any: its own error there, an `error_type` in the others.

    Every process enters it, from its main thread. The body must not wait for other processes.
    """
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    failed = _failures(all_gather_text(f"errors-{next(_calls)}", one_line(mine)))
    if mine is not None:
        raise mine
    if failed:
        raise error_type(failed)


class Barrier:
    """A barrier of all processes, used many times and from any thread; a failure of one process breaks it for all."""

    def __init__(self, name: str) -> None:
        """Make it in every process, from its main thread; `name` is made unique."""
        self.name = f"{name}-{next(_calls)}"
        self._count = 0
        self._failure = ""

    def wait(self, problem: str = "", seconds: float = BARRIER_SECONDS) -> None:
        """Wait for all processes.

        Raises:
            OSError: a process has a problem or timed out. The message names it, and the barrier stays broken.
        """
        if not self._failure:
            self._count += 1
            try:
                self._failure = _failures(all_gather_text(f"{self.name}/{self._count}", problem, seconds))
            except TimeoutError as error:
                self._failure = str(error)
        if self._failure:
            raise OSError(self._failure)

    def abort(self, error: BaseException) -> None:
        """Break the barrier: the others raise at their next wait."""
        if not self._failure:
            with contextlib.suppress(OSError):
                self.wait(one_line(error))


def one_line(error: BaseException | None) -> str:
    """Write an error as one line. A long one is cut in the middle: its end says what happened."""
    text = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"


def _failures(problems: list[str]) -> str:
    """List failures with the processes that had them: "process 1: no space left on device"."""
    by_text: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        if problem:
            by_text.setdefault(problem, []).append(index)
    return "; ".join(f"{_processes(who)}: {problem}" for problem, who in by_text.items())


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def config_facts(config: Config) -> dict[str, str]:
    """Return every option but `hosts.process_id`, which differs between processes."""
    shared = dataclasses.replace(config, hosts=dataclasses.replace(config.hosts, process_id=None))
    return {
        f"{section}.{name}" if isinstance(values, dict) else section: repr(value)
        for section, values in dataclasses.asdict(shared).items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def require_same(facts: Mapping[str, str], seconds: float = BARRIER_SECONDS) -> None:
    """Compare facts that must be the same in every process.

    Raises:
        ValueError: one differs; the message has every value and the processes that have it.
    """
    found = [json.loads(text) for text in all_gather_text(f"facts-{next(_calls)}", json.dumps(dict(facts)), seconds)]
    lines = []
    for name in dict.fromkeys(itertools.chain.from_iterable(found)):
        values: dict[str, list[int]] = {}
        for index, each in enumerate(found):
            values.setdefault(each.get(name, "missing"), []).append(index)
        if len(values) > 1:
            lines.append(f"{name}: {'; '.join(f'{value} in {_processes(who)}' for value, who in values.items())}")
    if lines:
        raise ValueError("\n  ".join(["the processes of this run differ:", *lines]))


def machine_facts() -> dict[str, str]:
    """Return the facts that must be the same on every host: code, versions, local devices."""
    root = Path(__file__).parents[1]
    checksum = hashlib.blake2b(digest_size=8)
    kernels, command = (root.parent / "pallas_kernels").rglob("*.py"), root.parent.glob("train.py")
    for path in sorted([*root.rglob("*.py"), *kernels, *command]):
        checksum.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    return {
        "code": f"checksum {checksum.hexdigest()}",
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "local devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def row_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Return (part, parts): the part of a batch's rows that this process reads. Processes with the same rows share one.

    Raises:
        ValueError: the mesh gives two processes overlapping but different rows.
    """
    spans: dict[int, set[tuple[int, int]]] = {}
    where: Mapping[Any, Any] = sharding.batch_sharding(mesh).devices_indices_map((rows,))
    for device, index in where.items():
        spans.setdefault(device.process_index, set()).add(index[0].indices(rows)[:2])
    parts = sorted({tuple(sorted(span)) for span in spans.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} cuts rows across processes; make mesh.data * mesh.fsdp a multiple "
            f"of the {len(spans)} processes, or mesh.context * mesh.tensor a multiple of the devices of each"
        )
    return parts.index(tuple(sorted(spans[jax.process_index()]))), len(parts)


class AnyProcess:
    """Reduce a flag over all processes, again and again: true where it is true in any of them."""

    def __init__(self, mesh: Mesh) -> None:
        """Compile nothing yet; with one process nothing ever is."""
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def now(self, flag: bool) -> bool:
        """Reduce this flag and wait for the result."""
        self._pending = None
        return self.lagged(flag)

    def lagged(self, flag: bool) -> bool:
        """Start to reduce this flag and return the result of the call before; the first call waits for its own.

        Every process calls it equally often, so all of them get the same result at the same call.
        """
        if jax.process_count() == 1:
            return flag
        flags = jax.make_array_from_callback((self._split.mesh.size,), self._split, lambda _: np.array([flag]))
        result, self._pending = self._pending, self._any(flags)
        return bool(self._pending if result is None else result)
