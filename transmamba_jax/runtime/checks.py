"""Checks of values that raise a ValueError with what was found and what to do."""

import difflib
from collections.abc import Sequence
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise a ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def at_least(section: str, config: Any, minimum: int, *names: str) -> None:
    """Raise a ValueError unless these fields of a section of the config are at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name} must be >= {minimum}, found {value}")


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return the end of an error message: the nearest of the valid names, or all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the names are {', '.join(names)}"


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, for a message."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
