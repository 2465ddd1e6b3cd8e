"""Held-out loss by position, scores of texts, the inside of layers, the lm-evaluation-harness adapter."""

from transmamba_jax.evaluate.evaluator import EvalResult, EvaluationStopped, Evaluator, PositionLoss, spans
from transmamba_jax.evaluate.inspection import Inspection, inspect
from transmamba_jax.evaluate.scoring import Scorer

__all__ = ["EvalResult", "EvaluationStopped", "Evaluator", "Inspection", "PositionLoss", "Scorer", "inspect", "spans"]
