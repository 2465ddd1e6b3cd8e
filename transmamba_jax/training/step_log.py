"""The metrics of steps: fetched one step late, so that logging never stalls the device."""

from collections.abc import Callable

import jax

from transmamba_jax.config import Config
from transmamba_jax.training.console import Console
from transmamba_jax.training.loss import Metrics
from transmamba_jax.training.metrics import Record, Throughput, peak_memory_bytes
from transmamba_jax.training.step import TrainState, first_nonfinite, leaf_name


class NonFiniteError(ArithmeticError):
    """The loss or the gradient was not finite for `train.max_nonfinite_steps` steps in a row."""


class StepLog:
    """Fetch metrics one step late, stop a diverged run, and write the lines that are due."""

    def __init__(self, config: Config, console: Console, write: Callable[[Record], None]) -> None:
        """Report to `console`; `write` takes the records."""
        self._config, self._console, self._write = config, console, write
        self._pending: tuple[int, Metrics, Record] | None = None
        self.clock = Throughput(config, jax.devices())
        self._compile_seconds = 0.0
        self._nonfinite_steps = 0

    def start(self, compile_seconds: float) -> None:
        """Start the clock of the first step."""
        self._compile_seconds = compile_seconds
        self._console.begin()
        self.clock.resume()

    def push(self, step: int, metrics: Metrics, state: TrainState, facts: Record) -> None:
        """Take the metrics of a step that is under way and finish those of the step before; `facts` join its line."""
        self.flush(state)
        self._pending = step, metrics, facts

    def flush(self, state: TrainState) -> int:
        """Wait for what is pending, write it, and return how many of the last steps in a row were skipped.

        Raises:
            NonFiniteError: too many.
        """
        if self._pending is not None:
            step, metrics, facts = self._pending
            self._pending = None
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            self._finish(step, {**values, **facts}, state)
        return self._nonfinite_steps

    def _finish(self, step: int, values: Record, state: TrainState) -> None:
        self.clock.step_done()
        train = self._config.train
        nonfinite_leaf, self._nonfinite_steps = values.pop("nonfinite_leaf"), values["nonfinite_steps"]
        if self._nonfinite_steps > 0:
            self._console.say(f"step {step} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}")
        if self._nonfinite_steps >= train.max_nonfinite_steps:
            raise NonFiniteError(_diagnosis(step, self._nonfinite_steps, nonfinite_leaf, values, state))
        if step % train.log_every == 0 or step == train.steps:
            timing = {"compile_seconds": self._compile_seconds, "peak_memory_bytes": peak_memory_bytes()}
            record = {"step": step, **values, **self.clock.read(), **timing}
            self._write(record)
            self._console.report(record)
        self._console.advance(values["loss"])


def _diagnosis(step: int, nonfinite_steps: int, nonfinite_leaf: int, values: Record, state: TrainState) -> str:
    parameter = first_nonfinite(state.params)
    if parameter is not None:
        where = f"parameter {parameter}"
    elif nonfinite_leaf < len(jax.tree.leaves(state.params)):
        where = f"the gradient of {leaf_name(state.params, nonfinite_leaf)}"
    else:
        where = "the loss itself, with a finite gradient"
    return (
        f"{nonfinite_steps} steps in a row up to step {step} had a non-finite loss or gradient (loss {values['loss']}, "
        f"gradient norm {values['grad_norm']}); the first non-finite leaf is {where}. The parameters are still those "
        f"of step {step - nonfinite_steps} and nothing was saved over the last checkpoint"
    )
