"""Stop requests: SIGTERM, SIGHUP or Ctrl-C asks the run to stop at the next safe place; a second Ctrl-C ends it."""

import os
import signal
import socket
import threading
from types import TracebackType

from transmamba_jax.runtime.logs import LOGGER

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved: EX_TEMPFAIL, the same command continues it."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_CLOSE = 0  # no signal has this number


class Preemption:
    """Context in which SIGTERM, SIGINT and SIGHUP set `requested` instead of ending the process.

    SIGHUP, which a terminal sends when it closes, is left alone where it is ignored: nohup asks for that.

    Python runs signal handlers between bytecodes of the main thread, which never come while XLA compiles. The
    interpreter itself writes each signal's number to a socket, and a thread reads it there: so a request is
    acknowledged, and a second Ctrl-C obeyed, whatever the main thread is doing.

    Another thread than the main one can install no handlers: signals do there what the program does with them.
    """

    def __init__(self) -> None:
        """Install nothing yet; `with` does."""
        self._requested = threading.Event()
        self._installed = threading.current_thread() is threading.main_thread()

    @property
    def requested(self) -> bool:
        """Return whether a signal has asked the run to stop."""
        return self._requested.is_set()

    def __enter__(self) -> "Preemption":
        if not self._installed:
            LOGGER.info("not in the main thread: SIGTERM and Ctrl-C do not save and stop this run")
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno())
        heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._installed:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.send(bytes([_CLOSE]))
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _note(self, *_: object) -> None:
        # The listener does the same; this makes the request visible to the very next line of the main thread.
        self._requested.set()

    def _listen(self) -> None:
        interrupts = 0
        while (number := self._reader.recv(1)[0]) != _CLOSE:
            if number not in _SIGNALS:
                continue
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                os._exit(128 + signal.SIGINT)
            self._requested.set()
            again = " again" if interrupts else " twice"
            name = signal.Signals(number).name
            LOGGER.warning("%s: saving and stopping; Ctrl-C%s ends the run at once", name, again)
