"""Memory of the host: its peak, and a C library that keeps what a step frees, where the step runs on a CPU.

XLA takes a step's temporaries from malloc and frees them after it. glibc gives such large blocks back to the system,
which hands out fresh pages, zeroed one fault at a time, at the next step: a quarter of the time of a step on a CPU. It
can keep them in its main arena alone, the one that can grow without limit, which belongs to the thread that started the
process. So that thread has to run the steps itself. The arenas of other threads let the compiler's threads work side
by side: with one arena for all, compilation takes a half more time.

Compilation fragments the heap: it leaves tens of thousands of free chunks, here gaps, between what it keeps. malloc
sorts them by size and walks through them at each request of a step, with the lock held that other threads wait for: up
to a fifth of the time of a small model's step.
"""

import ctypes
import functools
import re
import resource
import sys
import threading
from pathlib import Path

# Of <malloc.h>: mallopt's names of what may be set, and the values that switch each off.
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NONE = -4, 0

_GAP_BYTES = range(1024, 2**20)
"""Gaps that are closed: malloc finds smaller ones without a walk, and larger ones are a step's temporaries."""
_GAP_PASSES = 3  # what is left of a gap that was a little larger is the next pass's
_LOWERED, _COMPILED = "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration"
_LONG_LOWERING, _LONG_COMPILATION = 0.05, 0.3  # seconds; faster ones leave few gaps
_pieces: list[int] = []
"""Addresses of the pieces that fill the gaps."""
_lock = threading.Lock()  # of the pieces: programs may be compiled by several threads


def keep_freed() -> bool:
    """Keep freed memory for the next step, for the rest of the process; tell whether that was arranged.

    To be called before JAX knows its devices, by the thread that started the process and that runs the steps: programs
    then run in the thread that calls them, not beside it (`jax_cpu_enable_async_dispatch`). Gaps that long compilations
    leave are closed after them, see `close_gaps`, and opened before the next. Does nothing where an accelerator is at
    hand, whose steps take no memory of the host, and where the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or _accelerator():
        return False
    glibc = _glibc()
    if glibc is None:
        return False
    arranged = all([glibc.mallopt(name, value) for name, value in ((_MMAP_MAX, _NONE), (_TRIM_THRESHOLD, _NEVER))])
    if arranged:
        import jax  # starts no thread

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _close_gaps_between_compilations()
    return arranged


def close_gaps() -> None:
    """Take the free pieces of memory between those in use out of malloc's lists, until `open_gaps`.

    Their pages go back to the system first, so that they cost addresses and no memory. Pieces of a megabyte and more
    stay. Does nothing where the C library is not glibc, or in another thread, whose requests go to another arena.
    """
    glibc = _glibc()
    if glibc is None or threading.current_thread() is not threading.main_thread():
        return
    with _lock:
        glibc.malloc_trim(0)
        for _ in range(_GAP_PASSES):
            # From large to small: a request takes the smallest piece that it fits, which is then one of its own bin.
            for smallest, count in sorted(_gaps(glibc), reverse=True):
                size = smallest - ctypes.sizeof(ctypes.c_size_t)  # a piece begins with its size
                _pieces.extend(address for address in (glibc.malloc(size) for _ in range(count)) if address)


def open_gaps() -> None:
    """Give the pieces that `close_gaps` took back to malloc."""
    glibc = _glibc()
    with _lock:
        while glibc is not None and _pieces:
            glibc.free(_pieces.pop())


def gap_count() -> int:
    """Return the number of free pieces of memory that `close_gaps` would take; 0 where the C library is not glibc."""
    glibc = _glibc()
    return 0 if glibc is None else sum(count for _, count in _gaps(glibc))


def peak_bytes() -> int:
    """Return the most resident memory that this process has had, in bytes.

    On Linux that of the program that runs. `ru_maxrss` begins with the peak of the process that started it.
    """
    if sys.platform.startswith("linux"):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        glibc.malloc.argtypes, glibc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        glibc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
        glibc.open_memstream.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)]
        glibc.open_memstream.restype = ctypes.c_void_p
        glibc.fclose.argtypes = glibc.free.argtypes = [ctypes.c_void_p]
        glibc.mallopt, glibc.malloc_trim  # noqa: B018 -- raises where they are missing
    except (OSError, AttributeError):
        return None
    return glibc


def _gaps(glibc: ctypes.CDLL) -> list[tuple[int, int]]:
    """Return the smallest size in bytes and the number of pieces of each bin of the main arena's list."""
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = glibc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    glibc.malloc_info(0, stream)
    glibc.fclose(stream)
    main_arena = ctypes.string_at(text, size.value).decode("ascii").partition("</heap>")[0]
    glibc.free(text)
    found = re.findall(r'<(?:size|unsorted) from="(\d+)" to="\d+" total="\d+" count="(\d+)"', main_arena)
    sizes = [(int(smallest) & ~15, int(count)) for smallest, count in found]  # the low bits of a size are flags
    return [(smallest, count) for smallest, count in sizes if smallest in _GAP_BYTES]


@functools.cache
def _close_gaps_between_compilations() -> None:
    import jax

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _LOWERED and duration_secs >= _LONG_LOWERING:
            open_gaps()  # for the compiler, which would take new memory for every program
        elif event == _COMPILED and duration_secs >= _LONG_COMPILATION:
            close_gaps()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _accelerator() -> bool:
    """Tell whether the kernel knows a GPU or a TPU; JAX cannot be asked before it has started."""
    return any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0"))
