"""Helpers for tests of whole runs: a signal at a chosen call, and two runs that must have ended alike."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import transmamba_jax as tm
from tests.training.support import Little
from transmamba_jax import checkpoint
from transmamba_jax.config import Config
from transmamba_jax.runtime import logs
from transmamba_jax.training.metrics import TIMING


def train(settings: Config) -> int:
    """Train `Little`, and show the lines of the library."""
    with logs.shown():
        return tm.train(settings, model=Little(settings.model))


def before_call(owner: Any, name: str, count: int, accident: Callable[[], object]) -> None:
    """Let an accident happen when `owner.name` is called for the `count`-th time."""
    original, calls = getattr(owner, name), 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            accident()
        return original(*args, **kwargs)

    setattr(owner, name, struck)


def strike(owner: Any, name: str, number: int, count: int) -> None:
    """Send this process a signal when `owner.name` is called for the `count`-th time."""
    before_call(owner, name, count, lambda: os.kill(os.getpid(), number))


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_same_end(workdir: Path, straight: Path, step: int) -> None:
    """Compare state, data position and metrics with a run that had no accident, bit for bit."""
    found, expected = (checkpoint.restore(folder / "checkpoints") for folder in (workdir, straight))
    assert found.step == expected.step == step
    assert found.data_states == expected.data_states
    arrays = lambda saved: jax.device_get((saved.params, saved.state))
    jax.tree.map(np.testing.assert_array_equal, arrays(found), arrays(expected))
    assert metrics_of(workdir) == metrics_of(straight)


def lines_of(settings: Config) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics."""
    text = (Path(settings.workdir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def steps_of(settings: Config) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    return checkpoint.complete_steps(Path(settings.workdir) / "checkpoints")
