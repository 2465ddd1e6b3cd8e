"""TransMamba in JAX and Flax: attention and Mamba-2 with one set of weights, switched inside a sequence."""

import importlib
from typing import TYPE_CHECKING, Any

from transmamba_jax import schedule
from transmamba_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from transmamba_jax.config_io import load_config
from transmamba_jax.generate import generate
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.memory_converter import memory_converter
from transmamba_jax.model import TransMamba

if TYPE_CHECKING:
    from transmamba_jax import convert, export
    from transmamba_jax.checkpoint import restore
    from transmamba_jax.training.loop import train
    from transmamba_jax.training.optimizer import make_optimizer
    from transmamba_jax.training.step import TrainState, make_train_step

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Decoder",
    "EvalConfig",
    "KernelsConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainState",
    "TransMamba",
    "convert",
    "export",
    "generate",
    "load_config",
    "make_optimizer",
    "make_train_step",
    "memory_converter",
    "restore",
    "schedule",
    "train",
]


_LAZY = {
    "restore": "checkpoint",
    "train": "training.loop",
    "make_optimizer": "training.optimizer",
    "TrainState": "training.step",
    "make_train_step": "training.step",
}
"""Name -> its module, which takes seconds to import (orbax, Grain, optax) and which the model does not need."""


def __getattr__(name: str) -> Any:
    # Both are commands too, which Python runs without a warning only where the package has not imported them.
    if name in ("convert", "export"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
