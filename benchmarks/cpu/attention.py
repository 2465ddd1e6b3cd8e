"""Race causal attention: `python -m benchmarks.cpu.attention` from the root of the repository prints a table.

The blockwise implementation against `jax.nn.dot_product_attention(is_causal=True)`, forward and forward + backward, in
one process, taking turns. Both are compared with a float64 computation before they are timed. A time is the fastest
call; a ratio below 1 means that blockwise is faster.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from transmamba_jax.attention import blockwise, causal_attention

HEADS = 8
PASSES = ("forward", "forward+backward")
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
"""Largest relative L2 error against float64 of a contender that may race."""

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
CONTENDERS: dict[str, Attention] = {
    "library": functools.partial(jax.nn.dot_product_attention, is_causal=True),
    "blockwise": functools.partial(causal_attention, implementation="blockwise"),
}


def make_inputs(batch: int, length: int, width: int, dtype: str, seed: int) -> tuple[jax.Array, ...]:
    """Draw q, k, v and the cotangent of the output, [B, T, H, N] each."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, HEADS, width)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(4))


def passes(attend: Attention) -> dict[str, Callable[..., Any]]:
    """Both passes of a contender, jitted, as functions of (q, k, v, cotangent)."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        y, back = jax.vjp(attend, q, k, v)
        return y, *back(g)

    return {"forward": jax.jit(lambda q, k, v, _: attend(q, k, v)), "forward+backward": jax.jit(both)}


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention as the equation says it."""
    score = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones(score.shape[-2:], bool))
    return jnp.einsum("bhts,bshp->bthp", jax.nn.softmax(jnp.where(causal, score, -jnp.inf), axis=-1), v)


def check(name: str, attend: Attention, width: int, dtype: str) -> float:
    """Return the largest relative error of values and gradients at T = 1100, which is not a multiple of the block.

    Raises:
        SystemExit: it is above TOLERANCE: the contender computes something else.
    """
    inputs = make_inputs(1, 1100, width, dtype, seed=7)
    found = [np.asarray(x, np.float64) for x in passes(attend)["forward+backward"](*inputs)]
    arrays = [np.asarray(x, np.float32) for x in inputs]
    with jax.enable_x64(True):
        exact = passes(dense)["forward+backward"](*(jnp.asarray(x, jnp.float64) for x in arrays))
        wanted = [np.asarray(x) for x in exact]
    error = max(float(np.linalg.norm(f - w) / np.linalg.norm(w)) for f, w in zip(found, wanted, strict=True))
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"{name} is off by {error:.1e} against float64")
    return error


def race(args: argparse.Namespace, batch: int, length: int, kind: str) -> tuple[float, float]:
    """Time one shape and pass, print its line, return the ratio of minima and the median ratio of the rounds."""
    sets = [make_inputs(batch, length, args.width, args.dtype, seed) for seed in range(2)]
    runs = {name: passes(attend)[kind] for name, attend in CONTENDERS.items()}
    # Calls too short for the clock are repeated inside one timed call.
    repeats = max(1, 2_000_000 // (batch * length * length + 20_000))

    def call(run: Callable[..., Any], turn: int) -> None:
        for _ in range(repeats):
            jax.block_until_ready(run(*sets[turn % len(sets)]))

    times = timing.round_robin(
        {name: functools.partial(call, run) for name, run in runs.items()}, rounds=args.rounds, seconds=args.seconds
    )
    ratio = times["blockwise"].ratio(times["library"])
    paired = times["blockwise"].paired_ratio(times["library"])
    library, blockwise = (times[name].minimum / repeats * 1e3 for name in ("library", "blockwise"))
    print(
        f"{kind:>16} {batch:>3} {length:>6} {library:>12.3f} {blockwise:>12.3f} {ratio:>8.3f} {paired:>8.3f}",
        flush=True,
    )
    return ratio, paired


def main() -> None:
    """Parse the arguments, print what runs on what, check, race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens of a row (T)")
    parser.add_argument("--width", type=int, default=64, help="channels of a head, N = P")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument(
        "--diagonal",
        type=int,
        default=blockwise._CPU_EDGE,
        help="queries at a time in blocks on the diagonal; 512: a whole block",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender and shape")
    parser.add_argument("--seconds", type=float, default=30.0, help="at most about this long for a shape and pass")
    args = parser.parse_args()
    blockwise._CPU_EDGE = args.diagonal
    print(timing.heading("jax", "jaxlib"))
    print(f"device {jax.devices()[0].device_kind}; {args.dtype}, H {HEADS}, N = P = {args.width}")
    for name, attend in CONTENDERS.items():
        error = check(name, attend, args.width, args.dtype)
        print(f"{name:>16}: largest relative error against float64 {error:.1e}", flush=True)
    print(f"{'pass':>16} {'B':>3} {'T':>6} {'library ms':>12} {'blockwise ms':>12} {'ratio':>8} {'rounds':>8}")
    for kind in args.passes:
        ratios = [race(args, batch, length, kind) for length in args.length for batch in args.batch]
        minima, paired = (timing.geometric_mean(column) for column in zip(*ratios, strict=True))
        print(f"{kind}: geometric mean of ratios of minima {minima:.3f}, of median ratios of the rounds {paired:.3f}")


if __name__ == "__main__":
    main()
