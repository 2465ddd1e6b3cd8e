"""Arguments that `ssd` and `ssd_state` refuse, and how an implementation is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from pallas_kernels.ssd import api, implementations, ssd, ssd_state
from transmamba_jax.training import loop

from . import checks


def _arguments(**changes: Any) -> dict[str, Any]:
    return {name: jnp.asarray(value) for name, value in checks.make_inputs(checks.Spec(length=6)).items()} | changes


WRONG = {
    "x rank": ({"x": jnp.zeros((2, 6, 4))}, r"x must be \[B, T, H, P\], found shape \(2, 6, 4\)"),
    "x integer": ({"x": jnp.zeros((2, 6, 4, 8), jnp.int32)}, "x must be float32 or bfloat16 or float16, found int32"),
    "dt shape": ({"dt": jnp.zeros((2, 6, 3))}, r"dt must have shape \(2, 6, 4\), found \(2, 6, 3\)"),
    "dt dtype": ({"dt": jnp.zeros((2, 6, 4), jnp.bfloat16)}, "dt must be float32, found bfloat16"),
    "a shape": ({"a": jnp.zeros((2,))}, r"a must have shape \(4,\), found \(2,\)"),
    "a dtype": ({"a": jnp.zeros((4,), jnp.bfloat16)}, "a must be float32, found bfloat16"),
    "b length": ({"b": jnp.zeros((2, 5, 2, 16))}, r"b must be \[B, T, G, N\]"),
    "b groups": ({"b": jnp.zeros((2, 6, 3, 16))}, "groups that divides H = 4"),
    "b dtype": ({"b": jnp.zeros((2, 6, 2, 16), jnp.bfloat16)}, "b must be float32, found bfloat16"),
    "state shape": ({"initial_state": jnp.zeros((2, 4, 16, 8))}, r"initial_state must have shape \(2, 4, 8, 16\)"),
    "state dtype": (
        {"initial_state": jnp.zeros((2, 4, 8, 16), jnp.bfloat16)},
        "initial_state must be float32, found bfloat16",
    ),
    "ids shape": ({"segment_ids": jnp.ones((2, 5), jnp.int32)}, r"segment_ids must have shape \(2, 6\)"),
    "ids dtype": ({"segment_ids": jnp.ones((2, 6))}, "segment_ids must be an integer type, found float32"),
    "chunk size": ({"chunk_size": 0}, "chunk_size must be an int >= 1, found 0"),
    "implementation": (
        {"implementation": "cuda"},
        "implementation must be None or one of reference, associative, sequential.*found 'cuda'",
    ),
}
WRONG["implementation type"] = ({"implementation": ["associative"]}, r"one of reference.*found \['associative'\]")
WRONG_SSD = {
    "c shape": ({"c": jnp.zeros((2, 6, 2, 8))}, r"c must have the shape and dtype of b, \(2, 6, 2, 16\) float32"),
    "c dtype": ({"c": jnp.zeros((2, 6, 2, 16), jnp.bfloat16)}, "c must have the shape and dtype of b"),
    "d shape": ({"d": jnp.zeros((4, 1))}, r"d must have shape \(4,\)"),
}


@pytest.mark.parametrize(("changes", "message"), [*WRONG.values(), *WRONG_SSD.values()], ids=[*WRONG, *WRONG_SSD])
def test_ssd_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**_arguments(**changes))


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_ssd_state_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = _arguments(**changes)
    del arguments["c"], arguments["d"]
    with pytest.raises(ValueError, match=message):
        ssd_state(**arguments)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="T = 0"):
        ssd(**{name: value[:, :0] if value.ndim > 2 else value for name, value in _arguments().items()})


def test_every_name_is_an_implementation() -> None:
    arguments = _arguments()
    assert {"reference", "associative", "sequential"} <= set(implementations())
    results = [
        jax.jit(lambda arguments, name=name: ssd(**arguments, implementation=name)[0])(arguments)
        for name in ("reference", "associative", "sequential")
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype", "devices", "expected"),
    [
        ("cpu", jnp.float32, 1, "sequential"),
        ("gpu", jnp.float32, 1, "associative"),
        ("tpu", jnp.bfloat16, 1, "pallas_tpu"),
        ("tpu", jnp.float16, 1, "associative"),
        ("tpu", jnp.bfloat16, 4, "associative"),
    ],
)
def test_automatic_choice_goes_by_the_default_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: Any, devices: int, expected: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    arguments = _arguments()
    chosen = api._module(None, arguments["x"].astype(dtype), arguments["b"].astype(dtype))
    assert chosen is api.IMPLEMENTATIONS[expected]


@pytest.mark.parametrize("wrap", [lambda run: run, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
def test_a_kernel_lowered_for_another_platform_is_named(wrap: Any) -> None:
    arguments = _arguments(implementation="pallas_tpu")
    run = wrap(lambda x: jnp.sum(ssd(**arguments | {"x": x})[0]))
    message = r"'pallas_tpu' cannot serve this call: it is lowered for cpu, .* for tpu\. Leave .*interpret_mode"
    with pytest.raises(ValueError, match=message):
        run(arguments["x"])
    del arguments["c"], arguments["d"]
    run = wrap(lambda x: jnp.sum(ssd_state(**arguments | {"x": x})))
    with pytest.raises(ValueError, match=message):
        run(arguments["x"])


def test_training_says_which_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(api, "_log_choice", api._log_choice.__wrapped__)  # it says each thing once a process

    def run(*_: Any) -> int:
        ssd(**_arguments())
        return 0

    monkeypatch.setattr(loop, "train", run)
    assert train.main(["--config", "configs/tiny.yaml"]) == 0
    assert "SSD runs as 'sequential', chosen for 'cpu'" in capsys.readouterr().out
