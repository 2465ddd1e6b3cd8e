"""Evaluations of a reported cell after its training, as `measure` of the study names them."""

import dataclasses
from typing import Any

from transmamba_jax import data
from transmamba_jax.checkpoint import command_options
from transmamba_jax.config import Config
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate.search import Step, search
from transmamba_jax.evaluate.token_classes import class_losses
from transmamba_jax.model import TransMamba
from transmamba_jax.study.spec import Study


def evaluate(study: Study, config: Config) -> dict[str, Any]:
    """Restore the trained cell and return `measure/<name>/<field>` of every evaluation.

    Fields are those of an evaluation line; with classes also `class/<class>`, the mean loss in nats per token, and
    `class/<class>/interval`, both ends over rows; with a search also `transpoints`, which it found on the rows of the
    study's `data.eval_split`, and `cost`, their predicted FLOPs per token.

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
        if "search" in entry:
            chosen = _search(study, measured, tokenizer, saved.params, entry["search"])
            measured = dataclasses.replace(
                measured, model=dataclasses.replace(measured.model, transpoints=chosen.transpoints)
            )
            metrics |= {f"measure/{name}/transpoints": list(chosen.transpoints), f"measure/{name}/cost": chosen.cost}
        model = TransMamba(measured.model, measured.kernels)
        result = Evaluator(model, measured, tokenizer)(saved.params).metrics()
        metrics |= {f"measure/{name}/{field.removeprefix('eval/')}": value for field, value in result.items()}
        if entry.get("classes"):
            for each in class_losses(model, measured, tokenizer, saved.params):
                metrics[f"measure/{name}/class/{each.name}"] = each.loss
                metrics[f"measure/{name}/class/{each.name}/interval"] = [each.low, each.high]
    return metrics


def _search(study: Study, config: Config, tokenizer: data.Tokenizer, params: Any, share: float) -> Step:
    """Search on the split that learning rates are chosen on, which is not the reported one."""
    rows = dataclasses.replace(config.data, eval_split=study.search_split)
    config = dataclasses.replace(config, data=rows)
    return search(TransMamba(config.model, config.kernels), config, tokenizer, params, share)[0][-1]
