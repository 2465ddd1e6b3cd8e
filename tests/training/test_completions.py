"""Test training on completions alone: the loss against float64 arithmetic by hand, and a hundred steps."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.support import Little, little_config
from transmamba_jax import config_io, data, sharding
from transmamba_jax.config import Config
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate.__main__ import main as evaluate
from transmamba_jax.training.optimizer import make_optimizer
from transmamba_jax.training.step import TrainState, abstract_batch, make_train_step

ANSWERS = {"red": "stop", "green": "go", "blue": "wait"}


def config_of(folder: Path, packing: str, **sections) -> Config:
    """Write questions and answers, and return a config that trains on the answers."""
    rows = [{"prompt": f"{word}?", "completion": answer} for word, answer in ANSWERS.items()] * 20
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": f"jsonl:{folder}/qa.jsonl", "cache_dir": str(folder / "cache"), "packing": packing}
    fields = {"prompt_field": "prompt", "completion_field": "completion", "seq_len": 24, "batch_size": 4}
    return little_config(
        **{"model": {"vocab_size": 256}, "data": {**source, **fields}, "workdir": str(folder / "run"), **sections}
    )


def by_hand(logits: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return loss and accuracy of the letters behind a question mark up to the end of their document, in float64."""
    loss, right, count = 0.0, 0, 0
    for row, (tokens, scores) in enumerate(zip(batch["tokens"], logits.astype(np.float64), strict=True)):
        text = bytes(tokens.tolist())
        for place in range(1, len(text)):
            before, segments = text[:place].rpartition(b"\0")[2], batch.get("segment_ids")
            padding = segments is not None and segments[row, place] == 0
            starts = segments is not None and segments[row, place] != segments[row, place - 1]
            cut = text.find(b"?", 0, text.find(b"\0")) < 0 and place <= text.find(b"\0")  # a row that begins in one
            if padding or starts or (b"?" not in before and not cut):
                continue
            shifted = scores[place - 1] - scores[place - 1].max()
            loss += np.log(np.exp(shifted).sum()) - shifted[tokens[place]]
            right += int(scores[place - 1].argmax() == tokens[place])
            count += 1
    return loss / count, right / count


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_the_loss_is_that_of_the_completions(tmp_path: Path, packing: str) -> None:
    config = config_of(tmp_path, packing, eval={"windows": 4, "batch_size": 4})
    model, mesh = Little(config.model), sharding.make_mesh(little_config().mesh, jax.devices()[:1])
    batch = next(data.train_batches(config.data, data.load_tokenizer("bytes")))
    assert {name: rows.shape for name, rows in batch.items()} == {
        name: rows.shape for name, rows in abstract_batch(config, mesh).items()
    }
    inputs = lambda batch: {name: batch[name][:, :-1] for name in ("tokens", "segment_ids") if name in batch}
    with jax.set_mesh(mesh):
        state = TrainState.create(config, model, mesh)
        params = jax.tree.map(jnp.copy, state.params)
        expected, _ = by_hand(np.asarray(model.apply({"params": params}, **inputs(batch))), batch)
        _, metrics = make_train_step(config, model, make_optimizer(config), mesh)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)

    result = Evaluator(model, config, data.load_tokenizer("bytes"))(params)
    (held_out,) = data.eval_batches(config.data, data.load_tokenizer("bytes"), 4, 4)
    logits = np.asarray(model.apply({"params": params}, **inputs(held_out)))
    loss, accuracy = by_hand(logits, held_out)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == pytest.approx(accuracy, rel=1e-6)
    assert result.metrics()["eval/accuracy"] == result.accuracy


@pytest.mark.slow
def test_a_hundred_steps_on_prompts_lower_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = {"d_model": 32, "num_heads": 2, "num_groups": 1, "head_dim": 16, "state_dim": 16, "mlp_dim": 64}
    config = config_of(
        tmp_path,
        "first_fit",
        model={"vocab_size": 256, "num_layers": 2, "transpoints": (0, 12), **small},
        train={"steps": 100, "log_every": 50, "sample_tokens": 8},
        eval={"every": 50, "windows": 8},
        checkpoint={"every": 0},
    )
    assert tm.train(config) == 0
    folder = Path(config.workdir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0] < np.log(256)
    assert lines[-1]["eval/accuracy"] > 0.8
    assert not [name for line in lines for name in line if name.startswith("baseline/")]
    assert config_io.read_config_file(folder / "config.yaml") == config
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(lines[-1]["eval/accuracy"], abs=1e-6)
    assert found["baselines"] == {}
