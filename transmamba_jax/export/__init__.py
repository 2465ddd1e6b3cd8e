"""Exported folders: safetensors, config, tokenizer and StableHLO programs; the command is in `__main__`."""

from transmamba_jax.export.folder import CONFIG, TOKENIZER, Loaded, abstract_params, load, save
from transmamba_jax.export.stablehlo import (
    PLATFORMS,
    PROGRAMS,
    decode,
    load_program,
    new_cache,
    pack_weights,
    programs,
    save_programs,
)

__all__ = [
    "CONFIG",
    "PLATFORMS",
    "PROGRAMS",
    "TOKENIZER",
    "Loaded",
    "abstract_params",
    "decode",
    "load",
    "load_program",
    "new_cache",
    "pack_weights",
    "programs",
    "save",
    "save_programs",
]
