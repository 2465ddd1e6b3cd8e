"""Metrics: where they are written, and the arithmetic behind throughput and utilisation."""

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from transmamba_jax.config import Config
from transmamba_jax.report.costs import flops_per_token
from transmamba_jax.runtime import hardware, host_memory, storage
from transmamba_jax.runtime.logs import LOGGER
from transmamba_jax.training import schedule_sampling
from transmamba_jax.training.writers import Writers

Record = dict[str, Any]

TIMING = (
    "tokens_per_second",
    "model_flops_per_second",
    "utilisation",
    "compile_seconds",
    "peak_memory_bytes",
)
"""Fields of a training line that depend on the machine and not on the run."""


def peak_memory_bytes() -> int:
    """Return the most memory that a local device has held; on a CPU, the most that this process has held."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(peaks) if peaks else host_memory.peak_bytes()


def training_flops_per_token(config: Config) -> float | None:
    """Return the FLOPs that a trained token needs in the mean over the run, see `report.costs.flops_per_token`.

    Those of a pool are the mean over its schedules. None where a step computes more than one schedule (`rows`,
    distillation) or a layer has more weights (the ablation `separate_weights`).
    """
    train = config.train
    if train.schedule_sampling == "rows" or train.schedule_distillation or config.model.ablation == "separate_weights":
        return None
    at = lambda points: flops_per_token(
        dataclasses.replace(config.model, transpoints=points), config.data.seq_len, config.kernels.chunk_size
    )
    own = at(config.model.transpoints)
    if train.schedule_sampling == "none":
        return own
    share = min(train.schedule_sampling_steps or train.steps, train.steps) / train.steps
    return share * statistics.fmean(map(at, schedule_sampling.pool(config))) + (1 - share) * own


class Throughput:
    """Count steps and the seconds spent in them, without evaluations and saves."""

    def __init__(self, config: Config, devices: list[jax.Device]) -> None:
        """Make a clock that stands still until `resume`; FLOPs are those of the mean step of the run."""
        self._tokens = config.data.batch_size * config.data.seq_len
        self._flops = training_flops_per_token(config)
        self._peak = hardware.peak_flops(devices)
        self._steps, self._seconds = 0, 0.0
        self._since: float | None = None

    def step_done(self) -> None:
        """Count a step."""
        self._steps += 1

    def pause(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def resume(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def read(self) -> Record:
        """Return the rates since the last reading and reset the counts."""
        self.pause()
        rate = self._steps * self._tokens / self._seconds
        self._steps, self._seconds = 0, 0.0
        self.resume()
        rates = {"tokens_per_second": rate}
        if self._flops is not None:
            rates["model_flops_per_second"] = rate * self._flops
            if self._peak is not None:
                rates["utilisation"] = rate * self._flops / self._peak
        return rates


class MetricsWriter:
    """Append records to metrics.jsonl and give their numbers to writers; drop an earlier run's lines beyond `step`."""

    def __init__(self, workdir: Path, step: int, writers: Writers | None = None) -> None:
        """Continue after `step`; a line that a killed run left unfinished goes as well. `close` closes `writers`."""
        path = workdir / "metrics.jsonl"
        self.kept = _lines_up_to(path, step)
        storage.replace_text(path, "".join(line + "\n" for line, _ in self.kept), "metrics.jsonl.new")
        self._file = storage.append_to(path)
        self._writers = Writers({}) if writers is None else writers
        self.written = False
        """A line was written since the start."""

    def has(self, step: int, name: str) -> bool:
        """Return whether the field `name` of `step` was written before this process started."""
        return any(record["step"] == step and name in record for _, record in self.kept)

    def write(self, record: Record) -> None:
        """Append one line, see `storage.AppendedFile`; a value that is not finite is written as null.

        Raises:
            OSError: it could not be written, and goes before the next one.
        """
        self.written = True
        clean = {name: _clean(value) for name, value in record.items()}
        line = (json.dumps(clean, allow_nan=False) + "\n").encode()
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        tags = {name if "/" in name else f"train/{name}": value for name, value in numbers.items()}
        try:
            self._file.write(line)
        finally:
            self._writers.write(record["step"], tags)

    def flush(self) -> None:
        """Return when every line is with the storage.

        Raises:
            OSError: a line could not be written.
        """
        self._file.flush()

    def close(self) -> None:
        """Close the file and the writers.

        Raises:
            OSError: lines that waited to be written still could not be.
        """
        try:
            self._file.close()
        finally:
            self._writers.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # what ended the run is the better message
                raise


def _lines_up_to(path: Path, step: int) -> list[tuple[str, Record]]:
    """Return the lines of an earlier run up to `step`; keep a copy of a file that has foreign lines, or loses all."""
    if not path.exists():
        return []
    if step == 0:
        if lines := path.read_bytes():
            kept = storage.append_to(path.with_suffix(".jsonl.old"))  # after those of an earlier start
            kept.write(lines)
            kept.close()
            LOGGER.info("no checkpoint of the earlier run: its lines go from %s to %s", path, f"{path.name}.old")
        return []
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    complete = text[: text.rfind("\n") + 1].splitlines()
    records = [(line, _parse(line)) for line in complete]
    foreign = [index for index, (_, record) in enumerate(records, start=1) if record is None]
    if foreign:
        copy = path.with_suffix(".jsonl.old")
        storage.copy(path, copy)
        LOGGER.warning(
            "%s: line %d%s has no step and is left out; the file as it was is %s",
            path,
            foreign[0],
            f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else "",
            copy,
        )
    return [(line, record) for line, record in records if record is not None and record["step"] <= step]


def _parse(line: str) -> Record | None:
    """Read a line; None: it is not one that a run wrote, or is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _clean(value: Any) -> Any:
    """Return null for a number that is not finite; of a list of lists, [start, stop, NaN] is left out."""
    if isinstance(value, dict):
        return {name: _clean(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        holds = lambda each: isinstance(each, list | tuple) and any(map(_nonfinite, each))
        return [_clean(each) for each in value if not holds(each)]
    return None if _nonfinite(value) else value
