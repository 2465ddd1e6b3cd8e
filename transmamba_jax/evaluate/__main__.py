"""Measure a checkpoint on held-out text."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transmamba_jax import config_io, data, schedule
from transmamba_jax.checkpoint import command_options
from transmamba_jax.config import Config
from transmamba_jax.evaluate.evaluator import EvalResult, Evaluator
from transmamba_jax.evaluate.lengths import with_length
from transmamba_jax.evaluate.search import search
from transmamba_jax.evaluate.search import table as search_table
from transmamba_jax.evaluate.token_classes import class_losses
from transmamba_jax.evaluate.token_classes import table as class_table
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import calibration, compile_cache, hardware, logs, serving_mesh
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.paths import option_path


def _configured(saved: Config, options: argparse.Namespace) -> Config:
    """Return the checkpoint's config with what the command line replaces; the architecture stays the checkpoint's."""
    config = saved
    if options.config is not None:
        given = config_io.load_config(options.config)
        train = dataclasses.replace(saved.train, accumulation=1)  # it must divide the batches of the run's own data
        config = dataclasses.replace(saved, train=train, data=given.data, eval=given.eval, kernels=given.kernels)
        if options.schedule is None:
            model = dataclasses.replace(saved.model, transpoints=given.model.transpoints)
            config = dataclasses.replace(config, model=model)
    windows = config.eval.windows if options.windows is None else options.windows
    if options.row_length is not None:
        config = with_length(config, options.row_length, options.scale_transpoints)
    elif options.scale_transpoints:
        raise ValueError("--scale-transpoints is for --row-length, and there is none")
    return dataclasses.replace(
        config,
        model=command_options.apply(config, options),
        eval=dataclasses.replace(config.eval, windows=windows),
    )


def _check(options: argparse.Namespace, config: Config) -> None:
    """Refuse before the evaluation what would fail after it.

    Raises:
        ValueError: `--classes` or `--search` of a mixture, or a share out of range.
    """
    further = [name for name in ("classes", "search") if getattr(options, name) not in (None, False)]
    require(
        not (config.data.mixture and further),
        f"--{' and --'.join(further)} read one source, found the mixture of {', '.join(config.data.sources)}; name one "
        "as data.source in a file for --config",
    )
    require(
        options.search is None or 0 <= options.search <= 1,
        f"--search must be a share in [0, 1], found {options.search}",
    )


def _table(result: EvalResult, transpoints: Sequence[int]) -> list[str]:
    """Write the loss by position, with the number of layers that attend at the first and last position of a span."""
    lines = [f"{'positions':>17}  {'nats/token':>10}  attention layers"]
    for span in result.by_position:
        first, last = (sum(point > position for point in transpoints) for position in (span.start, span.stop - 1))
        layers = str(first) if first == last else f"{first} to {last}"
        lines.append(f"{span.start:>8,} - {span.stop:>6,}  {span.loss:>10.4f}  {layers} of {len(transpoints)}")
    return lines


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figures(result: EvalResult) -> dict[str, Any]:
    figures = {"tokens": result.tokens, "loss": _finite(result.loss), "bits_per_byte": _finite(result.bits_per_byte)}
    return figures if result.accuracy is None else {**figures, "accuracy": result.accuracy}


def _report(
    step: int, config: Config, transpoints: Sequence[int], result: EvalResult, peers: Mapping[str, float]
) -> dict[str, Any]:
    """Return the object that --json prints; losses in nats per token, null where one is not finite."""
    spans = [{"start": span.start, "stop": span.stop, "loss": _finite(span.loss)} for span in result.by_position]
    return {
        "step": step,
        "source": ", ".join(config.data.sources),
        "split": config.data.eval_split,
        "seq_len": config.data.seq_len,
        "transpoints": list(transpoints),
        **_figures(result),
        **({"sources": {name: _figures(each) for name, each in result.by_source}} if result.by_source else {}),
        "baselines": dict(peers),
        "by_position": spans,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba evaluate",
        description="Measure a checkpoint on held-out text.",
        allow_abbrev=False,
    )
    command_options.add_arguments(parser)
    parser.add_argument(
        "--config",
        type=option_path,
        default=None,
        metavar="FILE",
        help="take the data, eval and TransPoints from this file (default: the config in the checkpoint)",
    )
    parser.add_argument(
        "--windows", type=int, default=None, help="rows to read, 0: all of the split (default: the config's)"
    )
    parser.add_argument(
        "--row-length", type=int, metavar="T", help="tokens of the rows to read (default: data.seq_len)"
    )
    parser.add_argument(
        "--scale-transpoints",
        action="store_true",
        help="scale the TransPoints with --row-length (default: keep them as numbers of tokens)",
    )
    parser.add_argument(
        "--classes",
        action="store_true",
        help="measure copies by distance, tokens that are no copy, and planted repeats as well",
    )
    parser.add_argument(
        "--search",
        type=float,
        metavar="SHARE",
        help="search TransPoints greedily, within this share (0 to 1) of the predicted FLOPs between the SSM and "
        "attention everywhere; good for a model trained under random schedules",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint and print loss, bits per byte, baselines and the loss by position, as text or JSON."""
    options = _parser().parse_args(arguments)
    compile_cache.keep_programs()
    try:
        hardware.require_devices()
        saved = command_options.restore(options.checkpoint, options.step)
        config = _configured(saved.config, options)
        _check(options, config)
        tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
        params, mesh = serving_mesh.place(saved.params)  # on several devices each reads some of the windows
        with serving_mesh.use(mesh):
            kernels = calibration.kernels(config.model, config.kernels, "read")
            model = TransMamba(config.model, kernels)
            result = Evaluator(model, config, tokenizer, mesh)(params)
            classes = class_losses(model, config, tokenizer, params) if options.classes else []
            steps = [] if options.search is None else search(model, config, tokenizer, params, options.search)[0]
        peers = {}
        if data.has_baselines(config.data):
            peers = data.baselines(data.training_text(config.data), data.held_out_text(config.data))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    points = schedule.expand(config.model.transpoints, config.model.num_layers)
    if options.json:
        found = {"classes": [dataclasses.asdict(each) for each in classes]} if classes else {}
        found |= {"search": [dataclasses.asdict(step) for step in steps]} if steps else {}
        print(json.dumps({**_report(saved.step, config, points, result, peers), **found}))
        return 0
    print(f"step {saved.step} of {options.checkpoint}, {', '.join(config.data.sources)} {config.data.eval_split}")
    print(f"TransPoints {', '.join(map(str, points))} of {config.data.seq_len} tokens")
    print(f"{result.tokens:,} tokens: loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits per byte")
    for name, each in result.by_source:
        print(f"  {name}: loss {each.loss:.4f} nats/token, {each.bits_per_byte:.4f} bits per byte")
    if result.accuracy is not None:
        print(f"accuracy on the tokens that are trained on: {result.accuracy:.4f}")
    for name, value in peers.items():
        print(f"{name.replace('_', ' ')}: {value:.4f}")
    print("\n".join(_table(result, points)))
    if classes:
        print("\n".join(class_table(classes)))
    if steps:
        print("\n".join(search_table(steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
