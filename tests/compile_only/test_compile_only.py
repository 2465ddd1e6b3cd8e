"""Compiling for hardware that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transmamba_jax import sharding
from transmamba_jax.compile_only.compiler import EXIT_DOES_NOT_FIT, topology_devices
from transmamba_jax.compile_only.program import read_program
from transmamba_jax.config import MeshConfig

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.num-layers",
    "4",
    "--model.transpoints",
    "0",
    "64",
    "--data.batch-size",
    "8",
    "--optimizer.name",
    "adamw",
]


def compile_for(topology: str, *options: str, expect: int = 0) -> str:
    command = [sys.executable, "train.py", "--config", "configs/tiny.yaml", "--compile-only", "--topology", topology]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*command, *SMALL, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout


def number(pattern: str, output: str) -> float:
    return float(re.search(pattern + r" ([\d.e+]+)", output)[1])


@pytest.mark.slow
def test_tiny_on_a_tpu_that_is_not_there() -> None:
    output = compile_for("v5e:2x2", "--mesh.fsdp", "2")
    assert "v5e:2x2: 4 x TPU v5 lite, mesh {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 1}" in output
    assert re.search(r"arguments \S+ GiB, temporaries \S+ GiB, at the peak 0\.\d+ GiB of 16\.000 GiB", output)
    assert re.search(r"FLOPs, \S+ bytes, (\S+ ms|no time \(its optimal_seconds is -\S+\)), a loop's body once", output)
    assert "all-reduce" in output
    assert number("utilisation at most", output) <= 1
    assert number("predicted           ", output) >= number("at least", output)
    assert number("; utilisation", output) <= 1
    assert number("FLOPs of a device   ", output) == pytest.approx(3.319e9, rel=1e-3)


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_what_to_change() -> None:
    options = ("--data.batch-size", "16384", "--mesh.fsdp", "2")
    output = compile_for("v5e:2x2", *options, expect=EXIT_DOES_NOT_FIT)
    assert "does not fit" in output
    assert "--model.remat full (now none)" in output
    assert "--mesh.fsdp, to --mesh.context for long rows or --mesh.tensor for wide layers" in output


@pytest.mark.slow
def test_simulated_devices() -> None:
    output = compile_for("cpu:4", "--mesh.context", "2", "--data.tokenizer", "not-made-yet.json")
    assert "not-made-yet.json is not there: taken to have model.vocab_size=256 tokens" in output
    assert "4 x cpu, mesh {'data': 2, 'fsdp': 1, 'context': 2, 'tensor': 1}" in output
    assert "all-gather" in output
    assert "utilisation" not in output
    assert "no time of a step    there is no data sheet of cpu here" in output


@pytest.mark.parametrize("name", ["cpu:0", "cpu:many", "v99:2x2"])
def test_an_unknown_topology_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--topology"):
        topology_devices(name)


def test_a_mesh_may_split_an_axis_of_the_torus() -> None:
    """Two devices per row on 4 x 4 x 4: an axis of four is cut in two."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, context=2), topology_devices("v5p:4x4x4"))
    assert dict(mesh.shape) == {"data": 1, "fsdp": mesh.size // 2, "context": 2, "tensor": 1}


def test_a_program_counts_its_loops_as_often_as_they_run() -> None:
    hlo = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %negate = f32[8]{0} negate(%p)
}

%c (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %unknown = pred[] compare(%i, %j), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = f32[16,4]{1,0} all-gather(%x), dimensions={0}
  %s = (bf16[8], bf16[32]) all-gather-start(%y), dimensions={0}
  %f = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}

%four (p: (s32[])) -> pred[] {
  %end = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%walk (p: (s32[])) -> (s32[]) {
  %scan.7 = (f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"TUw","cost_estimate":{"flops":"30","transcendentals":"0","bytes_accessed":"50"}}}
  %splash_mha_dq_no_residuals.2 = bf16[2,3,8,4]{3,2,1,0} custom-call(%m, %q, %k, %v), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2]{1,0}, bf16[2,3,8,4]{3,2,1,0}, \
bf16[2,3,8,4]{3,2,1,0}, bf16[2,3,8,6]{3,2,1,0}}, backend_config={}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[]) while(%u), condition=%four, body=%walk
  %alone = f32[4]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%sum
  %also = f32[4]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%sum
  %pairs = f32[2]{0} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %r = f32[4]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%sum, backend_config={"estimated_cycles":"7"}
}
"""
    program = read_program(hlo)
    assert program.collectives == {"all-gather": (6, 3 * (16 * 4 * 4 + 32 * 2)), "all-reduce": (2, 24)}
    assert program.cycles == 307
    # Causal attention of 2 rows, 3 heads, 8 tokens: 2 FLOPs for half of the pairs.
    flops, moved = 2 * 3 * 8 * 8 * (2 * 4 + 6), 2 * 2 * 3 * 8 * (4 + 4 + 4 + 6) + 2
    attention = (4, 4 * flops, 4 * moved)
    assert program.kernels == {"scan": (4, 120, 200), "splash_mha_dq_no_residuals": attention}
