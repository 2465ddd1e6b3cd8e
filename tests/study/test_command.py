"""The command with real runs in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.support import TREE, study_file
from transmamba_jax.checkpoint import complete_steps
from transmamba_jax.study import __main__ as study_command
from transmamba_jax.study.spec import merge

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own; its cells share compiled programs in a folder of the test's."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_two_jobs_search_report_and_write_the_page(tmp_path):
    model = {"num_layers": 1, "d_model": 4, "num_heads": 1, "head_dim": 4}
    axes = {"schedule": {"ssm": {"model": {"transpoints": [0]}}}}  # the schedule quickest to compile
    config = merge(TREE["config"], {"model": model, "train": {"steps": 2}})
    quick = {"learning_rates": [1e-2], "search_seeds": [0], "seeds": [10, 11]}
    file = study_file(tmp_path, axes=axes, config=config, quick=quick, figures=["curves"])
    out = tmp_path / "out"
    result = run(tmp_path, "transmamba_jax.study", str(file), "--quick", "--jobs", "2", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out / "index.html")
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["stage"], record["seed"], record["error"]) for record in records] == [
        ("search", 0, None),
        ("report", 10, None),
        ("report", 11, None),
    ]
    splits = [record["config"]["data"]["eval_split"] for record in records]
    assert splits == ["validation", "test", "test"]
    assert "proves that the pipeline works, and no claim" in (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "code", "stages"),
    [(None, 0, ["search", "report"]), ("search", 0, ["search"]), (None, 75, ["search"])],
    ids=["both", "one", "stopped"],
)
def test_jobs_run_the_stages_that_are_asked_for_until_one_is_stopped(tmp_path, monkeypatch, stage, code, stages):
    started, hours = [], []

    class Child:
        """Stands in for a process that has ended."""

        def __init__(self, arguments):
            started.append(arguments[arguments.index("--stage") + 1])
            hours.append(float(arguments[arguments.index("--budget-hours") + 1]))
            self.pid, self.returncode = os.getpid(), code

        def poll(self):
            return self.returncode

        wait = poll

    monkeypatch.setattr(study_command.subprocess, "Popen", Child)
    monkeypatch.setattr(study_command, "_divide_cores", lambda _: None)
    file = study_file(tmp_path, axes={"schedule": {"ssm": {"model": {"transpoints": [0]}}}})
    options = ["--jobs", "2", "--out", str(tmp_path / "out"), *(["--stage", stage] if stage else [])]
    assert study_command.main([str(file), *options]) == code
    assert started == [each for each in stages for _ in range(2)]
    # One hour for all stages: each gets what the one before left.
    assert hours[::2] == hours[1::2] == sorted(hours[::2], reverse=True)
    assert 0.9 < min(hours) <= max(hours) < 1
    assert len(set(hours)) == len(stages)


@pytest.mark.parametrize("hours", ["nan", "inf", "-1", "two"])
def test_hours_that_are_none_are_refused(tmp_path, capsys, hours):
    with pytest.raises(SystemExit):
        study_command.main([str(study_file(tmp_path)), "--budget-hours", hours])
    assert "argument --budget-hours: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_the_jobs_too(number):
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    before = signal.getsignal(number)

    def stop() -> None:
        with study_command._ended_together(children):
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(SystemExit) as ended:
        stop()
    assert ended.value.code == 75
    assert [child.poll() for child in children] == [-signal.SIGTERM] * 2
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_a_study_that_is_killed_in_a_cell_continues_in_that_cell(tmp_path):
    quick = {"learning_rates": [1e-2], "search_seeds": [0, 1], "seeds": [10]}
    axes = {"schedule": {"ssm": {"model": {"transpoints": [0]}}}}
    changes = {"train": {"steps": 40, "log_every": 1}, "eval": {"every": 20}}
    config = merge(TREE["config"], changes)
    file = study_file(tmp_path, axes=axes, config=config, quick=quick, figures=["curves"])
    out = tmp_path / "out"
    folders = [out / "cells/ssm" / f"search-rate0.01-seed{seed}" for seed in (0, 1)]

    drive = lambda batch: run(tmp_path, "tests.study.drive", batch, str(file), "--quick", "--out", str(out))

    # Forty steps per cell, with a checkpoint every two: batch 79 is the last but one of the second cell.
    killed = drive("79")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = (folders[0] / "result.json").read_bytes()
    step = max(complete_steps(folders[1] / "checkpoints"))
    assert 0 < step < 40
    assert not (folders[1] / "result.json").exists()
    before = (folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    again = drive("0")
    assert again.returncode == 0, again.stderr
    assert (folders[0] / "result.json").read_bytes() == finished
    lines = (folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # What was written up to the checkpoint stays as it was, times included: those steps were not trained again.
    kept = [line for line in before if json.loads(line)["step"] <= step]
    assert len(kept) >= step
    assert lines[: len(kept)] == kept
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["seed"], record["error"]) for record in records] == [(0, None), (1, None), (10, None)]
