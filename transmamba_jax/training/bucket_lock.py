"""The run lock of a work directory in a bucket: an object that is made on a condition and renewed as a lease.

`<workdir>/run.lock` names the run that holds it; without the object the lock is free. It is created on the condition
that there is none, renewed (written again with the same bytes) and taken over on the condition that its version is the
one that was read, and deleted at the end. Of several runs, one meets a condition.

A run that does not renew its lock for `lease` seconds, by the clock of the service, is dead, and so is one whose
process has ended on this machine. A request that failed may have been served, and its repetition then fails for its
condition: the bytes of the object tell whose it is.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from transmamba_jax.training import lock_owner

if TYPE_CHECKING:
    from transmamba_jax.runtime.storage.gcs import Versioned

_log = logging.getLogger(__name__)


class BucketLock:
    """A lock that is held: renews its lease in a thread."""

    def __init__(self, workdir: Any, held: "Versioned", period: float) -> None:
        self._workdir, self._held, self._period = workdir, held, period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Read the lock again; a bucket that does not answer is reported by the next write to it.

        Raises:
            ValueError: another run has taken it over.
        """
        from transmamba_jax.runtime.storage import gcs

        try:
            found = gcs.read_versioned(_url(self._workdir))
        except OSError:
            return
        owner = lock_owner.parse(found.content.decode("utf-8", "replace"))
        if owner is not None and found.content != self._held.content:
            raise lock_owner.RunningElsewhereError(lock_owner.taken_over(self._workdir, owner))

    def close(self) -> None:
        """Stop renewing, and free the lock where it is ours."""
        from transmamba_jax.runtime.storage import gcs

        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            gcs.delete_versioned(_url(self._workdir), self._held.generation)

    def _renew(self) -> None:
        while not self._ended.wait(self._period):
            # A lock that another run took over is found by `check`; one that was deleted is made again.
            with contextlib.suppress(OSError):
                self._held = _write(self._workdir, self._held.content, self._held.generation)


@contextlib.contextmanager
def hold(workdir: Any, lease: float, stopped: Callable[[], bool]) -> Iterator[BucketLock | None]:
    """Hold the lock of a work directory in a bucket; see `run_lock.hold`.

    Raises:
        ValueError: another run has it; or the bucket is not there or cannot be written.
    """
    content = json.dumps(lock_owner.describe_with_token()).encode()
    try:
        held = _acquire(workdir, content, lease, stopped)
    except FileExistsError:
        raise lock_owner.RunningElsewhereError(
            f"{workdir} belongs to another run that starts or ends now; try again"
        ) from None
    except FileNotFoundError:
        raise ValueError(
            f"workdir {workdir}: there is no bucket {workdir.bucket}; make it (gcloud storage buckets create "
            f"gs://{workdir.bucket}), or use another --workdir"
        ) from None
    except OSError as error:
        raise ValueError(_unusable(workdir, error)) from None
    if held is None:
        yield None
        return
    lock = BucketLock(workdir, held, lease / 6)
    try:
        yield lock
    finally:
        lock.close()


def _acquire(workdir: Any, content: bytes, lease: float, stopped: Callable[[], bool]) -> "Versioned | None":
    """Return the lock when it is free or its owner dead; None: `stopped()` while it waited."""
    from transmamba_jax.runtime.storage import gcs

    seen, begin = 0, time.monotonic()
    while True:
        found = gcs.read_versioned(_url(workdir))
        owner = lock_owner.parse(found.content.decode("utf-8", "replace"))
        runs = owner is not None and lock_owner.runs(owner)
        if owner is None or runs is False:
            if owner is not None:
                _log.warning("%s: %s, no longer runs: taking the lock over", workdir, lock_owner.shown(owner))
            return _write(workdir, content, found.generation)
        if runs:
            raise lock_owner.RunningElsewhereError(lock_owner.still_runs(workdir, owner))
        age = _now(workdir, content) - found.updated if not seen else time.monotonic() - begin
        if age > lease:
            limit = f"more than {lease:.0f} s: taking it over"
            who = lock_owner.shown(owner)
            _log.warning("%s: %s, last renewed its lock %.0f s ago, %s", workdir, who, age, limit)
            return _write(workdir, content, found.generation)
        if not seen:
            seen, begin = found.generation, time.monotonic() - max(age, 0.0)
            until = f"waiting until it is renewed again, or until {lease:.0f} s have passed without"
            who = lock_owner.shown(owner)
            _log.warning("%s belongs to %s, which renewed it %.0f s ago; %s", workdir, who, age, until)
        elif found.generation != seen:
            raise ValueError(
                f"{workdir} belongs to another run: {lock_owner.shown(owner)}, renewed its lock just now and loses it "
                f"after {lease:.0f} s without: it is running; stop it, or use another --workdir"
            )
        if stopped():
            return None
        time.sleep(min(1.0, lease / 20))


def _write(workdir: Any, content: bytes, generation: int) -> "Versioned":
    """Write the lock where its version is still `generation`, or where it has these bytes already.

    Raises:
        FileExistsError: it is another run's.
        OSError: it cannot be written.
    """
    from transmamba_jax.runtime.storage import gcs

    try:
        return gcs.write_versioned(_url(workdir), content, generation)
    except FileExistsError:
        found = gcs.read_versioned(_url(workdir))
        if found.content == content:
            return found
        if found.generation == 0 and generation != 0:
            return gcs.write_versioned(_url(workdir), content, 0)
        raise


def _now(workdir: Any, content: bytes) -> float:
    """Return the time by the clock of the service."""
    from transmamba_jax.runtime.storage import gcs

    probe = workdir / f"run.lock.{json.loads(content)['token']}"
    written = gcs.write_versioned(str(probe), b"?", 0)
    probe.unlink(missing_ok=True)
    return written.updated


def _url(workdir: Any) -> str:
    return str(workdir / "run.lock")


def _unusable(workdir: Any, error: OSError) -> str:
    from transmamba_jax.runtime.storage.gcs import BucketError

    if isinstance(error, BucketError) and error.denied:
        return (
            f"workdir {workdir} cannot be read and written: {error.strerror}, with the role Storage Object User "
            "(roles/storage.objectUser); or use another --workdir"
        )
    return f"workdir {workdir} cannot be read and written: {error.strerror or error}; try again, or another --workdir"
