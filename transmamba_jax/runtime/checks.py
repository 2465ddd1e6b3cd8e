"""Checks of values that raise a ValueError with what was found and what to do."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

INT32_MAX = 2**31 - 1
"""Largest number of tokens, of rows or of one axis: positions and token ids are int32."""


def require(condition: bool, message: str) -> None:
    """Raise a ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_types(section: str, config: Any) -> None:
    """Raise a ValueError unless every field of a section of the config has the type of its annotation.

    An int for a float, a list for a tuple, a mapping for pairs and a path for a str become the annotated type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = typed(hints[field.name], getattr(config, field.name), f"{section}.{field.name}")
        object.__setattr__(config, field.name, value)


def typed(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type: an int becomes a float, a list a tuple, a path a str.

    A mapping becomes a tuple of pairs; nothing else is cast.

    Raises:
        ValueError: it has another type; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(value in arguments, f"{where} must be one of {', '.join(map(repr, arguments))}, found {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return typed(inner, value, where)
    if is_mapping(hint):
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        of_two = isinstance(pairs, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
        )
        require(of_two, f"{where} must be a mapping, found {value!r}")
        name, inner = typing.get_args(arguments[0])
        return tuple(
            (typed(name, key, f"a name in {where}"), typed(inner, item, f"{where}[{key!r}]")) for key, item in pairs
        )
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, found {value!r}")
        return tuple(typed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    matches = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    decimal = " (decimal, without leading zeros)" if hint is int else ""
    require(
        matches, f"{where} must be of type {hint.__name__}{decimal}, found {value!r} of type {type(value).__name__}"
    )
    return value


def is_mapping(hint: Any) -> bool:
    """Tell whether a field of this type holds pairs of a name and a value: a mapping that is ordered and hashable."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and typing.get_origin(arguments[0]) is tuple


def at_least(section: str, config: Any, minimum: int, *names: str) -> None:
    """Raise a ValueError unless these fields of a section of the config are at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name} must be >= {minimum}, found {value}")


def at_most(section: str, config: Any, maximum: int, *names: str) -> None:
    """Raise a ValueError unless these fields of a section of the config are at most `maximum`."""
    for name in names:
        value = getattr(config, name)
        require(value <= maximum, f"{section}.{name} must be <= {maximum}, found {value}")


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return the end of an error message: the nearest of the valid names, or all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the names are {', '.join(names)}"


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, for a message."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // each for each in small)})
