"""Evaluations of a reported cell after its training, as `measure` of the study names them."""

from typing import Any

from transmamba_jax import data
from transmamba_jax.checkpoint import command_options
from transmamba_jax.config import Config
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate.token_classes import class_losses
from transmamba_jax.model import TransMamba
from transmamba_jax.study.spec import Study


def evaluate(study: Study, config: Config) -> dict[str, Any]:
    """Restore the trained cell and return `measure/<name>/<field>` of every evaluation.

    Fields are those of an evaluation line; with classes also `class/<class>`, the mean loss in nats per token, and
    `class/<class>/interval`, both ends over rows.

    Raises:
        ValueError: the cell has no checkpoint, or rows cannot be made.
    """
    if not study.measure:
        return {}
    saved = command_options.restore(config.workdir, None)
    tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
    metrics: dict[str, Any] = {}
    for name, entry in study.measure.items():
        measured = study.measure_config(config, name)
        model = TransMamba(measured.model, measured.kernels)
        result = Evaluator(model, measured, tokenizer)(saved.params).metrics()
        metrics |= {f"measure/{name}/{field.removeprefix('eval/')}": value for field, value in result.items()}
        if entry.get("classes"):
            for each in class_losses(model, measured, tokenizer, saved.params):
                metrics[f"measure/{name}/class/{each.name}"] = each.loss
                metrics[f"measure/{name}/class/{each.name}/interval"] = [each.low, each.high]
    return metrics
