"""Trials of simulated implementations: each way to end is recorded, and none but the right ones is chosen."""

import sys
from pathlib import Path

import pytest

from transmamba_jax.calibrate import trials
from transmamba_jax.calibrate import worker as real_worker
from transmamba_jax.calibrate.candidates import Job
from transmamba_jax.config import KernelsConfig
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
