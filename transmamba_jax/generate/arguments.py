"""Check the arguments of generation and scoring before anything is compiled."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import schedule
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import tree_paths


def whole_number(name: str, value: Any, least: int) -> int:
    """Return an integer of any type as a Python integer.

    Raises:
        ValueError: it is not an integer, or less than `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, found {type(value).__name__} {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be >= {least}, found {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """Return a number of any type, such as an array of shape (), as a Python float.

    Raises:
        ValueError: it is not a number.
    """
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name} must be a number, found {type(value).__name__} {value!r}")


def check_model(model: Any) -> None:
    """Refuse a model that cannot decode.

    Raises:
        ValueError: it is no TransMamba, has an attention function of its own, or a mixer with an ablation.
    """
    if not isinstance(model, TransMamba):
        raise ValueError(
            f"model must be a TransMamba, found {type(model).__name__}; generate(model, params, prompts) takes "
            "model = tm.TransMamba(config) first and then its parameters"
        )
    if model.attention is not None:
        raise ValueError(
            "model must attend by softmax, which is how the cache is read, found TransMamba(attention=...); "
            "call the model on the whole row for each token instead"
        )
    if model.config.ablation != "none":
        raise ValueError(
            f"model.ablation must be 'none' to decode, found {model.config.ablation!r}; call the model on the whole "
            "row for each token instead"
        )


def check_params(model: nn.Module, params: Any) -> None:
    """Compare parameters with those that the model initialises: names and shapes; any floating dtype fits.

    Raises:
        ValueError: they are no nested dict, are wrapped in {"params": ...}, are traced, do not fit, or are no floats.
    """
    if isinstance(params, TransMamba) or params is None or not hasattr(params, "keys"):
        raise ValueError(f"params must be the nested dict of a model's parameters, found {type(params).__name__}")
    if set(params) == {"params"}:
        raise ValueError('params is {"params": ...}, the variables of a model; pass variables["params"]')
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "params are traced: generation is a loop of compiled programs in Python, so it runs outside jax.jit, "
            "jax.vmap and jax.grad"
        )
    shapes = lambda tree: {name: list(leaf.shape) for name, leaf in tree_paths.flatten(tree).items()}
    tree_paths.raise_differences("params do not fit the model", shapes(_initialised(model)), shapes(dict(params)))
    for name, leaf in tree_paths.flatten(dict(params)).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params must be of a floating dtype, found {leaf.dtype} in {name}")


@functools.lru_cache(maxsize=8)  # tracing the initialisation takes a moment
def _initialised(model: nn.Module) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def check_schedule(transpoints: Any, model: TransMamba) -> schedule.Schedule:
    """Return one TransPoint per layer; None: those of the config.

    Raises:
        ValueError: it is no sequence of integers, or no schedule of this model.
    """
    if transpoints is None:
        transpoints = model.config.transpoints
    if isinstance(transpoints, np.ndarray | jax.Array):
        transpoints = np.asarray(transpoints).tolist()
    if isinstance(transpoints, str) or not isinstance(transpoints, Sequence):
        raise ValueError(
            f"transpoints must be a sequence of integers, such as tm.schedule.mamba2() or (0, 9), found {transpoints!r}"
        )
    return schedule.expand(transpoints, model.config.num_layers)


def raise_not_finite(params: Any, consequence: str = "there is no next token") -> NoReturn:
    """Say that logits are NaN, and which parameters are the cause.

    Raises:
        ValueError: always.
    """
    leaves = tree_paths.flatten(params).items()
    names = [name for name, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
    found = f"parameters that are not finite: {', '.join(names)}" if names else "finite parameters: an overflow"
    raise ValueError(f"logits are NaN, so {consequence}; the model has {found}")
