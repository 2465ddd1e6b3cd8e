"""Held-out loss, bits per byte and loss by position; also `python -m transmamba_jax.evaluate`.

    loss           = sum_i nll_i / tokens                  nll_i = logsumexp(z_i) - z_i[target_i], nats per token
    bits per byte  = sum_i nll_i / (ln 2 · sum_i bytes(target_i))

Loss by position is the mean over the rows at the same distances from the start of the row, in the spans
[0, 1), [1, 2), [2, 4), [4, 8) ... T. Logits exist for `train.loss_chunk` tokens at a time, in float32.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transmamba_jax import config_file, data, schedule, serving_mesh, serving_options, sharding
from transmamba_jax.config import Config
from transmamba_jax.model import TransMamba
from transmamba_jax.scoring import token_scores
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
    """Measures parameters on the held-out windows that the config names; reads them once and compiles once."""

    def __init__(self, model: TransMamba, config: Config, tokenizer: data.Tokenizer, mesh: Mesh | None = None) -> None:
        """Read the windows; rows of weight 0 fill a batch up to what divides over the devices.

        Raises:
            ValueError: the held-out split cannot be read or is too short for one window.
        """
        self._seq_len = config.data.seq_len
        self._mesh = mesh
        batches = data.eval_batches(config.data, tokenizer, config.eval.windows, config.eval.batch_size)
        missing = -config.eval.batch_size % (1 if mesh is None else sharding.row_shards(mesh))
        self._batches = [
            {name: np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) for name, rows in batch.items()}
            for batch in batches
        ]
        self._token_bytes = np.asarray(tokenizer.token_bytes, np.float64)
        self._nll = jax.jit(
            functools.partial(_nll_by_position, model, config.train.loss_chunk),
            out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
        )

    def __call__(self, params: Any, should_stop: Callable[[], bool] = lambda: False) -> EvalResult:
        """Evaluate `params`; with a mesh, each batch's rows are split over its devices.

        Raises:
            EvaluationStopped: `should_stop()` turned true between two batches.
        """
        nll, counts = np.zeros((2, self._seq_len), np.float64)  # [T]
        byte_count = 0.0
        for index, batch in enumerate(self._batches):
            if should_stop():
                raise EvaluationStopped(f"evaluation stopped after {index} of {len(self._batches)} batches")
            weights = _target_weights(batch)
            inputs = {name: self._place(rows) for name, rows in batch.items() if name != "weights"}
            nll += np.asarray(self._nll(params, inputs, self._place(weights)), np.float64)
            counts += weights.sum(axis=0, dtype=np.float64)
            byte_count += float(np.sum(self._token_bytes[batch["tokens"][:, 1:]] * weights))
        return EvalResult(
            loss=float(nll.sum() / counts.sum()),
            bits_per_byte=float(nll.sum() / (math.log(2) * byte_count)),
            tokens=round(counts.sum()),
            by_position=tuple(
                PositionLoss(start, stop, float(nll[start:stop].sum() / counts[start:stop].sum()))
                for start, stop in spans(nll.size)
                if counts[start:stop].any()
            ),
        )

    def _place(self, rows: np.ndarray) -> Any:
        # Every process reads the same windows, so each hands over the same global array.
        return rows if self._mesh is None else jax.device_put(rows, sharding.batch_sharding(self._mesh))


def _target_weights(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Weigh the targets of a batch, float32 [B, T]: 0 in rows that fill up, or where another document begins."""
    tokens = batch["tokens"]
    weights = np.broadcast_to(batch["weights"][:, None], (len(tokens), tokens.shape[1] - 1))
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


def _nll_by_position(
    model: TransMamba,
    chunk: int,
    params: Any,
    batch: dict[str, Int[Array, "B T+1"]],
    weights: Float32[Array, "B T"],
) -> Float32[Array, "T"]:
    """Sum the weighted negative log-likelihoods of the rows at each position, in float32."""
    return -jnp.sum(token_scores(model, chunk, params, **batch)[0] * weights, axis=0)


def _configured(saved: Config, options: argparse.Namespace) -> Config:
    """Return the checkpoint's config with what the command line replaces; the architecture stays the checkpoint's."""
    config = saved
    if options.config is not None:
        given = config_file.load_config(options.config)
        config = dataclasses.replace(saved, data=given.data, eval=given.eval)
        if options.schedule is None:
            model = dataclasses.replace(saved.model, transpoints=given.model.transpoints)
            config = dataclasses.replace(config, model=model)
    windows = config.eval.windows if options.windows is None else options.windows
    return dataclasses.replace(
        config,
        model=serving_options.apply(config, options),
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
        prog="python -m transmamba_jax.evaluate",
        description="Measure a checkpoint on held-out text.",
        allow_abbrev=False,
    )
    serving_options.add_arguments(parser)
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="take the data, eval and TransPoints from this file (default: the config in the checkpoint)",
    )
    parser.add_argument(
        "--windows", type=int, default=None, help="rows to read, 0: all of the split (default: the config's)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint and print loss, bits per byte, baselines and the loss by position."""
    options = _parser().parse_args(arguments)
    try:
        saved = serving_options.restore(options.checkpoint, options.step)
        config = _configured(saved.config, options)
        tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
        params, mesh = serving_mesh.place(saved.params)  # on several devices each reads some of the windows
        with serving_mesh.use(mesh):
            result = Evaluator(TransMamba(config.model), config, tokenizer, mesh)(params)
        peers = data.baselines(data.training_text(config.data), data.held_out_text(config.data))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    points = schedule.expand(config.model.transpoints, config.model.num_layers)
    print(f"step {saved.step} of {options.checkpoint}, {config.data.source} {config.data.eval_split}")
    print(f"TransPoints {', '.join(map(str, points))} of {config.data.seq_len} tokens")
    print(f"{result.tokens:,} tokens: loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits per byte")
    for name, value in peers.items():
        print(f"{name.replace('_', ' ')}: {value:.4f}")
    print("\n".join(_table(result, points)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
