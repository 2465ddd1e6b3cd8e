"""Writers of metrics beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A writer that fails is one warning: the run continues, and metrics.jsonl has every line.
"""

import contextlib
import importlib.util
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transmamba_jax.config import Config
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.logs import LOGGER
from transmamba_jax.training import trackers

_CLOSE_SECONDS = 60.0
"""Time that a writer has at the end of a run to send pending lines."""


class Writer(Protocol):
    """Destination of the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step, named `train/loss`, `eval/loss` and so on.

        Raises:
            OSError: they could not be written.
        """

    def close(self) -> None:
        """Write pending lines and end.

        Raises:
            OSError: not all of it could be written.
        """


class TensorBoard:
    """Event file of TensorBoard in WORKDIR/tensorboard; it hides what an earlier run wrote beyond `step`."""

    def __init__(self, workdir: Path, step: int) -> None:
        # A third of a second: it looks for clients of every cloud.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._make_event, self._make_summary, self._checksum = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        folder = workdir / "tensorboard"
        # From step 0 too: where the earlier run was killed before its first checkpoint, its numbers are here.
        continues = step > 0 or (folder.is_dir() and any(folder.iterdir()))
        folder.mkdir(exist_ok=True)
        # Not tensorboardX's writer: its thread dies of a full disk, and whoever fills its queue waits for ever.
        self._file = storage.append_to(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")
        with contextlib.suppress(OSError):  # what does not fit is written before the numbers
            self._event(file_version="brain.Event:2")
            if continues:
                self._event(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START), step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append an event; see `Writer`."""
        numbers = [self._make_summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(summary=self._make_summary(value=numbers), step=step)

    def close(self) -> None:
        """Close the file; see `Writer`."""
        self._file.close()

    def _event(self, **fields: Any) -> None:
        """Append length, its checksum, event, its checksum."""
        event = self._make_event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        self._file.write(length + checksums[0] + event + checksums[1])


class OnFirstWrite:
    """A writer that is made with its first numbers, so that the first step does not wait for it."""

    def __init__(self, make: Callable[[], Writer]) -> None:
        self._make = make
        self._writer: Writer | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Make the writer where there is none, and hand it the numbers; see `Writer`."""
        if self._writer is None:
            try:
                self._writer = self._make()
            except OSError:
                raise
            except Exception as error:  # whatever another package raises: the run continues
                raise OSError(f"{type(error).__name__}: {error}") from error
        self._writer.write(step, values)

    def close(self) -> None:
        """Close the writer; see `Writer`."""
        if self._writer is not None:
            self._writer.close()


class Background:
    """A writer in a thread of its own: training never waits for a network, nor is ended by what another package raises.

    After a failure nothing more is written, and every call raises it.
    """

    def __init__(self, make: Callable[[], Writer], close_seconds: float = _CLOSE_SECONDS) -> None:
        """Make the writer in the thread; `close` waits at most `close_seconds` for it."""
        self._queue: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._seconds = close_seconds
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), name="metrics", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the numbers of a step; see `Writer`."""
        self._raise()
        self._queue.put((step, values))

    def close(self) -> None:
        """Wait until all is written; see `Writer`."""
        self._queue.put(None)
        self._thread.join(self._seconds)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"not everything was sent within {self._seconds:g} s")

    def _run(self, make: Callable[[], Writer]) -> None:
        try:
            writer = make()
            while (item := self._queue.get()) is not None:
                writer.write(*item)
            writer.close()
        except BaseException as error:  # whatever another package raises: the run continues
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise OSError(f"{type(self._error).__name__}: {self._error}") from self._error


class Writers:
    """Several writers as one that never raises: the first failure of each is a warning."""

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        """Open the writers; `makers` has their names in messages."""
        self._warned: set[str] = set()
        self._writers: dict[str, Writer] = {}
        for name, make in makers.items():
            try:
                self._writers[name] = make()
            except OSError as error:
                self._warn(name, error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers of a step to every writer."""
        for name, writer in self._writers.items():
            try:
                writer.write(step, values)
            except OSError as error:
                self._warn(name, error)

    def close(self) -> None:
        """Close every writer."""
        for name, writer in self._writers.items():
            try:
                writer.close()
            except OSError as error:
                self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        if name not in self._warned:
            self._warned.add(name)
            LOGGER.warning("%s: %s. The run continues; metrics.jsonl has every line", name, error)


def check_installed(config: Config) -> None:
    """Check that the packages of the writers are there.

    Raises:
        ValueError: one is not, and the message names the extra that has it.
    """
    for package, target in (("wandb", config.train.wandb), ("mlflow", config.train.mlflow)):
        if target is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"train.{package}={target} needs the package {package}: pip install -e '.[{package}]'")


def open_writers(config: Config, workdir: Path, step: int) -> Writers:
    """Open the writers that `train.tensorboard`, `train.wandb` and `train.mlflow` ask for, to continue after `step`."""
    makers: dict[str, Callable[[], Writer]] = {}
    if config.train.tensorboard:
        makers["TensorBoard"] = lambda: OnFirstWrite(lambda: TensorBoard(workdir, step))
    if config.train.wandb is not None:
        makers["Weights & Biases"] = lambda: Background(lambda: trackers.WeightsAndBiases(config, workdir))
    if config.train.mlflow is not None:
        makers["MLflow"] = lambda: Background(lambda: trackers.MLflow(config, workdir))
    return Writers(makers)
