"""Kernels of a run: this device's record at the first start, and the same ones at every later start."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import target
from pallas_kernels.table import Table
from transmamba_jax.config import Config, DataConfig, EvalConfig, KernelsConfig, ModelConfig, TrainConfig
from transmamba_jax.generate import loaded
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Record, Result
from transmamba_jax.training import kernels
from transmamba_jax.training.loop import train

MODEL = ModelConfig(
    num_layers=1, d_model=8, num_heads=1, num_groups=1, head_dim=4, state_dim=4, mlp_dim=0, transpoints=(8,),
    dtype="float32",
)  # fmt: skip

DEFAULT = KernelsConfig(unrolled_layers=8)  # of training on a CPU


@pytest.fixture(name="cache", autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def keep(name: str, chunk: int = 16) -> Path:
    """Write a record in which one SSD implementation passed."""
    seconds: Any = {operation: {16: 1.0} for operation in ("forward", "forward+backward", "state")}
    key = calibration.key_of(MODEL)
    file = calibration.file_of(key)
    calibration.write(Record(key, "", 1, (Result("ssd", name, chunk, "passed", "", seconds),)), file)
    return file


def start(workdir: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[KernelsConfig, list[str]]:
    """Return the kernels of a start, which are kept, and the lines about an earlier start."""
    workdir.mkdir(exist_ok=True)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="transmamba_jax"):
        chosen = kernels.choose(MODEL, KernelsConfig(**options), workdir)
    kernels.save(chosen, workdir)
    lines = [record.getMessage() for record in caplog.records]
    return chosen, [line for line in lines if not line.startswith("kernels by the record ")]


def first_of(chosen: KernelsConfig) -> str:
    assert isinstance(chosen.ssd_choice, Table)
    return chosen.ssd_choice.order(16)[0].name


def test_a_record_made_between_two_starts_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir = tmp_path / "run"
    assert start(workdir, caplog) == (DEFAULT, [])
    assert start(workdir, caplog) == (DEFAULT, [])
    keep("associative")
    chosen, (line,) = start(workdir, caplog)
    assert chosen == DEFAULT
    assert line.startswith("kernels stay those that this run was started with: ssd by device and shape, ")
    (workdir / kernels.FILE).unlink()
    chosen, lines = start(workdir, caplog)
    assert (first_of(chosen), lines) == ("associative", [])
    keep("sequential")
    chosen, (line,) = start(workdir, caplog)
    assert first_of(chosen) == "associative"
    assert "would have ssd sequential (chunks of 16) at 16 tokens" in line


def test_a_name_given_later_wins_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep("associative")
    start(tmp_path / "run", caplog)
    chosen, (line,) = start(tmp_path / "run", caplog, ssd="sequential")
    assert chosen.ssd_choice == "sequential"
    assert line.startswith("warning: kernels may change from those that this run was started with: ssd associative")
    assert "agree to a tolerance" in line
    assert start(tmp_path / "run", caplog, ssd="sequential")[1] == []


def test_layers_per_iteration_are_eight_on_a_cpu_unless_given_and_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path / "given", caplog, unrolled_layers=2)[0].unrolled_layers == 2
    assert start(tmp_path / "given", caplog)[0].unrolled_layers == 2
    assert start(tmp_path / "given", caplog, unrolled_layers=4)[0].unrolled_layers == 4
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    assert start(tmp_path / "elsewhere", caplog)[0].unrolled_layers == 1
    assert KernelsConfig().unrolled_layers is None


def test_another_device_looks_up_its_own_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("associative")
    start(tmp_path / "run", caplog)
    monkeypatch.setattr(calibration, "device_name", lambda: "another chip")
    chosen, (line,) = start(tmp_path / "run", caplog)
    assert chosen == DEFAULT
    assert line.startswith("warning: kernels may change")
    assert "on another chip" in line


def test_names_that_stay_on_another_device_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"ssd": "sequential", "attention": "blockwise"}
    start(tmp_path / "run", caplog, **names)
    monkeypatch.setattr(calibration, "device_name", lambda: "another chip")
    assert start(tmp_path / "run", caplog, **names)[1] == []


@pytest.mark.parametrize("text", ["{", "{}", '{"device": "x", "kernels": {"no": 1}}', "[]"])
def test_a_file_that_cannot_be_read_is_ignored(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / kernels.FILE).write_text(text)
    chosen, (line,) = start(tmp_path, caplog)
    assert chosen == DEFAULT
    assert line.startswith(f"{tmp_path / kernels.FILE} is not used: ")


@pytest.mark.slow
def test_a_run_uses_the_record_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep("associative", 8)
    config = Config(
        model=dataclasses.replace(MODEL, vocab_size=256),
        data=DataConfig(seq_len=16, batch_size=2),
        train=TrainConfig(steps=1, sample_tokens=0),
        eval=EvalConfig(every=0),
        workdir=str(tmp_path / "run"),
    )
    with caplog.at_level(logging.INFO):
        assert train(config, documents=["some text to learn " * 20] * 20) == 0
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert f"kernels by the record {file}: ssd associative (chunks of 8) at 16 tokens" in text
    assert f"SSD runs as 'associative', chunks of 8, the fastest by {file}" in text
    saved = json.loads((tmp_path / "run" / kernels.FILE).read_text())
    assert saved["kernels"]["ssd"] is None
    assert saved["kernels"]["ssd_table"]["source"] == str(file)
    assert "associative" not in (tmp_path / "run" / "config.yaml").read_text()
    assert first_of(loaded.load(tmp_path / "run").model.kernels) == "associative"
