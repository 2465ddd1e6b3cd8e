"""Upcycle Mamba-2: random weights in transformers' layout, then TransPoints, then a hundred steps."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.runs import metrics_of
from tests.training.support import little_config
from transmamba_jax import convert, data
from transmamba_jax.training.loss import loss_and_gradient

TEXTS = [f"document {index} of a small text\n" * 4 for index in range(40)]
MIXED = (8, 24)
ARMS = {
    "Mamba-2": {"transpoints": (0,)},
    "with the converter": {"transpoints": MIXED},
    "without the converter": {"transpoints": MIXED, "ablation": "zero_state"},
}


@pytest.mark.slow
def test_upcycled_weights_learn_under_transpoints_with_the_converter_and_without(tmp_path):
    made = tm.ModelConfig(
        num_layers=2, d_model=16, num_heads=2, num_groups=2, head_dim=8, state_dim=8, mlp_dim=0, transpoints=(0,)
    )
    params = tm.TransMamba(made).init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]
    # Memory as long as a row: what crosses a TransPoint counts.
    params["layers"]["mixer"]["dt_bias"] = jnp.full((2, 2), -2.0)
    source = tmp_path / "mamba2"
    convert.to_mamba2(made, params, source, "transformers")
    assert json.loads((source / "config.json").read_text())["architectures"] == ["Mamba2ForCausalLM"]
    model, params = convert.from_mamba2(source)
    base = little_config(
        data={"seq_len": 32, "batch_size": 4},
        optimizer={"warmup_steps": 2, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
        kernels={"chunk_size": 16},
        train={"steps": 100, "loss_chunk": 256, "log_every": 1, "sample_tokens": 0, "init_from": str(source)},
        checkpoint={"every": 0},
    )
    before, after = {}, {}
    for arm, options in ARMS.items():
        own = dataclasses.replace(model, **options)
        config = dataclasses.replace(base, model=own, workdir=str(tmp_path / arm))
        assert tm.train(config, documents=TEXTS) == 0
        losses = [record["loss"] for record in metrics_of(Path(config.workdir))]
        before[arm], after[arm] = losses[0], float(np.mean(losses[-10:]))
        # The first loss is that of the weights in the files, under the run's TransPoints.
        given = data.give_documents(config.data, "same", TEXTS)
        rows = next(data.train_batches(given, data.load_tokenizer("bytes")))
        batch = {"tokens": jnp.asarray(rows["tokens"])}
        loss, _ = loss_and_gradient(params, tm.TransMamba(own, config.kernels), batch, 1, 256)
        assert losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert len({round(loss, 5) for loss in before.values()}) == 3
    for arm in ARMS:
        assert after[arm] < before[arm] - 2, (before, after)
