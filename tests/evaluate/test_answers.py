"""Accuracy on answers: counts by hand, and through a training run on a task."""

import json

import numpy as np
import pytest

import transmamba_jax as tm
from transmamba_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TrainConfig
from transmamba_jax.evaluate.answers import AnswerCounter


def test_accuracies_by_hand():
    # Two rows of 9 tokens. Row 0: an answer of two tokens at 3, 4 (facts 1, 2), one at 8 (fact 6). Row 1: one at 5 (2).
    answers = np.array([[0, 0, 0, 1, 1, 0, 0, 0, 2], [0, 0, 0, 0, 0, 1, 0, 0, 0]])
    facts = np.array([[-1, -1, -1, 1, 2, -1, -1, -1, 6], [-1, -1, -1, -1, -1, 2, -1, -1, -1]])
    right = np.zeros((2, 8), bool)
    right[0, 2] = True  # token 3, but not token 4
    right[0, 7] = right[1, 4] = True
    counter = AnswerCounter()
    counter.add(right[:1], answers[:1], facts[:1])
    counter.add(right[1:], answers[1:], facts[1:])
    result = counter.result(8, (0, 4, 8))
    assert (result.tokens, result.answers, result.count) == (3 / 4, 2 / 3, 3)
    assert result.by_query == [[2, 4, 0.0, 1], [4, 8, 1.0, 2]]
    assert result.by_fact == [[1, 2, 0.0, 1], [2, 4, 1.0, 1], [4, 8, 1.0, 1]]
    assert result.by_distance == [[2, 4, 2 / 3, 3]]
    assert result.by_transpoint == [[0, None, None, 2 / 3], [4, 0.0, 1.0, 1.0], [8, 2 / 3, None, None]]
    with pytest.raises(ValueError, match="no held-out row has an answer"):
        AnswerCounter().result(8, (0,))


@pytest.mark.slow
def test_a_run_on_a_task_learns_it_and_says_so(tmp_path):
    model = ModelConfig(
        vocab_size=3, num_layers=2, d_model=32, num_heads=2, num_groups=2, head_dim=16, state_dim=16, mlp_dim=0,
        transpoints=(0, 16), dtype="float32",
    )  # fmt: skip
    config = Config(
        model=model,
        data=DataConfig(source="synthetic:induction?alphabet=2", seq_len=16, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=5),
        train=TrainConfig(steps=60, log_every=60),
        eval=EvalConfig(every=60, windows=64),
        workdir=str(tmp_path / "run"),
    )
    assert tm.train(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (training,) = [line for line in lines if "loss" in line]
    assert training["tokens"] == 32  # one answer a row
    (result,) = [line for line in lines if "eval/loss" in line]
    assert result["eval/tokens"] == result["eval/answers_count"] == 64
    assert result["eval/accuracy"] == result["eval/answers"] > 0.9
    assert (tmp_path / "run/report/index.html").exists()
