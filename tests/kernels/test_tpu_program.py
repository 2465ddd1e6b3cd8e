"""Traffic that `benchmarks/tpu/program.py` counts in compiled programs, and the cycles of kernels."""

import json

import pytest

from benchmarks.tpu import kernel_cycles, paper_compile
from benchmarks.tpu import program as tpu_program

PROGRAM = """HloModule jit_f, is_scheduled=true

%inner (param_0: bf16[8,128], param_1: f32[4,128]) -> f32[4,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = f32[4,128]{1,0:T(4,128)} parameter(1)
  %bitcast.1 = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%param_0)
  %slice.1 = bf16[4,128]{1,0:T(8,128)(2,1)} slice(%bitcast.1), slice={[0:4], [0:128]}
  %slice.2 = bf16[2,128]{1,0:T(8,128)(2,1)} slice(%bitcast.1), slice={[4:6], [0:128]}
  ROOT %add.1 = f32[4,128]{1,0:T(4,128)} add(%param_1, %slice.1)
}

ENTRY %main (x: bf16[8,128], y: f32[4,128]) -> f32[4,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[4,128]{1,0:T(4,128)} parameter(1), metadata={op_name="f32[9,9] (not an array"}
  %fusion.1 = f32[4,128]{1,0:T(4,128)S(1)} fusion(%x, %y), kind=kLoop, calls=%inner
  %copy-start.1 = (f32[4,128]{1,0:T(4,128)}, f32[4,128]{1,0:T(4,128)S(1)}, u32[]{:S(2)}) copy-start(%fusion.1)
  %copy-done.1 = f32[4,128]{1,0:T(4,128)} copy-done(%copy-start.1)
  %slice-start.1 = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[1,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %slice-done.1 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %kernel.1 = (f32[4,128]{1,0:T(4,128)S(1)}, pred[4]{0:T(128)}) custom-call(%copy-done.1, %slice-done.1)
  ROOT %get-tuple-element.1 = f32[4,128]{1,0:T(4,128)S(1)} get-tuple-element(%kernel.1), index=0
}
"""


def test_traffic_is_what_lies_in_memory() -> None:
    """Of x the fusion reads two slices, 6 of its 8 rows; its result is in VMEM and is copied out."""
    found = {operation.name: moved for operation, moved in tpu_program.traffic(PROGRAM)}
    assert found == {
        "fusion.1": 6 * 128 * 2 + 4 * 128 * 4,
        "copy-start.1": 4 * 128 * 4,
        "slice-start.1": 128 * 2,
        "kernel.1": 4 * 128 * 4 + 4,
    }


def test_what_cannot_be_counted_is_an_error() -> None:
    loop = PROGRAM.replace("fusion(%x, %y), kind=kLoop, calls=%inner", "while(%x, %y), condition=%inner, body=%inner")
    with pytest.raises(ValueError, match=r"a program without loops and branches, found while fusion\.1"):
        list(tpu_program.traffic(loop))
    with pytest.raises(ValueError, match="expected the text of a compiled program, found 'nothing'"):
        list(tpu_program.traffic("nothing"))


@pytest.mark.parametrize("start", [0, 1024, 8192])
def test_tokens_before_the_first_output_take_the_cycles_of_the_state_alone(start: int) -> None:
    counted = json.loads(kernel_cycles.RESULTS.read_text())["kernels"]["v5e"]
    whole, alone = counted["ssd_forward"], counted["ssd_state_forward"]
    tokens = kernel_cycles.ROWS * kernel_cycles.LENGTH
    flops, cycles = ((start * alone[what] + (8192 - start) * whole[what]) / tokens for what in ("flops", "cycles"))
    name = f"ssd_forward_from_{start}" if start else "ssd_forward"
    share = paper_compile._of_peak(counted, name, 8192)
    assert flops / share == pytest.approx(cycles * whole["flops"] / whole["cycles"] / whole["of_peak"])
