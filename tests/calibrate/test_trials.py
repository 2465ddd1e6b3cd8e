"""Trials of simulated implementations: each way to end is recorded, and none but the right ones is chosen."""

import sys
from pathlib import Path

import pytest

from transmamba_jax.calibrate import __main__ as command
from transmamba_jax.calibrate import trials
from transmamba_jax.calibrate import worker as real_worker
from transmamba_jax.calibrate.candidates import Job
from transmamba_jax.config import KernelsConfig
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Record, Result

from . import worker

SIZES = {"num_heads": 2, "num_groups": 2, "head_dim": 4, "state_dim": 4, "dtype": "float32"}
JOB = Job(SIZES, rows=1, split=1, lengths=(256, 64), rounds=2, quick=True, limit=25)


def make_record(*names: str, job: Job = JOB) -> Record:
    return trials.make_record(job, (sys.executable, "-m", "tests.calibrate.worker", *names))


def by_name(record: Record) -> dict[str, Result]:
    return {result.name: result for result in record.results if result.operator == "ssd"}


@pytest.fixture(name="record", scope="module")
def _record() -> Record:
    return make_record("slow", "wrong", "fails", "hangs", "exits", "killed")


@pytest.mark.slow
def test_every_ending_is_recorded(record: Record) -> None:
    found = by_name(record)
    assert {name: result.outcome for name, result in found.items()} == {
        "sequential": "passed",
        "slow": "passed",
        "wrong": "wrong",
        "fails": "failed",
        "hangs": "hung",
        "exits": "died",
        "killed": "died",
        "pallas_tpu": "passed over",
    }
    assert found["wrong"].message == "y: relative error 1.0e-03 > 2e-06"
    assert found["fails"].message == "ValueError: no such tile in this kernel"
    assert found["hangs"].message == "no sign of life for 25 s"
    assert found["exits"].message.startswith("exit code 7")
    assert found["killed"].message.startswith("signal SIGKILL")
    assert found["pallas_tpu"].message == "it is for a TPU, and this is a CPU"


@pytest.mark.slow
def test_only_those_that_passed_are_timed(record: Record) -> None:
    for name, result in by_name(record).items():
        timed = {operation: set(lengths) for operation, lengths in result.seconds.items()}
        everywhere = {operation: {256, 64} for operation in ("forward", "forward+backward", "state")}
        assert timed == (everywhere if name in ("sequential", "slow") else {})
    found = by_name(record)
    for length in (256, 64):
        assert found["slow"].seconds["forward"][length] >= worker.LATE
        assert 0 < found["sequential"].seconds["forward"][length] < worker.LATE
    (attention,) = (each for each in record.results if each.operator == "attention" and each.outcome == "passed")
    assert attention.name == "blockwise"
    assert set(attention.seconds) == {"forward", "forward+backward"}


@pytest.mark.slow
def test_the_fastest_of_the_right_ones_is_chosen(record: Record) -> None:
    for purpose in ("train", "read"):
        chosen = record.kernels(KernelsConfig(), purpose)  # type: ignore[arg-type]
        assert chosen.ssd_table is not None
        for length in (256, 64):
            order = [candidate.name for candidate in chosen.ssd_table.order(length)]
            assert order == ["sequential", "slow"]
        assert {each.name for each in chosen.ssd_table.order(64, state_alone=True)} == {"sequential", "slow"}


@pytest.mark.slow
def test_one_that_dies_while_it_is_timed_is_left_out_and_the_others_are_timed_again() -> None:
    record = make_record("dies_late")
    found = by_name(record)
    assert found["dies_late"].outcome == "died"
    assert found["dies_late"].message.startswith("exit code 9")
    assert found["dies_late"].seconds == {}
    assert set(found["sequential"].seconds["state"]) == {256, 64}


@pytest.mark.parametrize(
    ("error", "message"),
    [(AssertionError(), "an assertion without a message"), (AssertionError("\ny: nan\nmore"), "y: nan")],
)
def test_an_assertion_of_any_text_is_a_wrong_result(
    error: AssertionError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> None:
        raise error

    said: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(real_worker, "check", check)
    monkeypatch.setattr(real_worker, "say", lambda event, **fields: said.append((event, fields)))
    real_worker._check(JOB, Result("ssd", "sequential", None, "passed"))
    assert said == [("wrong", {"message": message})]


def test_a_device_that_cannot_be_asked(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text("raise SystemExit('no such device')")
    with pytest.raises(RuntimeError, match=r"the device cannot be asked for its kind: died: .* no such device"):
        trials.make_record(JOB, (sys.executable, str(program)))


@pytest.fixture(name="measured")
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the command take a record that is there, and return its arguments; `tmp_path/file` can be no folder."""
    key = {"device": "a chip", "driver": "7", "jax": "0.11", "transmamba_jax": "0.1", "shapes": {"head_dim": 64}}
    results = (Result("ssd", "sequential", 32, "passed", "", {"forward": {64: 0.002}}),)
    monkeypatch.setattr(trials, "make_record", lambda _: Record(key, "2026-01-01 00:00:00", 4, results))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    return ["--config", "tiny", "--output"]


def kept(folder: Path) -> list[Path]:
    return [*folder.glob("cache/transmamba_jax/calibration/*.json")]


def test_a_cache_that_cannot_be_written_loses_neither_table_nor_output(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert command.main([*measured, str(tmp_path / "copy.json")]) == 1
    printed = capsys.readouterr()
    assert "2.000*" in printed.out
    assert printed.err.count(" is not written: ") == 1
    assert calibration.read(tmp_path / "copy.json").rows == 4
    assert command.main([*measured, str(tmp_path / "file" / "copy.json")]) == 1
    assert capsys.readouterr().err.count(" is not written: ") == 2


def test_an_output_that_cannot_be_written_loses_neither_table_nor_record(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "file" / "copy.json"
    assert command.main([*measured, str(output)]) == 1
    printed = capsys.readouterr()
    assert "2.000*" in printed.out
    assert f"transmamba calibrate: {output} is not written: " in printed.err
    assert len(kept(tmp_path)) == 1


def test_without_a_home_folder_the_output_is_written(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def folder() -> Path:
        raise ValueError("there is no home folder")

    monkeypatch.setattr(calibration, "folder", folder)
    assert command.main([*measured, str(tmp_path / "copy.json")]) == 1
    printed = capsys.readouterr()
    assert "2.000*" in printed.out
    assert printed.err == "transmamba calibrate: the record is not kept: there is no home folder\n"
    assert calibration.read(tmp_path / "copy.json").rows == 4
    assert command.main(["show"]) == 2
    assert capsys.readouterr().err == "transmamba calibrate: there is no home folder\n"


def test_an_output_whose_reader_left_keeps_the_record(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def left(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(command, "print", left, raising=False)
    assert command.main([*measured, str(tmp_path / "copy.json")]) == 0
    assert len(kept(tmp_path)) == 1
    assert (tmp_path / "copy.json").exists()
    assert command.main(["show"]) == 0
    assert capsys.readouterr().err == ""
