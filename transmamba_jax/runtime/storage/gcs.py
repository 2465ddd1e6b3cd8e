"""Google Cloud Storage through gcsfs: requests are retried with a line in the log; objects change on a condition.

Importing this module imports gcsfs and makes the file system here the one that fsspec opens for `gs://`: orbax writes
its metadata through it as well. Listings are not cached, because other processes write to the same folders.
"""

import asyncio
import errno
import functools
import itertools
import logging
import random
from typing import Any, NamedTuple

import fsspec
import gcsfs
from gcsfs.retry import RETRIABLE_EXCEPTIONS, HttpError, NonRetryableError, is_retriable
from google.auth.exceptions import GoogleAuthError, TransportError

_RETRIES = 8  # after 0.25, 0.5, 1, ... 32 s: a minute
_FIRST_DELAY = 0.25
_REQUEST_SECONDS = 120.0
_CREDENTIALS = (
    "Give this machine credentials for the bucket: gcloud auth application-default login, or a service account"
)

_log = logging.getLogger("transmamba_jax.storage")


class BucketError(OSError):
    """A request that failed, after its retries where these could help; the text says which and why."""

    def __init__(self, text: str, denied: bool = False) -> None:
        """Keep the text as `strerror`; `denied`: no credentials, or without permission."""
        super().__init__(errno.EACCES if denied else errno.EIO, text)
        self.denied = denied

    def __str__(self) -> str:
        """Return the text alone. gcsfs looks for "Forbidden" at its beginning."""
        return str(self.strerror)


class FileSystem(gcsfs.GCSFileSystem):
    """The file system of gcsfs with another way to retry."""

    def __init__(self, *args: Any, requests_timeout: Any = _REQUEST_SECONDS, **kwargs: Any) -> None:
        """Set the seconds that a request may take; FSSPEC_GCS_REQUESTS_TIMEOUT sets them from outside."""
        super().__init__(*args, **{"use_listings_cache": False, **kwargs})
        self._seconds = float(requests_timeout)

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        """Send a request, again with growing delays while the service is busy, fails or does not answer.

        gcsfs retries too, but not a request without an answer, and it says nothing.
        """
        send = functools.partial(gcsfs.GCSFileSystem._request.__wrapped__, self, method, path, *args, **kwargs)
        for attempt in itertools.count():
            try:
                return await asyncio.wait_for(send(), self._seconds)
            except (FileNotFoundError, FileExistsError):
                raise
            except (HttpError, OSError, NonRetryableError, GoogleAuthError, *RETRIABLE_EXCEPTIONS) as error:
                # A TimeoutError is an OSError. Of the other ones, gcsfs raises a bare one for 403.
                again = isinstance(error, TimeoutError | TransportError) or is_retriable(error)
                denied = not again and (
                    type(error) is OSError
                    or isinstance(error, NonRetryableError | GoogleAuthError)
                    or getattr(error, "code", None) in (401, 403)
                )
                reason = self._reason(error)
                if denied or not again or attempt == _RETRIES:
                    after = f" ({attempt + 1} attempts)" if attempt else ""
                    text = f"{_shown(method, path, args)}: {reason}{after}"
                    raise BucketError(f"Forbidden: {text}. {_CREDENTIALS}" if denied else text, denied) from error
                delay = _FIRST_DELAY * 2**attempt * random.uniform(1, 1.25)
                what = _shown(method, path, args)
                _log.warning("%s: %s; attempt %d of %d in %.1f s", what, reason, attempt + 2, _RETRIES + 1, delay)
                await asyncio.sleep(delay)

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._seconds:g} s"
        if isinstance(error, HttpError):
            return f"HTTP {error.code} {' '.join(str(error.message).split())[:200]}"
        return " ".join(str(error).splitlines()[1:] or str(error).split()) or type(error).__name__


def _shown(method: str, path: str, args: tuple[Any, ...]) -> str:
    """Name a request: its method and object."""
    name = "/".join(map(str, args)) or path.partition("/b/")[2].partition("?")[0] or path
    return f"{method} {name}"


def filesystem() -> Any:
    """Return the file system, the same object that etils.epath and with it orbax use."""
    return fsspec.filesystem("gcs", finalize_on_close=True)


class Versioned(NamedTuple):
    """Contents of an object and the number of its version, 0 where there is no object."""

    content: bytes
    generation: int
    updated: float
    """Seconds since 1970 by the clock of the service."""


def read_versioned(path: str) -> Versioned:
    """Read an object and its version.

    Raises:
        OSError: it cannot be read.
    """
    files = filesystem()
    bucket, key, _ = files.split_path(path)
    while True:
        try:
            found = files.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        except FileNotFoundError:
            return Versioned(b"", 0, 0.0)
        try:
            _, content = files.call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=found["generation"])
        except FileNotFoundError:
            continue  # replaced or deleted in between
        return Versioned(content, int(found["generation"]), _updated(files, found))


def write_versioned(path: str, content: bytes, generation: int) -> Versioned:
    """Write an object if its version is still `generation`; 0: if there is none.

    Raises:
        FileExistsError: it is another one.
        OSError: it cannot be written.
    """
    files = filesystem()
    bucket, key, _ = files.split_path(path)
    url = f"{files._location}/upload/storage/v1/b/{bucket}/o"
    condition = {"ifGenerationMatch": str(generation)}
    made = files.call("POST", url, uploadType="media", name=key, data=content, json_out=True, **condition)
    return Versioned(content, int(made["generation"]), _updated(files, made))


def delete_versioned(path: str, generation: int) -> None:
    """Delete an object if its version is still `generation`.

    Raises:
        FileExistsError: it is another one.
        OSError: it cannot be deleted.
    """
    files = filesystem()
    bucket, key, _ = files.split_path(path)
    files.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=str(generation))


def _updated(files: Any, found: dict[str, Any]) -> float:
    return float(files._parse_timestamp(found["updated"]).timestamp())


for _protocol in ("gcs", "gs"):
    fsspec.register_implementation(_protocol, FileSystem, clobber=True)
