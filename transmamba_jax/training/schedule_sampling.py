"""Training under random schedules, so that one checkpoint is good under many: `train.schedule_sampling`.

    none    every step runs `model.transpoints`
    pool    every step runs one schedule of `train.schedule_pool`: sliced, one compiled program each
    rows    every row has TransPoints of its own: one compiled program, which computes both branches everywhere

The steps after `train.schedule_sampling_steps` run `model.transpoints`, without distillation.

With `train.schedule_distillation` each step also runs the fixed schedule `train.schedule_teacher`, whose predictions
the drawn one learns from; see `loss`.

A draw is a function of (train.seed, step), made on the host: it is the same on every process, and a resumed run draws
what the run without a break draws.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from transmamba_jax import schedule
from transmamba_jax.config import Config
from transmamba_jax.model import TransMamba

Rows = dict[str, np.ndarray]

_SALT = 0x7A9
"""Keeps the draws apart from other uses of the seed."""


def resolve(config: Config, entries: Sequence[str], option: str) -> list[schedule.Schedule]:
    """Return the schedules that an option lists, one TransPoint per layer.

    Raises:
        ValueError: an entry is no schedule, or has more TransPoints than the model has layers.
    """
    layers, found = config.model.num_layers, []
    for entry in entries:
        try:
            found.append(schedule.expand(schedule.choose(entry, config.data.seq_len, layers), layers))
        except ValueError as error:
            raise ValueError(f"{option}: {entry!r}: {error}") from None
    return found


def pool(config: Config) -> list[schedule.Schedule]:
    """Return the schedules of `train.schedule_pool`; see `resolve`."""
    return resolve(config, config.train.schedule_pool, "train.schedule_pool")


def require_transmamba(model: nn.Module, option: str) -> None:
    """Refuse an option that needs TransPoints for a model that has none."""
    if not isinstance(model, TransMamba):
        raise ValueError(f"{option} needs a TransMamba, found {type(model).__name__}: leave it out for other models")


def programs(config: Config, model: nn.Module) -> list[tuple[Config, nn.Module]]:
    """Return config and model of every compiled step: each schedule of the pool, or the one that there is.

    The last one is that of the steps after the random ones, where there are such steps.

    Raises:
        ValueError: a schedule does not fit, or the model is no `TransMamba`.
    """
    if config.train.schedule_sampling != "none":
        require_transmamba(model, f"train.schedule_sampling={config.train.schedule_sampling}")
    if config.train.schedule_distillation:
        teacher(config, model)
    drawn = [(config, model)]
    if config.train.schedule_sampling == "pool":
        drawn = [(config, _under(config, model, points)) for points in pool(config)]
    if not is_fixed(config, config.train.steps - 1):
        return drawn
    return [*drawn, (without(config), model)]


def without(config: Config) -> Config:
    """Return a config that trains under `model.transpoints` alone, without distillation."""
    options = {"sampling": "none", "pool": (), "sampling_steps": 0, "distillation": 0.0}
    fixed: dict[str, Any] = {f"schedule_{name}": value for name, value in options.items()}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fixed))


def is_fixed(config: Config, step: int) -> bool:
    """Tell whether step `step` (from 0) is one of those after the random ones."""
    return 0 < config.train.schedule_sampling_steps <= step


def teacher(config: Config, model: nn.Module) -> nn.Module:
    """Return the model under `train.schedule_teacher`, whose predictions are the soft targets of distillation.

    Raises:
        ValueError: the schedule does not fit, or the model is no `TransMamba`.
    """
    require_transmamba(model, f"train.schedule_distillation={config.train.schedule_distillation:g}")
    (points,) = resolve(config, (config.train.schedule_teacher,), "train.schedule_teacher")
    return _under(config, model, points)


def _under(config: Config, model: nn.Module, points: schedule.Schedule) -> nn.Module:
    return model.clone(config=dataclasses.replace(config.model, transpoints=points))


def of_step(config: Config, step: int) -> int:
    """Return which of `programs` step `step` (from 0) runs."""
    drawn = len(config.train.schedule_pool) if config.train.schedule_sampling == "pool" else 1
    return drawn if is_fixed(config, step) else int(_generator(config, step).integers(drawn))


def of_rows(config: Config, step: int) -> np.ndarray:
    """Return the TransPoints of every row of step `step` (from 0), int32 [B, L].

    With a pool every row runs one of its schedules. Without one, every row and layer draws from 0, the powers of two
    below T, and T, all equally likely.
    """
    generator, rows = _generator(config, step), config.data.batch_size
    if config.train.schedule_pool:
        schedules = np.array(pool(config), np.int32)
        return schedules[generator.integers(len(schedules), size=rows)]
    seq_len = config.data.seq_len
    points = np.array([0, *(2**power for power in range((seq_len - 1).bit_length())), seq_len], np.int32)
    return points[generator.integers(len(points), size=(rows, config.model.num_layers))]


def with_transpoints(config: Config, batch: Rows, step: int, part: int, parts: int) -> Rows:
    """Return this process's batch, rows `part` of `parts`, with the TransPoints of its rows where rows draw them."""
    if config.train.schedule_sampling != "rows" or is_fixed(config, step):
        return batch
    rows = config.data.batch_size // parts
    return {**batch, "transpoints": of_rows(config, step)[part * rows : (part + 1) * rows]}


def _generator(config: Config, step: int) -> np.random.Generator:
    return np.random.default_rng((_SALT, config.train.seed, step))
