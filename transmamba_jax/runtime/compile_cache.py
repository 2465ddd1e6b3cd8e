"""Keep compiled programs on disk, so that the second start of a command compiles nothing.

Commands call `keep_programs`; a program that uses the library decides for itself, by JAX's own options.
"""

import hashlib
import logging
import platform
import tempfile
from pathlib import Path

import filelock
import jax

from transmamba_jax.runtime.paths import user_cache

_MAX_BYTES = 2 * 2**30
_MIN_SECONDS = 0.3  # a program that compiles faster is not worth its file
_LOCK_SECONDS = 5
_LOGGER = logging.getLogger(__name__)


def keep_programs() -> None:
    """Keep the programs that this process compiles in the user's cache folder, the least recently used go first.

    To be called before the first program is compiled. Settings of the user's own win: `JAX_COMPILATION_CACHE_DIR`
    names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
    """
    settings = jax.config.values  # what the environment and earlier updates say
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = user_cache() / "programs" / _instruction_set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # JAX runs what it finds there
        tempfile.TemporaryFile(dir=folder).close()  # it can be written to, and the disk is not full
        _remove_incomplete(folder)
    except (OSError, ValueError) as error:
        _LOGGER.warning("compiled programs are not kept for the next start: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def _remove_incomplete(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left: a program without the time of its last use.

    Up to jax 0.11 one of them fails every later write of every process (remove this when jax >= 0.12 is required).
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):  # the lock that JAX writes under
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except filelock.Timeout:
        _LOGGER.debug("another process writes to %s: incomplete programs are left", folder)


def _instruction_set() -> str:
    """Name the instructions that a CPU program may use: a home folder is often shared by machines of several kinds."""
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text(encoding="utf-8").splitlines() if flags.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
