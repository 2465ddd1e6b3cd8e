"""Checks of the suite for every SSD implementation: values and every gradient against the float64 recurrence.

Plain functions that raise AssertionError, of jax and numpy alone: `suite.py` makes tests of them, and
`benchmarks/gpu/suite.py` calls them where nothing else is installed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd import oracle, ssd, ssd_state

FORWARD_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
BF16_TOLERANCE = 1e-2

Arrays = dict[str, np.ndarray]
Fields = dict[str, Any]
"""Of `Spec`, where its defaults do not suit an implementation."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shapes, decay regime and documents of one case."""

    rows: int = 2
    length: int = 37
    heads: int = 4
    groups: int = 2
    head_dim: int = 8
    state_dim: int = 16
    chunk_size: int = 16
    regime: str = "default"
    documents: bool = False
    start: int = 0

    def __str__(self) -> str:
        """Name the fields that differ from the defaults."""
        parts = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(parts) or "default"


SPECS = (
    Spec(),
    *(Spec(length=length) for length in (1, 5, 15, 16, 17)),
    Spec(groups=1),
    Spec(length=200, heads=2, head_dim=96, state_dim=64, chunk_size=128),
    Spec(rows=1, length=129, heads=2, groups=1, head_dim=32, state_dim=128, chunk_size=256),
    Spec(length=200, regime="strong", chunk_size=128),
    Spec(length=200, regime="strong", groups=4, chunk_size=32),
    Spec(length=200, regime="bursts", chunk_size=128),
    Spec(length=200, regime="slow", chunk_size=64),
    Spec(rows=6, length=70, documents=True),
    Spec(rows=6, length=70, documents=True, regime="strong", groups=4, chunk_size=128),
    Spec(rows=6, length=70, documents=True, regime="slow", groups=1, chunk_size=32),
)

STARTS = (Spec(start=1), Spec(start=16), Spec(start=21, groups=4), Spec(start=36, regime="slow"))
"""Outputs from a later token on: of the first chunk, of a whole one, of one cut in two, the last token's alone."""

BFLOAT16 = Spec(rows=6, length=70, documents=True, chunk_size=32)
LONG = Spec(rows=1, length=8192, heads=2, groups=1)


def make_inputs(spec: Spec, seed: int = 0) -> Arrays:
    """Every float input, with the decay a freshly initialised layer has, up to 16 a step, or 1e-3 of the first.

    "strong" scatters steps of up to 16 among slow ones; "bursts" begins every 32 tokens with a run of 16 of them.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (spec.rows, spec.length, spec.heads)))
    a = -rng.uniform(1, 16, spec.heads)
    if spec.regime == "strong":
        # Tokens that forget nearly everything beside tokens that keep nearly everything: large sums, small differences.
        dt = np.where(rng.uniform(size=dt.shape) < 0.5, rng.uniform(0, 1, dt.shape), dt * 0.1)
        a[0] = -16.0
    elif spec.regime == "bursts":
        dt = np.where(np.arange(spec.length)[:, None] % 32 < 16, 1.0, dt * 0.01)
        a[:] = -16.0
    elif spec.regime == "slow":
        a *= 1e-3
    return {
        "x": normal(spec.rows, spec.length, spec.heads, spec.head_dim),
        "dt": dt.astype(np.float32),
        "a": a.astype(np.float32),
        "b": normal(spec.rows, spec.length, spec.groups, spec.state_dim),
        "c": normal(spec.rows, spec.length, spec.groups, spec.state_dim),
        "d": normal(spec.heads),
        "initial_state": normal(spec.rows, spec.heads, spec.head_dim, spec.state_dim),
    }


def make_cotangents(spec: Spec, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents of y and of the final state."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((spec.rows, spec.length, spec.heads, spec.head_dim), np.float32)
    state = rng.standard_normal((spec.rows, spec.heads, spec.head_dim, spec.state_dim), np.float32)
    return y, state


def make_segment_ids(spec: Spec) -> np.ndarray | None:
    """Six rows: packed; left, right and middle padding; documents of one token and at chunk edges; nothing real."""
    if not spec.documents:
        return None
    length = spec.length
    assert (spec.rows, length) == (6, 70)
    ids = np.zeros((6, length), np.int32)
    ids[0] = np.repeat([3, 1, 2], [20, 33, 17])
    ids[1, 9:] = np.repeat([1, 2], [30, 31])
    ids[2, :51] = np.repeat([5, 9], [40, 11])
    ids[3, 4:20], ids[3, 26:40], ids[3, 40:44], ids[3, 47:66] = 1, 1, 2, 7
    ids[4] = np.repeat([1, 2, 3, 4, 5, 6], [16, 1, 1, 14, 32, 6])
    return ids


def evaluate(implementation: str, spec: Spec, inputs: dict[str, Any], ids: Any, cotangents: Any) -> Any:
    """((y, state), gradients by name) of `ssd`, traced afresh."""

    def function(inputs: Any) -> Any:
        options: dict[str, Any] = {
            "chunk_size": spec.chunk_size,
            "implementation": implementation,
            "output_start": spec.start,
        }
        return ssd(**inputs, segment_ids=ids, **options)

    def both(inputs: Any, cotangents: Any) -> Any:
        result, pullback = jax.vjp(function, inputs)
        return result, pullback(cotangents)[0]

    return jax.jit(both)(inputs, cotangents)


def evaluate_state(implementation: str, spec: Spec, inputs: dict[str, Any], ids: Any, cotangent: Any) -> Any:
    """(state, gradients by name) of `ssd_state`, traced afresh."""

    def function(inputs: Any) -> Any:
        return ssd_state(**inputs, segment_ids=ids, chunk_size=spec.chunk_size, implementation=implementation)

    def both(inputs: Any, cotangent: Any) -> Any:
        result, pullback = jax.vjp(function, inputs)
        return result, pullback(cotangent)[0]

    needed = {name: inputs[name] for name in ("x", "dt", "a", "b", "initial_state")}
    return jax.jit(both)(needed, cotangent)


def check_close(name: str, found: Any, expected: np.ndarray, tolerance: float) -> None:
    """Assert finite values within the relative L2 tolerance."""
    assert np.isfinite(np.asarray(found, np.float32)).all(), f"{name} is not finite"
    error = oracle.relative_error(found, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def check_against_oracle(implementation: str, spec: Spec) -> None:
    """Assert y, state and every gradient."""
    inputs, ids, (dy, dstate) = make_inputs(spec), make_segment_ids(spec), make_cotangents(spec)
    dy[:, : spec.start] = 0
    truth = oracle.ssd(inputs, ids, dy, dstate)
    (y, state), gradients = evaluate(implementation, spec, inputs, ids, (dy[:, spec.start :], dstate))
    real = np.ones(y.shape[:2], bool) if ids is None else ids[:, spec.start :] != 0
    assert y.dtype == jnp.float32
    assert state.dtype == jnp.float32
    assert np.isfinite(y).all(), "y is not finite"
    check_close("y", np.asarray(y)[real], truth.y[:, spec.start :][real], FORWARD_TOLERANCE)
    check_close("state", state, truth.state, FORWARD_TOLERANCE)
    for name, expected in truth.gradients.items():
        check_close(f"gradient of {name}", gradients[name], expected, GRADIENT_TOLERANCE)


def check_state_alone(implementation: str, spec: Spec, bfloat16: bool = False) -> None:
    """Assert the state and every gradient of `ssd_state`."""
    inputs, ids, (dy, dstate) = make_inputs(spec), make_segment_ids(spec), make_cotangents(spec)
    low = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("x", "b") if bfloat16}
    rounded = inputs | {name: np.asarray(value, np.float32) for name, value in low.items()}
    truth = oracle.ssd(rounded, ids, np.zeros_like(dy), dstate)
    state, gradients = evaluate_state(implementation, spec, inputs | low, ids, dstate)
    value, gradient = (BF16_TOLERANCE,) * 2 if bfloat16 else (FORWARD_TOLERANCE, GRADIENT_TOLERANCE)
    check_close("state", state, truth.state, value)
    for name, found in gradients.items():
        check_close(f"gradient of {name}", np.asarray(found, np.float32), truth.gradients[name], gradient)


def check_defaults(implementation: str, fields: Fields) -> None:
    """Assert that what is left out is no skip and a state of zeros."""
    spec = Spec(rows=1, length=20, **fields)
    inputs = make_inputs(spec)
    zeros = inputs | {"d": np.zeros_like(inputs["d"]), "initial_state": np.zeros_like(inputs["initial_state"])}
    truth = oracle.ssd(zeros, None, *make_cotangents(spec))
    required = {name: inputs[name] for name in ("x", "dt", "a", "b", "c")}
    y, state = jax.jit(lambda inputs: ssd(**inputs, implementation=implementation))(required)
    check_close("y", y, truth.y, FORWARD_TOLERANCE)
    check_close("state", state, truth.state, FORWARD_TOLERANCE)


def check_bfloat16(implementation: str, spec: Spec) -> None:
    """Assert dtypes, values and every gradient in bfloat16."""
    inputs, ids = make_inputs(spec), make_segment_ids(spec)
    low = {name: jnp.asarray(value, jnp.bfloat16) for name, value in inputs.items() if name in ("x", "b", "c")}
    dy, dstate = make_cotangents(spec)
    dy_low = jnp.asarray(dy, jnp.bfloat16)
    rounded = inputs | {name: np.asarray(value, np.float32) for name, value in low.items()}
    truth = oracle.ssd(rounded, ids, np.asarray(dy_low, np.float32), dstate)
    (y, state), gradients = evaluate(implementation, spec, inputs | low, ids, (dy_low, dstate))
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    real = np.ones(y.shape[:2], bool) if ids is None else ids != 0
    check_close("y", np.asarray(y, np.float32)[real], truth.y[real], BF16_TOLERANCE)
    check_close("state", state, truth.state, BF16_TOLERANCE)
    for name, expected in truth.gradients.items():
        assert gradients[name].dtype == (jnp.bfloat16 if name in low else jnp.float32)
        check_close(f"gradient of {name}", np.asarray(gradients[name], np.float32), expected, BF16_TOLERANCE)


def check_padding(implementation: str, fields: Fields) -> None:
    """A row padded on the left, in the middle or on the right has the outputs and state of the row without."""
    spec = Spec(rows=1, length=40, **fields)
    inputs = make_inputs(spec)
    run = jax.jit(lambda inputs, ids: ssd(**inputs, segment_ids=ids, chunk_size=16, implementation=implementation))
    y, state = run(inputs, None)
    for places in (range(13), range(40, 53), range(17, 30)):
        kept = np.setdiff1d(np.arange(53), places)
        padded = dict(inputs)
        for name in ("x", "dt", "b", "c"):
            padded[name] = np.full((1, 53, *inputs[name].shape[2:]), 3.0, np.float32)
            padded[name][:, kept] = inputs[name]
        ids = np.zeros((1, 53), np.int32)
        ids[:, kept] = 4
        y_padded, state_padded = run(padded, ids)
        check_close("y", np.asarray(y_padded)[:, kept], np.asarray(y, np.float64), FORWARD_TOLERANCE)
        check_close("state", state_padded, np.asarray(state, np.float64), FORWARD_TOLERANCE)


def check_extreme_decays(implementation: str, fields: Fields) -> None:
    """Steps of 0, and decays far below what float32 can hold, in one chunk."""
    spec = Spec(rows=1, length=48, **fields)
    inputs = make_inputs(spec)
    inputs["dt"][:, ::3] = 0.0
    inputs["dt"][:, 1::7] = 1e4
    cotangents = make_cotangents(spec)
    truth = oracle.ssd(inputs, None, *cotangents)
    (y, state), gradients = evaluate(implementation, spec, inputs, None, cotangents)
    check_close("y", y, truth.y, FORWARD_TOLERANCE)
    check_close("state", state, truth.state, FORWARD_TOLERANCE)
    for name, expected in truth.gradients.items():
        check_close(f"gradient of {name}", gradients[name], expected, GRADIENT_TOLERANCE)
