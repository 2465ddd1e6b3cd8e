"""From documents to batches: shuffling, packing, batching per process and exact resume, all of it Grain's.

A training stream (a process reads one or more): documents, in a new order each epoch -> this stream's share -> tokens
with an end-of-document id -> windows of rows of seq_len + 1 tokens -> rows shuffled within their window -> its part of
a batch. Epochs follow one another without a seam: a row may hold the end of one epoch and the start of the next.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import (
    ConcatThenSplitIterDataset,
    FirstFitPackIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
)

from transmamba_jax.config import DataConfig
from transmamba_jax.data import mixture, task_batches
from transmamba_jax.data.batch_iterator import Batch, BatchIterator, Plan
from transmamba_jax.data.documents import Documents, cut_text, take
from transmamba_jax.data.encoding import TOKEN, EncodeInParts, encode_document, encode_documents
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.synthetic import is_synthetic
from transmamba_jax.data.tokenizers import Tokenizer

WINDOW_BYTES = 2**20
"""Text of the window that rows are shuffled in (less where a split has less): bounds the memory, and the work of
starting and resuming."""

BINS = 64
"""Rows that first-fit packing fills at one time."""

CHECKED_BYTES = 2**26
"""Bytes of a split that are read and checked before training; later ones are checked when they are read."""

CHECKED_DOCUMENTS = 2**14
"""Documents after which no more are checked, once they fill a window."""

GROUP_BYTES = 2**14
"""Text that is encoded at a time: of short documents several, so that the pipeline's work for each is small."""

_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def train_batches(
    config: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Return the endless training batches of one process.

    Each batch has `tokens` int32 [batch_size / process_count, seq_len + 1] and, of the same shape, `bytes`: the UTF-8
    bytes of the document that each token stands for, 1 for its end; with first-fit packing also `segment_ids`: 1, 2,
    ... for the documents of a row in order, 0 for padding. Where completions alone are trained on it has `weights`
    float32: 1 for their tokens and the end of the document behind them, else 0. A row of a mixture is of one source.

    Rows do not overlap. With `concat` packing every token of every document is in exactly one row per epoch; with
    `first_fit` a document longer than a row is cut into parts, each a segment. In every epoch a document belongs to
    exactly one process.

    Raises:
        ValueError: the source cannot be read, is too short for one row, has fewer documents than streams, or
            batch_size is not a multiple of the streams, or those not of process_count.
    """
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size={config.batch_size} must be a multiple of the {process_count} processes")
    plan = Plan(process_index, process_count, config.batch_size, config.streams)
    if plan.streams % process_count or config.batch_size % plan.streams:
        raise ValueError(
            f"data.streams={plan.streams} must be a multiple of the {process_count} processes and divide "
            f"data.batch_size={config.batch_size}"
        )
    if is_synthetic(config.source):
        return BatchIterator(functools.partial(_open_task_stream, config), plan)
    mixture.refuse_shared_files(config)
    sources = [_open_source(config.of_source(name), tokenizer, plan.streams) for name in config.sources]
    if config.num_workers > 0 and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl's own programs parse

    def open_stream(index: int, count: int) -> tuple[grain.IterDataset, dict[str, Any]]:
        dataset = _stream(config, sources, tokenizer, index, count)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers), _start_worker)
        return dataset, _settings(config, sources, index, count)

    skipped = sum(source.documents.skipped_rows for source in sources) if config.on_error == "skip" else None
    return BatchIterator(open_stream, plan, [name for name, _ in config.mixture], skipped)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Documents that a stream reads, and what was measured of them."""

    config: DataConfig
    documents: Documents
    window_tokens: int
    """Tokens of the window that rows are shuffled in."""
    group: int
    """Documents that are encoded at a time."""


def _open_source(config: DataConfig, tokenizer: Tokenizer, streams: int) -> _Source:
    documents = open_documents(config, config.train_split)
    return _Source(config, documents, *_check(documents, config, tokenizer, streams))


def _stream(
    config: DataConfig, sources: Sequence[_Source], tokenizer: Tokenizer, index: int, count: int
) -> grain.IterDataset:
    """Return the batches of stream `index` of `count`, of one source or of a mixture."""
    rows, shard, weighted = config.batch_size // count, slice(index, None, count), config.completions_only
    windows = [
        _windows(each.config, each.documents, tokenizer, rows, each.window_tokens, shard, each.group, weighted)
        for each in sources
    ]
    if not config.mixture:
        return FlatMapIterDataset(windows[0], _Cut(rows))
    numbers = mixture.plan([share for _, share in config.mixture], rows, index, count)
    return mixture.DrawRows(numbers, [FlatMapIterDataset(each, _Cut(1)) for each in windows])


def _settings(config: DataConfig, sources: Sequence[_Source], index: int, count: int) -> dict[str, Any]:
    """Return what a saved position has to agree with.

    The source's name is not among them: a corpus may move between two runs.
    """
    facts = {
        "documents": [len(each.documents) for each in sources],
        "window": [each.window_tokens for each in sources],
        "group": [each.group for each in sources],
    }
    mixed = {"mixture": [share for _, share in config.mixture]} if config.mixture else {}
    return {
        **{name: values if config.mixture else values[0] for name, values in facts.items()},
        **mixed,
        "rows": config.batch_size // count,
        "stream": [index, count],
        **{name: getattr(config, name) for name in ("packing", "seq_len", "shuffle", "seed", "num_workers")},
    }


def _open_task_stream(config: DataConfig, index: int, count: int) -> tuple[grain.IterDataset, dict[str, Any]]:
    """Open a stream of a synthetic task, whose rows are drawn in the training process."""
    dataset = task_batches.training_stream(config, config.batch_size // count, slice(index, None, count))
    names = ("source", "seq_len", "seed", "train_split")
    stream = {"rows": config.batch_size // count, "stream": [index, count]}
    return dataset, {**stream, **{name: getattr(config, name) for name in names}}


def _start_worker(_index: int, _count: int) -> None:
    """Leave Ctrl-C to the training process, and end with it however it ends (Grain's workers outlive a kill -9)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _windows(
    config: DataConfig,
    documents: Documents | Sequence[bytes],
    tokenizer: Tokenizer,
    rows: int,
    window_tokens: int,
    shard: slice,
    group: int,
    weighted: bool,
) -> grain.IterDataset:
    """Return windows of rows, multiples of `rows`, of the documents that `shard` selects in each epoch.

    `group` documents are encoded at a time. `weighted` rows have weights.
    """
    length = config.seq_len + 1
    # Grain numbers the epochs upwards from the seed; hashing keeps neighbouring seeds from sharing their epochs.
    seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0]) >> 1
    in_parts = isinstance(documents, Documents) and documents.has_long
    source = grain.MapDataset.source(range(len(documents)) if in_parts else documents)
    if config.shuffle:
        source = source.shuffle(seed=seed)
    source = source[shard].repeat(None)
    if isinstance(documents, Documents) and in_parts:
        stream = FlatMapIterDataset(source.to_iter_dataset(_READ), EncodeInParts(documents, tokenizer))
    else:
        encode = functools.partial(_encode, tokenizer, config.packing == "concat")
        stream = source.batch(group, batch_fn=list).map(encode).to_iter_dataset(_READ)
    window = rows * max(1, window_tokens // (rows * length))
    if config.packing == "concat":
        # Grain's packing costs Python time per row; one long row per window, cut afterwards, costs next to none.
        windows = ConcatThenSplitIterDataset(stream, length_struct={"tokens": window * length})
        windows = windows.map(functools.partial(_cut, length))
    else:
        pieces = FlatMapIterDataset(stream, _Cut(length) if in_parts else _CutDocuments(length))
        windows = FirstFitPackIterDataset(
            pieces, length_struct={"tokens": length}, num_packing_bins=BINS, shuffle_bins=False
        )
        windows = windows.map(_name_segments).batch(window)
    if config.shuffle:
        windows = windows.random_map(_permute_rows, seed=seed)
    return windows.map(functools.partial(name_fields, weighted))


def _encode(tokenizer: Tokenizer, joined: bool, documents: list[bytes]) -> Batch:
    """Encode several documents: one array of their tokens, and where they are not to be joined, their lengths."""
    encoded = encode_documents(tokenizer, documents)
    tokens = {"tokens": np.concatenate(encoded)}
    return tokens if joined else {**tokens, "lengths": np.array([len(each) for each in encoded])}


def _cut(length: int, packed: Batch) -> Batch:
    return {"tokens": packed["tokens"].reshape(-1, length)}


def _name_segments(packed: Batch) -> Batch:
    return {"tokens": packed["tokens"], "segment_ids": packed["tokens_segment_ids"]}


def name_fields(weighted: bool, window: Batch) -> Batch:
    """Take tokens apart into the arrays that a batch has."""
    tokens = window["tokens"].view(TOKEN)
    fields = {"tokens": tokens["id"].copy(), "bytes": np.maximum(tokens["bytes"], ~tokens["bytes"])}
    if weighted:
        real = window["segment_ids"] > 0 if "segment_ids" in window else True
        fields["weights"] = ((tokens["bytes"] >= 0) & real).astype(np.float32)
    return fields | {name: value for name, value in window.items() if name != "tokens"}


def _permute_rows(window: Batch, generator: np.random.Generator) -> Batch:
    order = generator.permutation(len(window["tokens"]))
    return {name: value[order] for name, value in window.items()}


class _Cut(FlatMapTransform):
    """Cut arrays along their first axis into parts of `size`, the last one shorter."""

    def __init__(self, size: int):
        self._size = size

    def flat_map(self, element: Batch) -> list[Batch]:
        starts = range(0, len(element["tokens"]), self._size)
        return [{name: value[start : start + self._size] for name, value in element.items()} for start in starts]


class _CutDocuments(FlatMapTransform):
    """Cut each of several documents into parts of `size` tokens, the last one shorter."""

    def __init__(self, size: int):
        self._size = size

    def flat_map(self, element: Batch) -> list[Batch]:
        documents = np.split(element["tokens"], np.cumsum(element["lengths"])[:-1])
        starts = [(tokens, start) for tokens in documents for start in range(0, len(tokens), self._size)]
        return [{"tokens": tokens[start : start + self._size]} for tokens, start in starts]


def _check(documents: Documents, config: DataConfig, tokenizer: Tokenizer, streams: int) -> tuple[int, int]:
    """Refuse what would fail in the middle of a run.

    Returns:
        The tokens of a window, by the tokens that bytes became, and the number of documents to encode at a time.
    """
    split = config.train_split
    if len(documents) < streams:
        raise ValueError(
            f"split {split!r} of data.source {config.source!r} has {len(documents)} documents for {streams} streams "
            "(one a process, or data.streams); each needs at least one"
        )
    tokens = bytes_encoded = bytes_read = count = 0
    for count, document in enumerate(take(documents, CHECKED_BYTES), start=1):
        bytes_read += len(document) + 1
        if tokens <= config.seq_len:
            sample = cut_text(document, WINDOW_BYTES)
            tokens += len(encode_document(tokenizer, sample))
            bytes_encoded += len(sample) + 1
        if count >= CHECKED_DOCUMENTS and bytes_read >= WINDOW_BYTES:
            break
    require_row(tokens, config, split)
    # With 1, the length that Grain gives the endless data set overflows.
    group = max(2, min(len(documents), GROUP_BYTES * count // bytes_read))
    return max(1, min(WINDOW_BYTES, bytes_read) * tokens // bytes_encoded), group


def require_row(tokens: int, config: DataConfig, split: str) -> None:
    """Refuse a split that has not the tokens of one row.

    Raises:
        ValueError: the message says how many there are.
    """
    if tokens <= config.seq_len:
        raise ValueError(
            f"split {split!r} of data.source {config.source!r} has {tokens} tokens, fewer than one row of "
            f"data.seq_len + 1 = {config.seq_len + 1}; give more text or lower data.seq_len"
        )
