"""Held-out loss by position, scores of texts, the lm-evaluation-harness adapter; the command is in `__main__`."""

from transmamba_jax.evaluate.evaluator import EvalResult, EvaluationStopped, Evaluator, PositionLoss, spans
from transmamba_jax.evaluate.scoring import Scorer

__all__ = ["EvalResult", "EvaluationStopped", "Evaluator", "PositionLoss", "Scorer", "spans"]
