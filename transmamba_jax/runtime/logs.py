"""Show on a terminal or in a file of output what the library logs.

Library code logs through `logging.getLogger("transmamba_jax")` and never prints. It installs no handler: a program that
uses the library decides what is shown. A notebook shows all with `logging.basicConfig(level="INFO")` and silences it
with `logging.getLogger("transmamba_jax").setLevel("ERROR")`. The commands use `shown`.
"""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, ParamSpec

from tqdm import tqdm

LOGGER = logging.getLogger("transmamba_jax")
"""The logger of the library. `pallas_kernels`, a package of its own, has a second one."""

_KERNELS = logging.getLogger("pallas_kernels")
_FORMAT, _TIME = "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"


class TerminalHandler(logging.Handler):
    """Write records to the standard output, each with a time stamp, above a progress bar where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT, _TIME))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; nothing that happens to the output ends the program."""
        write_line(self.format(record))


@contextlib.contextmanager
def shown(level: int = logging.INFO) -> Iterator[None]:
    """Show the records of the library and its kernels while the body runs.

    Other handlers of the program do not get them meanwhile: no line is shown twice.
    """
    handler = TerminalHandler()
    before = [(logger, logger.level, logger.propagate) for logger in (LOGGER, _KERNELS)]
    for logger, _, _ in before:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, old_level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


def write_line(text: str) -> None:
    """Write a line to the standard output; to the standard error where that is closed or full; else nowhere."""
    try:
        _write(sys.stdout, text)
    except OSError:
        _point_at(sys.stdout, sys.stderr)
        try:
            _write(sys.stdout, text)
        except OSError:
            _point_at(sys.stdout, None)


def _write(stream: IO[str], text: str) -> None:
    tqdm.write(text, file=stream)
    stream.flush()


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Let a command print any text to any standard output.

    A character that the encoding lacks is escaped. An output that is closed at the start becomes the standard error. An
    output whose reader leaves, as `head` does, ends the body without a traceback.
    """
    _open_closed_descriptors()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open)
    if sys.stdout is None:
        sys.stdout = sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _point_at(sys.stdout, None)


Arguments = ParamSpec("Arguments")


def command(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Run the `main` of a command within `safe_output`; a file that cannot be read or written is a line and code 2."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        with safe_output():
            try:
                return main(*args, **kwargs)
            except BrokenPipeError:
                raise
            except OSError as error:
                print(error, file=sys.stderr)
                return 2
        return 0  # the reader left, as `head` does

    return run


def _open_closed_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: a file that takes their number would get what the runtime prints."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _point_at(stream: IO[str], target: IO[str] | None) -> None:
    """Let the descriptor of a stream write to that of another one, or nowhere."""
    with contextlib.suppress(OSError):
        if target is not None:
            os.dup2(target.fileno(), stream.fileno())
            return
    with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), stream.fileno())
