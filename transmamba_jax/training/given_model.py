"""A model that a program gives to `train`, instead of the plain one of the config."""

import dataclasses

import flax.linen as nn

from transmamba_jax.model import TransMamba


def own_name(model: nn.Module) -> str | None:
    """Name a `TransMamba` that a checkpoint does not hold; None: it is plain, or its parameters fit no plain one."""
    if not isinstance(model, TransMamba) or (type(model) is TransMamba and model.attention is None):
        return None
    attention = model.attention
    function = "" if attention is None else f"attention={getattr(attention, '__qualname__', repr(attention))}"
    return f"{type(model).__name__}({function})"


def require_hashable(model: nn.Module) -> None:
    """Refuse a module that no compiled program can be kept for.

    Raises:
        ValueError: an attribute is not hashable.
    """
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"attribute {field.name} of the model, {type(model).__name__}, must be hashable, found {value!r}; "
                "use a tuple for a list, and a frozen dataclass for a dictionary"
            ) from None
