"""Held-out loss, bits per byte and loss by position; also `python -m transmamba_jax.evaluate`.

    loss           = sum_i nll_i / tokens                  nll_i = logsumexp(z_i) - z_i[target_i], nats per token
    bits per byte  = sum_i nll_i / (ln 2 · sum_i bytes(target_i))

Loss by position is the mean over the rows at the same distances from the start of the row, in the spans
[0, 1), [1, 2), [2, 4), [4, 8) ... T. Logits exist for `train.loss_chunk` tokens at a time, in float32.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transmamba_jax import config as config_lib
from transmamba_jax import data, schedule, sharding
from transmamba_jax.model import TransMamba
from transmamba_jax.shapes import Array, Float32, Int


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
    """What one pass over the held-out windows gives."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int
    """Predictions that the figures average over."""
    by_position: tuple[PositionLoss, ...]

    def metrics(self) -> dict[str, Any]:
        """Return the values of an evaluation line of metrics.jsonl; positions as [start, stop, loss]."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/tokens": self.tokens,
            "eval/by_position": [[span.start, span.stop, span.loss] for span in self.by_position],
        }


class Evaluator:
    """Measures parameters on the held-out windows that the config names; compiles once."""

    def __init__(
        self, model: TransMamba, config: config_lib.Config, tokenizer: data.Tokenizer, mesh: Mesh | None = None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._nll = jax.jit(
            partial(_nll_by_position, model, config.train.loss_chunk),
            out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
        )

    def __call__(self, params: Any, should_stop: Callable[[], bool] = lambda: False) -> EvalResult:
        """Evaluate `params`; with a mesh, each batch's rows are split over its devices.

        Raises:
            EvaluationStopped: `should_stop()` turned true between two batches.
        """
        config = self._config
        token_bytes = np.asarray(self._tokenizer.token_bytes, np.float64)
        nll = np.zeros(config.data.seq_len, np.float64)  # [T]
        rows = byte_count = 0.0
        for batch in data.eval_batches(config.data, self._tokenizer, config.eval.windows, config.eval.batch_size):
            if should_stop():
                raise EvaluationStopped(f"evaluation stopped after {rows:.0f} windows")
            tokens, weights = self._pad(batch["tokens"], batch["weights"])
            nll += np.asarray(self._nll(params, self._place(tokens), self._place(weights[:, None])), np.float64)
            rows += float(np.sum(weights, dtype=np.float64))
            byte_count += float(np.sum(token_bytes[tokens[:, 1:]] * weights[:, None]))
        if not (rows and byte_count):
            raise ValueError(f"data.eval_split={config.data.eval_split!r} gave no window to evaluate on")
        return EvalResult(
            loss=float(nll.sum() / (rows * nll.size)),
            bits_per_byte=float(nll.sum() / (math.log(2) * byte_count)),
            tokens=round(rows) * nll.size,
            by_position=tuple(
                PositionLoss(start, stop, float(nll[start:stop].mean() / rows)) for start, stop in spans(nll.size)
            ),
        )

    def _pad(self, tokens: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fill a batch up to the one compiled shape with rows of weight 0."""
        shards = 1 if self._mesh is None else sharding.row_shards(self._mesh)
        missing = math.ceil(self._config.eval.batch_size / shards) * shards - len(tokens)
        return np.pad(tokens, ((0, missing), (0, 0))), np.pad(weights, (0, missing))

    def _place(self, rows: np.ndarray) -> Any:
        # Every process reads the same windows, so each hands over the same global array.
        return rows if self._mesh is None else jax.device_put(rows, sharding.activation("tokens", self._mesh))


def spans(seq_len: int) -> list[tuple[int, int]]:
    """Cut positions 0 .. T-1 into [0, 1), [1, 2), [2, 4), [4, 8) ... T."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(max(2 * edges[-1], 1), seq_len))
    return list(itertools.pairwise(edges))


def _nll_by_position(
    model: TransMamba, chunk: int, params: Any, tokens: Int[Array, "B T+1"], weights: Float32[Array, "B 1"]
) -> Float32[Array, "T"]:
    """Sum the weighted negative log-likelihoods of the rows at each position, in float32."""
    hidden = model.apply({"params": params}, tokens[:, :-1], method="hidden")
    batch, time = hidden.shape[:2]
    width = min(max(chunk // batch, 1), time)
    count = math.ceil(time / width)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - time)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, width, *x.shape[2:]), 1, 0)

    def summed(part: tuple[Array, Array]) -> Float32[Array, "Q"]:
        hidden, targets = part
        logits = model.apply({"params": params}, hidden, method="logits")
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights, axis=0)

    return jax.lax.map(summed, (cut(hidden), cut(tokens[:, 1:]))).reshape(-1)[:time]


def _configured(saved: config_lib.Config, options: argparse.Namespace) -> config_lib.Config:
    """Return the checkpoint's config with what the command line replaces; the architecture stays the checkpoint's."""
    config, transpoints = saved, saved.model.transpoints
    if options.config is not None:
        given = config_lib.load_config(options.config)
        config, transpoints = dataclasses.replace(saved, data=given.data, eval=given.eval), given.model.transpoints
    if options.schedule is not None:
        transpoints = schedule.named(options.schedule, config.data.seq_len)
    windows = config.eval.windows if options.windows is None else options.windows
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transpoints=transpoints),
        eval=dataclasses.replace(config.eval, windows=windows),
    )


def _table(result: EvalResult, transpoints: Sequence[int]) -> list[str]:
    """Write the loss by position, with the number of layers that attend at the first and last position of a span."""
    lines = [f"{'positions':>17}  {'nats/token':>10}  attention layers"]
    for span in result.by_position:
        first, last = (sum(point > position for point in transpoints) for position in (span.start, span.stop - 1))
        layers = str(first) if first == last else f"{first} to {last}"
        lines.append(f"{span.start:>8,} - {span.stop:>6,}  {span.loss:>10.4f}  {layers} of {len(transpoints)}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transmamba_jax.evaluate", description="Measure a checkpoint on held-out text."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="<workdir>/checkpoints")
    parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="take the data, eval and TransPoints from this file (default: the config in the checkpoint)",
    )
    parser.add_argument(
        "--schedule",
        default=None,
        metavar="NAME",
        help=f"TransPoint schedule scaled to data.seq_len: {', '.join(schedule.NAMED)} (default: the config's)",
    )
    parser.add_argument(
        "--windows", type=int, default=None, help="rows to read, 0: all of the split (default: the config's)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint and print loss, bits per byte, baselines and the loss by position."""
    from transmamba_jax import checkpoint  # orbax takes seconds to import and the training loop has its own use of it

    options = _parser().parse_args(arguments)
    try:
        saved = checkpoint.restore(options.checkpoint, options.step, params_only=True)
        config = _configured(saved.config, options)
        tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
        result = Evaluator(TransMamba(config.model), config, tokenizer)(saved.params)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    points = schedule.expand(config.model.transpoints, config.model.num_layers)
    print(f"step {saved.step} of {options.checkpoint}, {config.data.source} {config.data.eval_split}")
    print(f"TransPoints {', '.join(map(str, points))} of {config.data.seq_len} tokens")
    print(f"{result.tokens:,} tokens: loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits per byte")
    print("\n".join(_table(result, points)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
