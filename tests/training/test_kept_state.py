"""What a run keeps where something other than its steps fails: text that cannot be read, a stop, a save."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import pytest

import transmamba_jax as tm
from tests.training.runs import assert_same_end, before_call, lines_of, steps_of, train
from tests.training.support import Little
from transmamba_jax import checkpoint, data
from transmamba_jax.checkpoint import checkpointer, manifest
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.training import completion, loop
from transmamba_jax.training.completion import sample
from transmamba_jax.training.step_log import NonFiniteError

TEXTS = [f"document {index} of a small text\n" * 4 for index in range(40)]


def losses_of_checkpoints(settings):
    folder = Path(settings.workdir) / "checkpoints"
    return {step: manifest.read(folder / str(step)).eval_loss for step in steps_of(settings)}


def test_text_that_no_step_reads_costs_the_baselines_alone(make, monkeypatch, capsys):
    def broken(_):
        raise ValueError("document 7 is no text")

    settings = make(train={"steps": 4}, checkpoint={"every": 0})
    with monkeypatch.context() as patch:
        patch.setattr(data, "training_text", broken)
        assert train(settings) == 0
    assert "no baselines: document 7 is no text" in capsys.readouterr().out
    assert steps_of(settings) == [4]
    assert "eval/loss" in lines_of(settings)[-1]
    assert (Path(settings.workdir) / "report" / "index.html").exists()
    assert train(settings) == 0  # the text is mended
    assert "baseline/gzip_bits_per_byte" in lines_of(settings)[-1]
    assert len(lines_of(settings)) == len({json.dumps(line) for line in lines_of(settings)})


def test_a_document_that_cannot_be_read_costs_no_step(make, tmp_path, monkeypatch):
    """The state of the last complete step is saved, and once the text is mended the run ends as if nothing was."""
    sections = {"checkpoint": {"every": 0}, "eval": {"every": 0}, "train": {"steps": 6}}
    settings, straight = (make(**sections, workdir=str(tmp_path / name)) for name in ("broken", "straight"))
    run = lambda config: tm.train(config, model=Little(config.model), documents=TEXTS)
    assert run(straight) == 0
    original, calls = data.BatchIterator.__next__, itertools.count(1)

    def read(batches):
        if next(calls) == 4:
            raise ValueError("document 9 is no text")
        return original(batches)

    with monkeypatch.context() as patch:
        patch.setattr(data.BatchIterator, "__next__", read)
        with pytest.raises(ValueError, match="document 9 is no text"):
            run(settings)
    assert steps_of(settings) == [3]
    assert run(settings) == 0
    assert_same_end(Path(settings.workdir), Path(straight.workdir), 6)


def test_an_evaluation_that_fails_costs_no_step(make, monkeypatch):
    def broken(*_):
        raise OSError("the disk is gone")

    settings = make(checkpoint={"every": 0}, eval={"every": 3})
    monkeypatch.setattr(Evaluator, "__call__", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        train(settings)
    assert steps_of(settings) == [3]


def test_a_run_that_diverged_is_not_saved_before_an_error_of_the_data(make, monkeypatch):
    def broken():
        raise ValueError("document 9 is no text")

    settings = make(checkpoint={"every": 0}, eval={"every": 0}, optimizer={"learning_rate": 1e30, "warmup_steps": 0})
    monkeypatch.setattr(data.BatchIterator, "__next__", data.BatchIterator.__next__)  # put back after the test
    before_call(data.BatchIterator, "__next__", 4, broken)
    with pytest.raises(ValueError, match="document 9 is no text"):
        train(settings)
    assert steps_of(settings) == []


def test_a_stop_in_an_evaluation_does_not_cost_the_best_checkpoint(make, monkeypatch):
    settings = make(checkpoint={"every": 2, "keep_latest": 1, "keep_best": 1}, eval={"every": 2}, train={"steps": 6})
    monkeypatch.setattr(Evaluator, "__call__", Evaluator.__call__)
    before_call(Evaluator, "__call__", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(settings) != 0
    assert losses_of_checkpoints(settings) == {2: None}
    best = iter([0.5, 8.0, 9.0])
    original = Evaluator.__call__

    def rising(*arguments):
        return dataclasses.replace(original(*arguments), loss=next(best))

    monkeypatch.setattr(Evaluator, "__call__", rising)
    assert train(settings) == 0
    assert losses_of_checkpoints(settings) == {2: 0.5, 6: 9.0}
    assert checkpoint.restore(Path(settings.workdir) / "checkpoints", 2).step == 2


def test_a_stop_between_two_schedules_keeps_the_loss_of_the_first(make, monkeypatch):
    """The checkpoint has the loss. No line is written: the next start measures all schedules again."""
    settings = make(checkpoint={"every": 2}, eval={"every": 2}, train={"steps": 4})
    monkeypatch.setattr(loop, "_evaluators", lambda *arguments: {"other": arguments[-1]})
    monkeypatch.setattr(Evaluator, "__call__", Evaluator.__call__)  # put back after the test
    before_call(Evaluator, "__call__", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(settings) != 0
    (loss,) = losses_of_checkpoints(settings).values()
    assert not [line for line in lines_of(settings) if "eval/loss" in line]
    assert train(settings) == 0
    first, last = [line for line in lines_of(settings) if "eval/loss" in line]
    assert (first["step"], first["eval/loss"], first["eval/other/loss"]) == (2, loss, loss)
    assert losses_of_checkpoints(settings) == {2: loss, 4: last["eval/loss"]}


def test_a_save_that_is_tried_again_knows_its_loss(make, monkeypatch):
    settings = make(checkpoint={"every": 0}, train={"steps": 2}, eval={"every": 2})
    original, calls = manifest.write, itertools.count(1)

    def full(*arguments):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(manifest, "write", full)
    assert train(settings) == 0
    (loss,) = (line["eval/loss"] for line in lines_of(settings) if "eval/loss" in line)
    assert losses_of_checkpoints(settings) == {2: pytest.approx(loss)}
    assert sorted(path.name for path in (Path(settings.workdir) / "checkpoints").iterdir()) == ["2"]


def test_what_ends_a_run_is_not_hidden_by_a_save_that_fails(make, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    settings = make(checkpoint={"every": 2}, eval={"every": 0})
    monkeypatch.setattr(manifest, "write", full)
    push = loop.StepLog.push

    def diverged(log, step, *arguments):
        push(log, step, *arguments)
        if step == 3:
            raise NonFiniteError("step 3 is not finite")

    monkeypatch.setattr(loop.StepLog, "push", diverged)
    monkeypatch.setattr(checkpointer.Checkpointer, "saving", True)  # the failure is found at the end
    with pytest.raises(NonFiniteError, match="step 3 is not finite"):
        train(settings)
    assert "checkpoint 2 was not saved: " in capsys.readouterr().out


def test_a_sample_that_fails_costs_no_report(make, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("the text is gone")

    settings = make(train={"steps": 2, "sample_tokens": 4}, eval={"every": 0})
    monkeypatch.setattr(sample, "sample_text", broken)
    monkeypatch.setattr(completion, "_decodes", lambda *_: True)
    assert train(settings) == 0
    assert "no sample: the text is gone" in capsys.readouterr().out
    assert (Path(settings.workdir) / "report" / "index.html").exists()
