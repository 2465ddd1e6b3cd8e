"""Name the process that holds a run lock, and tell whether it still runs."""

import datetime
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any


def describe_myself() -> dict[str, Any]:
    """Describe this process for the lock that it takes."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since, "machine": machine()}


def describe_with_token() -> dict[str, Any]:
    """Describe this process so that no other lock has the same description, and another process can look for it."""
    return {**describe_myself(), "space": _process_space(), "begin": _begin(os.getpid()), "token": uuid.uuid4().hex}


def parse(content: str) -> dict[str, Any] | None:
    """Read a lock; None: it is free, or not readable because its owner died while it took it."""
    try:
        owner = json.loads(content)
    except ValueError:
        return None
    complete = isinstance(owner, dict) and {"host", "process", "since", "machine"} <= owner.keys()
    return owner if complete else None


def shown(owner: dict[str, Any]) -> str:
    """Name an owner in a message."""
    return f"process {owner['process']} on {owner['host']}, started {owner['since']}"


class RunningElsewhereError(ValueError):
    """The work directory belongs to another run."""


def still_runs(workdir: object, owner: dict[str, Any]) -> str:
    """Refuse a work directory whose owner runs."""
    return f"{workdir} belongs to another run: {shown(owner)}, is still running; stop it, or use another --workdir"


def taken_over(workdir: object, owner: dict[str, Any]) -> str:
    """Tell a run that it has lost its lock."""
    return (
        f"{workdir} was taken over by another run: {shown(owner)}. This run did not renew its lock in time (was it "
        "suspended?) and stops without saving"
    )


def machine() -> str:
    """Name this machine since it was started: hosts may share a name, and a restart ends every process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()} {boot}"


def runs(owner: dict[str, Any]) -> bool | None:
    """Tell whether an owner that `describe_with_token` described still runs; None: that cannot be seen from here.

    A process number means the same process only on one machine, in one PID namespace, and with one start time.
    """
    space = _process_space()
    if owner["machine"] != machine() or not space or owner.get("space") != space or not owner.get("begin"):
        return None
    return _begin(owner["process"]) == owner["begin"]


def _process_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _begin(process: int) -> str:
    """Return the time at which a process started, in ticks since the machine did; "" where there is none such."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie runs no more
