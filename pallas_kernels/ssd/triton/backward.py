"""The backward pass of SSD as Triton kernels; shapes and names as in `forward.py`.

With h the state before a chunk, dh the gradient of that after it, S_ij = c_i . b_j, G_ij = dy_i . x_j and W_ij =
exp(s_i - s_j) for i >= j:

    dx_j = dt_j (sum_i S_ij W_ij dy_i + exp(s_Q - s_j) b_j dh) + d dy_j
    db_j = dt_j (sum_i G_ij W_ij c_i + exp(s_Q - s_j) x_j dh^T)
    dc_i = sum_j dt_j G_ij W_ij b_j + exp(s_i) dy_i h^T

The gradient of l_k is the sum over everything whose decay spans token k: pairs j < k <= i, reads of h at i >= k, writes
into the next state from j < k, and h to the next state. Sums only add; see `decay.py`.
"""

import triton
import triton.language as tl

from pallas_kernels.ssd.triton.forward import (
    _dot,
    _from_start,
    _put_tokens,
    _segsum,
    _state,
    _to_end,
    _tokens,
    _tokens_across,
    _whole,
)


@triton.jit
def _spanning(pairs, Q: tl.constexpr):
    """Pairs [Q, Q] at [i, j] -> [Q], at k the sum over j < k <= i."""
    row, lane = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    upto = tl.cumsum(tl.where(row > lane, pairs, 0.0), 1)
    after = tl.sum(tl.where(row > lane, upto, 0.0), 0)  # at j: pairs up to j and beyond j, what spans token j + 1
    return tl.sum(tl.where(lane + 1 == row, after[None, :], 0.0), 1)


@triton.jit
def _before_and_since(writes, reads, Q: tl.constexpr):
    """[Q], at k the sum of writes j < k and of reads i >= k."""
    row, lane = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    return tl.sum(tl.where(lane < row, writes[None, :], reads[None, :]), 1)


@triton.jit
def _scores(b, c, batch, start, group, LENGTH: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
            TILE_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute c_i . b_j of a chunk [Q, Q]."""
    scores = tl.zeros((Q, Q), tl.float32)
    for n in tl.range(0, N, TILE_N):
        c_tile = _tokens(c, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
        b_across = _tokens_across(b, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
        scores += _dot(c_tile, b_across, c_tile.dtype, PRECISION)
    return scores


@triton.jit
def head_gradients(
    x, dt, coarse, fine, b, c, d, dy, states, dstates, dx, ddt, dlog_decay, dd,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TOTAL: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, dt and l of one chunk, l without the pairs, and its part of that of d, [B, H, chunks].

    Without OUTPUTS there are no y and c: `c`, `d`, `dy` and `dd` are not touched. Grid: (chunks, H, B).
    """
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, start = head // (HEADS // GROUPS), chunk * Q
    row = (batch * HEADS + head) * TOTAL + chunk
    begin = row * Q
    at_token = begin + tl.arange(0, Q)
    dt_tile = tl.load(dt + at_token)
    ddt_tile = tl.zeros((Q,), tl.float32)
    writes = tl.zeros((Q,), tl.float32)
    reads = tl.zeros((Q,), tl.float32)
    through, skip_gradient = 0.0, 0.0
    if OUTPUTS:
        skip = tl.load(d + head)
        weighted = _scores(b, c, batch, start, group, LENGTH, GROUPS, N, Q, TILE_N, PRECISION)
        weighted *= _segsum(coarse, fine, begin, Q)
    for p in tl.range(0, P, TILE_P):
        ddtx = tl.zeros((Q, TILE_P), tl.float32)
        read = tl.zeros((Q, TILE_P), tl.float32)
        for n in tl.range(0, N, TILE_N):
            h = _state(states, row, n, p, N, P, TILE_N, TILE_P)
            dh = _state(dstates, row, n, p, N, P, TILE_N, TILE_P)
            through += tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1), 0)
            ddtx += _dot(_tokens(b, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N), dh, dh.dtype, PRECISION)
            if OUTPUTS:
                read += _dot(_tokens(c, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N), h, h.dtype, PRECISION)
        x_tile = _tokens(x, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
        x32 = x_tile.to(tl.float32)
        ddtx *= _to_end(coarse, fine, at_token, begin + Q - 1)[:, None]
        writes += tl.sum(ddtx * x32, 1)
        if OUTPUTS:
            dy_tile = _tokens(dy, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
            dy32 = dy_tile.to(tl.float32)
            reads += tl.sum(read * dy32, 1)
            skip_gradient += tl.sum(tl.sum(dy32 * x32, 1), 0)
            ddtx += _dot(tl.trans(weighted), dy_tile, x_tile.dtype, PRECISION)
        ddt_tile += tl.sum(ddtx * x32, 1)
        dx_tile = ddtx * dt_tile[:, None]
        if OUTPUTS:
            dx_tile += skip * dy32
        _put_tokens(dx, dx_tile, batch, start, head, p, LENGTH, HEADS, P)
    if OUTPUTS:
        tl.store(dd + row, skip_gradient)
    tl.store(ddt + at_token, ddt_tile)
    reads *= _from_start(coarse, fine, at_token)
    through *= _whole(coarse, fine, begin + Q - 1)
    tl.store(dlog_decay + at_token, _before_and_since(writes * dt_tile, reads, Q) + through)


@triton.jit
def _dscores(
    x, dt, coarse, fine, b, c, dy, dlog_decay, batch, part, group, chunk,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TOTAL: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G_ij W_ij dt_j of a chunk [Q, Q], summed over PART heads; write the gradient of l by pairs of each."""
    start = chunk * Q
    scores = _scores(b, c, batch, start, group, LENGTH, GROUPS, N, Q, TILE_N, PRECISION)
    dscores = tl.zeros((Q, Q), tl.float32)
    for member in tl.range(0, PART):
        head = part * PART + member
        begin = ((batch * HEADS + head) * TOTAL + chunk) * Q
        cross = tl.zeros((Q, Q), tl.float32)
        for p in tl.range(0, P, TILE_P):
            dy_tile = _tokens(dy, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
            x_across = _tokens_across(x, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
            cross += _dot(dy_tile, x_across, dy_tile.dtype, PRECISION)
        cross *= _segsum(coarse, fine, begin, Q) * tl.load(dt + begin + tl.arange(0, Q))[None, :]
        dscores += cross
        tl.store(dlog_decay + begin + tl.arange(0, Q), _spanning(cross * scores, Q))
    return dscores


@triton.jit
def group_gradients(
    x, dt, coarse, fine, b, c, dy, states, dstates, db, dc, dlog_decay,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TOTAL: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, PART: tl.constexpr,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of b and c of one chunk, summed over PART heads of a group, [B, T, H / PART, N], and of l by pairs.

    Without OUTPUTS there are no y and c: of the results only `db` is stored. Grid: (chunks, H / PART, B).
    """
    chunk, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, start = part * PART // (HEADS // GROUPS), chunk * Q
    if OUTPUTS:
        dscores = _dscores(
            x, dt, coarse, fine, b, c, dy, dlog_decay, batch, part, group, chunk,
            LENGTH, HEADS, GROUPS, P, N, TOTAL, Q, TILE_P, TILE_N, PART, PRECISION,
        )  # fmt: skip
    # Addresses and decays that a loop does not change are worked out in every turn: kept over several heads they spill.
    for n in tl.range(0, N, TILE_N, disable_licm=True):
        db_tile = tl.zeros((Q, TILE_N), tl.float32)
        dc_tile = tl.zeros((Q, TILE_N), tl.float32)
        for member in tl.range(0, PART, disable_licm=True):
            head = part * PART + member
            row = (batch * HEADS + head) * TOTAL + chunk
            at_token = row * Q + tl.arange(0, Q)
            from_dstate = tl.zeros((Q, TILE_N), tl.float32)
            from_state = tl.zeros((Q, TILE_N), tl.float32)
            for p in tl.range(0, P, TILE_P, disable_licm=True):
                x_tile = _tokens(x, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
                dh = _state(dstates, row, n, p, N, P, TILE_N, TILE_P)
                from_dstate += _dot(x_tile, tl.trans(dh), x_tile.dtype, PRECISION)
                if OUTPUTS:
                    dy_tile = _tokens(dy, batch, start, head, p, LENGTH, HEADS, P, Q, TILE_P)
                    h = _state(states, row, n, p, N, P, TILE_N, TILE_P)
                    from_state += _dot(dy_tile, tl.trans(h), dy_tile.dtype, PRECISION)
            weights = tl.load(dt + at_token) * _to_end(coarse, fine, at_token, row * Q + Q - 1)
            db_tile += from_dstate * weights[:, None]
            if OUTPUTS:
                dc_tile += from_state * _from_start(coarse, fine, at_token)[:, None]
        if OUTPUTS:
            c_tile = _tokens(c, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
            db_tile += _dot(tl.trans(dscores), c_tile, c_tile.dtype, PRECISION)
            b_tile = _tokens(b, batch, start, group, n, LENGTH, GROUPS, N, Q, TILE_N)
            dc_tile += _dot(dscores, b_tile, b_tile.dtype, PRECISION)
            _put_tokens(dc, dc_tile, batch, start, part, n, LENGTH, HEADS // PART, N)
        _put_tokens(db, db_tile, batch, start, part, n, LENGTH, HEADS // PART, N)
