"""Groups of parameters by shell patterns over their paths: frozen ones, and those with a factor of the learning rate.

A pattern is matched by `fnmatch` with a path such as `layers/mixer/q/kernel`; `*` matches slashes too. Layers are
stacked in one array, so that a pattern selects a parameter in all of them.
"""

import fnmatch
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transmamba_jax.config import Config
from transmamba_jax.report.charts import byte_count
from transmamba_jax.runtime.tree_paths import flatten, path_name


def check_patterns(config: Config, params: Any) -> None:
    """Check that every pattern selects a parameter and that one is left to train.

    Raises:
        ValueError: a pattern of `train.freeze` or `optimizer.lr_multipliers` matches no path, or all are frozen.
    """
    multiplied = [pattern for pattern, _ in config.optimizer.lr_multipliers]
    for option, patterns in (("train.freeze", config.train.freeze), ("optimizer.lr_multipliers", multiplied)):
        _require_matches(option, patterns, params)
    if all(jax.tree.leaves(frozen_mask(config, params))):
        raise ValueError(f"train.freeze={' '.join(config.train.freeze)} freezes every parameter: none is left to train")


def frozen_mask(config: Config, params: Any) -> Any:
    """Return a tree of booleans: True for the leaves that `train.freeze` selects."""
    frozen = lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in config.train.freeze)
    return jax.tree.map_with_path(lambda path, _: frozen(path_name(path)), params)


def factors(config: Config, params: Any) -> Any:
    """Return the tree of the factors of `optimizer.lr_multipliers`: that of the last pattern that matches, else 1."""
    pairs = config.optimizer.lr_multipliers[::-1]
    factor = lambda path: next((value for pattern, value in pairs if fnmatch.fnmatchcase(path, pattern)), 1.0)
    return jax.tree.map_with_path(lambda path, _: factor(path_name(path)), params)


def scale_by_factors(config: Config) -> optax.GradientTransformation:
    """Multiply updates by the factors of `optimizer.lr_multipliers`; it has no state."""
    values = {1.0, *(value for _, value in config.optimizer.lr_multipliers)}
    return optax.partition({value: optax.scale(value) for value in values}, lambda params: factors(config, params))


def without_frozen(config: Config, tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Run `tx` on the parameters that are not frozen; frozen ones have updates of 0, and no state.

    The state is that of `tx` itself, so that the paths of its leaves are the same with and without frozen parameters.
    `init` checks the patterns; see `check_patterns`.
    """
    frozen = lambda params: frozen_mask(config, params)
    trained = optax.masked(tx, lambda params: jax.tree.map(operator.not_, frozen(params)))
    zero = optax.masked(optax.set_to_zero(), frozen)

    def init(params: Any) -> Any:
        check_patterns(config, params)
        return trained.init(params).inner_state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, masked = trained.update(updates, optax.MaskedState(state), params, **extra)
        return zero.update(updates, zero.init(updates), params)[0], masked.inner_state

    return optax.GradientTransformationExtraArgs(init, update)


def zero_frozen(config: Config, gradient: Any) -> Any:
    """Put zeros in the place of the gradients of frozen parameters; XLA then leaves out their computation."""
    mask = frozen_mask(config, gradient)
    return jax.tree.map(lambda leaf, frozen: jnp.zeros_like(leaf) if frozen else leaf, gradient, mask)


def describe(config: Config, params: Any, opt_state: Any) -> str:
    """Write the sizes of parameters and optimizer state, and of what is frozen, for a log line."""
    leaves, mask = jax.tree.leaves(params), jax.tree.leaves(frozen_mask(config, params))
    frozen = sum(leaf.size for leaf, is_frozen in zip(leaves, mask, strict=True) if is_frozen)
    parts = [f"{sum(leaf.size for leaf in leaves):,} parameters ({_size(leaves)})"]
    parts += [f"{frozen:,} of them frozen"] if frozen else []
    return ", ".join([*parts, f"optimizer state {_size(jax.tree.leaves(opt_state))}"])


def _size(leaves: Sequence[Any]) -> str:
    return byte_count(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))


def _require_matches(option: str, patterns: Sequence[str], params: Any) -> None:
    paths = list(flatten(params))
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            known = "\n  ".join(paths)
            raise ValueError(f"{option}: {pattern!r} matches no parameter; the parameters are\n  {known}")
