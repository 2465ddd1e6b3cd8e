"""Run the candidates in processes of their own, one process at a time, and make a record of how each ended.

This process does not start JAX's backend: a TPU serves one process at a time.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

from transmamba_jax.calibrate.candidates import Job
from transmamba_jax.runtime.calibration import Outcome, Record, Result
from transmamba_jax.runtime.logs import LOGGER

WORKER = (sys.executable, "-m", "transmamba_jax.calibrate.worker")

Event = dict[str, Any]

_LONGEST = 500  # characters of a message


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a process: what it said, and how it went where it did not do all that was asked."""

    events: list[Event]
    outcome: Outcome
    message: str


def make_record(job: Job, worker: Sequence[str] = WORKER) -> Record:
    """Check and time every candidate and return the record.

    Raises:
        RuntimeError: no process can start JAX and name the device.
    """
    described = _ask(worker, "describe", job, [])
    if described.outcome != "passed":
        raise RuntimeError(f"the device cannot be asked for its kind: {described.outcome}: {described.message}")
    (device,) = (event for event in described.events if event["event"] == "device")
    job = dataclasses.replace(job, rows=device["rows"])
    checked: list[Result] = []
    for tree in device["candidates"]:
        candidate = Result(**tree)
        checked.append(_checked(worker, job, candidate))
        LOGGER.info("%s", line(checked[-1]))
    timed = _timed(worker, job, checked)
    passed_over = [Result(**tree) for tree in device["passed_over"]]
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return Record(device["key"], made, job.rows, (*timed, *passed_over))


def title(result: Result) -> str:
    """Name a candidate."""
    chunk = "" if result.chunk_size is None else f", chunks of {result.chunk_size}"
    return f"{result.operator} {result.name}{chunk}"


def line(result: Result) -> str:
    """Say how a candidate ended."""
    return f"{title(result)}: {result.outcome}{': ' * bool(result.message)}{result.message}"


def _checked(worker: Sequence[str], job: Job, candidate: Result) -> Result:
    ending = _ask(worker, "check", job, [candidate])
    wrong = [event["message"] for event in ending.events if event["event"] == "wrong"]
    if wrong:
        return dataclasses.replace(candidate, outcome="wrong", message=wrong[0])
    return dataclasses.replace(candidate, outcome=ending.outcome, message=ending.message)


def _timed(worker: Sequence[str], job: Job, checked: list[Result]) -> list[Result]:
    """Time those that passed, all in one process; where one breaks it, time the others again without that one."""
    results = list(checked)
    while indices := [index for index, result in enumerate(results) if result.outcome == "passed"]:
        ending = _ask(worker, "time", job, [results[index] for index in indices])
        if ending.outcome != "passed":
            running = [event["candidate"] for event in ending.events if event["event"] == "running"]
            if not running:
                raise RuntimeError(f"the process that times ended before its first call: {ending.message}")
            broken = indices[running[-1]]
            results[broken] = dataclasses.replace(results[broken], outcome=ending.outcome, message=ending.message)
            LOGGER.info("while it was timed, %s", line(results[broken]))
            continue
        for place, index in enumerate(indices):
            results[index] = dataclasses.replace(results[index], seconds=_medians(ending.events, place))
        break
    return results


def _medians(events: Sequence[Event], place: int) -> dict[Any, dict[int, float]]:
    times: dict[str, dict[int, list[float]]] = {}
    for event in events:
        if event["event"] == "time" and event["candidate"] == place:
            times.setdefault(event["operation"], {}).setdefault(event["length"], []).append(event["seconds"])
    return {name: {length: statistics.median(found) for length, found in rows.items()} for name, rows in times.items()}


def _ask(worker: Sequence[str], task: str, job: Job, candidates: Sequence[Result]) -> Ending:
    """Run a process to its end, or end it when it gives no sign of life for `job.limit` seconds."""
    request = {
        "task": task,
        "job": dataclasses.asdict(job),
        "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
    }
    # What a process takes of a GPU's memory at its start would be missing to the one after it.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            list(worker),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            _send(process.stdin, request)
            events, hung = _events(lines, job.limit)
            hung = hung or not _ended(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it started: they are a group of their own
                process.wait()
        reader.join()
        process.stdout.close()
        errors.seek(0)
        return _ending(events, hung, process.returncode, errors.read(), job.limit)


def _send(stream: IO[str], request: Event) -> None:
    with contextlib.suppress(BrokenPipeError):  # it is dead, which its exit code says
        json.dump(request, stream)
        stream.close()


def _ended(process: "subprocess.Popen[str]", seconds: float = 10) -> bool:
    """Wait for the end of a process that has closed its output."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for text in stream:
        lines.put(text)
    lines.put(None)


def _events(lines: "queue.Queue[str | None]", limit: float) -> tuple[list[Event], bool]:
    """Return the events until the output ends, and whether it did not within `limit` seconds of the last line."""
    events: list[Event] = []
    while True:
        try:
            text = lines.get(timeout=limit)
        except queue.Empty:
            return events, True
        if text is None:
            return events, False
        if text.startswith('{"event"'):  # a library may print, too
            events.append(json.loads(text))


def _ending(events: list[Event], hung: bool, code: int, errors: str, limit: float) -> Ending:
    if hung:
        return Ending(events, "hung", f"no sign of life for {limit:g} s")
    if code == 0:
        return Ending(events, "passed", "")
    if code == 1 and "Traceback (most recent call last)" in errors:
        return Ending(events, "failed", _exception(errors))
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((text.strip() for text in reversed(errors.splitlines()) if text.strip()), "")
    return Ending(events, "died", f"{how}{': ' * bool(last)}{last[:_LONGEST]}")


def _exception(errors: str) -> str:
    """Return the exception at the end of a traceback in one line, without the notes that JAX adds to it."""
    lines = errors.rpartition("Traceback (most recent call last)")[2].splitlines()[1:]
    message = list(itertools.dropwhile(lambda text: not text or text[0].isspace(), lines))
    own = itertools.takewhile(lambda text: not text.startswith("----"), message)
    return " ".join(text.strip() for text in own)[:_LONGEST]
