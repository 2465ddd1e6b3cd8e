"""A run that is killed, terminated and interrupted ends with the bits of one that is not."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import programs
from tests.training.runs import assert_same_end, metrics_of
from transmamba_jax import checkpoint
from transmamba_jax.training.preemption import EXIT_PREEMPTED

CONFIG = """
model: {num_layers: 2, d_model: 16, num_heads: 2, num_groups: 2, head_dim: 8, state_dim: 8, mlp_dim: 16,
        transpoints: [16]}
kernels: {chunk_size: 16}
data: {source: "text:TEXT", seq_len: 32, batch_size: 4, packing: first_fit}
optimizer: {warmup_steps: 5, learning_rate: 1e-2}
train: {steps: 40, accumulation: 2, loss_chunk: 32, log_every: 4, sample_tokens: 8}
checkpoint: {every: 5}
eval: {every: 10, windows: 8, batch_size: 4}
"""


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """Run train.py in a process of its own; compiled programs are shared, so that only the first one pays."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    words = ["state", "space", "model", "attention", "memory", "switch", "token", "layer"]
    for index in range(120):
        text = " ".join(rng.choice(words, rng.integers(1, 12)))
        (folder / f"{index:03}.txt").write_text(text + "\n", encoding="utf-8")
    config = folder / "small.yaml"
    config.write_text(CONFIG.replace("TEXT", str(folder / "*.txt")), encoding="utf-8")
    environment = {**programs.environment(), "JAX_PLATFORMS": "cpu"}

    def run(workdir, accident="none", count=0, expect=0):
        arguments = ["--config", str(config), "--workdir", str(folder / workdir)]
        program = ["-m", "tests.training.drive", accident, str(count)] if accident else ["train.py"]
        result = subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == expect, result.stdout + result.stderr
        return folder / workdir, result.stdout

    return run


@pytest.fixture(name="straight", scope="module")
def _straight(run):
    return run("straight", accident=None)[0]


@pytest.mark.slow
def test_a_straight_run_learns_and_leaves_everything_behind(straight):
    lines = metrics_of(straight)
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in training] == list(range(4, 41, 4))
    assert [line["step"] for line in held_out] == [10, 20, 30, 40]
    assert held_out[-1]["eval/bits_per_byte"] < 0.8 * training[0]["bits_per_byte"]
    assert checkpoint.complete_steps(straight / "checkpoints")[-1] == 40
    assert (straight / "report" / "index.md").exists()
    samples = (straight / "report" / "sample.txt").read_text(encoding="utf-8").split("\n--- prompt\n")[1:]
    assert len({sample.split("\n--- model\n")[0] for sample in samples}) == 3


@pytest.mark.slow
def test_killed_at_step_17_and_resumed_is_bit_identical(run, straight):
    workdir, _ = run("killed", "kill-at-batch", 18, expect=-signal.SIGKILL)
    assert checkpoint.complete_steps(workdir / "checkpoints")[-1] in (10, 15)
    assert (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    _, output = run("killed")
    assert "continuing from step 1" in output
    assert_same_end(workdir, straight, 40)


@pytest.mark.slow
def test_stopped_while_compiling_training_and_evaluating_is_bit_identical(run, straight):
    workdir, _ = run("stopped", "terminate-in-compilation", 1, expect=EXIT_PREEMPTED)
    assert checkpoint.complete_steps(workdir / "checkpoints") == [0]
    run("stopped", "terminate-at-batch", 8, expect=EXIT_PREEMPTED)
    assert checkpoint.complete_steps(workdir / "checkpoints")[-1] == 8
    run("stopped", "interrupt-in-evaluation", 1, expect=EXIT_PREEMPTED)  # the first evaluation, between its batches
    assert checkpoint.complete_steps(workdir / "checkpoints")[-1] == 10
    assert not any("eval/loss" in line for line in metrics_of(workdir))
    _, output = run("stopped")
    assert "continuing from step 10" in output
    assert_same_end(workdir, straight, 40)
    _, output = run("stopped")
    assert "compiling" not in output
    assert "complete: step 40 of 40" in output
    assert_same_end(workdir, straight, 40)
