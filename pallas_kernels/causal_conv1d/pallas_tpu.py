"""Causal depthwise convolution, and SiLU, as Pallas TPU kernels.

    u_t = bias + Σ_s kernel_{K-1-s} · x_{t-s}          y_t = u_t, or SiLU(u_t)
    dx_t = Σ_s kernel_{K-1-s} · du_{t+s}               dkernel_{K-1-s} = Σ_t du_t · x_{t-s}       dbias = Σ_t du_t

The forward pass reads x once, the backward pass x and dy. XLA's program takes several times the time of the memory
traffic (`docs/log/`), the kernel about that time. The backward pass recomputes u: the residual is x alone.

The grid is (batch, blocks of channels, blocks of tokens), tokens in order, from the end in the backward pass. A cell
walks strips of tokens, one column of 128 channels after the other, all in float32 registers. The carry from strip to
strip is the last 8 tokens of x in the forward pass and the first 8 of du in the backward pass (a register has 8 rows).
The kernels lower for a TPU whatever the default backend is, and run on a CPU under
`jax.experimental.pallas.tpu.force_tpu_interpret_mode()`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import varying

_ROWS, _LANES = 8, 128
"""Of a float32 register."""

_STRIP = 256
"""Tokens of a strip: of 128, instructions outside the loop over strips are a third, of 512 there is more to compile."""

_TOKENS = (1024, 512, 256)
_MAX_BLOCK = 768
"""Channels: two blocks of 1536, for the two cores of a v5p."""

_VMEM_BUDGET = 10 * 2**20
_MAX_TAPS = 7
"""The tokens that a token may read are a bit for each tap, of an int8."""

_BEFORE = 16
"""Tokens that the backward pass reads of the block before: the least that is whole registers in bfloat16."""


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Shapes of a call and its block sizes."""

    batch: int
    length: int
    channels: int
    taps: int
    itemsize: int
    silu: bool
    masked: bool

    @property
    def strip(self) -> int:
        """Tokens of a strip; 32 rows of int8 are a register's."""
        return min(_STRIP, -(-self.length // 32) * 32)

    @property
    def block(self) -> int:
        """Channels of a cell: whole lanes and an even number of cells where there are some, or all of them."""
        fitting = [size for size in range(_LANES, _MAX_BLOCK + 1, _LANES) if self.channels % size == 0]
        even = [size for size in fitting if self.channels // size % 2 == 0]
        return max(even or fitting or [self.channels])

    @property
    def tokens(self) -> int:
        """Tokens of a cell: the most whose x, dy and dx, twice, stay within the budget, and that waste no eighth."""
        budget, strips = _VMEM_BUDGET // (3 * 2 * self.itemsize * self.block), pl.cdiv(self.length, self.strip)
        wasted = lambda size: pl.cdiv(self.length, size) * size - strips * self.strip
        fits = [size for size in _TOKENS if size <= budget and 8 * wasted(size) <= self.length]
        return max(fits, default=self.strip) if self.strip == _STRIP else self.strip

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells: (batch, blocks of channels, blocks of tokens)."""
        return self.batch, self.channels // self.block, pl.cdiv(self.length, self.tokens)

    @property
    def columns(self) -> list[slice]:
        """Channels of a block, a register wide each."""
        return [slice(start, min(start + _LANES, self.block)) for start in range(0, self.block, _LANES)]

    def spec(self, reverse: bool = False, width: int | None = None) -> pl.BlockSpec:
        """Block [tokens, channels] of [B, T, C]; with a width, [tokens, width] of [B, T, width]."""
        last = self.grid[2] - 1

        def index(b, c, t):
            return b, (last - t if reverse else t), (c if width is None else 0)

        return pl.BlockSpec((None, self.tokens, width or self.block), index)

    def before_spec(self) -> pl.BlockSpec:
        """Block of the last tokens before that of `spec(reverse=True)`; before the first one, any."""
        last, blocks = self.grid[2] - 1, self.tokens // _BEFORE
        index = lambda b, c, t: (b, jnp.maximum((last - t) * blocks - 1, 0), c)
        return pl.BlockSpec((None, _BEFORE, self.block), index)

    def weight_spec(self, rows: int) -> pl.BlockSpec:
        """Block [rows, channels] of kernel or bias."""
        return pl.BlockSpec((rows, self.block), lambda _, c, __: (0, c))

    def cost(self, operations: int, *arrays: Any) -> pl.CostEstimate:
        """Estimate from operations per value, and from bytes read and written."""
        values = self.batch * self.length * self.channels
        bytes_accessed = sum(array.size * array.dtype.itemsize for array in arrays)
        return pl.CostEstimate(operations * values, values if self.silu else 0, bytes_accessed)


def unsupported_reason(x: jax.Array, kernel: jax.Array) -> str | None:
    """Return why the kernels do not support these shapes and dtypes; None: they do."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, found {x.dtype.name}"
    if kernel.shape[0] > _MAX_TAPS:
        return f"kernel must have at most {_MAX_TAPS} taps, found {kernel.shape[0]}"
    if x.shape[2] % _LANES and x.shape[2] > _MAX_BLOCK:
        return f"x must have a multiple of {_LANES} channels, or at most {_MAX_BLOCK}, found {x.shape[2]}"
    return None


def _tiles_of(x: jax.Array, kernel: jax.Array, readable: jax.Array | None, silu: bool) -> _Tiles:
    batch, length, channels = x.shape
    return _Tiles(batch, length, channels, kernel.shape[0], x.dtype.itemsize, silu, readable is not None)


def causal_conv1d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, readable: jax.Array | None = None, silu: bool = False
) -> jax.Array:
    """Mix each channel with its own K - 1 previous values, and apply SiLU if asked.

    Args:
        x: bfloat16 or float32 [B, T, C]; before its first token are zeros.
        kernel: [K, C]; the last tap meets the current token. Multiplication and accumulation are float32.
        bias: [C].
        readable: integers [B, T]; bit s is set where the token reads the one s before it. None: it reads all.
        silu: return SiLU(u) instead of u.

    Returns:
        [B, T, C] in the dtype of x. Differentiable in x, kernel and bias.

    Raises:
        ValueError: the kernels cannot serve the call: dtype, taps or channels.
    """
    reason = unsupported_reason(x, kernel)
    if reason is not None:
        raise ValueError(f"the TPU kernels of the convolution cannot serve this call: {reason}")
    if readable is not None:
        # Tokens are a register's rows, and so are bits here: one a lane costs less than turning rows in the kernel.
        readable = jnp.broadcast_to(readable.astype(jnp.int8)[..., None], (*readable.shape, _LANES))
        x, kernel, bias, readable = varying.align_varying_axes(x, kernel, bias, readable)
    else:
        x, kernel, bias = varying.align_varying_axes(x, kernel, bias)
    return _convolve(x, kernel, bias, readable, silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array, readable: jax.Array | None, silu: bool) -> jax.Array:
    tiles = _tiles_of(x, kernel, readable, silu)
    masks = () if readable is None else (readable,)
    operands = (x, *masks, *_weights(tiles, kernel, bias))
    out = varying.out_struct_like(x, x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_forward_kernel, tiles=tiles),
        grid=tiles.grid,
        in_specs=[
            tiles.spec(),
            *(tiles.spec(width=_LANES) for _ in masks),
            tiles.weight_spec(tiles.taps),
            tiles.weight_spec(1),
        ],
        out_specs=tiles.spec(),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((_ROWS, tiles.block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=tiles.cost(2 * tiles.taps + 2, *operands, out),
        name="causal_conv_forward",
    )(*operands)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, readable: jax.Array | None, silu: bool) -> Any:
    return _convolve(x, kernel, bias, readable, silu), (x, kernel, bias, readable)


def _backward(silu: bool, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, kernel, bias, readable = residuals
    tiles = _tiles_of(x, kernel, readable, silu)
    masks = () if readable is None else (readable,)
    operands = (x, x, dy, *masks, *_weights(tiles, kernel, bias))
    rows = (tiles.taps + 1) * _ROWS
    outs = [
        varying.out_struct_like(x, x.shape, x.dtype),
        varying.out_struct_like(x, (tiles.batch, rows, tiles.channels), jnp.float32),
    ]
    dx, sums = pl.pallas_call(
        functools.partial(_backward_kernel, tiles=tiles),
        grid=tiles.grid,
        in_specs=[
            tiles.spec(reverse=True),
            tiles.before_spec(),
            tiles.spec(reverse=True),
            *(tiles.spec(reverse=True, width=_LANES) for _ in masks),
            tiles.weight_spec(tiles.taps),
            tiles.weight_spec(1),
        ],
        out_specs=[tiles.spec(reverse=True), pl.BlockSpec((None, rows, tiles.block), lambda b, c, _: (b, 0, c))],
        out_shape=outs,
        scratch_shapes=[pltpu.VMEM((_carried(tiles) * _ROWS, tiles.block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=tiles.cost(6 * tiles.taps + 6, *operands[1:], *outs),  # of the second x a fraction is read
        name="causal_conv_backward",
    )(*operands)
    found = jnp.sum(sums.reshape(tiles.batch, tiles.taps + 1, _ROWS, tiles.channels), axis=(0, 2))
    found = found / 2 if silu else found
    return dx, found[:-1].astype(kernel.dtype), found[-1].astype(bias.dtype), None


_convolve.defvjp(_forward, _backward)


def _weights(tiles: _Tiles, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias [1, C] in float32, halved before SiLU: the kernels take u / 2, see `_forward_kernel`."""
    scale = 0.5 if tiles.silu else 1.0
    return kernel.astype(jnp.float32) * scale, bias.astype(jnp.float32)[None] * scale


def _convolved(
    tiles: _Tiles, earlier: jax.Array, x: jax.Array, masks: list[Any], weights: list[jax.Array], bias: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the sum over taps of a strip, and x_{t-s} for every s, from the strip and the 8 tokens before it."""
    both = jnp.concatenate([earlier, x], axis=0)
    back = [x, *(both[_ROWS - s : _ROWS - s + x.shape[0]] for s in range(1, tiles.taps))]
    total = bias
    for s, value in enumerate(back):
        total = total + weights[tiles.taps - 1 - s] * _where(masks[s], value)
    return total, back


def _where(mask: Any, value: jax.Array) -> jax.Array:
    return value if mask is None else jnp.where(mask, value, 0)


def _masks(tiles: _Tiles, readable_ref: Any, rows: Any, width: int) -> list[Any]:
    """Tell for every s which tokens of a strip read the one s before them; None: all."""
    if readable_ref is None:
        return [None] * tiles.taps
    bits = readable_ref[rows, :width].astype(jnp.int32)
    return [bits & (1 << s) != 0 for s in range(tiles.taps)]


def _forward_kernel(*refs: Any, tiles: _Tiles) -> None:
    """With h = u / 2: SiLU(u) = h + h tanh(h), two operations; u / (1 + exp(-u)) is 17, and overflows."""
    x_ref, *masks_ref, kernel_ref, bias_ref, y_ref, tail_ref = refs
    readable_ref = masks_ref[0] if tiles.masked else None

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        tail_ref[...] = jnp.zeros_like(tail_ref)

    for at in tiles.columns:
        weights, bias = [kernel_ref[tap : tap + 1, at] for tap in range(tiles.taps)], bias_ref[:, at]

        def body(k: jax.Array, tail: jax.Array, at=at, weights=weights, bias=bias) -> jax.Array:
            rows = pl.ds(pl.multiple_of(k * tiles.strip, tiles.strip), tiles.strip)
            x = x_ref[rows, at].astype(jnp.float32)
            masks = _masks(tiles, readable_ref, rows, at.stop - at.start)
            u, _ = _convolved(tiles, tail, x, masks, weights, bias)
            y_ref[rows, at] = (u + u * jnp.tanh(u) if tiles.silu else u).astype(y_ref.dtype)
            return x[-_ROWS:]

        tail_ref[:, at] = jax.lax.fori_loop(0, tiles.tokens // tiles.strip, body, tail_ref[:, at])


def _carried(tiles: _Tiles) -> int:
    """Count the arrays of 8 tokens that a strip hands to the one before it: of du as each tap read it."""
    return max(1, tiles.taps - 1) if tiles.masked else 1


def _backward_kernel(*refs: Any, tiles: _Tiles) -> None:
    """With h = u / 2 and g = tanh(h): SiLU'(u) = (1 + g) (1 + h (1 - g)) / 2; weights and sums have the half."""
    x_ref, before_ref, dy_ref, *masks_ref, kernel_ref, bias_ref, dx_ref, sums_ref, head_ref = refs
    readable_ref = masks_ref[0] if tiles.masked else None
    strip, strips, taps = tiles.strip, tiles.tokens // tiles.strip, tiles.taps
    block = tiles.grid[2] - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        head_ref[...] = jnp.zeros_like(head_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    row_slices = lambda count: [slice(k * _ROWS, (k + 1) * _ROWS) for k in range(count)]
    fold = lambda value: jnp.sum(value.reshape(-1, _ROWS, value.shape[1]), axis=0)
    for at in tiles.columns:
        weights, bias = [kernel_ref[tap : tap + 1, at] for tap in range(taps)], bias_ref[:, at]
        before = jnp.where(block == 0, 0, before_ref[:, at].astype(jnp.float32))[-_ROWS:]

        def body(turn: jax.Array, carry: Any, at=at, weights=weights, bias=bias, before=before) -> Any:
            heads, sums = carry
            start = pl.multiple_of((strips - 1 - turn) * strip, strip)
            rows = pl.ds(start, strip)
            x, dy = x_ref[rows, at].astype(jnp.float32), dy_ref[rows, at].astype(jnp.float32)
            inside = pl.ds(pl.multiple_of(jnp.maximum(start - _BEFORE, 0), _BEFORE), _BEFORE)
            earlier = jnp.where(start == 0, before, x_ref[inside, at].astype(jnp.float32)[-_ROWS:])
            if tiles.length % tiles.tokens:
                # Memory beyond the end of an array holds anything, also NaN.
                left = tiles.length - block * tiles.tokens - start
                real = lambda value, left: jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) < left
                x, dy = jnp.where(real(x, left), x, 0), jnp.where(real(dy, left), dy, 0)
                earlier = jnp.where(real(earlier, left + _ROWS), earlier, 0)
            masks = _masks(tiles, readable_ref, rows, at.stop - at.start)
            u, back = _convolved(tiles, earlier, x, masks, weights, bias)
            if tiles.silu:
                g = jnp.tanh(u)
                du = dy * ((1 + g) * (1 + u * (1 - g)))
            else:
                du = dy
            read = [_where(mask, du) for mask in masks]
            dx = weights[-1] * read[0]
            for s in range(1, taps):
                after = jnp.concatenate([read[s], heads[s - 1 if tiles.masked else 0]], axis=0)
                dx = dx + weights[taps - 1 - s] * after[s : s + strip]
            dx_ref[rows, at] = dx.astype(dx_ref.dtype)
            new = [fold(read[s] * back[s]) for s in reversed(range(taps))] + [fold(du)]
            first = read[1:] if tiles.masked and taps > 1 else [du]
            return [value[:_ROWS] for value in first], [old + more for old, more in zip(sums, new, strict=True)]

        init = (
            [head_ref[rows, at] for rows in row_slices(_carried(tiles))],
            [sums_ref[rows, at] for rows in row_slices(taps + 1)],
        )
        heads, sums = jax.lax.fori_loop(0, strips, body, init)
        for ref, values in ((head_ref, heads), (sums_ref, sums)):
            for rows, value in zip(row_slices(len(values)), values, strict=True):
                ref[rows, at] = value
