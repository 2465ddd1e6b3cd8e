"""Causal attention: a float64 loop for values, autodiff of the dense float64 formula for gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.table import Candidate, Measured, Table
from tests.attention.calls import Spec, assert_close, blocked, dense_with_gradients, loop, relative, with_gradients
from transmamba_jax.attention import api, blockwise, causal_attention
from transmamba_jax.attention import oracle as numpy_oracle


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_BLOCK", 16)
    monkeypatch.setattr(blockwise, "_CPU_EDGE", 6)  # a block on the diagonal in parts of 6, 6 and 4 queries


# Blocks of 16: one block, its edges, several blocks; one spec serves several tests, which share its compilation.
SEVERAL = Spec(100, groups=2, heads=4, packed=True)
SHAPES = [
    Spec(1, packed=True),
    Spec(15, groups=2, heads=4, state_dim=6, head_dim=10),
    Spec(16, groups=2, heads=2, packed=True),
    Spec(17, groups=1, heads=4, head_dim=3),
    Spec(31, groups=4, heads=4, state_dim=12, head_dim=12, packed=True),
    Spec(33, groups=2, heads=6),
    Spec(64, groups=3, heads=3, state_dim=5),
    SEVERAL,
]


@pytest.mark.parametrize("spec", [SHAPES[1], SEVERAL], ids=lambda spec: f"T{spec.length}")
def test_values_and_gradients_of_the_reference(spec: Spec) -> None:
    arrays, ids = spec.arrays()
    assert_close(arrays, ids, 1e-6, 2e-6, "reference")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("spec", SHAPES, ids=lambda spec: f"T{spec.length}")
def test_values_and_gradients(spec: Spec) -> None:
    arrays, ids = spec.arrays()
    assert_close(arrays, ids, 1e-6, 2e-6)
    q, k, v, _ = arrays
    wanted = loop(q, k, v, ids, 1 / np.sqrt(spec.state_dim))
    assert relative(dense_with_gradients(arrays, ids)[0], wanted) < 1e-13


@pytest.mark.parametrize(("length", "packed"), [(512, False), (513, False), (1025, True)])
def test_real_block_edges(length: int, packed: bool) -> None:
    arrays, ids = Spec(length, heads=2, state_dim=4, head_dim=4, batch=1 + packed, packed=packed).arrays()
    assert_close(arrays, ids, numpy_oracle.VALUE_TOLERANCE, numpy_oracle.GRADIENT_TOLERANCE)


def test_the_numpy_oracle_is_the_dense_formula() -> None:
    arrays, _ = Spec(33, groups=2, heads=6).arrays(np.float64)
    for ours, theirs in zip(numpy_oracle.attend(*arrays), dense_with_gradients(arrays, None), strict=True):
        assert relative(ours, theirs) < 1e-13


@pytest.mark.usefixtures("small_blocks")
def test_scale_is_a_factor_on_the_scores() -> None:
    (q, k, v, _), ids = Spec(40, packed=True).arrays()
    found = causal_attention(*map(jnp.asarray, (q, k, v)), jnp.asarray(ids), scale=0.7)
    assert relative(found, loop(q, k, v, ids, 0.7)) < 1e-6


@pytest.mark.usefixtures("small_blocks")
def test_large_scores_stay_finite_and_exact() -> None:
    arrays, ids = SEVERAL.arrays()
    arrays[0] *= 60
    # Scores reach 500, whose float32 rounding of 3e-5 is the relative error of a weight.
    assert_close(arrays, ids, 1e-4, 2e-4)


@pytest.mark.usefixtures("small_blocks")
def test_any_ids_may_attend_not_only_contiguous_rising_ones() -> None:
    arrays, _ = SEVERAL.arrays()
    ids = np.random.default_rng(0).integers(0, 4, (2, 100)).astype(np.int32)
    ids[1] = np.repeat([7, 3, 7, 0, 3, 1, 0, 3, 3, 7], 10)
    assert_close(arrays, ids, 1e-6, 2e-6)


def test_blocks_of_other_documents_are_skipped() -> None:
    ids = jnp.asarray([np.repeat([1, 1, 2, 3, 3, 3, 0], 8), np.repeat([1, 2, 2, 3, 3, 0, 0], 8)])
    first = lambda rows: blockwise._split_ids(rows, 7, 8)[1].tolist()
    assert first(ids[:1]) == [0, 0, 2, 3, 3, 3, 6]
    assert first(ids[1:]) == [0, 1, 1, 3, 3, 5, 5]
    assert first(ids) == [0, 0, 1, 3, 3, 3, 5]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_see_neither_future_nor_other_documents(packed: bool) -> None:
    length = 35
    (q, k, v, _), ids = Spec(length, heads=1, state_dim=4, head_dim=3, packed=packed).arrays()
    sees = np.tril(np.ones((length, length), bool))
    sees = np.stack([sees & (True if ids is None else row[:, None] == row) for row in ([0, 0] if ids is None else ids)])
    given = None if ids is None else jnp.asarray(ids)

    @jax.jit
    def jacobians(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        y, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, given), q, k, v)
        one_token = (
            jnp.eye(length)[:, None, :, None, None] * jnp.arange(1.0, 4.0)[None, None, None, None]
        )  # the rows of the batch do not mix
        return jax.vmap(back)(jnp.broadcast_to(one_token, (length, *y.shape)))

    # [from t, B, to s, 1, channels] -> [B, t, s]
    to_q, to_k, to_v = (np.swapaxes(np.abs(x).sum((-1, -2)) > 0, 0, 1) for x in jacobians(q, k, v))
    np.testing.assert_array_equal(to_v, sees)
    assert not (to_k & ~sees).any()
    assert not (to_q & ~np.eye(length, dtype=bool)).any()
    several = sees & (sees.sum(-1, keepdims=True) > 1)
    np.testing.assert_array_equal(to_k & several, several)


@pytest.mark.usefixtures("small_blocks")
def test_padding_changes_no_real_token_and_stays_finite() -> None:
    q, k, v, g = (x[:, :30] for x in SEVERAL.arrays()[0])
    alone = with_gradients([q, k, v, g], None)
    for left, right in ((0, 70), (70, 0), (27, 43)):
        widths = ((0, 0), (left, right), (0, 0), (0, 0))
        padded = [np.pad(x, widths, constant_values=3.0) for x in (q, k, v)] + [np.pad(g, widths)]
        ids = np.pad(np.ones((2, 30), np.int32), ((0, 0), (left, right)))
        for name, ours, theirs in zip(("y", "dq", "dk", "dv"), with_gradients(padded, ids), alone, strict=True):
            assert relative(ours[:, left : left + 30], theirs) < 1e-6, name
            assert np.isfinite(ours).all(), name
            if name != "y":
                assert not ours[:, :left].any()
                assert not ours[:, left + 30 :].any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("operand", ["float32", "bfloat16"])
def test_bfloat16_is_close_to_float32(operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if operand == "bfloat16":  # what an accelerator multiplies
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays, ids = Spec(60, groups=2, heads=4, packed=True).arrays()
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found = with_gradients(low, ids, implementation="blockwise")
    wanted = dense_with_gradients([np.asarray(x, np.float32) for x in low], ids)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative(ours, theirs) < (0.004 if operand == "float32" else 0.008)


def test_float64_stays_float64() -> None:
    arrays, ids = Spec(20, packed=True).arrays(np.float64)
    with jax.enable_x64(True):
        found = causal_attention(*map(jnp.asarray, arrays[:3]), jnp.asarray(ids))
        assert relative(found, loop(*arrays[:3], ids, 8**-0.5)) < 1e-14


def gradient_of_length(length: int) -> Any:
    like = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    run = lambda q, k, v, g: jax.vjp(causal_attention, q, k, v)[1](g)
    return jax.jit(run).trace(like, like, like, like)


def test_memory_is_linear_in_time() -> None:
    peak = {
        length: gradient_of_length(length).lower().compile().memory_analysis().temp_size_in_bytes
        for length in (8192, 16384)
    }
    assert peak[16384] <= 2.1 * peak[8192]
    assert peak[16384] < 16384**2 / 8  # a thirty-second of one head's scores


def test_program_does_not_grow_with_time() -> None:
    equations = {str(gradient_of_length(length).jaxpr).count(" = ") for length in (1024, 65536)}
    assert len(equations) == 1


@pytest.mark.usefixtures("small_blocks")
def test_runs_inside_shard_map() -> None:
    arrays, ids = SEVERAL.arrays()
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, heads = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec("data", None, "tensor")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(heads,) * 4 + (rows,), out_specs=heads)
    def mapped(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, ids: jax.Array) -> tuple:
        return blocked(q, k, v, g, ids, "blockwise", ("mapped",))

    found = jax.jit(mapped)(*map(jnp.asarray, arrays), jnp.asarray(ids))
    for ours, theirs in zip(found, dense_with_gradients(arrays, ids), strict=True):
        assert relative(ours, theirs) < 2e-6


# --- the libraries' kernels ---


@pytest.mark.parametrize(
    ("backend", "dtype", "packed", "name"),
    [
        ("cpu", "bfloat16", False, "blockwise"),
        ("gpu", "bfloat16", False, "cudnn"),
        ("gpu", "bfloat16", True, "blockwise"),
        ("gpu", "float32", False, "blockwise"),
        ("tpu", "float32", True, "splash"),
        ("tpu", "float16", False, "blockwise"),
        ("another", "float32", False, "blockwise"),
    ],
)
def test_automatic_choice(backend: str, dtype: str, packed: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    (q, _, v, _), ids = Spec(8, packed=packed).arrays()
    assert api._choose(q.astype(jnp.dtype(dtype)), v, ids, None) == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.ones((2, 8, 8))}, "q and k must share one shape"),
        ({"k": np.ones((2, 8, 1, 7))}, "q and k must share one shape"),
        ({"v": np.ones((2, 7, 2, 6))}, "v must have shape"),
        ({"q": np.ones((2, 8, 4, 8)), "k": np.ones((2, 8, 4, 8))}, "must divide the heads of v, found G=4, H=2"),
        ({"q": np.ones((2, 8, 1, 0)), "k": np.ones((2, 8, 1, 0))}, "must not be empty"),
        ({"v": np.ones((2, 8, 2, 6), np.float16)}, "must share one floating-point dtype"),
        ({"segment_ids": np.ones((2, 7), np.int32)}, "segment_ids must have shape"),
        ({"segment_ids": np.ones((2, 8))}, "segment_ids must be integers"),
        (
            {"implementation": "flash"},
            "unknown implementation 'flash'; use one of reference, blockwise, cudnn, splash or None",
        ),
        ({"implementation": "cudnn"}, r"cudnn.*needs bfloat16 or float16, found float32"),
        ({"implementation": "cudnn", "segment_ids": np.ones((2, 8), np.int32)}, "not segment_ids"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses(change: dict[str, Any], message: str) -> None:
    (q, k, v, _), _ = Spec(8).arrays()
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(ValueError, match=message):
        causal_attention(**{n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()})


def test_refuses_what_the_kernels_cannot_hold() -> None:
    wide = jnp.ones((1, 8, 1, 160), jnp.bfloat16)
    with pytest.raises(ValueError, match="N and P of at most 128, found N=160"):
        causal_attention(wide, wide, wide, implementation="cudnn")
    half = jnp.ones((1, 8, 1, 16), jnp.float16)
    with pytest.raises(ValueError, match=r"splash.*needs bfloat16 or float32, found float16"):
        causal_attention(half, half, half, implementation="splash")


def test_a_table_of_measurements(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its fastest that can serve the call at the nearest length, else the platform's order; both are logged once."""
    (q, _, v, _), _ = Spec(40).arrays()
    table = Table("record.json", (Measured(64, (Candidate("cudnn"), Candidate("reference"), Candidate("blockwise"))),))
    monkeypatch.setattr(api, "_log_choice", api._log_choice.__wrapped__)
    with caplog.at_level("INFO", logger="transmamba_jax.attention"):
        assert api._choose(q, v, None, table) == "reference"
        assert api._choose(q, v, None, Table("record.json", (Measured(64, (Candidate("cudnn"),)),))) == "blockwise"
    measured, fallback = (record.getMessage() for record in caplog.records)
    assert measured == (
        "attention runs as 'reference', the fastest by record.json; passed over 'cudnn': it "
        "needs bfloat16 or float16, found float32"
    )
    assert fallback.startswith("attention runs as 'blockwise', chosen for 'cpu'; passed over 'cudnn': it needs ")
    found, wanted = (causal_attention(q, q, v, implementation=name) for name in (table, "reference"))
    np.testing.assert_array_equal(found, wanted)


def test_one_that_did_not_pass_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (q, _, v, _), _ = Spec(40).arrays()
    monkeypatch.setattr(api, "_AUTOMATIC", {"cpu": ("reference", "blockwise")})
    monkeypatch.setattr(api, "_warn", api._warn.__wrapped__)
    reasons = ("reference", "it is wrong"), ("blockwise", "it hung")
    assert api._choose(q, v, None, Table("", (), excluded=reasons[:1])) == "blockwise"
    assert not caplog.records
    assert api._choose(q, v, None, Table("", (), excluded=reasons)) == "blockwise"
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("passed over 'reference': it is wrong; passed over 'blockwise': it hung")
