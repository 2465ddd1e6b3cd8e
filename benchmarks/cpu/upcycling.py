"""Upcycle Mamba-2: `python -m benchmarks.cpu.upcycling` prints the table of docs/fine-tune.md in about five minutes.

A Mamba-2 of 4 layers and width 64, random or trained for --steps steps on the standard library, is written in
transformers' layout. It is then trained for 100 steps from there, under TransPoint 0 and log-spaced ones, with the
Memory Converter and with the state 0 at the TransPoint. Held-out nats per token, which are bytes, before and after.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import transmamba_jax as tm
from benchmarks import timing
from transmamba_jax import checkpoint, convert, data, schedule, sharding
from transmamba_jax.config import Config
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.runtime import host_memory

SEQ_LEN, STEPS = 128, 100
OPTIONS = (
    *("--model.mlp-dim", "0", "--model.d-model", "64", "--model.num-heads", "4", "--model.num-groups", "4"),
    *("--model.head-dim", "32", "--model.state-dim", "32", "--model.residual-in-fp32", "False"),
    *("--data.seq-len", str(SEQ_LEN), "--data.batch-size", "8", "--train.sample-tokens", "0", "--eval.windows", "64"),
    *("--checkpoint.every", "0", "--optimizer.warmup-steps", "10", "--optimizer.learning-rate", "1e-3"),
    *("--optimizer.final-learning-rate", "1e-4", "--model.transpoints", "0"),
)


def config_of(workdir: Path, steps: int, source: Path | None = None, **model: Any) -> Config:
    """Return the config of a run, with changes of its model."""
    base = tm.load_config("tiny", list(OPTIONS))
    return dataclasses.replace(
        base,
        workdir=str(workdir),
        model=dataclasses.replace(base.model, **model),
        train=dataclasses.replace(base.train, steps=steps, init_from=None if source is None else str(source)),
        eval=dataclasses.replace(base.eval, every=steps),
    )


def held_out(config: Config, params: Any) -> float:
    """Return the held-out loss of parameters in nats per token."""
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = tm.TransMamba(config.model, config.kernels)
        return Evaluator(model, config, data.open_tokenizer(config.data), mesh)(params).loss


def source(folder: Path, steps: int) -> Any:
    """Write a Mamba-2 of so many steps in transformers' layout, and return its parameters."""
    config = config_of(folder / f"pretrained-{steps}", max(steps, 1))
    if steps:
        tm.train(config)
        params = checkpoint.restore(config.workdir, params_only=True).params
    else:
        params = tm.TransMamba(config.model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    convert.to_mamba2(config.model, params, folder / f"source-{steps}")
    return params


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the trained source; default: 300")
    options = parser.parse_args()
    host_memory.keep_freed()
    print(timing.heading("jax"))
    spaced = schedule.choose("log_spaced", SEQ_LEN, 4)
    arms = {
        "Mamba-2": {"transpoints": (0,)},
        "log-spaced, converter": {"transpoints": spaced},
        "log-spaced, state 0": {"transpoints": spaced, "ablation": "zero_state"},
    }
    with tempfile.TemporaryDirectory() as place:
        for steps in (options.steps, 0):
            params = source(Path(place), steps)
            for number, (name, model) in enumerate(arms.items()):
                config = config_of(
                    Path(place) / f"run-{steps}-{number}", STEPS, Path(place) / f"source-{steps}", **model
                )
                before = held_out(config, params)
                tm.train(config)
                lines = (Path(config.workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                after = json.loads(lines[-1])["eval/loss"]
                kind = f"trained for {steps} steps" if steps else "random"
                print(f"{kind:<24} {name:<24} {before:.5f} -> {after:.5f}", flush=True)


if __name__ == "__main__":
    main()
