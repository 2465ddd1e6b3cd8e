"""Several processes, one a host: how they find one another, agree, fail together, and which rows each one reads.

The only module that touches `jax.distributed`. Every process runs the same program on the same config; what one of them
alone can see (a signal, a full disk, a missing file) is told to the others here, because a process that went another
way would leave them waiting in a collective for ever. With one process everything here is immediate.

Texts go through the key-value store of JAX's coordination service, which any thread may use and which needs no device;
the answer to "was anyone asked to stop?", which every step needs, goes over the devices and is read a step late.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
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
from jax._src import distributed  # the key-value store has no public name; orbax uses it in the same way
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transmamba_jax import sharding
from transmamba_jax.config import Config, HostsConfig

PATIENCE_SECONDS = 600
"""How long processes wait for one another where a healthy one may be busy: writing a checkpoint, reading data."""

_numbers = itertools.count()


def start(config: HostsConfig) -> None:
    """Join the processes of this run, if it has several; before JAX is used for anything else.

    Where they are comes from `hosts.coordinator`, `hosts.processes` and `hosts.process`, and what of it is missing from
    the environment: that of Cloud TPU, Slurm, Open MPI or JAX_COORDINATOR_ADDRESS, which alone is reason enough to look
    for others, or, where one of the options asks for several, of any that JAX knows (Kubernetes with `jax[k8s]`). A
    process that dies later, or leaves with an error, ends the others: JAX stops them when it has been silent for
    `hosts.heartbeat`.

    A process that is alone after `hosts.timeout` says so and ends with exit code 2.

    Raises:
        ValueError: the environment does not say what is missing.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    asked = coordinator is not None or config.processes is not None or config.process is not None
    if config.processes == 1 or not (asked or _environment_has_several()):
        return
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, found {coordinator!r}; or set hosts.coordinator")
    # Its handler of SIGTERM would take the place of the run's own, and orbax asks it on one process only.
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime ends a process that waits too long in the middle of C++, with a stack trace; this is earlier.
    alarm = threading.Timer(config.timeout, _give_up, [config.timeout])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=config.timeout + 60,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"this process cannot join the others: {error} (hosts.coordinator={coordinator}, "
            f"hosts.processes={config.processes}, hosts.process={config.process}). What is None the environment must "
            f"say{_outside_srun()}; --hosts.processes 1 trains with this process alone"
        ) from error
    finally:
        alarm.cancel()
    say(f"{jax.process_count()} processes; when one is silent for {config.heartbeat} s the others end too")


def _environment_has_several() -> bool:
    """Tell whether the environment names other processes: what JAX's own detection reads, where it finds several."""
    counts = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    # JAX puts the TPU among its platforms on a Cloud TPU VM; what is around it is known to the VM's metadata alone.
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return any(count != "1" for count in counts) or "tpu" in (platforms or "")


def _outside_srun() -> str:
    """Say what is missing where a Slurm job has several tasks, and this process is none of them."""
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
        "same hosts.coordinator and hosts.processes and its own hosts.process, see that the port is open, or raise "
        "hosts.timeout",
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
    """Tell whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def say(*lines: str) -> None:
    """Print lines from the first process alone."""
    if is_first():
        print(*lines, sep="\n  ", flush=True)


def exchange(key: str, text: str, seconds: float = PATIENCE_SECONDS) -> list[str]:
    """Give a text to every process and return those of all, in order. Any thread may call it; a key is used once.

    Raises:
        TimeoutError: some process did not come in time.
    """
    if jax.process_count() == 1:
        return [text]
    client = distributed.global_state.client
    if client is None:
        raise ValueError(f"jax has {jax.process_count()} processes that did not join; start them with train.py")
    folder = f"transmamba_jax/{key}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    try:
        client.wait_at_barrier(folder, math.ceil(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"not every process came to {key!r} within {seconds:.0f} s: {one_line(error)}") from error
    found = {int(name.rpartition("/")[2]): value for name, value in client.key_value_dir_get(folder)}
    return [found[index] for index in range(jax.process_count())]


def of_first(value: Any) -> Any:
    """Return what the first process has, as JSON keeps it; every process calls it, from its main thread."""
    return json.loads(exchange(f"value-{next(_numbers)}", json.dumps(value if is_first() else None))[0])


@contextlib.contextmanager
def together(kind: type[Exception] = ValueError) -> Iterator[None]:
    """Fail everywhere when the body fails anywhere: the process where it did raises its own error, the others `kind`.

    Every process enters it, from its main thread. The body must not wait for other processes.
    """
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    failed = _failures(exchange(f"together-{next(_numbers)}", one_line(mine)))
    if mine is not None:
        raise mine
    if failed:
        raise kind(failed)


class Meetings:
    """A row of points where all processes wait for one another, on any thread; a failure ends it for all of them."""

    def __init__(self, name: str) -> None:
        """Make it in every process, from its main thread; `name` is made unique."""
        self.name = f"{name}-{next(_numbers)}"
        self._count = 0
        self._failure = ""

    def meet(self, problem: str = "", seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for all processes.

        Raises:
            OSError: one of them has a problem, or did not come; the message says which, and no further meeting is held.
        """
        if not self._failure:
            self._count += 1
            try:
                self._failure = _failures(exchange(f"{self.name}/{self._count}", problem, seconds))
            except TimeoutError as error:
                self._failure = str(error)
        if self._failure:
            raise OSError(self._failure)

    def leave(self, error: BaseException) -> None:
        """Tell the others, at the next point, that this process failed; nothing where they know of a failure."""
        if not self._failure:
            with contextlib.suppress(OSError):
                self.meet(one_line(error))


def one_line(error: BaseException | None) -> str:
    """Write an error as one line; what happened is at its end, where a long one is cut in the middle."""
    text = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"


def _failures(problems: list[str]) -> str:
    """Describe who failed: "process 1: no space left on device"."""
    by_text: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        if problem:
            by_text.setdefault(problem, []).append(index)
    return "; ".join(f"{_processes(who)}: {problem}" for problem, who in by_text.items())


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def config_facts(config: Config) -> dict[str, str]:
    """Return every option but `hosts.process`, which is each process's own."""
    shared = dataclasses.replace(config, hosts=dataclasses.replace(config.hosts, process=None))
    return {
        f"{section}.{name}" if isinstance(values, dict) else section: repr(value)
        for section, values in dataclasses.asdict(shared).items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def require_same(facts: Mapping[str, str], seconds: float = PATIENCE_SECONDS) -> None:
    """Compare facts that have to be the same in every process.

    Raises:
        ValueError: one differs; the message has every value and who found it.
    """
    found = [json.loads(text) for text in exchange(f"facts-{next(_numbers)}", json.dumps(dict(facts)), seconds)]
    lines = []
    for name in dict.fromkeys(itertools.chain.from_iterable(found)):
        values: dict[str, list[int]] = {}
        for index, each in enumerate(found):
            values.setdefault(each.get(name, "nothing"), []).append(index)
        if len(values) > 1:
            lines.append(f"{name}: {'; '.join(f'{value} in {_processes(who)}' for value, who in values.items())}")
    if lines:
        raise ValueError("\n  ".join(["the processes of this run differ:", *lines]))


def machine_facts() -> dict[str, str]:
    """Return what has to be the same on every host before they compute together: code, versions, local devices."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    kernels, command = (root.parent / "pallas_kernels").rglob("*.py"), root.parent.glob("train.py")
    for path in sorted([*root.rglob("*.py"), *kernels, *command]):
        digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    return {
        "code": f"digest {digest.hexdigest()}",
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "local devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def row_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Return which of how many parts of a batch's rows this process reads; processes with the same rows share a part.

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
            f"the mesh {dict(mesh.shape)} cuts rows across processes: {parts}; make mesh.data * mesh.fsdp a multiple "
            f"of the {len(spans)} processes, or mesh.context * mesh.tensor a multiple of the devices of each"
        )
    return parts.index(tuple(sorted(spans[jax.process_index()]))), len(parts)


class Vote:
    """Asks all processes a yes-no question over and over; the answer is yes when one says yes."""

    def __init__(self, mesh: Mesh) -> None:
        """Compile nothing yet; with one process nothing ever is."""
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def now(self, yes: bool) -> bool:
        """Ask and wait for the answer."""
        self._pending = None
        return self.later(yes)

    def later(self, yes: bool) -> bool:
        """Ask and return the answer to the question before, which nobody waits for; the first time, wait.

        Every process calls it as often, so all of them get the same answer at the same place.
        """
        if jax.process_count() == 1:
            return yes
        flags = jax.make_array_from_callback((self._split.mesh.size,), self._split, lambda _: np.array([yes]))
        answer, self._pending = self._pending, self._any(flags)
        return bool(self._pending if answer is None else answer)
