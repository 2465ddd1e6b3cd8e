"""Names of the leaves of a tree, `layers/mixer/q/kernel`, and the differences of two sets of named leaves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

_LISTED = 12  # names in a message


class Differences(NamedTuple):
    """Lines about names on one side alone, and about names that stand for something else on each side."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def path_name(path: Iterable[Any]) -> str:
    """Write a tree path as `layers/mixer/q/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Return path -> leaf, such as `layers/mixer/q/kernel`."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten` for a tree of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def compare(expected: Mapping[str, object], found: Mapping[str, object]) -> Differences:
    """Compare names, and the shapes or kinds that they stand for."""
    return Differences(
        missing=[f"{name} {kind}" for name, kind in expected.items() if name not in found],
        unexpected=[f"{name} {kind}" for name, kind in found.items() if name not in expected],
        mismatched=[
            f"{name}: expected {kind}, found {found[name]}"
            for name, kind in expected.items()
            if name in found and kind != found[name]
        ],
    )


def raise_differences(
    what: str, expected: Mapping[str, object], found: Mapping[str, object], compared: str = "shape"
) -> None:
    """Compare names and shapes, or whatever `compared` says that the mappings hold.

    Raises:
        ValueError: a name is missing or unexpected, or its shape differs; the message lists all three.
    """
    missing, unexpected, mismatched = compare(expected, found)
    if missing or unexpected or mismatched:
        lines = [
            f"missing: {listed(missing)}",
            f"unexpected: {listed(unexpected)}",
            *(f"{compared} mismatch: {line}" for line in mismatched[:_LISTED]),
            *([f"and {len(mismatched) - _LISTED} more"] if len(mismatched) > _LISTED else []),
        ]
        raise ValueError("\n  ".join([f"{what}:", *lines]))


def listed(names: Sequence[str]) -> str:
    """Join the first names of a list for a message, and count the others."""
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more]) or "none"
