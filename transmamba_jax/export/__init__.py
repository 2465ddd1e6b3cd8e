"""Exported folders: safetensors, config, tokenizer and StableHLO programs; the command is in `__main__`."""

from transmamba_jax.export.folder import (
    CONFIG,
    PLATFORMS,
    PROGRAMS,
    TOKENIZER,
    Loaded,
    abstract_params,
    decode,
    load,
    load_program,
    new_cache,
    prepare,
    programs,
    save,
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
    "prepare",
    "programs",
    "save",
    "save_programs",
]
