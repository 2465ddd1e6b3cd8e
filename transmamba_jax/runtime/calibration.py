"""Records of the implementations that are right and fast on a device, and the kernels that follow from them.

`transmamba calibrate` writes a record; training, generation and evaluation look for the one of their device, versions
and shapes. There is one file per key in `folder()`. A file that cannot be read, or is of another format, is ignored
with a line in the log.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax

from pallas_kernels.table import Candidate, Measured, Table
from transmamba_jax import __version__
from transmamba_jax.model_config import KernelsConfig, MeasuredKernels, ModelConfig
from transmamba_jax.runtime import hardware, paths
from transmamba_jax.runtime.logs import LOGGER

FORMAT = 1
"""Of the file; another one is not read."""

Operation = Literal["forward", "forward+backward", "state"]
Purpose = Literal["train", "read"]
Outcome = Literal["passed", "passed over", "wrong", "failed", "hung", "died"]

_CALLS: dict[Purpose, Operation] = {"train": "forward+backward", "read": "forward"}
SHAPES = ("num_heads", "num_groups", "head_dim", "state_dim", "dtype")
"""Options of a model that its record goes by."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one implementation with one chunk size."""

    operator: Literal["ssd", "attention"]
    name: str
    chunk_size: int | None
    """Tokens; None: the implementation chooses its own, or has none."""
    outcome: Outcome
    message: str = ""
    """Reason of an outcome that is not "passed"."""
    seconds: dict[Operation, dict[int, float]] = dataclasses.field(default_factory=dict)
    """Median time of a call by operation and tokens of a row."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Measurements of one device."""

    key: dict[str, Any]
    """Device, driver, versions and shapes; see `key_of`."""
    made: str
    """Date and time, UTC."""
    rows: int
    """Rows of the calls that were timed."""
    results: tuple[Result, ...]
    source: str = ""
    """File that it was read from."""

    def table(self, operator: str, operation: Operation) -> tuple[Measured, ...]:
        """Return the implementations that passed, by length and time."""
        timed: dict[int, list[tuple[float, Candidate]]] = {}
        for result in self.results:
            if result.operator == operator and result.outcome == "passed":
                for length, seconds in result.seconds.get(operation, {}).items():
                    timed.setdefault(length, []).append((seconds, Candidate(result.name, result.chunk_size)))
        fastest_first = lambda found: tuple(candidate for _, candidate in sorted(found, key=lambda pair: pair[0]))
        return tuple(Measured(length, fastest_first(found)) for length, found in sorted(timed.items()))

    def excluded(self, operator: str) -> tuple[tuple[str, str], ...]:
        """Return the implementations that ran and did not pass with any chunk size, each with the reason."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            if result.operator == operator:
                found.setdefault(result.name, []).append(result)
        reasons = []
        for name, results in found.items():
            ran = [result for result in results if result.outcome != "passed over"]
            if ran and all(result.outcome != "passed" for result in ran):
                reasons.append((name, f"it is {ran[0].outcome!r} in the record {self.source}"))
        return tuple(reasons)

    def kernels(self, options: KernelsConfig, purpose: Purpose) -> MeasuredKernels:
        """Return the options with this record's tables behind those that are None.

        The measured chunk size is taken where `chunk_size` is at its default; any other value of it is kept.
        """
        operation = _CALLS[purpose]
        calls, states = self.table("ssd", operation), self.table("ssd", "state")
        if options.chunk_size != KernelsConfig().chunk_size:
            calls, states = _names_alone(calls), _names_alone(states)
        attention = self.table("attention", operation)
        no_ssd, no_attention = self.excluded("ssd"), self.excluded("attention")
        return MeasuredKernels(
            **dataclasses.asdict(options),
            ssd_table=Table(self.source, calls, states, no_ssd) if calls or no_ssd else None,
            attention_table=(
                Table(self.source, attention, excluded=no_attention) if attention or no_attention else None
            ),
        )


def _names_alone(rows: tuple[Measured, ...]) -> tuple[Measured, ...]:
    return tuple(Measured(row.length, tuple(dict.fromkeys(Candidate(c.name) for c in row.order))) for row in rows)


def folder() -> Path:
    """Return the folder of the records: `calibration` in the user's cache folder."""
    return paths.user_cache() / "calibration"


def device_name() -> str:
    """Return the kind of the default device, and for a CPU its processor, of which JAX knows no name."""
    device = jax.devices()[0]
    return f"cpu: {hardware.processor()}" if device.platform == "cpu" else device.device_kind


def key_of(model: ModelConfig) -> dict[str, Any]:
    """Return what a record must agree on with a model that uses it; starts JAX's backend."""
    return {
        "device": device_name(),
        "driver": _driver(),
        "jax": jax.__version__,
        "transmamba_jax": __version__,
        "shapes": {name: getattr(model, name) for name in SHAPES},
    }


def _driver() -> str:
    """Return the version of the runtime behind JAX, and of NVIDIA's kernel module where there is one."""
    runtime = " ".join(jax.devices()[0].client.platform_version.split())
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", module.read_text()) if module.exists() else None
    return f"{runtime}, NVIDIA {found[1]}" if found else runtime


def file_of(key: dict[str, Any]) -> Path:
    """Return the file of the record with a key."""
    checksum = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    device = re.sub(r"[^A-Za-z0-9]+", "-", str(key["device"])).strip("-").lower()[:40]
    return folder() / f"{device}-{checksum}.json"


def write(record: Record, file: Path) -> None:
    """Write a record atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(record, source=""))}
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def read(file: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: it cannot be read, or is of another format.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']}, and {FORMAT} is read")
        results = tuple(_result(found) for found in tree["results"])
        return Record(dict(tree["key"]), str(tree["made"]), int(tree["rows"]), results, str(file))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the calibration record {file} is not used: {reason}") from None


def _result(tree: dict[str, Any]) -> Result:
    seconds = {
        operation: {int(length): float(value) for length, value in lengths.items()}
        for operation, lengths in tree["seconds"].items()
    }
    return Result(**{**tree, "seconds": seconds})


def find(model: ModelConfig) -> Record | None:
    """Return the record of this device, these versions and the model's shapes, or None; starts JAX's backend."""
    key = key_of(model)
    try:
        file = file_of(key)
        if not file.exists():
            return None
        record = read(file)
        if record.key != key:
            raise ValueError(f"the calibration record {file} is not used: its key is {record.key}, not {key}")
    except (OSError, ValueError) as error:  # no home folder, or one that may not be read, too
        LOGGER.warning("%s", error)
        return None
    return record


def kernels(model: ModelConfig, options: KernelsConfig, purpose: Purpose) -> KernelsConfig:
    """Return the options, with this device's measurements behind those that are None where there is a record.

    Args:
        model: its heads and dtype are part of the record's key.
        options: names given win over any measurement; those that already have measurements are returned as they are.
        purpose: "train" looks at the times of forward and backward pass, "read" at those of the forward pass.
    """
    if isinstance(options, MeasuredKernels) or (options.ssd is not None and options.attention is not None):
        return options
    record = find(model)
    if record is None:
        return options
    chosen = record.kernels(options, purpose)
    LOGGER.info("kernels by the record %s: %s", record.source, describe(chosen))
    return chosen


def describe(options: KernelsConfig) -> str:
    """Name the implementations that options ask for: the given ones, or the first of each measured length."""
    tables = (options.ssd_table, options.attention_table) if isinstance(options, MeasuredKernels) else (None, None)
    parts = []
    for operator, name, table in zip(("ssd", "attention"), (options.ssd, options.attention), tables, strict=True):
        parts.append(
            f"{operator} {name or 'by device and shape'}" if name or table is None else _fastest(operator, table)
        )
    return ", ".join(parts)


def _fastest(operator: str, table: Table) -> str:
    found: dict[Candidate, list[int]] = {}
    for row in table.calls:
        found.setdefault(row.order[0], []).append(row.length)
    chunk = lambda candidate: "" if candidate.chunk_size is None else f" (chunks of {candidate.chunk_size})"
    if not found:
        return f"{operator} by device and shape without {', '.join(name for name, _ in table.excluded)}"
    shown = [f"{c.name}{chunk(c)} at {'/'.join(map(str, lengths))} tokens" for c, lengths in found.items()]
    return f"{operator} {', '.join(shown)}"


def to_tree(options: KernelsConfig) -> dict[str, Any]:
    """Return options with their tables as JSON keeps them; `from_tree` reads them."""
    return dataclasses.asdict(options)


def from_tree(tree: dict[str, Any]) -> KernelsConfig:
    """Read what `to_tree` wrote.

    Raises:
        ValueError: it is not of that form.
    """

    def rows(found: list[Any]) -> tuple[Measured, ...]:
        return tuple(Measured(int(row["length"]), tuple(Candidate(*each) for each in row["order"])) for row in found)

    def table(found: dict[str, Any] | None) -> Table | None:
        if found is None:
            return None
        excluded = tuple((str(name), str(reason)) for name, reason in found.get("excluded", ()))
        return Table(found["source"], rows(found["calls"]), rows(found["states"]), excluded)

    try:
        if "ssd_table" not in tree:
            return KernelsConfig(**tree)
        tables = {name: table(tree[name]) for name in ("ssd_table", "attention_table")}
        return MeasuredKernels(**{**tree, **tables})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"kernels are not of the form that is read here: {error}") from None
