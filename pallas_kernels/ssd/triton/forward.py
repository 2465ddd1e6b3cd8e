"""The forward pass of SSD as Triton kernels; `implementation.py` launches them. Importing this imports triton.

Rows are cut into chunks of Q tokens, and those into segments of CHUNKS chunks. The state before every chunk, and the
gradient of that after it, are stored in the dtype of x, in which the matrix unit takes them; the walk that makes
them carries float32. Every other kernel takes one chunk per program. Nothing depends on the order programs run in.

Shapes: x, y [B, T, H, P]; b, c [B, T, G, N]; dt, the running sums s = coarse + fine of l and the gradients of dt and l
float32 [B, H, SEGMENTS CHUNKS Q], 0 beyond the end; states [B, H, chunks, N, P], one per segment or row float32.
Tiles are powers of two, TILE_P and TILE_N of the dimensions P and N, and masked where these end. A tile with "across"
in its name has its tokens in the lanes.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(left, right, dtype, PRECISION: tl.constexpr):
    """Multiply two tiles in `dtype`, sums in float32."""
    return tl.dot(left.to(dtype), right.to(dtype), input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _places(batch, start, part, first, LENGTH: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
            token, channel):  # fmt: skip
    """Address tokens from `start`, channels from `first` of [B, T, PARTS, WIDTH]: base, offsets, mask."""
    # One 64-bit sum for the tile, 32 bits for the places in it: a 64-bit pointer an element would fill the registers.
    base = ((batch * LENGTH + start) * PARTS + part) * WIDTH + first
    return base, token * (PARTS * WIDTH) + channel, (token < LENGTH - start) & (channel < WIDTH - first)


@triton.jit
def _tokens(pointer, batch, start, part, first, LENGTH: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
            Q: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Load a tile [Q, TILE], 0 beyond any end."""
    token, channel = tl.arange(0, Q)[:, None], tl.arange(0, TILE)[None, :]
    base, at, mask = _places(batch, start, part, first, LENGTH, PARTS, WIDTH, token, channel)
    return tl.load(pointer + base + at, mask=mask, other=0.0)


@triton.jit
def _tokens_across(pointer, batch, start, part, first, LENGTH: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
                   Q: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Load the same, transposed: [TILE, Q]."""
    token, channel = tl.arange(0, Q)[None, :], tl.arange(0, TILE)[:, None]
    base, at, mask = _places(batch, start, part, first, LENGTH, PARTS, WIDTH, token, channel)
    return tl.load(pointer + base + at, mask=mask, other=0.0)


@triton.jit
def _put_tokens(pointer, tile, batch, start, part, first, LENGTH: tl.constexpr, PARTS: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """Store a tile [Q, TILE]."""
    token, channel = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    base, at, mask = _places(batch, start, part, first, LENGTH, PARTS, WIDTH, token, channel)
    tl.store(pointer + base + at, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _state(pointer, row, n, p, N: tl.constexpr, P: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr):
    """Load a tile [TILE_N, TILE_P] of state number `row`."""
    at_n, at_p = tl.arange(0, TILE_N)[:, None], tl.arange(0, TILE_P)[None, :]
    mask = (at_n < N - n) & (at_p < P - p)
    return tl.load(pointer + (row * (N * P) + n * P + p) + at_n * P + at_p, mask=mask, other=0.0)


@triton.jit
def _put_state(pointer, tile, row, n, p, N: tl.constexpr, P: tl.constexpr):
    """Store it."""
    at_n, at_p = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    mask = (at_n < N - n) & (at_p < P - p)
    tl.store(pointer + (row * (N * P) + n * P + p) + at_n * P + at_p, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _whole(coarse, fine, last):
    """exp(s_Q), given the place of the chunk's last token."""
    return tl.exp(tl.load(coarse + last) + tl.load(fine + last))


@triton.jit
def _from_start(coarse, fine, at):
    """exp(s_i), given the places of the chunk's tokens."""
    return tl.exp(tl.load(coarse + at) + tl.load(fine + at))


@triton.jit
def _to_end(coarse, fine, at, last):
    """exp(s_Q - s_j)."""
    return tl.exp((tl.load(coarse + last) - tl.load(coarse + at)) + (tl.load(fine + last) - tl.load(fine + at)))


@triton.jit
def _segsum(coarse, fine, start, Q: tl.constexpr):
    """exp(s_i - s_j) at [i, j] for i >= j, else 0: [Q, Q]. Masked before the exponential, which could overflow."""
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    exponent = tl.load(coarse + start + i) - tl.load(coarse + start + j)
    exponent += tl.load(fine + start + i) - tl.load(fine + start + j)
    return tl.exp(tl.where(i >= j, exponent, float("-inf")))


@triton.jit
def running_sums(log_decay, coarse, fine, Q: tl.constexpr):
    """Sum l inside every chunk, as a part that adds up exactly and a small rest (`decay.py`). Grid: (chunks,)."""
    at = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    clipped = tl.maximum(tl.load(log_decay + at), -128.0)
    exact = tl.floor(clipped * 256.0 + 0.5) / 256.0
    tl.store(coarse + at, tl.cumsum(exact, 0))
    tl.store(fine + at, tl.cumsum(clipped - exact, 0))


@triton.jit
def walk(
    value, key, dt, coarse, fine, first, states, ends,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr,
    REVERSE: tl.constexpr, ADD: tl.constexpr, FROM_FIRST: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk each segment; write the states before its chunks and, to `ends`, after it.

        h <- exp(s_Q) h + sum_j exp(s_Q - s_j) dt_j b_j x_j^T            (key b, value x)

    REVERSE walks back: the gradients of the states after the chunks, and of that before the segment.

        dh <- exp(s_Q) dh + sum_i exp(s_i) c_i dy_i^T                    (key c, value dy)

    FROM_FIRST: from `first` [B, H, SEGMENTS, N, P], else from 0. SAVE: store `states`. Without ADD nothing is added,
    and `value`, `key` and `dt` are not touched. Grid: (segments and tiles of N and P, H, B).
    """
    tiles_p: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tiles: tl.constexpr = tiles_p * ((N + TILE_N - 1) // TILE_N)
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n, p = (tile // tiles_p) * TILE_N, (tile % tiles_p) * TILE_P
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (batch * HEADS + head) * SEGMENTS + segment
    at_token = tl.arange(0, Q)
    h = tl.zeros((TILE_N, TILE_P), tl.float32)
    if FROM_FIRST:
        h = _state(first, row, n, p, N, P, TILE_N, TILE_P)
    for step in tl.range(0, CHUNKS):
        k = (CHUNKS - 1 - step) if REVERSE else step
        if SAVE:
            _put_state(states, h, row * CHUNKS + k, n, p, N, P)
        begin = (row * CHUNKS + k) * Q
        h *= _whole(coarse, fine, begin + Q - 1)
        if ADD:
            start = (segment * CHUNKS + k) * Q
            x = _tokens(value, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
            group = head // (HEADS // GROUPS)
            b_across = _tokens_across(key, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N).to(tl.float32)
            if REVERSE:
                weights = _from_start(coarse, fine, begin + at_token)
            else:
                weights = tl.load(dt + begin + at_token) * _to_end(coarse, fine, begin + at_token, begin + Q - 1)
            h += _dot(b_across * weights[None, :], x, x.dtype, PRECISION)
    _put_state(ends, h, row, n, p, N, P)


@triton.jit
def pass_states(
    ends, whole, first, states, last,
    SIZE: tl.constexpr, SEGMENTS: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Join segments that were walked from 0: `states` before each, `last` after all; reversed, from the end.

    h <- whole_k h + ends_k with `whole` [B, H, SEGMENTS] the decay of a segment. Grid: (B H, tiles of SIZE = N P).
    """
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = at < SIZE
    row = tl.program_id(0).to(tl.int64)
    h = tl.load(first + row * SIZE + at, mask=mask, other=0.0)
    for step in tl.range(0, SEGMENTS):
        k = row * SEGMENTS + ((SEGMENTS - 1 - step) if REVERSE else step)
        tl.store(states + k * SIZE + at, h, mask=mask)
        h = h * tl.load(whole + k) + tl.load(ends + k * SIZE + at, mask=mask, other=0.0)
    tl.store(last + row * SIZE + at, h, mask=mask)


@triton.jit
def outputs(
    x, dt, coarse, fine, b, c, d, states, y,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TOTAL: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y of each chunk, with h the state before it; TOTAL is the number of chunks of a row.

        y_i = sum_{j <= i} (c_i . b_j) exp(s_i - s_j) dt_j x_j + exp(s_i) c_i h + d x_i

    Grid: (chunks and tiles of P, H, B).
    """
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    chunk, p = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * TILE_P
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, start = head // (HEADS // GROUPS), chunk * Q
    row = (batch * HEADS + head) * TOTAL + chunk
    begin = row * Q
    at_token = begin + tl.arange(0, Q)
    scores = tl.zeros((Q, Q), tl.float32)
    y_tile = tl.zeros((Q, TILE_P), tl.float32)
    for n in tl.range(0, N, TILE_N):
        c_tile = _tokens(c, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
        b_across = _tokens_across(b, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
        scores += _dot(c_tile, b_across, c_tile.dtype, PRECISION)
        y_tile += _dot(c_tile, _state(states, row, n, p, N, P, TILE_N, TILE_P), c_tile.dtype, PRECISION)
    x_tile = _tokens(x, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
    # Scales of tokens multiply left operands and results: a right operand is in the registers of every warp.
    y_tile = y_tile * _from_start(coarse, fine, at_token)[:, None] + tl.load(d + head) * x_tile.to(tl.float32)
    scores *= _segsum(coarse, fine, begin, Q) * tl.load(dt + at_token)[None, :]
    y_tile += _dot(scores, x_tile, x_tile.dtype, PRECISION)
    _put_tokens(y, y_tile, batch, start, head, p, LENGTH, HEADS, P)
