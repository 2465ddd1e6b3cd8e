"""The folder where sources keep what they prepare once: the standard library's set, indexes, unpacked rows."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from transmamba_jax.config import DataConfig
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import expand_path, user_cache


def cache_folder(config: DataConfig) -> Path:
    """Return `data.cache_dir`, or the default.

    Raises:
        ValueError: it is in a bucket, where files can neither be mapped nor locked.
    """
    if config.cache_dir is None:
        return user_cache()
    folder = expand_path(config.cache_dir)
    require(not storage.is_remote(folder), f"data.cache_dir must be a folder of this machine, found {folder}")
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the body runs; other processes wait for it, also on another host of a shared folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        yield
