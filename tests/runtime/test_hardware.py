"""Data sheets agree with one another: peak over FLOPs per cycle is the maker's clock."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from transmamba_jax.runtime import hardware

ROOT = Path(__file__).parents[2]

# GHz: Google Cloud's TPU papers and pages; boost clocks of NVIDIA's whitepapers.
CLOCKS = {"TPU v4": 1.05, "TPU v5 lite": 1.5, "TPU v5": 1.75, "TPU v6 lite": 1.75, "A100": 1.41, "H100": 1.83}


@pytest.mark.parametrize("name", CLOCKS)
def test_peak_over_flops_per_cycle_is_the_clock(name: str) -> None:
    found = [chip for kind, chip in hardware.CHIPS.items() if kind == name or name in kind.split("-")[0].split(" ")]
    assert found
    for chip in found:
        assert chip.peak_flops / chip.flops_per_cycle == pytest.approx(1e9 * CLOCKS[name], rel=0.01)
        assert 1e9 < chip.links < chip.bandwidth < chip.memory * 120  # every byte of memory within 10 ms or more


def test_the_peak_of_devices_needs_every_data_sheet() -> None:
    known, unknown = (types.SimpleNamespace(device_kind=kind) for kind in ("NVIDIA H200", "cpu"))
    assert hardware.peak_flops([known, known]) == 2 * 989e12
    assert hardware.peak_flops([known, unknown]) is None


COMMANDS = {
    "training": "--config tiny --workdir {folder}/run",
    "generate": "--checkpoint {folder} --prompt a",
    "evaluate": "--checkpoint {folder}",
    "study": "configs/studies/s1_recall.yaml --out {folder}/study",
    "calibrate": "--plan --config tiny --quick",
    "checkpoint": "verify {folder}",
    "export": "--checkpoint {folder} --output {folder}/exported",
    "convert": "from-mamba2 {folder} {folder}/converted",
    "report": "{folder}",
}


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_a_platform_without_devices_is_said_without_a_traceback(module: str, tmp_path: Path) -> None:
    arguments = COMMANDS[module].format(folder=tmp_path).split()
    environment = {**os.environ, "JAX_PLATFORMS": "rocm", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", f"transmamba_jax.{module}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2, result.stderr
    assert "JAX opens no device with JAX_PLATFORMS=rocm" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_every_command_that_opens_devices_is_tried() -> None:
    commands = {path.parent.name for path in (ROOT / "transmamba_jax").glob("*/__main__.py")}
    assert set(COMMANDS) == commands
