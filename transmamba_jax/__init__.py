"""TransMamba in JAX and Flax: attention and Mamba-2 with one set of weights, switched inside a sequence.

Public names load on first use, so that `import transmamba_jax` and `transmamba --help` take no seconds.
"""

import importlib
import sys
import time
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmamba_jax import convert, export, schedule
    from transmamba_jax.checkpoint import restore
    from transmamba_jax.config import (
        CheckpointConfig,
        Config,
        DataConfig,
        EvalConfig,
        HostsConfig,
        KernelsConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from transmamba_jax.config_io import load_config
    from transmamba_jax.data.registry import register_source
    from transmamba_jax.evaluate.inspection import Inspection, inspect
    from transmamba_jax.generate import Decoder, Sampling, generate, stream
    from transmamba_jax.generate.loaded import LanguageModel, load
    from transmamba_jax.memory_converter import memory_converter
    from transmamba_jax.model import TransMamba
    from transmamba_jax.training.loop import train
    from transmamba_jax.training.optimizer import make_optimizer
    from transmamba_jax.training.step import TrainState, make_train_step

__version__ = "0.1.0"

_IMPORTED = time.time()
"""Seconds since 1970: a source that was written later is not what runs."""

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Decoder",
    "EvalConfig",
    "HostsConfig",
    "Inspection",
    "KernelsConfig",
    "LanguageModel",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Sampling",
    "TrainConfig",
    "TrainState",
    "TransMamba",
    "__version__",
    "convert",
    "export",
    "generate",
    "inspect",
    "load",
    "load_config",
    "make_optimizer",
    "make_train_step",
    "memory_converter",
    "register_source",
    "restore",
    "schedule",
    "stream",
    "train",
]

_MODULES = ("convert", "export", "schedule")

_HOMES = {
    "CheckpointConfig": "config",
    "Config": "config",
    "DataConfig": "config",
    "Decoder": "generate",
    "EvalConfig": "config",
    "HostsConfig": "config",
    "Inspection": "evaluate.inspection",
    "KernelsConfig": "config",
    "LanguageModel": "generate.loaded",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "Sampling": "generate",
    "TrainConfig": "config",
    "TrainState": "training.step",
    "TransMamba": "model",
    "generate": "generate",
    "inspect": "evaluate.inspection",
    "load": "generate.loaded",
    "load_config": "config_io",
    "make_optimizer": "training.optimizer",
    "make_train_step": "training.step",
    "memory_converter": "memory_converter",
    "register_source": "data.registry",
    "restore": "checkpoint",
    "stream": "generate",
    "train": "training.loop",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """A package of which two functions, `generate` and `memory_converter`, are named like their modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule here after it has loaded; these names are the functions'.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
