"""Goals and exclusions of `benchmarks/gpu/suite.py`, and reports of contenders whose process fails."""

import subprocess
from typing import Any

import pytest

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import suite as gpu_suite


def _race(kind: str, head_dim: int, times: dict[str, float], floor: float | None = None) -> dict[str, Any]:
    shape = (1, 64, 1, head_dim, 64)
    mine = ["associative", "pallas_gpu"]
    return {"operator": "ssd", "pass": kind, "shape": shape, "mine": mine, "milliseconds": times, "floor": floor}


def test_goals() -> None:
    """The fastest of this project's counts; head dims have limits of their own; what no race decides is open."""
    fast = {"associative": 1.4, "pallas_gpu": 0.85, "mamba_ssm": 1.0, "jax-linear-attention": 1.0}
    races = [_race("forward", 96, fast, floor=0.5), _race("forward+backward", 96, fast, floor=0.2)]
    lines, met = gpu_goals.goals([*races, _race("forward+backward", 64, fast)])
    found = [" ".join(line.split()).replace("ssd ", "").replace("x64x1x", "x").replace("x64,", ",") for line in lines]
    assert not met
    assert found == [
        "met forward 1x96, share of the floor's rate: at least 0.40, found 0.59",
        "met forward 1x96, portable over Triton: at most 1.50, found 1.40",
        "NOT MET forward+backward 1x96, share of the floor's rate: at least 0.30, found 0.24",
        "met forward+backward 1x96, portable over Triton: at most 1.50, found 1.40",
        "NOT MET forward+backward 1x96, over Triton: at most 0.80, found 0.85",
        "NOT MET forward+backward 1x96, over jax-linear-attention: at most 0.80, found 0.85",
        "met forward+backward 1x64, portable over Triton: at most 1.50, found 1.40",
        "NOT MET forward+backward 1x64, over Triton: at most 0.80, found 0.85",
        "met forward+backward 1x64, over jax-linear-attention: at most 1.10, found 0.85",
        "open over cuDNN: no race decides it",
    ]


def test_a_contender_that_hangs_reports_its_finished_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b'{"check": "a"}\nnoise\n{"check": "b", "failed": "E: x"}\n{"shape": "1x2", "error": 0.5}\n'

    def hang(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout, output=said)

    monkeypatch.setattr(subprocess, "run", hang)
    report = gpu_checks.check("pallas_gpu", "bfloat16", ["1x2", "3x4"], 5.0)
    assert report == {
        "passed": 1,
        "failed": {"b": "E: x"},
        "errors": {"1x2": 0.5},
        "unserved": {},
        "stopped": "not done after 5 s",
    }
    assert gpu_suite.exclusion_reason(report, "1x2", "bfloat16") == "off by 5.0e-01 against float64"
    assert (
        gpu_suite.exclusion_reason(report, "3x4", "bfloat16") == "not checked at these dimensions: not done after 5 s"
    )


def test_a_contender_that_dies_says_why() -> None:
    report = gpu_checks.check("nobody", "bfloat16", [], 300.0)
    assert report["stopped"] == "exit code 1: KeyError: 'nobody'"
