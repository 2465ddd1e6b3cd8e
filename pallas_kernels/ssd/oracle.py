"""The SSD recurrence and its gradients in float64 numpy, token by token, documents handled one by one.

Written from the equations alone: h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t + d x_t, and the chain rule.
"""

import dataclasses

import numpy as np

FLOAT_INPUTS = ("x", "dt", "a", "b", "c", "d", "initial_state")


@dataclasses.dataclass(frozen=True)
class Result:
    """y and the final state, and the gradients of sum(y dy) + sum(state dstate) by input name."""

    y: np.ndarray
    state: np.ndarray
    gradients: dict[str, np.ndarray]


def documents(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (real, restart) [T] of one row: which tokens count, and at which the state restarts."""
    real = ids != 0
    restart = np.zeros(len(ids), bool)
    current = None
    for t in np.flatnonzero(real):
        if current is not None and ids[t] != current:
            restart[t] = True
        current = ids[t]
    return real, restart


def ssd(inputs: dict[str, np.ndarray], segment_ids: np.ndarray | None, dy: np.ndarray, dstate: np.ndarray) -> Result:
    """Run the recurrence, then the chain rule in reverse. `inputs` has every name of FLOAT_INPUTS."""
    x, dt, a, b, c, d, h0 = (np.asarray(inputs[name], np.float64) for name in FLOAT_INPUTS)
    dy, dh = np.asarray(dy, np.float64), np.asarray(dstate, np.float64).copy()
    rows, length, heads, _ = x.shape
    groups = b.shape[2]
    group = np.arange(heads) // (heads // groups)
    real, restart = np.ones((rows, length), bool), np.zeros((rows, length), bool)
    if segment_ids is not None:
        for row in range(rows):
            real[row], restart[row] = documents(segment_ids[row])

    step = dt * real[..., None]
    decay = np.exp(step * a) * ~restart[..., None]
    states = np.empty((length + 1, *h0.shape))
    states[0] = h0
    y = np.empty_like(x)
    for t in range(length):
        update = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, group, None, :]
        states[t + 1] = decay[:, t, :, None, None] * states[t] + update
        y[:, t] = np.einsum("bhpn,bhn->bhp", states[t + 1], c[:, t, group]) + d[:, None] * x[:, t]

    dx, ddt, da = d[:, None] * dy, np.zeros_like(dt), np.zeros_like(a)
    db, dc = np.zeros_like(b), np.zeros_like(c)
    for t in reversed(range(length)):
        dc_heads = np.einsum("bhpn,bhp->bhn", states[t + 1], dy[:, t])
        dh = dh + dy[:, t, :, :, None] * c[:, t, group, None, :]
        ddtx = np.einsum("bhpn,bhn->bhp", dh, b[:, t, group])
        db_heads = np.einsum("bhpn,bhp->bhn", dh, step[:, t, :, None] * x[:, t])
        for head in range(heads):
            dc[:, t, group[head]] += dc_heads[:, head]
            db[:, t, group[head]] += db_heads[:, head]
        dlog = decay[:, t] * np.einsum("bhpn,bhpn->bh", dh, states[t])
        dx[:, t] += step[:, t, :, None] * ddtx
        ddt[:, t] = real[:, t, None] * (np.einsum("bhp,bhp->bh", ddtx, x[:, t]) + dlog * a)
        da += np.sum(dlog * step[:, t], axis=0)
        dh = decay[:, t, :, None, None] * dh
    dd = np.einsum("bthp,bthp->h", dy, x)
    gradients = dict(zip(FLOAT_INPUTS, (dx, ddt, da, db, dc, dd, dh), strict=True))
    return Result(y, states[-1].copy(), gradients)


def relative_error(found: object, expected: np.ndarray) -> float:
    """L2 norm of the difference over the L2 norm of `expected` (over 1 where that is 0)."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
    norm = np.linalg.norm(expected)
    return float(difference / norm if norm > 0 else difference)
