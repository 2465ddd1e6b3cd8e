"""Held-out loss, bits per byte and loss by position; also `python -m transmamba_jax.evaluate`.

    loss           = sum_i nll_i / tokens                  nll_i = logsumexp(z_i) - z_i[target_i], nats per token
    bits per byte  = sum_i nll_i / (ln 2 · sum_i bytes_i)   bytes of the document that target_i stands for

Loss by position is the mean over the rows at the same distances from the start of the row, in the spans
[0, 1), [1, 2), [2, 4), [4, 8) ... T. Logits exist for `train.loss_chunk` tokens at a time, in float32.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool

from transmamba_jax import data, schedule, sharding
from transmamba_jax.config import Config
from transmamba_jax.evaluate.answers import AnswerCounter, AnswerResult
from transmamba_jax.evaluate.scoring import token_scores
from transmamba_jax.runtime.token_loss import tokens_at_a_time
from transmamba_jax.shapes import Array, Float32, Int

_Batch = dict[str, np.ndarray]


class EvaluationStopped(Exception):
    """An evaluation was asked to stop before it had read every window."""


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the predictions made at positions start <= t < stop of a row."""

    start: int
    stop: int
    loss: float
    """Nats per token."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Result of one pass over the held-out windows."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int
    """Predictions that the figures average over."""
    by_position: tuple[PositionLoss, ...]
    accuracy: float | None = None
    """Share of the weighted tokens that are the model's most likely ones; None: all tokens weigh the same."""
    answers: AnswerResult | None = None
    """Accuracy on the answers of a synthetic task."""
    by_source: tuple[tuple[str, "EvalResult"], ...] = ()
    """Results of each source of a mixture.

    The mixture's loss and accuracy are the means of theirs, weighted by the shares. Its bits per byte are the mean loss
    divided by the mean bytes of a token, both weighted by the shares.
    """

    def metrics(self) -> dict[str, Any]:
        """Return the values of an evaluation line of metrics.jsonl; positions as [start, stop, loss]."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/tokens": self.tokens,
            "eval/by_position": [[span.start, span.stop, span.loss] for span in self.by_position],
            **({} if self.accuracy is None else {"eval/accuracy": self.accuracy}),
            **({} if self.answers is None else self.answers.metrics()),
            **{
                f"eval/{name}/{key}": getattr(result, key)
                for name, result in self.by_source
                for key in ("loss", "bits_per_byte", "tokens", "accuracy")
                if getattr(result, key) is not None
            },
        }


@dataclasses.dataclass
class _Sums:
    """Sums over the rows of some batches."""

    nll: np.ndarray
    """Weighted negative log-likelihoods by position, nats, [T]."""
    weights: np.ndarray
    """By position, [T]."""
    bytes_read: float = 0.0
    correct: float = 0.0
    """Weight of the tokens that are the likeliest ones."""
    per_token: bool = True
    """Tokens have weights of their own."""

    @classmethod
    def mixed(cls, parts: Sequence["_Sums"], shares: Sequence[float]) -> "_Sums":
        """Return the sums in which each part weighs its share, whatever it has of tokens."""
        factors = [share / part.weights.sum() for part, share in zip(parts, shares, strict=True)]
        total = lambda name: sum(factor * getattr(part, name) for factor, part in zip(factors, parts, strict=True))
        per_token = all(part.per_token for part in parts)
        return cls(total("nll"), total("weights"), total("bytes_read"), total("correct"), per_token)

    def result(self, **others: Any) -> EvalResult:
        """Return the means."""
        total = self.weights.sum()
        return EvalResult(
            loss=float(self.nll.sum() / total),
            bits_per_byte=float(self.nll.sum() / (math.log(2) * self.bytes_read)),
            by_position=tuple(
                PositionLoss(start, stop, float(self.nll[start:stop].sum() / self.weights[start:stop].sum()))
                for start, stop in spans(self.nll.size)
                if self.weights[start:stop].any()
            ),
            accuracy=self.correct / float(total) if self.per_token else None,
            **others,
        )


class Evaluator:
    """Measures parameters on the held-out windows that the config names; reads them once and compiles once."""

    def __init__(self, model: nn.Module, config: Config, tokenizer: data.Tokenizer, mesh: Mesh | None = None) -> None:
        """Read the windows; rows of weight 0 fill a batch up to what divides over the devices.

        Raises:
            ValueError: the held-out split cannot be read or is too short for one window.
        """
        self._seq_len = config.data.seq_len
        self._chunk = tokens_at_a_time(config.train.loss_chunk, config.model.vocab_size)
        self._model, self._mesh = model, mesh
        sets = data.eval_sets(config.data, tokenizer, config.eval.windows, config.eval.batch_size)
        missing = -config.eval.batch_size % (1 if mesh is None else sharding.row_shards(mesh))
        pad = lambda rows: np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        self._sets = [[{key: pad(rows) for key, rows in batch.items()} for batch in sets[name]] for name in sets]
        self._mixture = config.data.mixture
        self._transpoints = config.model.transpoints
        self._score = _score(model, self._chunk, mesh)

    def under(self, transpoints: Sequence[int]) -> "Evaluator":
        """Return an evaluator of the same windows that runs the model, a `TransMamba`, under another schedule."""
        other = copy.copy(self)
        other._transpoints = schedule.expand(transpoints, self._model.config.num_layers)
        other._model = self._model.clone(config=dataclasses.replace(self._model.config, transpoints=other._transpoints))
        other._score = _score(other._model, self._chunk, self._mesh)
        return other

    def __call__(self, params: Any, should_stop: Callable[[], bool] = lambda: False) -> EvalResult:
        """Evaluate `params`; with a mesh, each batch's rows are split over its devices.

        Raises:
            EvaluationStopped: `should_stop()` turned true between two batches.
        """
        answers = AnswerCounter()
        parts = [self._sum(batches, params, answers, should_stop) for batches in self._sets]
        counts = [round(part.weights.sum()) for part in parts]
        if not self._mixture:
            table = answers.result(self._seq_len, self._transpoints) if "answers" in self._sets[0][0] else None
            return parts[0].result(tokens=counts[0], answers=table)
        names, shares = zip(*self._mixture, strict=True)
        results = [part.result(tokens=count) for part, count in zip(parts, counts, strict=True)]
        by_source = tuple(zip(names, results, strict=True))
        return _Sums.mixed(parts, shares).result(tokens=sum(counts), by_source=by_source)

    def _sum(
        self, batches: Sequence[_Batch], params: Any, answers: AnswerCounter, should_stop: Callable[[], bool]
    ) -> _Sums:
        """Add up the batches of a source."""
        nll, totals = np.zeros((2, self._seq_len), np.float64)
        sums = _Sums(nll, totals, per_token=batches[0]["weights"].ndim == 2)
        for index, batch in enumerate(batches):
            if should_stop():
                raise EvaluationStopped(f"evaluation stopped after {index} of {len(batches)} batches")
            weights = target_weights(batch)
            inputs = {name: self._place(batch[name]) for name in ("tokens", "segment_ids") if name in batch}
            losses, right = self._score(params, inputs, self._place(weights))
            sums.nll += np.asarray(losses, np.float64)
            sums.correct += float(np.sum(np.asarray(right) * weights, dtype=np.float64))
            if "answers" in batch:
                answers.add(np.asarray(right), batch["answers"], batch["facts"])
            sums.weights += weights.sum(axis=0, dtype=np.float64)
            sums.bytes_read += float(np.sum(batch["bytes"][:, 1:] * weights, dtype=np.float64))
        return sums

    def _place(self, rows: np.ndarray) -> Any:
        # Every process reads the same windows, so each hands over the same global array.
        return rows if self._mesh is None else jax.device_put(rows, sharding.batch_sharding(self._mesh))


def target_weights(batch: _Batch) -> np.ndarray:
    """Weigh the targets of a batch, float32 [B, T]: 0 in rows that fill up, or where another document begins.

    The batch has a weight for each row, or for each token.
    """
    tokens, weights = batch["tokens"], batch["weights"]
    weights = np.broadcast_to(weights[:, 1:] if weights.ndim == 2 else weights[:, None], tokens[:, 1:].shape)
    if "segment_ids" not in batch:
        return weights
    ids = batch["segment_ids"]
    return weights * (ids[:, 1:] == ids[:, :-1])


def spans(seq_len: int) -> list[tuple[int, int]]:
    """Cut positions 0 .. T-1 into [0, 1), [1, 2), [2, 4), [4, 8) ... T."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(max(2 * edges[-1], 1), seq_len))
    return list(itertools.pairwise(edges))


@functools.lru_cache(maxsize=16)  # the runs of a study follow one another in one process
def _score(model: nn.Module, chunk: int, mesh: Mesh | None) -> Callable[..., Any]:
    return jax.jit(
        functools.partial(_nll_by_position, model, chunk),
        out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
    )


def _nll_by_position(
    model: nn.Module,
    chunk: int,
    params: Any,
    batch: dict[str, Int[Array, "B T_plus_1"]],
    weights: Float32[Array, "B T"],
) -> tuple[Float32[Array, "T"], Bool[Array, "B T"]]:
    """Sum the weighted negative log-likelihoods of the rows at each position; tell which tokens are the likeliest."""
    scores, right = token_scores(model, chunk, params, batch["tokens"], batch.get("segment_ids"))
    return -jnp.sum(scores * weights, axis=0), right
