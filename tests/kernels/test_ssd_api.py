"""Bad arguments of `ssd` and `ssd_state`, and the choice of an implementation."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

import train
from pallas_kernels.ssd import api, checks, implementations, ssd, ssd_state, supports_output_start
from pallas_kernels.ssd.protocol import SsdImplementation
from pallas_kernels.table import Candidate, Measured, Table
from transmamba_jax.training import loop


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
    "implementation order": ({"implementation": ("cuda",)}, r"one of reference.*or a tuple of them, found \('cuda',\)"),
    "no implementation": ({"implementation": ()}, r"or a tuple of them, found \(\)"),
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
    x, b = arguments["x"].astype(dtype), arguments["b"].astype(dtype)
    assert api._choose(None, x, b, 64) == (expected, 64)


def _logged(caplog: pytest.LogCaptureFixture, **changes: Any) -> list[str]:
    api._log_choice.cache_clear()
    caplog.clear()
    with caplog.at_level("INFO", logger=api.__name__):
        for _ in range(2):
            jax.eval_shape(lambda arguments: ssd(**arguments, **changes), _arguments())
    return [record.getMessage() for record in caplog.records]


def test_one_line_says_why_each_implementation_was_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert _logged(caplog) == ["SSD runs as 'sequential', chosen for 'cpu'"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert _logged(caplog) == [
        "SSD runs as 'associative', chosen for 'tpu'; passed over 'pallas_tpu': the compiler cannot partition a kernel "
        "over devices outside jax.shard_map"
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "devices", lambda: [AbstractDevice("a GPU", num_cores=None, platform="gpu")])
    monkeypatch.setattr(api.pallas_gpu, "_device_unsupported_reason", lambda: None)
    monkeypatch.setattr(api.triton, "_missing", lambda: ["no Triton here"])
    (line,) = _logged(caplog)
    assert line.startswith("SSD runs as 'associative', chosen for 'gpu'; passed over 'pallas_gpu': it has not been ")
    assert "the head dim P of x must be one of 64, 96, 128, found 8" in line
    assert line.endswith("passed over 'triton': it has not been measured on a GPU; name it to use it; no Triton here")


def test_a_table_of_measurements(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The fastest at the nearest length that supports the call runs, with its chunk size; else the platform's order."""
    length = _arguments()["x"].shape[1]
    fast, slow = Candidate("associative", 8), Candidate("sequential", 16)
    rows = Measured(2 * length, (fast, slow)), Measured(64 * length, (slow, fast))
    table = Table("record.json", rows, states=(Measured(length, (slow, fast)),))
    assert _logged(caplog, implementation=table) == [
        "SSD runs as 'associative', chunks of 8, the fastest by record.json"
    ]
    x, b = _arguments()["x"], _arguments()["b"]
    assert api._choose(table, x, b, 64, state_alone=True) == ("sequential", 16)
    assert api._choose(Table("record.json", rows[1:]), x, b, 64, state_alone=True) == ("sequential", 16)
    # Of one length, the caller's chunk size where none was measured; nothing measured, or nothing that can run.
    assert api._choose(Table("", (Measured(1, (Candidate("associative"),)),)), x, b, 64) == ("associative", 64)
    assert api._choose(Table("", ()), x, b, 64) == ("sequential", 64)
    kernel = Table("record.json", (Measured(length, (Candidate("pallas_tpu"),)),))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    (line,) = _logged(caplog, implementation=kernel)
    assert line.startswith("SSD runs as 'sequential', chosen for 'cpu'; passed over 'pallas_tpu': the compiler cannot ")
    with pytest.raises(ValueError, match=r"one of reference, .* found Table"):
        ssd(**_arguments(), implementation=Table("", (Measured(1, (Candidate("other"),)),)))


def test_one_that_did_not_pass_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(api, "_ORDER", {"cpu": ("associative", "sequential")})
    monkeypatch.setattr(api, "_warn", api._warn.__wrapped__)
    reasons = ("associative", "it is wrong"), ("sequential", "it hung")
    assert _logged(caplog, implementation=Table("", (), excluded=reasons[:1])) == [
        "SSD runs as 'sequential', chosen for 'cpu'; passed over 'associative': it is wrong"
    ]
    warning = _logged(caplog, implementation=Table("", (), excluded=reasons))[0]
    assert warning == "SSD runs as 'sequential', though it hung: no other implementation can serve the call"


def test_the_length_of_a_table_is_the_nearest_by_ratio() -> None:
    a, b = (Candidate("associative"),), (Candidate("sequential"),)
    table = Table("", (Measured(16, a), Measured(256, b)))
    assert [table.order(length) for length in (1, 63, 65, 10**6)] == [a, a, b, b]
    assert table.order("T") == b  # a symbol


def test_an_order_of_preference(caplog: pytest.LogCaptureFixture) -> None:
    """The first that supports the call runs; where none does, every reason is reported."""
    (line,) = _logged(caplog, implementation=("pallas_gpu", "reference", "sequential"))
    assert line.startswith("SSD runs as 'reference', chosen for 'cpu'; passed over 'pallas_gpu': ")
    half = {name: value.astype(jnp.float16) for name, value in _arguments().items() if name in ("x", "b", "c")}
    message = (
        r"no implementation of pallas_tpu, pallas_gpu can serve this call: 'pallas_tpu': .*found float16.*; "
        r"'pallas_gpu': .*found float16"
    )
    with pytest.raises(ValueError, match=message):
        ssd(**_arguments(**half), implementation=("pallas_tpu", "pallas_gpu"))


def test_implementations_satisfy_the_protocol() -> None:
    for module in api.IMPLEMENTATIONS.values():
        for name in ("forward", "final_state", "unsupported_reason"):
            wanted = inspect.signature(getattr(SsdImplementation, name))
            found = inspect.signature(getattr(module, name))
            assert list(found.parameters.items()) == list(wanted.parameters.items())[1:]


def test_output_start_without_copies() -> None:
    """By name and by an order; an implementation that does not support the call supports no output start."""
    x, b = _arguments()["x"], _arguments()["b"]
    assert supports_output_start(x, b, "pallas_tpu")
    assert supports_output_start(x, b, ("pallas_tpu", "sequential"))
    assert not supports_output_start(x.astype(jnp.float16), b, "pallas_tpu")
    assert not supports_output_start(x, b, None)
    assert not supports_output_start(x, b, "sequential")


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
    monkeypatch.setattr(api, "_log_choice", api._log_choice.__wrapped__)  # it says each thing once per process

    def run(*_: Any) -> int:
        ssd(**_arguments())
        return 0

    monkeypatch.setattr(loop, "train", run)
    assert train.main(["--config", "configs/tiny.yaml"]) == 0
    assert "SSD runs as 'sequential', chosen for 'cpu'" in capsys.readouterr().out
