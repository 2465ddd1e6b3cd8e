"""The Triton kernels: the suite in Triton's interpreter on a CPU, and its compiler for two generations of GPUs.

Where the `dev` extra has no Triton (see `pyproject.toml`), the test is that the error says so.
"""

import importlib.util
import itertools
import sys
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.ssd import checks, ssd
from pallas_kernels.ssd.triton import block_sizes, implementation

from . import suite

HAS_TRITON = sys.platform == "linux" and sys.version_info < (3, 12)
"""As in the `dev` extra."""


def _call(head_dim: int = 64, dtype: Any = jnp.bfloat16) -> Any:
    """Trace a call."""
    arguments = checks.make_inputs(checks.Spec(head_dim=head_dim))
    low = {name: jnp.asarray(arguments[name], dtype) for name in ("x", "b", "c")}
    return jax.eval_shape(lambda inputs: ssd(**inputs, implementation="triton"), arguments | low)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (64, jnp.float16, "x must be float32 or bfloat16, found float16"),
        (264, jnp.float32, "the head dim P of x must be at most 256, found 264"),
    ],
)
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: Any, message: str) -> None:
    monkeypatch.setattr(implementation, "_missing", list)
    with pytest.raises(ValueError, match=f"'triton' cannot serve this call: {message}"):
        _call(head_dim, dtype)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, with what installs them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"jax-triton is not installed.*\[triton\].*CUDA plugin.*\[cuda12\]"):
        _call()


def test_this_machine_is_told_what_it_lacks() -> None:
    """Without JAX's CUDA plugin, or Triton on newer Pythons, a call says so."""
    lacking = implementation._missing()
    assert any("[triton]" in reason for reason in lacking) != HAS_TRITON
    if lacking:
        with pytest.raises(ValueError, match=r"'triton' cannot serve this call: .*pip install"):
            _call()
    else:
        assert _call()[0].dtype == jnp.bfloat16


def test_a_mesh_of_tpus_is_refused() -> None:
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5 lite", num_cores=None, platform="tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        reasons = implementation._missing()
    assert "it needs an NVIDIA GPU, found TPU v5 lite in the mesh of jax.set_mesh" in reasons


def test_blocks() -> None:
    """Few long rows are walked in segments; heads of a group are summed where enough programs are left."""
    assert block_sizes.choose(2, 8192, 16, 96, 16, 96, itemsize=2) == block_sizes.Blocks(64, 128, 1, 32, 32, 1)
    assert block_sizes.choose(1, 131072, 4, 64, 1, 64, itemsize=2) == block_sizes.Blocks(64, 32, 64, 64, 32, 4)
    assert block_sizes.choose(1, 100, 1, 64, 1, 64, itemsize=4) == block_sizes.Blocks(32, 4, 1, 32, 32, 1)


if HAS_TRITON:
    import triton.language as tl

    from . import triton_compiler, triton_interpreter

    @pytest.fixture
    def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the kernels in Triton's interpreter."""
        monkeypatch.setattr(implementation, "_missing", list)
        monkeypatch.setattr(implementation, "_launch", triton_interpreter.launch)

    # What counts is that every branch is met. Chunks have 32 tokens.
    SPECS = (
        checks.Spec(rows=1, heads=1, groups=1, length=1),
        checks.Spec(rows=1, length=40, heads=2, groups=1, head_dim=96, state_dim=40),
        checks.Spec(rows=1, length=70, heads=2, groups=1, regime="bursts"),
        checks.Spec(rows=6, length=70, heads=1, groups=1, documents=True, regime="strong"),
    )

    # Chunks of 64 tokens, and tiles of 64 where both dimensions allow it.
    BFLOAT16_SPECS = (
        checks.Spec(rows=1, length=70, heads=2, groups=1, head_dim=64, state_dim=64, regime="slow"),
        checks.Spec(rows=1, length=70, heads=1, groups=1, head_dim=128, state_dim=64, regime="strong"),
        checks.Spec(rows=1, length=40, heads=1, groups=1, head_dim=96, state_dim=128, regime="bursts"),
    )

    @pytest.mark.usefixtures("interpreter")
    class TestTriton(suite.SsdSuite):
        implementation = "triton"
        fields: ClassVar[dict[str, int]] = {"heads": 1, "groups": 1}  # the interpreter takes milliseconds an operation

        @pytest.mark.parametrize("spec", SPECS, ids=str)
        def test_values_and_gradients(self, spec: checks.Spec) -> None:
            super().test_values_and_gradients(spec)

        @pytest.mark.parametrize("spec", checks.STARTS[2:3], ids=str)
        def test_outputs_from_a_later_token_on(self, spec: checks.Spec) -> None:
            super().test_outputs_from_a_later_token_on(spec)

        @pytest.mark.parametrize("spec", BFLOAT16_SPECS, ids=str)
        def test_bfloat16_of_whole_tiles(self, spec: checks.Spec) -> None:
            checks.check_bfloat16(self.implementation, spec)

        @pytest.mark.slow
        @pytest.mark.parametrize("regime", ["strong"])
        def test_long_rows(self, regime: str) -> None:
            """Cut into two segments."""
            spec = checks.Spec(rows=1, length=520, heads=1, groups=1, regime=regime)
            assert block_sizes.choose(1, 520, 1, 8, 1, 16, itemsize=4).segments == 2
            checks.check_against_oracle(self.implementation, spec)

        @pytest.mark.parametrize("length", [20, 520])
        def test_state_alone(self, length: int) -> None:
            super().test_state_alone(checks.Spec(rows=1, length=length, heads=1, groups=1))

        def test_heads_summed_in_the_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.setattr(block_sizes, "_BUSY", 0)
            spec = checks.Spec(rows=1, length=20, heads=4, groups=2)
            assert block_sizes.choose(1, 20, 4, 8, 2, 16, itemsize=4).part == 2
            checks.check_against_oracle(self.implementation, spec)

    @pytest.mark.usefixtures("interpreter")
    def test_a_gradient_that_forgets_a_term_fails(monkeypatch: pytest.MonkeyPatch) -> None:
        """The suite sees the pairs that span a token."""
        _, backward = triton_interpreter.modules()
        monkeypatch.setattr(backward, "_spanning", lambda pairs, _: tl.sum(pairs, 1) * 0.0)
        with pytest.raises(AssertionError, match="gradient of dt: relative error"):
            checks.check_against_oracle("triton", checks.Spec(rows=1, length=20, heads=1, groups=1))

    def test_lowering_for_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
        """JAX without CUDA cannot import jax-triton: a call of it that gives what it is asked for stands in."""

        def call(first: jax.Array, *_: Any, out_shape: Any, **__: Any) -> list[jax.Array]:
            return [jnp.full(result.shape, first.ravel()[0], result.dtype) for result in out_shape]

        monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=call))
        monkeypatch.setattr(implementation, "_missing", list)
        arguments = checks.make_inputs(checks.Spec(length=6))
        with pytest.raises(ValueError, match=r"'triton' cannot serve this call: it is lowered for cpu, .* for cuda"):
            jax.jit(lambda arguments: ssd(**arguments, implementation="triton"))(arguments)

    # --- The compiler -------------------------------------------------------------------------------------------------

    # A row is walked at once, or in segments, from 0 and again; without y nothing is added in the backward pass.
    VARIANTS = {
        "running_sums",
        "walk ADD FROM_FIRST",
        "walk ADD FROM_FIRST SAVE",
        "walk ADD",
        "pass_states",
        "outputs",
        "walk REVERSE ADD FROM_FIRST SAVE",
        "walk REVERSE ADD",
        "walk REVERSE FROM_FIRST SAVE",
        "walk REVERSE",
        "pass_states REVERSE",
        "head_gradients OUTPUTS",
        "head_gradients",
        "group_gradients OUTPUTS",
        "group_gradients",
    }

    def cases() -> list[Any]:
        """Return every case; the suite has each pair of dimensions once, on alternating GPUs and dtypes."""
        found, dims = [], triton_compiler.DIMS
        for capability, dtype, head_dim, state_dim in itertools.product(
            triton_compiler.CAPABILITIES, triton_compiler.DTYPES, dims, dims
        ):
            number = dims.index(head_dim) * len(dims) + dims.index(state_dim)
            kind = 2 * triton_compiler.CAPABILITIES.index(capability) + triton_compiler.DTYPES.index(dtype)
            marks = [] if number % 4 == kind else [pytest.mark.exhaustive]
            found.append(pytest.param(capability, dtype, head_dim, state_dim, marks=marks))
        return found

    @pytest.mark.slow
    @pytest.mark.parametrize(("capability", "dtype", "head_dim", "state_dim"), cases())
    def test_kernels_fit_the_gpu(capability: int, dtype: str, head_dim: int, state_dim: int) -> None:
        """Every variant: no register spills, and shared memory suffices on the smallest GPU."""
        launches = triton_compiler.variants(head_dim, state_dim, dtype)
        assert {str(launch) for launch in launches} == VARIANTS
        parts = {dict(launch.constants).get("PART", 1) for launch in launches}
        assert min(parts) == 1 < max(parts)
        usages = {launch: triton_compiler.compile_for(launch, capability) for launch in launches}
        assert not [
            line for launch, usage in usages.items() for line in triton_compiler.complaints(launch, capability, usage)
        ]
