"""SSD as Pallas TPU kernels: one over x, b and c in the forward pass, one over those and dy in the backward pass.

Grid cells of a TPU core run in order, so the float32 state stays in VMEM while a kernel walks a row. HBM holds the
inputs, the outputs and, for the backward pass, one state per block of up to 1024 tokens. `forward.py` and `backward.py`
have the equations, `block_sizes.py` the sizes of the cells. The kernels lower for a TPU whatever the default backend
is, and run on a CPU under `jax.experimental.pallas.tpu.force_tpu_interpret_mode()`. Pallas for TPUs is imported by the
first call.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ssd import kernel_vjp
from pallas_kernels.ssd.pallas_tpu import block_sizes
from pallas_kernels.ssd.pallas_tpu.tiles import Tiles
from pallas_kernels.ssd.protocol import SsdInputs

supports_output_start = True
partitionable = False

_DTYPES = (jnp.float32, jnp.bfloat16)
_MULTIPLE = 8
"""Rows of a register: head and state dimensions are multiples of it."""

_MAX_DIM = 256
"""Blocks of every head and state dimension up to it fit the VMEM budget of `block_sizes.py`."""

_INTERPRETER = "jax.experimental.pallas.tpu.force_tpu_interpret_mode"


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return why the kernels do not support these shapes and dtypes; None: they do."""
    reasons = []
    if x.dtype not in _DTYPES:
        reasons.append(f"x must be float32 or bfloat16, found {x.dtype.name}: the matrix unit takes no other dtype")
    for name, size in (("the head dim P of x", x.shape[3]), ("the state dim N of b", b.shape[3])):
        if size % _MULTIPLE or size > _MAX_DIM:
            reasons.append(f"{name} must be a multiple of {_MULTIPLE} up to {_MAX_DIM}, found {size}")
    return "; ".join(reasons) or None


def tiles_of(x: jax.Array, b: jax.Array) -> Tiles:
    """Return the grid and blocks of a call of these shapes.

    Raises:
        ValueError: the kernels cannot serve the call: dtype, or a head or state dimension.
    """
    reason = unsupported_reason(x, b)
    if reason is not None:
        raise ValueError(f"implementation 'pallas_tpu' cannot serve this call: {reason}")
    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    chunk = block_sizes.choose_chunk(length, x.dtype.itemsize, target.device_kind())
    blocks = block_sizes.choose(length, num_heads, groups, head_dim, state_dim, x.dtype.itemsize, chunk)
    return Tiles(batch, length, num_heads, groups, head_dim, state_dim, blocks)


def _view(tiles: Tiles, inputs: SsdInputs) -> SsdInputs:
    """Return the inputs in the layouts of the kernels, all but the initial state."""
    x, dt, log_decay, b, c, d, _ = inputs
    return SsdInputs(
        tiles.view(target.assert_platform(x, "pallas_tpu", "tpu", _INTERPRETER), tiles.by_head),
        tiles.view_rows(dt),
        tiles.view_rows(log_decay),
        tiles.view(b, tiles.by_group),
        None if c is None else tiles.view(c, tiles.by_group),
        None if d is None else _skip_view(tiles, d),
    )


def _run(tiles: Tiles, inputs: SsdInputs, save: bool) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Run the forward kernel on arrays of the public shapes; see `run_forward` (saved states: a view)."""
    from pallas_kernels.ssd.pallas_tpu.forward import run_forward

    views = _view(tiles, inputs)._replace(initial_state=tiles.view_state(inputs.initial_state))
    y, final, saved = run_forward(tiles, views, save)
    # Tokens are sliced while heads are side by side in memory: on a TPU, slices of [B, T, H, P] are copies.
    y = None if y is None else tiles.unview(y[:, :, tiles.output_start :], tiles.by_head)
    return y, tiles.unview_state(final), saved


def _pad_front(view: jax.Array, tokens: int) -> jax.Array:
    return jnp.pad(view, ((0, 0), (0, 0), (tokens, 0), (0, 0))) if tokens else view


def _skip_view(tiles: Tiles, d: jax.Array) -> jax.Array:
    whole = jnp.broadcast_to(d[:, None], (tiles.num_heads, tiles.head_dim))
    return tiles.view(whole[None, None], tiles.by_head)


def _group_gradient(tiles: Tiles, gradient: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B, T, G, N] from the backward kernel's db or dc, summed where several cells share a group."""
    if tiles.cells_per_group == 1:
        return tiles.unview(gradient, tiles.by_group)
    parts = gradient.reshape(tiles.batch, tiles.groups, tiles.cells_per_group, tiles.length, tiles.state_dim)
    return jnp.sum(parts, axis=2).transpose(0, 2, 1, 3).astype(dtype)


def _gradients(tiles: Tiles, inputs: SsdInputs, saved: jax.Array, dy: jax.Array | None, dfinal: jax.Array) -> SsdInputs:
    """Run the backward kernel on arrays of the public shapes, `saved` as the forward kernel left it."""
    from pallas_kernels.ssd.pallas_tpu.backward import run_backward

    found = run_backward(
        tiles,
        _view(tiles, inputs),
        saved,
        None if dy is None else _pad_front(tiles.view(dy, tiles.by_head), tiles.output_start),
        tiles.view_state(dfinal),
    )
    c = inputs.c
    return SsdInputs(
        x=tiles.unview(found.x, tiles.by_head),
        dt=tiles.unview_rows(found.dt),
        log_decay=tiles.unview_rows(found.log_decay),
        b=_group_gradient(tiles, found.b, inputs.b.dtype),
        c=None if c is None else _group_gradient(tiles, found.c, c.dtype),
        d=None if c is None else jnp.sum(tiles.unview(found.d, tiles.by_head), axis=(0, 1, 3)),
        initial_state=tiles.unview_state(found.initial_state),
    )


forward, final_state = kernel_vjp.operators(tiles_of, _run, _gradients)
