"""Data: sources of documents, tokenizers, and the pipeline that turns documents into batches of rows.

Names are loaded on first use: a tokenizer needs neither Grain nor TFDS.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmamba_jax.data.batch_iterator import BatchIterator
    from transmamba_jax.data.byte_models import baselines, has_baselines
    from transmamba_jax.data.given import give_documents
    from transmamba_jax.data.held_out import eval_batches, eval_sets, held_out_text, training_text
    from transmamba_jax.data.pipeline import train_batches
    from transmamba_jax.data.registry import register_source
    from transmamba_jax.data.task_batches import open_tokenizer
    from transmamba_jax.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_from_json

_MODULES = {
    "baselines": "byte_models",
    "BatchIterator": "batch_iterator",
    "eval_batches": "held_out",
    "eval_sets": "held_out",
    "give_documents": "given",
    "has_baselines": "byte_models",
    "held_out_text": "held_out",
    "train_batches": "pipeline",
    "training_text": "held_out",
    "register_source": "registry",
    "open_tokenizer": "task_batches",
    "Tokenizer": "tokenizers",
    "check_vocabulary": "tokenizers",
    "load_tokenizer": "tokenizers",
    "tokenizer_from_json": "tokenizers",
}

__all__ = [
    "BatchIterator",
    "Tokenizer",
    "baselines",
    "check_vocabulary",
    "eval_batches",
    "eval_sets",
    "give_documents",
    "has_baselines",
    "held_out_text",
    "load_tokenizer",
    "open_tokenizer",
    "register_source",
    "tokenizer_from_json",
    "train_batches",
    "training_text",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
