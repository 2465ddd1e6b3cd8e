"""Names of leaves, and messages about them."""

import jax.numpy as jnp
import pytest

from transmamba_jax.runtime import tree_paths

TREE = {"layers": {"q": {"kernel": jnp.ones(2)}, "a_log": jnp.zeros(3)}, "embedding": jnp.ones(1)}


def test_leaves_have_paths_and_go_back() -> None:
    flat = tree_paths.flatten(TREE)
    assert list(flat) == ["embedding", "layers/a_log", "layers/q/kernel"]
    assert tree_paths.nest(flat) == TREE


def test_differences_are_named_by_their_kind() -> None:
    found = tree_paths.compare({"a": "f32 [1]", "b": "f32 [2]", "c": 1}, {"b": "f32 [3]", "c": 1, "d": "f32 [4]"})
    assert found == (["a f32 [1]"], ["d f32 [4]"], ["b: expected f32 [2], found f32 [3]"])
    tree_paths.raise_differences("same", {"a": 1}, {"a": 1})
    with pytest.raises(ValueError, match=r"they differ:\n  missing: a 1\n  unexpected: none\n  shape mismatch: b: exp"):
        tree_paths.raise_differences("they differ", {"a": 1, "b": 2}, {"b": 3})


def test_long_lists_are_cut_in_a_message() -> None:
    assert tree_paths.listed([]) == "none"
    assert tree_paths.listed([str(i) for i in range(14)]) == f"{', '.join(map(str, range(12)))}, and 2 more"
