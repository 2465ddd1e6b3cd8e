"""Keep compiled programs on disk, so that the second start of a command compiles nothing.

Commands call `keep_programs`; a program that uses the library decides for itself, by JAX's own options. JAX's
cache finds a program by its lowered module, so that it has to trace first. `compile_or_read` needs no trace.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import jax
from jax.experimental import serialize_executable

from transmamba_jax import _IMPORTED
from transmamba_jax.runtime import hardware
from transmamba_jax.runtime.paths import user_cache

_MAX_BYTES = 2 * 2**30
_MAX_KEYED_BYTES = 2**29
_MIN_SECONDS = 0.3  # a program that compiles faster is not worth its file
_LOCK_SECONDS = 5
_SUFFIX = ".program"  # of what `compile_or_read` keeps
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")  # that write a part of a program
_LOGGER = logging.getLogger(__name__)
_folder: Path | None = None  # of programs that are found without tracing; None: they are not kept


def keep_programs() -> None:
    """Keep the programs that this process compiles in the user's cache folder, the least recently used go first.

    To be called before the first program is compiled. Settings of the user's own win: `JAX_COMPILATION_CACHE_DIR`
    names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
    """
    global _folder
    settings = jax.config.values  # what the environment and earlier updates say
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = user_cache() / "programs" / _processor()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # JAX runs what it finds there
        tempfile.TemporaryFile(dir=folder).close()  # it can be written to, and the disk is not full
        _remove_incomplete(folder)
    except (OSError, ValueError) as error:
        _LOGGER.warning("compiled programs are not kept for the next start: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    _folder = folder


def compile_or_read(
    lower: Callable[[], jax.stages.Lowered], key: Sequence[object] | None, devices: Sequence[jax.Device]
) -> jax.stages.Compiled:
    """Compile a program; or read the one that an earlier start compiled under the same key, without tracing.

    Programs are kept after a call of `keep_programs`, where there is one process. Above 512 MiB the least recently used
    ones are removed. A program that JAX's cache has under another key is traced and read from there at each start.

    Args:
        lower: traces and lowers the program.
        key: values whose `repr` decides the program, together with the sources of this package, the versions of its
            libraries, the settings of JAX, and `devices`. None: the program is not kept.
        devices: those that the program runs on, in order.
    """
    file = _file(key, devices)
    if file is None:
        return lower().compile()
    program = _read(file, devices)
    if program is None:
        lowered, hits = lower(), _count_hits()
        before = hits["count"]
        program = lowered.compile()
        # An executable that was deserialized lacks functions when it is serialized again, on a CPU (jax 0.10.2): its
        # first call raises "Function ... not found".
        if hits["count"] == before and not _sources_changed():
            _write(file, program)
    return program


def read(key: Sequence[object] | None, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
    """Return the program that an earlier start kept under a key, see `compile_or_read`; None: there is none."""
    file = _file(key, devices)
    return None if file is None else _read(file, devices)


def _file(key: Sequence[object] | None, devices: Sequence[jax.Device]) -> Path | None:
    if _folder is None or key is None or jax.process_count() > 1 or _sources_changed():
        return None
    return _folder / f"{_digest(key, devices)}{_SUFFIX}"


@functools.cache
def _count_hits() -> dict[str, int]:
    """Return a count of the hits of JAX's cache from now on."""
    hits = {"count": 0}

    def listen(event: str, **_: object) -> None:
        hits["count"] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(listen)
    return hits


def _digest(key: Sequence[object], devices: Sequence[jax.Device]) -> str:
    client = devices[0].client
    known = (
        [repr(value) for value in key],
        [(device.id, device.device_kind) for device in devices],
        (client.platform, client.platform_version, jax.device_count()),
        sorted((name, repr(value)) for name, value in jax.config.values.items()),
        sorted((name, value) for name, value in os.environ.items() if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        (sys.version, [importlib.metadata.version(name) for name in _LIBRARIES], _sources()),
    )
    return hashlib.sha256(repr(known).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Hash every module of the two packages: a change of any of them may change a program."""
    digest = hashlib.sha256()
    for package, root, module in _modules():
        digest.update(repr((package, str(module.relative_to(root)))).encode() + module.read_bytes())
    return digest.hexdigest()


def _sources_changed() -> bool:
    """Tell whether a module was written since the import: the program that runs is not that of the sources then."""
    return any(module.stat().st_mtime > _IMPORTED for _, _, module in _modules())


def _modules() -> Iterator[tuple[str, Path, Path]]:
    for package in ("transmamba_jax", "pallas_kernels"):
        root = Path(sys.modules[package].__path__[0])
        for module in sorted(root.rglob("*.py")):
            yield package, root, module


def _read(file: Path, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
    """Read a program; None: there is none that can be read."""
    if not file.exists():
        return None
    try:
        executable, arguments, results = pickle.loads(file.read_bytes())  # the folder is this user's alone
        os.utime(file)  # its last use
        structures = jax.tree.structure(arguments), jax.tree.structure(results)
        return serialize_executable.deserialize_and_load(executable, *structures, execution_devices=devices)
    except Exception as error:  # whatever is wrong with the file: it can be made again
        _LOGGER.info("compiled again: %s cannot be read (%s)", file, error)
        return None


def _write(file: Path, program: jax.stages.Compiled) -> None:
    """Write an executable with the trees of its arguments and results; one that cannot be written is left out."""
    try:
        executable, *structures = serialize_executable.serialize(program)
        # A PyTreeDef cannot be pickled. A tree of that structure, with numbers for leaves, can.
        trees = (jax.tree.unflatten(structure, range(structure.num_leaves)) for structure in structures)
        waiting = file.with_name(f"{file.name}.{os.getpid()}")
        waiting.write_bytes(pickle.dumps((executable, *trees)))
        waiting.replace(file)
        _remove_oldest(file.parent)
    except Exception as error:  # a full disk; a device whose executables cannot be serialized
        _LOGGER.info("the next start traces and compiles again: %s is not written (%s)", file, error)


def _remove_oldest(folder: Path) -> None:
    """Remove the programs that were used least recently until the rest fits; those that a kill left incomplete too."""
    left = _MAX_KEYED_BYTES
    stats = [(file.stat(), file) for file in folder.glob(f"*{_SUFFIX}*")]
    for stat, file in sorted(stats, key=lambda pair: pair[0].st_mtime, reverse=True):
        if stat.st_size <= left:
            left -= stat.st_size
        else:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                file.unlink()


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


def _processor() -> str:
    """Name the instructions and the number of cores that a CPU program may use, which it is compiled for.

    A home folder is often shared by machines of several kinds, and a machine by jobs with some of its cores each.
    """
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text(encoding="utf-8").splitlines() if flags.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}-{len(hardware.usable_cores())}"
