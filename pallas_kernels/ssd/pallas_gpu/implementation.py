"""SSD as Pallas Mosaic GPU kernels for Hopper: one over x, b and c in the forward pass, one over those and dy in the
backward pass.

A thread block walks one row and head (or a part of its P columns) with the float32 state in registers; chunks arrive by
TMA while the tensor cores multiply. `forward.py` and `backward.py` have the equations, `wgmma.py` the layout of
operands and the matmuls of float32, `split.py` the split of few rows and heads over the chip, `block_sizes.py` the
sizes. The kernels lower for a GPU whatever the default backend is, and run on a CPU under
`jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode()`. Mosaic GPU is imported by the first call.
"""

import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ssd import kernel_vjp
from pallas_kernels.ssd.pallas_gpu import block_sizes, split
from pallas_kernels.ssd.protocol import SsdInputs

if TYPE_CHECKING:
    from pallas_kernels.ssd.pallas_gpu.tiles import Tiles

supports_output_start = False
partitionable = False

_DTYPES = (jnp.float32, jnp.bfloat16)
_DIMS = (64, 96, 128)
_OLDEST = (0, 11, 2)
"""Version of JAX: the first whose interpreter runs these kernels. 0.11.0 has none, that of 0.11.1 fails on them.
Remove it when jax >= 0.11.2 is required."""

_HOPPER = "9"
"""Major compute capability: the matmuls are wgmma instructions, which no other generation has."""

_HOPPER_NAME = r"\bG?H\d+\b"
"""H20, H100, H200, H800, GH200: device kinds of a mesh whose devices need not be present."""

_INTERPRETER = "jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode"


def _device_unsupported_reason() -> str | None:
    wanted, meant = "the device must be a Hopper (compute capability 9)", target.mesh_device()
    if meant is not None and meant.platform != "cpu":
        served = meant.platform == "gpu" and re.search(_HOPPER_NAME, meant.device_kind)
        return None if served else f"{wanted}, found {meant.device_kind} in the mesh of jax.set_mesh"
    if meant is not None or jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or str(capability).split(".")[0] == _HOPPER:
        return None
    return f"{wanted}, found {device.device_kind} ({capability})"


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return why the kernels do not support these shapes and dtypes here; None: they do."""
    reasons = []
    if jax.__version_info__ < _OLDEST:
        oldest = ".".join(str(part) for part in _OLDEST)
        reasons.append(
            f"jax must be at least {oldest} (on Python 3.12 or later), found {jax.__version__}, "
            "in which these kernels cannot be tested"
        )
    if x.dtype not in _DTYPES:
        reasons.append(f"x must be float32 or bfloat16, found {x.dtype.name}")
    for name, size in (("the head dim P of x", x.shape[3]), ("the state dim N of b", b.shape[3])):
        if size not in _DIMS:
            reasons.append(f"{name} must be one of {', '.join(map(str, _DIMS))}, found {size}")
    device = _device_unsupported_reason()
    return "; ".join([*reasons, *([] if device is None else [device])]) or None


def tiles_of(x: jax.Array, b: jax.Array) -> "Tiles":
    """Return the grid and thread blocks of a call of these shapes.

    Raises:
        ValueError: the kernels cannot serve the call: version, dtype, a dimension or the device.
    """
    reason = unsupported_reason(x, b)
    if reason is not None:
        raise ValueError(f"implementation 'pallas_gpu' cannot serve this call: {reason}")
    from pallas_kernels.ssd.pallas_gpu.tiles import Tiles

    batch, length, num_heads, head_dim = x.shape
    groups, state_dim = b.shape[2:]
    terms = 3 if x.dtype == jnp.float32 else 1
    forward, backward = block_sizes.choose_gpu(groups < num_heads, head_dim, state_dim, terms)
    length += -length % block_sizes.GPU_CHUNK
    return Tiles(batch, length, num_heads, groups, head_dim, state_dim, terms, forward, backward)


def _pad(tiles: "Tiles", value: jax.Array) -> jax.Array:
    """Zeros up to a whole chunk: dt = 0 and l = 0 leave the state as it is."""
    amount = tiles.length - value.shape[1]
    return jnp.pad(value, ((0, 0), (0, amount)) + ((0, 0),) * (value.ndim - 2)) if amount else value


def _operand(tiles: "Tiles", value: jax.Array) -> jax.Array:
    """[B, T, ...] -> bfloat16 terms [terms B, T, ...]."""
    from pallas_kernels.ssd.pallas_gpu import wgmma

    value = _pad(tiles, value)
    return value if tiles.terms == 1 else jnp.concatenate(wgmma.split(value, tiles.terms))


def _run(tiles: "Tiles", inputs: SsdInputs, save: bool) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """Run the forward kernel on arrays of the public shapes; see `run_forward` for the saved states."""
    from pallas_kernels.ssd.pallas_gpu.decays import scalar_rows
    from pallas_kernels.ssd.pallas_gpu.forward import run_forward

    x, dt, log_decay, b, c, d, h = inputs
    y, final, saved = run_forward(
        tiles,
        _operand(tiles, target.assert_platform(x, "pallas_gpu", "cuda", _INTERPRETER)),
        scalar_rows(_pad(tiles, dt), _pad(tiles, log_decay)),
        _operand(tiles, b),
        None if c is None else _operand(tiles, c),
        d,
        h.swapaxes(2, 3),
        x.dtype,
        save,
    )
    return (None if y is None else y[:, : x.shape[1]]), final.swapaxes(2, 3), saved


def _gradients(
    tiles: "Tiles", inputs: SsdInputs, saved: jax.Array, dy: jax.Array | None, dfinal: jax.Array
) -> SsdInputs:
    """Run the backward kernel on arrays of the public shapes; add up its partial sums."""
    from pallas_kernels.ssd.pallas_gpu.backward import VECTORS, run_backward
    from pallas_kernels.ssd.pallas_gpu.decays import scalar_rows

    x, dt, log_decay, b, c, d, _ = inputs
    found = run_backward(
        tiles,
        _operand(tiles, target.assert_platform(x, "pallas_gpu", "cuda", _INTERPRETER)),
        scalar_rows(_pad(tiles, dt), _pad(tiles, log_decay)),
        _operand(tiles, b),
        None if c is None else _operand(tiles, c),
        d,
        saved,
        None if dy is None else _operand(tiles, dy),
        dfinal.swapaxes(2, 3),
        x.dtype,
    )
    length = x.shape[1]

    def tokens(value: jax.Array) -> jax.Array:
        """[B, H, chunks, Q] -> [B, T, H]."""
        return value.reshape(*value.shape[:2], -1).swapaxes(1, 2)[:, :length]

    def group(value: jax.Array, dtype: Any) -> jax.Array:
        """[parts, B, T, H, N] -> [B, T, G, N]."""
        if value.shape[0] > 1 or tiles.groups < tiles.num_heads:
            value = value.reshape(*value.shape[:3], tiles.groups, -1, tiles.state_dim).sum(axis=(0, 4))
        else:
            value = value[0]
        return value[:, :length].astype(dtype)

    vectors = jnp.moveaxis(found["vectors"].sum(axis=2), 3, 0)
    sums = dict(zip(VECTORS, vectors, strict=False))
    through = found["through"].sum(axis=(2, 4))[..., None]
    # l_k is spanned by writes from j < k and by reads at i >= k.
    before = jnp.pad(sums["writes"][..., :-1], ((0, 0),) * 3 + ((1, 0),))
    dlog_decay = through + jnp.cumsum(before, axis=-1)
    dc, dd = None, None
    if c is not None:
        dlog_decay += sums["spans"] + jax.lax.cumsum(sums["reads"], axis=3, reverse=True)
        dc, dd = group(found["dc"], c.dtype), sums["skip"].sum(axis=(0, 2, 3))
    return SsdInputs(
        x=found["dx"][:, :length],
        dt=tokens(sums["dt"]),
        log_decay=tokens(dlog_decay),
        b=group(found["db"], b.dtype),
        c=dc,
        d=dd,
        initial_state=found["dinitial"].swapaxes(2, 3),
    )


def _parts_of(x: jax.Array, b: jax.Array) -> int:
    """Return the number of parts that the sequence is split into. Errors as for `tiles_of`."""
    tiles = tiles_of(x, b)
    blocks = tiles.batch * tiles.num_heads * (tiles.head_dim // tiles.forward.values)
    return block_sizes.choose_gpu_parts(blocks, tiles.chunks)


forward, final_state = split.operators(_parts_of, *kernel_vjp.operators(tiles_of, _run, _gradients))
