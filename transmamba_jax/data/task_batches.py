"""Batches of synthetic tasks: streams for training, held-out rows with their answers, and the task's tokenizer."""

import grain
import numpy as np

from transmamba_jax.config import DataConfig
from transmamba_jax.data import synthetic, task_rows, tasks
from transmamba_jax.data.symbol_tokenizer import SymbolTokenizer
from transmamba_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

ENDLESS = 2**40
"""Rows of the training split: none is seen twice."""

HELD_OUT_ROWS = 1024
"""Rows of the held-out split where `eval.windows` is 0."""


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer of `data.tokenizer`, or of the task where the source is synthetic.

    Raises:
        ValueError: it cannot be read, or there is no such task.
    """
    if not synthetic.is_synthetic(config.source):
        return load_tokenizer(config.tokenizer, config.end_of_document)
    task = synthetic.parse(config.source)
    return ByteTokenizer() if isinstance(task, tasks.Needle) else SymbolTokenizer(task.vocab_size)


def rows(config: DataConfig, split: str, count: int) -> synthetic.Rows:
    """Return rows of a task's split, seq_len + 1 tokens each.

    Raises:
        ValueError: there is no such task, or it does not fit into a row.
    """
    return synthetic.Rows(synthetic.parse(config.source), config.seq_len + 1, config.seed, split, count)


def open_task(config: DataConfig, _rest: str, split: str) -> list[list[int]]:
    """Return rows of a task as documents of token ids, for what reads documents of any source."""
    found = rows(config, split, HELD_OUT_ROWS)
    return [found[index].tokens.tolist() for index in range(HELD_OUT_ROWS)]


def training_stream(config: DataConfig, batch: int, shard: slice) -> grain.IterDataset:
    """Return endless batches of `batch` rows with `tokens`, `bytes` (1 each) and `weights`, of the rows in `shard`."""
    source = grain.MapDataset.source(rows(config, config.train_split, ENDLESS))[shard]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return source.map(_training_row).batch(batch).to_iter_dataset(options)


def held_out_batches(config: DataConfig, windows: int, batch_size: int) -> list[Batch]:
    """Return held-out rows as batches of one shape, the same every time.

    Each has `tokens`, `bytes`, `weights`, `answers` and `facts` [batch_size, seq_len + 1] (see `synthetic`); rows that
    fill up the last batch have weight 0.
    """
    count = windows or HELD_OUT_ROWS
    found = rows(config, config.eval_split, count)
    stacked = [np.stack(column) for column in zip(*(found[index] for index in range(count)), strict=True)]
    padding = -count % batch_size
    full = [np.pad(value, [(0, padding), (0, 0)]) for value in stacked]
    named = dict(zip(task_rows.Row._fields, full, strict=True))
    named["bytes"] = np.ones_like(named["tokens"])  # a symbol counts as one
    return [
        {name: value[start : start + batch_size] for name, value in named.items()}
        for start in range(0, count, batch_size)
    ]


def _training_row(row: task_rows.Row) -> Batch:
    return {"tokens": row.tokens, "bytes": np.ones_like(row.tokens), "weights": row.weights}
