"""The end of a complete run: samples and the report, written where they are missing or of an earlier step."""

import concurrent.futures
import contextlib
from pathlib import Path
from typing import Any

import flax.linen as nn

from transmamba_jax import data
from transmamba_jax.config import Config
from transmamba_jax.data.synthetic import is_synthetic
from transmamba_jax.model import TransMamba
from transmamba_jax.report import is_written, read_metrics, write_report
from transmamba_jax.runtime import hosts, storage
from transmamba_jax.training import sample
from transmamba_jax.training.console import Console
from transmamba_jax.training.metrics import MetricsWriter
from transmamba_jax.training.step import TrainState


def complete(
    *,
    config: Config,
    workdir: Path,
    model: nn.Module,
    tokenizer: data.Tokenizer,
    state: TrainState,
    step: int,
    console: Console,
    trained: bool,
    writer: MetricsWriter | None,
) -> None:
    """Write what a reader looks at, and say where everything is; every process calls it.

    Args:
        config: the run's.
        workdir: its folder.
        model: its model.
        tokenizer: its tokenizer.
        state: that of the last step.
        step: the last step.
        console: where lines go.
        trained: this start made steps. If not, samples and report stay where they are of this step.
        writer: of the lines of metrics; the report is old where this start wrote one. Of the first process.

    Raises:
        OSError: the report could not be written; what is half written is deleted, and the next start writes it.
    """
    report = workdir / "report"
    samples, index = report / "sample.txt", report / "index.html"
    text, baselines = None, None
    # Beside the samples, whose compilation leaves a core idle.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as beside:
        if writer is not None and config.eval.every > 0 and data.has_baselines(config.data):
            baselines = beside.submit(_write_baselines, config, writer, step, console)
        if _decodes(config, model) and hosts.broadcast_from_first(trained or not sample.is_written(samples, step)):
            console.say(f"writing samples of {config.train.sample_tokens} tokens")
            try:
                text = sample.sample_text(config, model, tokenizer, state, step)
            except (OSError, ValueError) as error:  # the text cannot be read, or logits are not finite
                console.alarm(f"no sample: {error}")
    if baselines is not None:
        baselines.result()
    logged = writer is not None and writer.written
    # The others wait: JAX takes a process that waits at the end of the program for one that was left alone.
    with hosts.collective_errors(OSError):
        try:
            if hosts.is_first() and text is not None:
                report.mkdir(exist_ok=True)
                storage.replace_text(samples, text, "sample.txt.new")
            if hosts.is_first() and (trained or text is not None or logged or not is_written(workdir, step)):
                index = write_report(workdir)
        except (OSError, ValueError) as error:
            for file in (samples, index):  # an old one, or half of one, would pass for the new one at the next start
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            raise OSError(
                f"step {step} of {config.train.steps} is saved, but the report is not written: {error}; "
                "the same command writes it"
            ) from error
    console.say(f"complete: step {step} of {config.train.steps}")
    if hosts.is_first():
        _say_result(workdir, step, console)
    console.say(f"checkpoint  {workdir / 'checkpoints' / str(step)}")
    if samples.exists():
        console.say(f"samples     {samples}")
    console.say(f"report      {index}")


def _decodes(config: Config, model: nn.Module) -> bool:
    """Tell whether samples are asked for and can be made.

    A program's own model has no decoding cache, and tokens of a synthetic task are no text.
    """
    own = isinstance(model, TransMamba) and model.attention is None and model.config.ablation == "none"
    return own and not is_synthetic(config.data.source) and config.train.sample_tokens > 0


def _write_baselines(config: Config, writer: MetricsWriter, step: int, console: Console) -> None:
    """Log the bits per byte of models that need no training, unless an earlier start did.

    They may read a broken document that no training step read. So they come after the last checkpoint.
    """
    if writer.has(step, "baseline/gzip_bits_per_byte"):
        return
    try:
        found = data.baselines(data.training_text(config.data), data.held_out_text(config.data))
        writer.write({"step": step, **{f"baseline/{name}": value for name, value in found.items()}})
        writer.flush()
    except (OSError, ValueError) as error:
        console.alarm(f"no baselines: {error}")


def _say_result(workdir: Path, step: int, console: Console) -> None:
    """Log the held-out loss of the last step beside its baselines."""
    last: dict[str, Any] = {}
    for record in read_metrics(workdir / "metrics.jsonl"):
        last |= record if record["step"] == step else {}
    bits = [last.get(f"{name}bits_per_byte") for name in ("eval/", "baseline/order2_", "baseline/gzip_")]
    if None not in bits:
        model, order2, gzip = (f"{value:.4f}" for value in bits)
        console.say(f"held out    {model} bits per byte; byte model of order 2 {order2}, gzip -9 {gzip}")
