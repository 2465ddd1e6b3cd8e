"""Baselines that a model has to beat: a byte model of order 2, gzip, xz and brotli."""

import lzma
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow

from transmamba_jax.config import DataConfig
from transmamba_jax.data.synthetic import is_synthetic

_PIECE = 2**22
"""Bytes that are counted at a time: their indices and probabilities take some 60 bytes each."""


def has_baselines(config: DataConfig) -> bool:
    """Tell whether baselines compare with the held-out loss: it is that of all the text of one source."""
    return not (is_synthetic(config.source) or config.completions_only or config.mixture)


def baselines(train: bytes, held_out: bytes) -> dict[str, float]:
    """Return bits per byte of `held_out` under an order-2 byte model of `train`, gzip -9, xz -9e and brotli -11.

    The order-2 model backs off by Witten and Bell's rule, in which d(ctx) counts the distinct bytes seen after ctx:
    p_n(c | ctx) = (count(ctx c) + d(ctx) p_{n-1}(c)) / (count(ctx) + d(ctx)), p_{n-1} where ctx was never seen, p_{-1}
    uniform over 256 bytes. gzip, xz and brotli see `held_out` alone. brotli has a dictionary of English words
    and markup.

    Raises:
        ValueError: either text has fewer than 3 bytes.
    """
    for name, text in (("train", train), ("held_out", held_out)):
        if len(text) < 3:
            raise ValueError(f"{name} must have at least 3 bytes, found {len(text)}")
    brotli = pyarrow.Codec("brotli", compression_level=11)
    return {
        "order2_bits_per_byte": _order2(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)),
        "gzip_bits_per_byte": 8 * len(zlib.compress(held_out, 9)) / len(held_out),
        "xz_bits_per_byte": 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out),
        "brotli_bits_per_byte": 8 * len(brotli.compress(held_out, asbytes=True)) / len(held_out),
    }


def _order2(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return bits per byte from the third byte on: the first two have no context of two bytes."""
    tables = []
    for order in range(3):
        counts = np.zeros(256 ** (order + 1), np.int64)
        for piece in _pieces(train, order):
            counts += np.bincount(_contexts(piece, order), minlength=len(counts))
        tables.append(counts)
    bits = sum(float(-np.log2(_probability(tables, piece)).sum()) for piece in _pieces(held_out, 2))
    return bits / (len(held_out) - 2)


def _probability(tables: list[np.ndarray], text: np.ndarray) -> np.ndarray:
    """Return the probability of every byte of a text from the third one on."""
    probability = np.full(len(text) + 1, 1 / 256)
    for order, counts in enumerate(tables):
        table = counts.reshape(-1, 256)
        totals, distinct = table.sum(axis=1), np.count_nonzero(table, axis=1)
        asked = _contexts(text, order)
        contexts = asked // 256
        seen, weight = totals[contexts], distinct[contexts]
        lower = probability[1:]  # the first byte has no context of this length
        probability = np.where(seen > 0, (counts[asked] + weight * lower) / np.maximum(seen + weight, 1), lower)
    return probability


def _pieces(text: np.ndarray, order: int) -> Iterator[np.ndarray]:
    """Cut a text into pieces that share `order` bytes, so that each run of `order` + 1 bytes is in one of them."""
    for start in range(0, len(text) - order, _PIECE):
        yield text[start : start + _PIECE + order]


def _contexts(text: np.ndarray, order: int) -> np.ndarray:
    """Return every run of `order` + 1 bytes as a number in base 256."""
    runs = len(text) - order
    number = np.zeros(runs, np.int64)
    for offset in range(order + 1):
        number = number * 256 + text[offset : offset + runs]
    return number
