"""The run lock: one run at a time writes to a work directory.

`<workdir>/run.lock` names the process that holds it; an empty file is a free lock. What a run that was killed left
behind is stale when its host is this one and its process is gone (no such process, another one under its number, or
the machine was started anew since): it is taken over, with a line. Whether a process on another host is alive cannot
be known here, so its lock is never taken over. The first of several processes holds it for all of them.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "run.lock"


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Hold the lock of `workdir`, which is made if it is not there.

    Raises:
        ValueError: another run has it, and the message says which one and what to do; or it cannot be written.
    """
    path = Path(workdir) / FILE
    owner = _myself()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _guarded(path) as content:
            _refuse_or_take_over(path, content)
            _write(path, json.dumps(owner))
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}; use another --workdir") from None
    try:
        yield
    finally:
        # A directory that was deleted meanwhile, or a lock that someone removed and another run took, is not ours.
        with contextlib.suppress(OSError), _guarded(path) as content:
            if content == json.dumps(owner):
                _write(path, "")


def shown(workdir: Path) -> str:
    """Return the lock as this process sees it: processes that see different ones do not share the directory."""
    try:
        return (Path(workdir) / FILE).read_text(encoding="utf-8")
    except OSError as error:
        return f"{error.strerror}"


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[str]:
    """Read the lock; nobody else on this host reads or writes it meanwhile."""
    with path.open("a+", encoding="utf-8") as stream:
        # Without file locks (some network file systems) two runs that start in the same instant may both go on.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        yield stream.read()


def _write(path: Path, text: str) -> None:
    with path.open("r+", encoding="utf-8") as stream:
        stream.truncate(0)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _refuse_or_take_over(path: Path, content: str) -> None:
    if not content:
        return
    try:
        owner = json.loads(content)
        host, process, since = owner["host"], owner["process"], owner["since"]
        boot, ticks = owner["boot"], owner["ticks"]
    except (ValueError, KeyError, TypeError):
        # Only a process that died while it took the lock leaves half a line.
        print(f"{path} is not readable ({content[:40]!r}): taking it over", flush=True)
        return
    who = f"process {process} on {host}, started {since}"
    if host != socket.gethostname():
        raise ValueError(
            f"{path.parent} belongs to another run: {who}. Whether it still runs cannot be seen from "
            f"{socket.gethostname()}: if it does not, delete {path}; if it does, use another --workdir"
        )
    if boot == _boot() and _ticks(process) == ticks and _alive(process):
        raise ValueError(
            f"{path.parent} belongs to another run: {who}, is still running; stop it, or use another --workdir"
        )
    why = "no longer runs" if boot == _boot() else "ended when the machine was started anew"
    print(f"{path}: {who}, {why}: taking the lock over", flush=True)


def _myself() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": process,
        "since": since,
        "boot": _boot(),
        "ticks": _ticks(process),
    }


def _boot() -> str | None:
    """Return what names the time since the machine was started; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _ticks(process: int) -> str | None:
    """Return when a process was started, in the system's own count: process numbers are used again."""
    try:
        # The name of the program, in parentheses, may hold anything; start time is field 22 of the line.
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
