"""What a run prints while it goes."""

import sys

from tqdm import tqdm

from transmamba_jax.runtime import hosts
from transmamba_jax.training.metrics import Record


class Console:
    """A progress bar on a terminal, plain lines elsewhere, from the first process."""

    def __init__(self, start: int, steps: int) -> None:
        """Show the bar, if there is to be one."""
        interactive = sys.stderr.isatty() and hosts.is_first()
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if interactive else None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is None:
            hosts.say(text)
        else:
            self._bar.write(text)

    def advance(self, loss: float) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update()

    def report(self, record: Record, steps: int) -> None:
        """Print a training line, unless the bar shows it."""
        if self._bar is None:
            self.say(
                f"step {record['step']}/{steps}  loss {record['loss']:.4f}  bits per byte {record['bits_per_byte']:.4f}"
                f"  gradient norm {record['grad_norm']:.3f}  learning rate {record['learning_rate']:.2e}"
                f"  {record['tokens_per_second']:,.0f} tokens/s"
            )
