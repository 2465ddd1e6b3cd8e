"""The update rule: clipping, then AdamW, or Muon for the layers' matrices and AdamW for the rest.

Learning rates follow an optax schedule of the number of updates, times `optimizer.lr_multipliers`. Weight decay is
decoupled and multiplied by the learning rate; leaves that are not matrices of a matmul (A_log, D, the Δ bias,
convolution biases, norm scales) have none.
"""

import re
from typing import Any

import jax
import optax
from optax import contrib

from transmamba_jax.config import Config, OptimizerConfig
from transmamba_jax.runtime.tree_paths import path_name
from transmamba_jax.training import parameter_groups

NO_DECAY = re.compile(r"(.*/)?(a_log|skip|dt_bias|bias|[a-z_]*norm/scale)")
# Matrices that multiply hidden states, stacked [L, in, out]; convolution taps are depthwise and not among them.
MATRICES = re.compile(r"layers/(mixer|mlp)/((attention_)?(q|k|v)|z|dt|out|gate|up|down)/kernel")


def learning_rate_schedule(config: Config, peak: float) -> optax.Schedule:
    """Warm up linearly from 0 to `peak`, then follow `optimizer.schedule`; the last step has the final rate.

    cosine: half a cosine over all steps after the warm-up. wsd: stable, then linear over the last
    `decay_fraction` of the steps (arXiv 2404.06395). constant: `peak` to the end. The final rate keeps its ratio to
    `learning_rate` when `peak` is another one, and `learning_rate_scale` multiplies all rates. Step n (from 1) is
    update count n - 1.

    With `restart_step` R (arXiv 1608.03983) steps 1 to R are the schedule of a run of R steps, and the others that of a
    run of steps - R, whose warm-up starts at the rate of step R.
    """
    unscaled = _unscaled_schedule(config, peak)
    return lambda count: unscaled(count) * config.optimizer.learning_rate_scale


def _unscaled_schedule(config: Config, peak: float) -> optax.Schedule:
    cfg = config.optimizer
    if cfg.restart_step == 0:
        return _shifted(_cycle(cfg, peak, config.train.steps, 0.0))
    first = _cycle(cfg, peak, cfg.restart_step, 0.0)
    with jax.ensure_compile_time_eval():  # optimizers are also made while the initialisation is traced
        reached = float(first(cfg.restart_step))
    second = _cycle(cfg, peak, config.train.steps - cfg.restart_step, reached)
    return _shifted(optax.join_schedules([first, lambda n: second(n + 1)], [cfg.restart_step + 1]))


def _shifted(schedule: optax.Schedule) -> optax.Schedule:
    return lambda count: schedule(count + 1)


def _cycle(cfg: OptimizerConfig, peak: float, steps: int, start: float) -> optax.Schedule:
    """Return the rate of step n, from 1 to `steps`; the warm-up begins at the rate `start`."""
    final = peak * cfg.final_learning_rate / cfg.learning_rate
    left = steps - cfg.warmup_steps
    if left <= 0 or cfg.schedule == "constant":  # a short trial run of a long experiment ends inside the warm-up
        decay = optax.constant_schedule(peak)
    elif cfg.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, left, final / peak)
    else:
        length = min(max(round(steps * cfg.decay_fraction), 1), left)
        decay = optax.linear_schedule(peak, final, length, transition_begin=left - length)
    if cfg.warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(start, peak, cfg.warmup_steps), decay], [cfg.warmup_steps])


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Build the update rule of `config.optimizer` for the parameters that `train.freeze` leaves.

    Clipping counts the gradients of those alone. `init` raises ValueError where a pattern matches no parameter.
    `update` takes `learning_rate_scale` in the place of the config's, a traced scalar for one compiled program under
    several learning rates.
    """
    cfg = config.optimizer
    rest = optax.adamw(
        _unscaled_schedule(config, cfg.learning_rate),
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
    )
    rule = optax.partition({"muon": _muon(config), "adamw": rest}, _labels) if cfg.name == "muon" else rest
    # One structure of the state: clipping and multipliers may change in a run.
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity()
    factors = [parameter_groups.scale_by_factors(config)] if cfg.lr_multipliers else []
    return parameter_groups.without_frozen(config, optax.chain(clip, rule, *factors, _scale_rates(config)))


def _scale_rates(config: Config) -> optax.GradientTransformationExtraArgs:
    """Scale all learning rates: an update, weight decay included, is proportional to its rate."""

    def update(
        updates: Any,
        state: optax.EmptyState,
        _params: Any = None,
        *,
        learning_rate_scale: jax.Array | float | None = None,
        **_: Any,
    ) -> tuple[Any, optax.EmptyState]:
        scale = config.optimizer.learning_rate_scale if learning_rate_scale is None else learning_rate_scale
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def updates_made(opt_state: Any) -> jax.Array | None:
    """Return the count that the learning rate follows, int32 []; None: no rule in the state has a schedule.

    It is the number of steps less those that were skipped, or fewer where the state began later than the run.
    """
    of_schedule = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
    found: list[tuple[Any, jax.Array]] = optax.tree_utils.tree_get_all_with_path(opt_state, "count", of_schedule)
    return found[0][1] if found else None


def decay_mask(params: Any) -> Any:
    """Return a tree of booleans: True for the leaves that weight decay applies to."""
    return jax.tree.map_with_path(lambda path, _: NO_DECAY.fullmatch(path_name(path)) is None, params)


def _labels(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "muon" if MATRICES.fullmatch(path_name(path)) else "adamw", params)


def _muon(config: Config) -> optax.GradientTransformation:
    """Orthogonalised momentum (arXiv 2502.16982), each layer's matrix by itself.

    Every leaf that gets here is a matrix, so the AdamW inside `contrib.muon` is left with nothing: it has Nesterov
    momentum and no decay mask, which the leaves outside must not get.
    """
    cfg = config.optimizer
    per_layer = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return contrib.muon(
        _unscaled_schedule(config, cfg.muon_learning_rate),
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: per_layer, params),
    )
