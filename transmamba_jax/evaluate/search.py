"""Greedy search of TransPoints for a trained elastic model, whose parameters stay as they are, under a cost budget.

From the SSM everywhere, the layer and the larger candidate that lower the held-out loss most per further FLOP are
taken, as long as the predicted cost fits. TransPoints are traced, so that every schedule runs in one compiled program.
The rows choose the schedule: report its loss on another split.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import data, schedule
from transmamba_jax.config import Config
from transmamba_jax.evaluate.evaluator import target_weights
from transmamba_jax.model import TransMamba
from transmamba_jax.report.costs import flops_per_token
from transmamba_jax.runtime.token_loss import chunked_log_likelihoods, tokens_at_a_time


@dataclasses.dataclass(frozen=True)
class Step:
    """A schedule that the search took."""

    transpoints: schedule.Schedule
    loss: float
    """Held-out loss, nats per token."""
    cost: float
    """Predicted cost, in the unit of the budget."""


def greedy(
    loss: Callable[[schedule.Schedule], float],
    cost: Callable[[schedule.Schedule], float],
    num_layers: int,
    candidates: Sequence[int],
    budget: float,
) -> list[Step]:
    """Return the schedules that a greedy search takes, from all layers at the smallest candidate to the last.

    Args:
        loss: held-out loss under a schedule of one TransPoint per layer.
        cost: predicted cost of such a schedule, such as FLOPs per token.
        num_layers: layers of the model.
        candidates: TransPoints to choose from, ascending.
        budget: largest cost.

    Raises:
        ValueError: the cheapest schedule does not fit the budget, or there is no candidate.
    """
    if not candidates or list(candidates) != sorted(set(candidates)):
        raise ValueError(f"candidates must be ascending TransPoints, found {', '.join(map(str, candidates)) or 'none'}")
    points = (candidates[0],) * num_layers
    if cost(points) > budget:
        raise ValueError(f"budget={budget:g} is below the cost of TransPoint {candidates[0]} in every layer, "
                         f"{cost(points):g}; raise it")  # fmt: skip
    path = [Step(points, loss(points), cost(points))]
    while True:
        now = path[-1]
        moves = [
            (*now.transpoints[:layer], candidate, *now.transpoints[layer + 1 :])
            for layer in range(num_layers)
            for candidate in candidates
            if candidate > now.transpoints[layer]
        ]
        steps = [Step(move, loss(move), cost(move)) for move in moves if cost(move) <= budget]
        better = [step for step in steps if step.loss < now.loss]
        if not better:
            return path
        gain = lambda step: (now.loss - step.loss) / max(step.cost - now.cost, 1e-9 * budget)  # noqa: B023
        path.append(max(better, key=gain))


def search(
    model: TransMamba, config: Config, tokenizer: data.Tokenizer, params: Any, share: float
) -> tuple[list[Step], float]:
    """Search TransPoints on the held-out rows of a config; return the steps, and the budget that they fit.

    Candidates are 0, the powers of two from 16 on, and T. The cost is that of `costs.flops_per_token`, and the budget
    `share` of the way from the SSM everywhere (0) to attention everywhere (1).

    Raises:
        ValueError: `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the cost between SSM and attention must be in [0, 1], found {share:g}")
    seq_len, layers = config.data.seq_len, config.model.num_layers
    batches = data.eval_batches(config.data, tokenizer, config.eval.windows, config.eval.batch_size)
    weights = [target_weights(batch) for batch in batches]
    total = sum(float(each.sum(dtype=np.float64)) for each in weights)

    @jax.jit
    def nll(params: Any, points: Any, inputs: dict[str, Any], targets: Any, weights: Any) -> Any:
        hidden = model.apply({"params": params}, **inputs, transpoints=points, method="hidden")
        logits = lambda part: model.apply({"params": params}, part, method="logits")
        chunk = tokens_at_a_time(config.train.loss_chunk, config.model.vocab_size)
        scores, _ = chunked_log_likelihoods(logits, hidden, targets, chunk)
        return -jnp.sum(scores * weights)

    @functools.cache
    def loss(points: schedule.Schedule) -> float:
        traced, summed = np.asarray(points, np.int32), 0.0
        for batch, weight in zip(batches, weights, strict=True):
            inputs = {name: batch[name][:, :-1] for name in ("tokens", "segment_ids") if name in batch}
            summed += float(nll(params, traced, inputs, batch["tokens"][:, 1:], weight))
        return summed / total

    def cost(points: schedule.Schedule) -> float:
        under = dataclasses.replace(config.model, transpoints=points)
        return flops_per_token(under, seq_len, config.kernels.chunk_size) / 3

    candidates = [0, *(2**power for power in range(4, (seq_len - 1).bit_length())), seq_len]
    least, most = cost((0,) * layers), cost((seq_len,) * layers)
    budget = least + share * max(most - least, 0.0)
    return greedy(loss, cost, layers, candidates, budget), budget


def table(path: Sequence[Step]) -> list[str]:
    """Write the steps of a search as lines of text."""
    lines = [f"{'FLOPs/token':>12}  {'nats/token':>10}  TransPoints"]
    return lines + [f"{step.cost:>12,.0f}  {step.loss:>10.4f}  {' '.join(map(str, step.transpoints))}" for step in path]
