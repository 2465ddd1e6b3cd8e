"""Checkpoints: save asynchronously, verify, restore onto any devices. The only package that imports orbax.

orbax takes seconds to import, so that a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmamba_jax.checkpoint.checkpointer import Checkpointer, restore, verify
    from transmamba_jax.checkpoint.manifest import DamagedError
    from transmamba_jax.checkpoint.steps import SaveError, complete_steps
    from transmamba_jax.checkpoint.tree import Checkpoint, Restored

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "DamagedError",
    "Restored",
    "SaveError",
    "complete_steps",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("transmamba_jax.checkpoint.checkpointer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
