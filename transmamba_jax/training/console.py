"""Progress of a run: a bar on a terminal, log lines elsewhere."""

import datetime
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from transmamba_jax.runtime import hosts
from transmamba_jax.runtime.logs import LOGGER
from transmamba_jax.training.metrics import Record


class Console:
    """Report the progress of the first process, on a progress bar or in lines of the library's logger."""

    def __init__(self, start: int, steps: int, clock: Callable[[], float] = time.time) -> None:
        """Show the bar where the standard error is a terminal; `clock` gives seconds since the epoch."""
        interactive = sys.stderr is not None and sys.stderr.isatty() and hosts.is_first()
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if interactive else None
        self._start, self._steps, self._clock = start, steps, clock
        self._begun = clock()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self) -> None:
        """Start the clock of the estimated end: the steps begin now."""
        self._begun = self._clock()

    def say(self, text: str) -> None:
        """Log a line."""
        if hosts.is_first():
            LOGGER.info(text)

    def alarm(self, text: str) -> None:
        """Log a line about something that needs a person."""
        if hosts.is_first():
            LOGGER.error("ALARM: %s", text)

    def advance(self, loss: float) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update()

    def report(self, record: Record) -> None:
        """Log a training line, unless the bar shows it."""
        if self._bar is None:
            self.say(
                f"step {record['step']}/{self._steps}  loss {record['loss']:.4f}"
                f"  bits per byte {record['bits_per_byte']:.4f}  gradient norm {record['grad_norm']:.3f}"
                f"  learning rate {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
                f"{self._estimated_end(record['step'])}"
            )

    def _estimated_end(self, step: int) -> str:
        """Estimate when the last step is done, from all that the steps so far took, evaluations and saves included."""
        if step >= self._steps:
            return ""
        now = self._clock()
        seconds = (now - self._begun) / (step - self._start) * (self._steps - step)
        return f"  ends about {datetime.datetime.fromtimestamp(now + seconds):%Y-%m-%d %H:%M}"
