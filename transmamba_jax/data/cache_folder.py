"""The folder where sources keep what they prepare once: the standard library's set, indexes, unpacked rows."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from transmamba_jax.config import DataConfig
from transmamba_jax.runtime.paths import expand_path, user_cache


def cache_folder(config: DataConfig) -> Path:
    """Return `data.cache_dir`, or the default."""
    return user_cache() if config.cache_dir is None else expand_path(config.cache_dir)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the body runs; other processes wait for it, also on another host of a shared folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        yield
