"""Data sheets agree with one another: peak over FLOPs per cycle is the maker's clock."""

import types

import pytest

from transmamba_jax.runtime import hardware

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
