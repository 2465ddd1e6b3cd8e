"""S3 through s3fs, with errors of the file system: botocore has errors of its own, such as those of credentials."""

import errno
import functools
from typing import Any

import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError

_CREDENTIALS = "Give this machine credentials for the bucket: aws configure, or AWS_ACCESS_KEY_ID and its secret"


class _FileSystem:
    """The file system of s3fs, with another class of errors."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        return _translated(found) if callable(found) else found


def _translated(call: Any) -> Any:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except BotoCoreError as error:
            help_ = f". {_CREDENTIALS}" if isinstance(error, NoCredentialsError) else ""
            raise OSError(errno.EIO, f"{error}{help_}") from error

    return run


def filesystem(**options: Any) -> Any:
    """Return the file system; it sees what other processes write."""
    return _FileSystem(fsspec.filesystem("s3", use_listings_cache=False, **options))
