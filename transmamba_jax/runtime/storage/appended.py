"""Files that grow line by line.

A file of a folder is appended to. An object cannot be: its bytes are kept in memory and uploaded as a whole by a
thread, at each write, but not more often than the service takes (one object, once a second) nor than five per cent
of the time. `flush` returns when all bytes are in the bucket. An object that another program has written meanwhile,
such as a run that took over from one that was suspended, is left as it is.
"""

import errno
import threading
import time
from pathlib import Path
from typing import Protocol

from transmamba_jax.runtime.storage.files import is_remote

_PERIOD = 1.0
_SHARE = 20  # of the time of an upload between two of them


class AppendedFile(Protocol):
    """A file that bytes are appended to. Bytes that the storage refuses are kept and written first next time."""

    def write(self, content: bytes) -> None:
        """Add bytes, handed to the system before this returns, or to the thread that uploads.

        Raises:
            OSError: not all of them could be, or an upload since the last call failed.
        """

    def flush(self) -> None:
        """Return when all bytes are with the storage.

        Raises:
            OSError: they could not be written.
        """

    def close(self) -> None:
        """Close the file, after one more attempt to write the pending bytes.

        Raises:
            OSError: it failed.
        """


def append_to(path: Path) -> AppendedFile:
    """Open a file to append to."""
    return _UploadedFile(path) if is_remote(path) else LocalFile(path)


class LocalFile:
    """A file of a folder."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, content: bytes) -> None:
        """Append; see `AppendedFile`."""
        self._waiting += content
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def flush(self) -> None:
        """Write the pending bytes; see `AppendedFile`."""
        self.write(b"")

    def close(self) -> None:
        """Close; see `AppendedFile`."""
        try:
            self.write(b"")
        finally:
            self._file.close()


class _UploadedFile:
    """An object of a bucket."""

    def __init__(self, path: Path) -> None:
        from transmamba_jax.runtime.storage import gcs

        self._path = path
        found = gcs.read_versioned(str(path))
        self._generation = found.generation
        self._content = bytearray(found.content)
        self._uploaded = len(self._content)
        self._change = threading.Condition()
        self._error: OSError | None = None  # that no call has raised yet
        self._stalled = False  # an upload failed, and the bytes wait for the next call
        self._hurry = self._closed = False
        self._ended = False  # the thread ended, by `close` or by an error that nobody expected
        self._thread = threading.Thread(target=self._run, name=f"upload {path.name}", daemon=True)
        self._thread.start()

    def write(self, content: bytes) -> None:
        with self._change:
            self._content += content
            error, self._error, self._stalled = self._error, None, False
            self._change.notify_all()
        if error is not None:
            raise error

    def flush(self) -> None:
        with self._change:
            self._stalled, self._hurry = self._ended, True
            self._change.notify_all()
            self._change.wait_for(lambda: self._uploaded == len(self._content) or self._stalled)
            self._hurry = False
            error, self._error = self._error if self._stalled else None, None
            if self._ended and self._uploaded < len(self._content):
                error = OSError(errno.EIO, f"{self._path} is no longer uploaded: its thread ended with an error")
        if error is not None:
            raise error

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._change:
                self._closed = True
                self._change.notify_all()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._upload()
        finally:
            with self._change:
                self._ended = self._stalled = True
                self._change.notify_all()

    def _upload(self) -> None:
        pause = 0.0
        while True:
            with self._change:
                self._change.wait_for(self._due)
                if self._closed:
                    return
                self._change.wait_for(lambda: self._hurry or self._closed, timeout=pause)
                content = bytes(self._content)
            begin = time.monotonic()
            try:
                self._write(content)
                error = None
            except OSError as failure:
                error = failure
            pause = max(_PERIOD, _SHARE * (time.monotonic() - begin))
            with self._change:
                self._error, self._stalled = error, error is not None
                if error is None:
                    self._uploaded = len(content)
                self._change.notify_all()

    def _write(self, content: bytes) -> None:
        """Write the object where it is the one that was read or written here last, or gone."""
        from transmamba_jax.runtime.storage import gcs

        try:
            written = gcs.write_versioned(str(self._path), content, self._generation)
        except FileExistsError:
            written = gcs.read_versioned(str(self._path))
            if written.generation == 0:
                written = gcs.write_versioned(str(self._path), content, 0)
            elif written.content != content:  # else the answer of an attempt that succeeded was lost
                raise gcs.BucketError(
                    f"{self._path} was written by another program, and is left as it is; delete it, and this run "
                    "writes all of its lines again"
                ) from None
        self._generation = written.generation

    def _due(self) -> bool:
        return self._closed or (not self._stalled and self._uploaded < len(self._content))
