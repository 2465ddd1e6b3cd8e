"""TransMamba in JAX and Flax: attention and Mamba-2 with one set of weights, switched inside a sequence."""

import importlib
from typing import TYPE_CHECKING, Any

from transmamba_jax import schedule
from transmamba_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
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

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Decoder",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TransMamba",
    "convert",
    "export",
    "generate",
    "load_config",
    "memory_converter",
    "restore",
    "schedule",
]


def __getattr__(name: str) -> Any:
    # Both are commands too, which Python runs without a warning only where the package has not imported them.
    if name in ("convert", "export"):
        return importlib.import_module(f"{__name__}.{name}")
    # orbax takes seconds to import and the model does not need it.
    if name == "restore":
        from transmamba_jax.checkpoint import restore

        return restore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
