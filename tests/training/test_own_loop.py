"""A loop of one's own from the public parts."""

import itertools

import jax
import numpy as np

import transmamba_jax as tm
from tests.training.support import Little, little_config
from transmamba_jax import data


def test_a_loop_of_public_parts_has_the_losses_of_the_library(tmp_path):
    texts = [f"document {index} of a small text\n" * 4 for index in range(40)]
    config = little_config(
        model={"vocab_size": 256}, train={"steps": 6}, checkpoint={"every": 0}, workdir=str(tmp_path / "run")
    )
    model = Little(config.model)
    assert tm.train(config, model=model, documents=texts) == 0
    from_library = [record["loss"] for record in _records(tmp_path / "run" / "metrics.jsonl")]

    state = tm.TrainState.create(config, model)
    step = tm.make_train_step(config, model, tm.make_optimizer(config))
    given = data.give_documents(config.data, "own", texts)
    losses = []
    for batch in itertools.islice(data.train_batches(given, data.load_tokenizer("bytes")), config.train.steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == from_library
    saved = tm.restore(tmp_path / "run" / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved.params), jax.device_get(state.params))


def _records(path):
    from transmamba_jax.report import read_metrics

    return [record for record in read_metrics(path) if "loss" in record]
