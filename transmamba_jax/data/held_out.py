"""Rows and text of the held-out split, the same every time."""

from collections.abc import Iterator, Sequence

import numpy as np

from transmamba_jax.config import DataConfig
from transmamba_jax.data import task_batches
from transmamba_jax.data.batch_iterator import Batch
from transmamba_jax.data.documents import take
from transmamba_jax.data.encoding import TOKEN, encode_document
from transmamba_jax.data.pipeline import name_fields, require_row
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.synthetic import is_synthetic
from transmamba_jax.data.tokenizers import Tokenizer
from transmamba_jax.runtime.checks import require

HELD_OUT_DOCUMENTS = 2**14
"""Documents of the held-out stream; of a larger split it takes this many, evenly spread."""

HELD_OUT_BYTES = 2**26
"""Bytes after which the held-out stream takes no further document."""


def eval_sets(config: DataConfig, tokenizer: Tokenizer, windows: int, batch_size: int) -> dict[str, list[Batch]]:
    """Return source -> `eval_batches` of it, `windows` rows of each source of a mixture.

    Raises:
        ValueError: see `eval_batches`.
    """
    return {name: eval_batches(config.of_source(name), tokenizer, windows, batch_size) for name in config.sources}


def eval_batches(config: DataConfig, tokenizer: Tokenizer, windows: int, batch_size: int) -> list[Batch]:
    """Return rows of the held-out stream as batches of one shape; the same every time. Of a mixture, use `eval_sets`.

    The stream is every held-out document followed by its end-of-document id. Its windows start every seq_len tokens
    and are seq_len + 1 long, so that each token is predicted once; `windows` of them are taken, evenly spread, or all
    (0, or more than there are). Each batch has `tokens` and `bytes` int32 [batch_size, seq_len + 1], `weights` float32
    [batch_size], 0 for the rows that fill up the last batch, and with first-fit packing `segment_ids` like the
    training batches. Where completions alone are trained on, `weights` are of the shape of `tokens`, as in training,
    and with first-fit packing documents are placed whole, so that no completion loses its prompt.

    Raises:
        ValueError: the source cannot be read, is too short for one window, or no token has a weight.
    """
    require(not config.mixture, "eval_batches is for one source, found a mixture; call eval_sets")
    if is_synthetic(config.source):
        return task_batches.held_out_batches(config, windows, batch_size)
    documents = [encode_document(tokenizer, document) for document in _held_out(config)]
    if config.completions_only and config.packing == "first_fit":
        rows = _whole_documents(config.seq_len + 1, documents)
        count = len(rows["tokens"])
    else:
        count = (sum(map(len, documents)) - 1) // config.seq_len
        require_row(sum(map(len, documents)), config, config.eval_split)
        rows = _windows(config, documents)
    taken = windows if 0 < windows < count else count
    chosen = np.arange(taken) * count // taken
    rows = name_fields(config.completions_only, {name: value[chosen] for name, value in rows.items()})
    rows.setdefault("weights", np.ones(taken, np.float32))
    if "segment_ids" in rows:
        rows["segment_ids"] += 1 - rows["segment_ids"][:, :1]
    if not rows["weights"].any():
        raise ValueError(
            f"split {config.eval_split!r} of data.source {config.source!r} has no completion in {taken} rows; raise "
            "eval.windows, or data.seq_len above the length of a prompt"
        )
    padding = -taken % batch_size
    full = {name: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1)) for name, value in rows.items()}
    return [
        {name: value[start : start + batch_size] for name, value in full.items()}
        for start in range(0, taken, batch_size)
    ]


def _windows(config: DataConfig, documents: Sequence[np.ndarray]) -> Batch:
    """Return the windows of the stream of all documents, as views of it."""
    length = config.seq_len + 1
    cut = lambda stream: np.lib.stride_tricks.sliding_window_view(stream, length)[:: config.seq_len]
    rows = {"tokens": cut(np.concatenate(documents))}
    if config.packing == "first_fit":
        rows["segment_ids"] = cut(np.repeat(np.arange(len(documents), dtype=np.int32), [*map(len, documents)]))
    return rows


def _whole_documents(length: int, documents: Sequence[np.ndarray]) -> Batch:
    """Place documents one after another into rows, whole where one fits: a completion keeps its prompt."""
    pieces = [each[start : start + length] for each in documents for start in range(0, len(each), length)]
    rows = list[list[np.ndarray]]()
    free = 0
    for piece in pieces:
        if len(piece) > free:
            rows.append([])
            free = length
        rows[-1].append(piece)
        free -= len(piece)
    tokens, ids = np.zeros((len(rows), length), TOKEN), np.zeros((len(rows), length), np.int32)
    for row, parts in enumerate(rows):
        stop = sum(map(len, parts))
        tokens[row, :stop] = np.concatenate(parts)
        ids[row, :stop] = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
    return {"tokens": tokens, "segment_ids": ids}


def held_out_text(config: DataConfig) -> bytes:
    """Return the held-out stream as bytes: every document, NUL as space, followed by one NUL."""
    return _joined(_held_out(config))


def training_text(config: DataConfig, max_bytes: int = 2**26) -> bytes:
    """Return training documents in the same form, in order, until `max_bytes` are reached."""
    return _joined(training_documents(config, max_bytes))


def training_documents(config: DataConfig, max_bytes: int) -> Iterator[bytes]:
    """Yield training documents in order until `max_bytes` are reached; the sources of a mixture give their shares.

    Raises:
        ValueError: a source cannot be read.
    """
    shares = [share for _, share in config.mixture] or [1.0]
    for name, share in zip(config.sources, shares, strict=True):
        documents = open_documents(config.of_source(name), config.train_split)
        yield from take(documents, max(1, int(max_bytes * share / sum(shares))))


def _held_out(config: DataConfig) -> Iterator[bytes]:
    for name in config.sources:
        documents = open_documents(config.of_source(name), config.eval_split)
        yield from take(documents, HELD_OUT_BYTES, stride=-(-len(documents) // HELD_OUT_DOCUMENTS))


def _joined(documents: Iterator[bytes]) -> bytes:
    return b"".join(document.replace(b"\0", b" ") + b"\0" for document in documents)
