"""Memory of the host: its peak, and a C library that keeps what a step frees, where the step runs on a CPU.

XLA takes a step's temporaries from malloc and frees them after it. glibc gives such large blocks back to the system,
which hands out fresh pages, zeroed one fault at a time, at the next step: a third of the time of a step on a CPU.
"""

import ctypes
import re
import resource
import sys
from pathlib import Path

# Of <malloc.h>: mallopt's names of what may be set, and the values that switch each off.
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NONE = -4, 0
_ARENA_MAX, _ONE = -8, 1


def keep_freed() -> bool:
    """Keep freed memory for the next step, for the rest of the process; tell whether that was arranged.

    To be called before JAX starts its threads, since each may open an arena of its own, and only one can grow without
    limit. Does nothing where an accelerator is at hand, whose steps take no memory of the host, and where the C library
    is not glibc.
    """
    if not sys.platform.startswith("linux") or _accelerator():
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    options = ((_ARENA_MAX, _ONE), (_MMAP_MAX, _NONE), (_TRIM_THRESHOLD, _NEVER))
    return all([mallopt(name, value) for name, value in options])


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


def _accelerator() -> bool:
    """Tell whether the kernel knows a GPU or a TPU; JAX cannot be asked before it has started."""
    return any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0"))
