"""The loop around a model that compiles in a second: what a run leaves, divergence, lost locks, the command line."""

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as command
import transmamba_jax as tm
from tests.training.runs import lines_of, steps_of, train
from tests.training.support import Little
from transmamba_jax import checkpoint, config_io, data, sharding
from transmamba_jax.checkpoint import command_options
from transmamba_jax.compile_only import compiler
from transmamba_jax.data import train_tokenizer
from transmamba_jax.training import loop, run_lock, step_log


@pytest.mark.draws
def test_a_run_leaves_its_files_and_a_second_start_only_reports_them(make, capsys):
    settings = make(train={"log_every": 3})
    assert train(settings) == 0
    folder = Path(settings.workdir)
    assert config_io.read_config_file(folder / "config.yaml") == settings
    assert steps_of(settings) == [8, 10]
    training = [line for line in lines_of(settings) if "loss" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 10]
    assert {
        "loss",
        "bits_per_byte",
        "grad_norm",
        "param_norm",
        "learning_rate",
        "tokens_per_second",
        "model_flops_per_second",
        "compile_seconds",
        "peak_memory_bytes",
        "skipped_steps",
    } <= training[-1].keys()
    held_out = [line for line in lines_of(settings) if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [5, 10]
    last = lines_of(settings)[-1]
    assert {"baseline/order2_bits_per_byte", "baseline/gzip_bits_per_byte"} <= last.keys()
    assert (folder / "report" / "loss.png").exists()
    before = capsys.readouterr().out
    order2, gzip = (last[f"baseline/{name}_bits_per_byte"] for name in ("order2", "gzip"))
    bits = f"{held_out[-1]['eval/bits_per_byte']:.4f} bits per byte"
    result = f"held out    {bits}; byte model of order 2 {order2:.4f}, gzip -9 {gzip:.4f}\n"
    assert result in before
    # Steps 4, 8 have checkpoints and step 5 an evaluation.
    assert "warning: checkpoint.keep_best=1 will keep none: no step before the last has both" in before
    for name in ("checkpoints/10", "report/index.html"):
        assert str(folder / name) in before
    lines = lines_of(settings)
    assert train(settings) == 0
    output = capsys.readouterr().out
    assert "compiling" not in output
    assert result in output
    assert str(folder / "report" / "index.html") in output
    assert lines_of(settings) == lines


def test_a_batch_that_is_still_on_the_host_is_an_error_in_the_step(make, monkeypatch):
    monkeypatch.setattr(sharding, "place_batch", lambda batch, _: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(make(eval={"every": 0}))


def test_a_held_out_split_that_cannot_be_read_is_refused_before_anything_is_made(make, capsys):
    wrong = {"eval_split": "vaildation"}
    with pytest.raises(ValueError, match=r"no split 'vaildation' .*did you mean 'validation'"):
        train(make(data=wrong))
    assert "compiling" not in capsys.readouterr().out
    assert not (Path(make().workdir) / "config.yaml").exists()
    assert train(make(data=wrong, train={"steps": 1}, eval={"every": 0})) == 0


def test_the_end_of_a_document_is_looked_for_in_the_tokenizer(make, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer.train(iter([b"text"]), 300), encoding="utf-8")
    config = make(data={"tokenizer": str(path), "end_of_document": "</text>"})
    for start in (train, compiler._check_tokenizer):
        with pytest.raises(ValueError, match=r"data\.end_of_document='</text>' is none of the added tokens of"):
            start(config)


def test_a_run_whose_evaluation_is_not_finite_goes_on_and_has_a_report(make):
    """The first step leaves weights whose loss is NaN everywhere; the next ones are skipped."""
    settings = make(train={"steps": 4}, eval={"every": 2}, optimizer={"learning_rate": 1e30, "warmup_steps": 0})
    assert train(settings) == 0
    held_out, last = [line for line in lines_of(settings) if "eval/loss" in line]
    assert (held_out["eval/loss"], held_out["eval/by_position"], last["eval/loss"]) == (None, [], None)
    assert (Path(settings.workdir) / "report" / "index.html").exists()


def test_an_attention_of_ones_own_trains_to_the_report_without_samples(make):
    mean = lambda _q, _k, v, *_, **__: jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    settings = make(train={"steps": 2, "sample_tokens": 8}, eval={"every": 0}, model={"transpoints": (99,)})
    model = tm.TransMamba(settings.model, settings.kernels, attention=mean)
    assert tm.train(settings, model=model) == 0
    report = Path(settings.workdir) / "report"
    assert (report / "index.html").exists()
    assert not (report / "sample.txt").exists()
    # Read as a plain model its parameters would compute something else.
    with pytest.raises(ValueError, match=r"a model of a program's own, TransMamba\(attention=test_an_att.*tm.restore"):
        tm.load(settings.workdir)
    with pytest.raises(ValueError, match="a model of a program's own"):
        command_options.restore(settings.workdir, None)
    with pytest.raises(ValueError, match=r"give that model to tm.train\(config, model=\.\.\.\)"):
        tm.train(config_io.read_config_file(Path(settings.workdir) / "config.yaml"))
    assert tm.restore(f"{settings.workdir}/checkpoints").params.keys() >= {"embedding", "layers"}


class Listed(Little):
    """A module that Flax cannot hash."""

    widths: Any = None


def test_a_module_with_a_list_is_refused_with_what_to_use(make):
    settings = make(train={"steps": 2}, eval={"every": 0})
    with pytest.raises(ValueError, match=r"widths of the model, Listed, must be hashable, found \[1\]; use a tuple"):
        tm.train(settings, model=Listed(settings.model, widths=[1]))


@pytest.mark.draws
def test_a_report_that_a_killed_run_left_old_is_written_again(make):
    settings = make(train={"steps": 4}, eval={"every": 0}, checkpoint={"every": 0})
    train(settings)
    index = Path(settings.workdir) / "report" / "index.html"
    old = index.read_text(encoding="utf-8")
    longer = make(train={"steps": 6}, eval={"every": 0}, checkpoint={"every": 0})
    train(longer)
    new = index.read_text(encoding="utf-8")
    assert "step 4 of 4" in old
    assert "step 6 of 6" in new
    index.write_text(old, encoding="utf-8")  # killed between the last checkpoint and the report
    assert train(longer) == 0
    assert "step 6 of 6" in index.read_text(encoding="utf-8")
    # The same number of steps again, from the beginning; then one more evaluation of the last step.
    shutil.rmtree(Path(settings.workdir) / "checkpoints")
    index.write_text(new.replace("</main>", "old</main>"), encoding="utf-8")
    assert train(longer) == 0
    assert "old</main>" not in index.read_text(encoding="utf-8")
    assert "held-out bits per byte" not in index.read_text(encoding="utf-8")
    assert train(make(train={"steps": 6}, eval={"every": 6}, checkpoint={"every": 0})) == 0
    assert "held-out bits per byte" in index.read_text(encoding="utf-8")


TEXTS = [f"document {index} of a small text\n" * 4 for index in range(40)]


@pytest.mark.parametrize(
    "documents",
    [TEXTS, [text.encode() for text in TEXTS], [list(text.encode()) for text in TEXTS], np.ones((40, 120), np.int64)],
    ids=["str", "bytes", "ids", "array"],
)
def test_a_program_trains_its_documents(make, documents):
    settings = make(train={"steps": 4}, eval={"every": 4, "windows": 0}, checkpoint={"every": 0})
    fit = lambda config, documents: tm.train(config, model=Little(config.model), documents=documents)
    assert fit(settings, documents) == 0
    (held_out,) = [line for line in lines_of(settings) if "eval/loss" in line]
    chosen = [
        np.asarray(documents[index] if isinstance(documents, np.ndarray) else list(TEXTS[index].encode()))
        for index in (9, 29)
    ]
    stream = np.concatenate([np.append(each, 0) for each in chosen])
    assert held_out["eval/tokens"] == (len(stream) - 1) // 12 * 12
    given = data.give_documents(settings.data, settings.workdir, documents)
    rows = data.eval_batches(given, data.load_tokenizer("bytes"), 0, 1)
    np.testing.assert_array_equal(rows[3]["tokens"][0], stream[36:49])
    longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=6))
    assert fit(longer, documents) == 0
    assert [line["step"] for line in lines_of(settings) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"documents: saved 36, now 18.*--checkpoint\.partial True"):
        fit(dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=7)), documents[:20])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one text", "documents must be a sequence of documents, found one str"),
        (iter(TEXTS), r"found list_iterator; list\(\.\.\.\) makes one of an iterator"),
        ([3, 4] * 20, "document 0 of split 'train' .* must be str, bytes or a list of token ids, found int"),
        ([[0.5]] * 40, r"list of token ids, found list of float64 \[1\]"),
        ([[1, 256]] * 40, "token ids from 1 to 256, but those of data.tokenizer 'bytes' are 0 to 255"),
        ([[-1]] * 40, "token ids from -1 to -1"),
        (TEXTS[:5], r"too few documents for a non-empty 'validation' split .* with --eval.every 0"),
        ([], "has too few documents for a non-empty 'train' split"),
    ],
)
def test_documents_that_are_none_are_refused(make, documents, message):
    with pytest.raises(ValueError, match=message):
        tm.train(make(eval={"every": 5 if documents else 0}), model=Little(make().model), documents=documents)


def test_training_works_in_another_thread_and_says_that_signals_do_not_stop_it_there(make, capsys):
    settings, codes = make(train={"steps": 3}, eval={"every": 0}), []
    thread = threading.Thread(target=lambda: codes.append(train(settings)))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "not in the main thread: SIGTERM and Ctrl-C do not save and stop this run" in capsys.readouterr().out
    assert steps_of(settings) == [3]


def test_a_run_that_lost_its_lock_saves_nothing_more(make, monkeypatch):
    settings = make(checkpoint={"every": 2}, eval={"every": 0})
    lock, original, batches = Path(settings.workdir) / run_lock.FILE, data.BatchIterator.__next__, []

    def steal(iterator):
        batches.append(None)
        if len(batches) == 4:
            lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "thief"}), encoding="utf-8")
        return original(iterator)

    monkeypatch.setattr(data.BatchIterator, "__next__", steal)
    with pytest.raises(ValueError, match=r"was taken over by another run: process \d+ on thief"):
        train(settings)
    assert steps_of(settings) == [2]
    assert '"thief"' in lock.read_text()


def test_a_run_that_lost_its_lock_while_compiling_leaves_the_config_to_the_other(make, monkeypatch):
    settings, original = make(eval={"every": 0}), loop.compile_train_step
    lock, config = (Path(settings.workdir) / name for name in (run_lock.FILE, "config.yaml"))

    def steal(*arguments):
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "thief"}), encoding="utf-8")
        config.write_text("the other's", encoding="utf-8")
        return original(*arguments)

    monkeypatch.setattr(loop, "compile_train_step", steal)
    with pytest.raises(ValueError, match="was taken over by another run"):
        train(settings)
    assert config.read_text(encoding="utf-8") == "the other's"


def test_a_diverged_run_stops_and_keeps_the_good_checkpoint(make, monkeypatch, capsys, tmp_path):
    original = loop._Run._save
    saved = []

    def save(run, state, step, eval_loss):
        saved.append(step)
        original(run, state, step, eval_loss)

    monkeypatch.setattr(loop._Run, "_save", save)
    # Parameters of 1e25 after one update: finite, but their gradient is not.
    rates = {"learning_rate": 1e25, "warmup_steps": 0, "weight_decay": 0.0}
    settings = make(
        optimizer=rates,
        train={"steps": 50, "max_nonfinite_steps": 3},
        checkpoint={"every": 1, "keep_latest": 9},
        eval={"every": 0},
    )
    with pytest.raises(
        step_log.NonFiniteError, match=r"3 steps in a row up to step 4 .*first non-finite leaf is the gradient"
    ):
        train(settings)
    assert saved == [1]
    assert steps_of(settings) == [1]
    assert np.all(np.isfinite(checkpoint.restore(Path(settings.workdir) / "checkpoints").params["embedding"]))
    output = capsys.readouterr().out
    assert output.count("skipped: loss") == 3
    file = tmp_path / "here.yaml"
    file.write_text(config_io.to_yaml(settings), encoding="utf-8")
    assert command.main(["--config", str(file)], model=Little) == 1
    assert "train.py: 3 steps in a row up to step 4" in capsys.readouterr().err


def test_the_command_line_refuses_with_a_message(capsys, tmp_path):
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert "--config is required" in error
    assert "\n  tiny\n" in error
    assert command.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {stepz: 3}", encoding="utf-8")
    assert command.main(["--config", str(bad)]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    bad.write_text(f"data: {{source: 'text:{tmp_path}/*.txt'}}\nworkdir: {tmp_path / 'run'}", encoding="utf-8")
    assert command.main(["--config", str(bad)]) == 2
    assert capsys.readouterr().err.startswith("train.py: ")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_help_shows_options_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    for name in (
        "--config FILE",
        "--compile-only",
        "--topology NAME",
        "--train.steps",
        "--checkpoint.every",
        "--eval.every",
        "--workdir",
        "(default: ",
    ):
        assert name in output
