"""The run lock: one run at a time writes to a work directory.

`<workdir>/run.lock` names the run that holds it; an empty file is a free lock. The run keeps an exclusive `flock` on
the file to its end, and renews the file's modification time: a lease.

On the owner's machine the flock decides. The kernel releases it however the process ends, kill -9 included, and the
next run takes the lock over. On another machine the flock may not be seen, so the lease decides: a run that did not
renew it for `LEASE_SECONDS` is dead. A job that is requeued on another node waits for that and starts by itself.
A run that was suspended for so long finds, before its next checkpoint, that it has lost the lock, and stops.

A work directory in a bucket has a lock of another kind: `bucket_lock.py`.

The first of several processes holds the lock for all of them.
"""

import contextlib
import fcntl
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from transmamba_jax.runtime import storage
from transmamba_jax.training import bucket_lock, lock_owner

FILE = "run.lock"
LEASE_SECONDS = 120.0
"""Age of a lease at which a run on another machine is taken for dead; it is renewed six times as often."""

_log = logging.getLogger(__name__)


class RunLock:
    """A lock that is held: renews its lease in a thread."""

    def __init__(self, path: Path, content: str, period: float) -> None:
        self._path, self._content, self._period = path, content, period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Read the lock again.

        Raises:
            ValueError: another run has taken it over.
        """
        content = shown(self._path.parent)
        owner = lock_owner.parse(content)
        if owner is not None and content != self._content:
            raise lock_owner.RunningElsewhereError(lock_owner.taken_over(self._path.parent, owner))

    def close(self) -> None:
        """Stop renewing."""
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._ended.wait(self._period):
            # A directory that is gone or not reachable for a moment is the business of whoever writes there.
            with contextlib.suppress(OSError):
                if self._path.read_text(encoding="utf-8") == self._content:
                    os.utime(self._path)


@contextlib.contextmanager
def hold(
    workdir: Path, lease: float = LEASE_SECONDS, stopped: Callable[[], bool] = lambda: False
) -> Iterator[RunLock | bucket_lock.BucketLock | None]:
    """Hold the lock of `workdir`, which is made if it is not there; `lease` in seconds, the same for all runs.

    Waits for the lease of a run on another machine to end, or until `stopped()`: the lock is not held then, and None
    is yielded.

    Raises:
        ValueError: another run has it, and the message says which one and what to do; or it cannot be written.
    """
    if storage.is_remote(workdir):
        with bucket_lock.hold(workdir, lease, stopped) as found:
            yield found
        return
    path, owner = Path(workdir) / FILE, lock_owner.describe_myself()
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(path.open("a+", encoding="utf-8"))
            held = _acquire(path, stream, lease, stopped)
            content = json.dumps(owner)
            if held:
                _write(stream, content)
        except OSError as error:
            raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}; use another --workdir") from None
        if not held:
            yield None
            return
        lock = RunLock(path, content, lease / 6)
        try:
            yield lock
        finally:
            lock.close()
            # A directory that was deleted meanwhile, or a lock that another run took, is not ours.
            if shown(path.parent) == content:
                with contextlib.suppress(OSError):
                    _write(stream, "")


def shown(workdir: Path) -> str:
    """Return the lock as this process sees it: processes that see different ones do not share the directory."""
    try:
        return (workdir / FILE).read_text(encoding="utf-8")
    except OSError as error:
        return f"{error.strerror}"


def _acquire(path: Path, stream: TextIO, lease: float, stopped: Callable[[], bool]) -> bool:
    """Return True when the lock is free or its owner dead; the flock is held then, where the file system has one.

    False: `stopped()` while it waited.
    """
    seen: float | None = None
    begin = time.monotonic()
    while True:
        free = _try_flock(stream)
        content = path.read_text(encoding="utf-8")  # opened again: network file systems refresh at an open
        owner = lock_owner.parse(content)
        if owner is None:
            if free is False:
                raise lock_owner.RunningElsewhereError(
                    f"{path.parent} belongs to another run that starts or ends now; try again"
                )
            if content:
                _log.warning("%s is not readable (%r): taking it over", path, content[:40])
            return True
        if free is not None and owner["machine"] == lock_owner.machine():
            if free:
                _log.warning("%s: %s, no longer runs: taking the lock over", path, lock_owner.shown(owner))
                return True
            raise lock_owner.RunningElsewhereError(lock_owner.still_runs(path.parent, owner))
        renewed = path.stat().st_mtime
        age = _now(path.parent) - renewed
        # The second condition ends the wait for a file whose time is in the future.
        if age > lease or time.monotonic() - begin > lease:
            limit = f"more than {lease:.0f} s: taking it over"
            _log.warning("%s: %s, last renewed its lock %.0f s ago, %s", path, lock_owner.shown(owner), age, limit)
            return True
        if seen is None:
            seen = renewed
            until = f"waiting until it is renewed again, or until {lease:.0f} s have passed without"
            _log.warning("%s belongs to %s, which renewed it %.0f s ago; %s", path, lock_owner.shown(owner), age, until)
        elif renewed != seen:
            raise lock_owner.RunningElsewhereError(
                f"{path.parent} belongs to another run: {lock_owner.shown(owner)}, renewed its lock "
                f"{max(age, 0):.0f} s ago and loses it after {lease:.0f} s without: it is "
                "running; stop it, or use another --workdir"
            )
        if stopped():
            return False
        time.sleep(min(1.0, lease / 20))


def _try_flock(stream: TextIO) -> bool | None:
    """Take the kernel's lock; False: another open file has it; None: this file system has no such locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{FILE}.") as probe:
        return os.fstat(probe.fileno()).st_mtime


def _write(stream: TextIO, text: str) -> None:
    stream.truncate(0)
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
