"""Block sizes of the Triton kernels, from shape and dtype: a table with reasons, no search at run time.

None has been timed; the compiler reports which fit (`python -m benchmarks.gpu.triton_compile`): registers do not spill,
and no program takes more shared memory than the 99 KB it has on the smallest of the family (8.6, 8.9).
"""

import dataclasses

WARPS = 4
"""Warps of a program: with 64 rows a tile each warp has the 16 that an instruction of the matrix unit takes."""

PASS_TILE = 512
"""Numbers of a state that a program of the pass over segments holds: 4 a thread."""

_BUSY = 256
"""Programs that fill a GPU: about two for each of the 108 (A100) or 132 (H100) multiprocessors."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Cut of a call of the Triton kernels: `segments` of `chunks` chunks of `chunk` tokens, tiles of dims, heads."""

    chunk: int
    chunks: int
    segments: int
    tile: int
    """Edge of the tiles of P and N, in the walk of states and the outputs."""
    gradient_tile: int
    part: int
    """Heads of a group that one program sums up."""


def choose(
    batch: int, length: int, num_heads: int, head_dim: int, groups: int, state_dim: int, *, itemsize: int
) -> Blocks:
    """Return how the Triton kernels cut a call.

    - chunk: 64 tokens, 32 in float32, whose three TF32 matmuls take twice the registers; longer ones spill.
    - tile: 64 where it divides both dimensions, else 32 (96 = 3 of 32, nothing padded; smaller dimensions are masked).
      In float32 and in the gradients, which hold more at a time, 32: with 64 they spill.
    - segments: as many as bring the walk of states to `_BUSY` programs, of 8 chunks or more: they are walked twice.
    - part: all heads of a group, which saves memory traffic, where that leaves 2 x `_BUSY` programs; else fewer.
    """
    wide = itemsize == 2
    chunk = 64 if wide else 32
    tile = 64 if wide and head_dim % 64 == 0 and state_dim % 64 == 0 else 32
    chunks = -(-length // chunk)
    walks = batch * num_heads * -(-head_dim // tile) * -(-state_dim // tile)
    segments = max(1, min(-(-_BUSY // walks), chunks // 8))
    ratio = num_heads // groups
    divisors = [part for part in range(1, ratio + 1) if ratio % part == 0]
    busy = [part for part in divisors if batch * chunks * num_heads // part >= 2 * _BUSY]
    return Blocks(chunk, -(-chunks // segments), segments, tile, 32, max(busy, default=1))
