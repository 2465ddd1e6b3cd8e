"""Held-out loss by class of token: copies by distance, tokens that are no copy, and repeats planted into noise.

A token is a copy when it ends an n-gram that ended earlier in the same row; its distance is that to the latest end.
Natural text has few tokens that only recall predicts, so a span of random tokens that is repeated in a row of random
tokens is measured as well (after arXiv 2606.20936 and Zoology, arXiv 2312.04927). Intervals are 95 % of a bootstrap
that draws whole rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from transmamba_jax import data
from transmamba_jax.config import Config
from transmamba_jax.evaluate.evaluator import target_weights
from transmamba_jax.evaluate.scoring import token_scores
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime.token_loss import tokens_at_a_time

NGRAM = 5
SPAN = 32
"""Tokens of a planted span."""
PLANTED_ROWS = 16
"""Rows of each distance of planted spans."""

_DRAWS = 1000
_EDGES = (0, 32, 128, 512, 2048)


@dataclasses.dataclass(frozen=True)
class ClassLoss:
    """Mean loss of the tokens of a class."""

    name: str
    tokens: int
    loss: float
    """Nats per token."""
    low: float
    """Lower end of the interval."""
    high: float


def copy_distances(
    row: Int[np.ndarray, "T1"], segment_ids: Int[np.ndarray, "T1"] | None = None, ngram: int = NGRAM
) -> Int[np.ndarray, "T1-1"]:
    """Return for each target of a row the tokens back to the latest end of the n-gram that it ends; 0: no copy.

    With `segment_ids`, an n-gram and its copy are in the same document: the model sees no other.
    """
    found = np.zeros(len(row) - 1, np.int64)
    latest: dict[bytes, int] = {}
    for end in range(ngram, len(row) + 1):
        if segment_ids is not None and segment_ids[end - ngram] != segment_ids[end - 1]:
            latest.clear()
            continue
        key = row[end - ngram : end].tobytes()
        if key in latest:
            found[end - 2] = end - latest[key]
        latest[key] = end
    return found


def classes(distances: Int[np.ndarray, "R T"]) -> dict[str, Bool[np.ndarray, "R T"]]:
    """Return name -> the targets of a class, by the distances of copies."""
    named = {"all": np.ones(distances.shape, bool), "no_copy": distances == 0, "copy": distances > 0}
    for low, high in zip(_EDGES, (*_EDGES[1:], None), strict=True):
        inside = (distances > low) & (distances <= (np.inf if high is None else high))
        named[f"copy_{low + 1}_{'on' if high is None else high}"] = inside
    return named


def class_losses(model: TransMamba, config: Config, tokenizer: data.Tokenizer, params: Any) -> list[ClassLoss]:
    """Measure the classes on the held-out rows of a config, and planted repeats in rows of random ids.

    Classes without a token are left out.
    """
    chunk = tokens_at_a_time(config.train.loss_chunk, config.model.vocab_size)
    score = jax.jit(functools.partial(token_scores, model, chunk))
    losses = lambda *arrays: -np.asarray(score(params, *arrays)[0], np.float64)
    batches = data.eval_batches(config.data, tokenizer, config.eval.windows, config.eval.batch_size)
    nll = np.concatenate([losses(batch["tokens"], batch.get("segment_ids")) for batch in batches])
    weights = np.concatenate([target_weights(batch) for batch in batches])
    ids = lambda batch: batch.get("segment_ids", [None] * len(batch["tokens"]))
    pairs = [pair for batch in batches for pair in zip(batch["tokens"], ids(batch), strict=True)]
    distances = np.stack([copy_distances(row, segments) for row, segments in pairs])
    found = [_mean(name, nll, weights * mask) for name, mask in classes(distances).items()]
    length = config.data.seq_len
    for distance in (SPAN * 2**power for power in range(length.bit_length())):
        if distance + SPAN <= length:
            rows, targets = planted_rows(length, distance, tokenizer.vocab_size)
            found.append(_mean(f"planted_{distance}", losses(rows, None), targets))
    return [each for each in found if each is not None]


def planted_rows(
    length: int, distance: int, vocab_size: int, seed: int = 0
) -> tuple[Int[np.ndarray, "R T1"], Bool[np.ndarray, "R T"]]:
    """Return rows of random ids in which a span is repeated after `distance` tokens, and the targets that repeat.

    The first token of the repeat is not among them: nothing announces it.
    """
    generator = np.random.default_rng((seed, distance))
    rows = generator.integers(vocab_size, size=(PLANTED_ROWS, length + 1), dtype=np.int32)
    targets = np.zeros((PLANTED_ROWS, length), bool)
    for row, start in enumerate(generator.integers(length + 1 - distance - SPAN, size=PLANTED_ROWS, endpoint=True)):
        again = start + distance
        rows[row, again : again + SPAN] = rows[row, start : start + SPAN]
        targets[row, again : again + SPAN - 1] = True  # target t is token t + 1
    return rows, targets


def _mean(name: str, nll: Float[np.ndarray, "R T"], weights: np.ndarray) -> ClassLoss | None:
    """Return the weighted mean and its interval over draws of rows; None: no weight."""
    sums, counts = (nll * weights).sum(1), weights.sum(1, dtype=np.float64)
    if not counts.any():
        return None
    draws = np.random.default_rng(0).integers(len(sums), size=(_DRAWS, len(sums)))
    drawn = counts[draws].sum(1)
    means = sums[draws].sum(1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return ClassLoss(name, int(np.count_nonzero(weights)), float(sums.sum() / counts.sum()), float(low), float(high))


def table(found: Sequence[ClassLoss]) -> list[str]:
    """Write the classes as lines of text."""
    lines = [f"{'tokens':>20}  {'count':>9}  {'nats/token':>10}  95 %"]
    return lines + [
        f"{each.name:>20}  {each.tokens:>9,}  {each.loss:>10.4f}  {each.low:.4f} to {each.high:.4f}" for each in found
    ]
