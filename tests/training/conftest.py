"""A maker of configs for runs of a second."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.support import little_config
from transmamba_jax.config import Config


def configs_in(folder: Path) -> Callable[..., Config]:
    """Return a maker of configs for `Little` on a small text, with work directories in a folder."""
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"document {index} of a small text\n" * 4, encoding="utf-8")

    def make(workdir: str = "run", **sections) -> Config:
        defaults = {
            "model": {"vocab_size": 256},
            "data": {"source": f"text:{folder / '*.txt'}"},
            "eval": {"every": 5, "windows": 8},
            "checkpoint": {"every": 4},
        }
        names = {*defaults, *sections}
        merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}
        return little_config(**merged, workdir=str(folder / workdir))

    return make


@pytest.fixture(name="make")
def _make(tmp_path):
    return configs_in(tmp_path)
