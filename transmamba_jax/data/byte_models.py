"""What a model has to beat: a byte model of order 2 and gzip."""

import zlib

import numpy as np

_BACKOFF = 4.0
"""Weight of the shorter context's estimate, in counts."""


def baselines(train: bytes, held_out: bytes) -> dict[str, float]:
    """Return bits per byte of `held_out` under an order-2 byte model of `train` and under gzip -9.

    The order-2 model interpolates with the orders below it: p_n(c | ctx) = (count(ctx c) + a p_{n-1}(c)) /
    (count(ctx) + a), a = 4, and p_{-1} uniform over 256 bytes. gzip sees `held_out` alone.
    """
    return {
        "order2_bits_per_byte": _order2(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)),
        "gzip_bits_per_byte": 8 * len(zlib.compress(held_out, 9)) / len(held_out),
    }


def _order2(train: np.ndarray, held_out: np.ndarray) -> float:
    probability: np.ndarray | float = 1 / 256
    for order in range(3):
        counts = np.bincount(_contexts(train, order), minlength=256 ** (order + 1))
        totals = counts.reshape(-1, 256).sum(axis=1)
        asked = _contexts(held_out, order)
        if order:
            probability = np.asarray(probability)[1:]  # the first byte has no context of this length
        probability = (counts[asked] + _BACKOFF * probability) / (totals[asked // 256] + _BACKOFF)
    return float(-np.log2(probability).mean())


def _contexts(text: np.ndarray, order: int) -> np.ndarray:
    """Return the number, base 256, of every run of `order` + 1 bytes."""
    runs = len(text) - order
    number = np.zeros(runs, np.int64)
    for offset in range(order + 1):
        number = number * 256 + text[offset : offset + runs]
    return number
