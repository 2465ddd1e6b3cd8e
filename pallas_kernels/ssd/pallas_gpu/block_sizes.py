"""Block sizes of the GPU kernels (Hopper), from shape and dtype: tables of candidates, no search at run time.

A thread block of the GPU kernels (Hopper) holds `values` of the P columns of one head and streams chunks of 64 tokens
through `stages` slots of shared memory.

- chunk = 64: the rows of one warpgroup's matmul.
- values: all of P where that fits, else an equal part of P. A part more reads b and c again, and in the backward pass
  writes one more float32 part of db and dc. The forward pass keeps its float32 state in registers, at most 96 of the
  255 that a thread can have (two matmuls of 64 rows and the rest need about as many): that cuts P = 128 in two.
- stages: 2 where that fits, so that the next chunk arrives during the matmuls of this one; else 1.
- "fits": within 222 of the 227 KiB that a block can have on a Hopper; scratch of the compiler, barriers and alignment
  came to 4 and a little.
"""

import dataclasses

GPU_CHUNK = 64
SMEM_BUDGET = 222 * 1024

_MIN_VALUES = 16
"""Columns of the narrowest swizzled tile of bfloat16."""

_STATE_REGISTERS = 96

_MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""

_PART_CHUNKS = 16
_MIN_PARTS = 3


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
    """Contents of a thread block: `values` columns of x, and `stages` chunks in flight."""

    values: int
    stages: int


def squares_of(terms: int) -> int:
    """Return the number of [Q, Q] operands that the backward kernel keeps in shared memory, others in registers."""
    return 3 if terms == 1 else 1


def smem_bytes_forward(blocks: GpuBlocks, state_dim: int, terms: int, outputs: bool) -> int:
    """Bytes of shared memory of the forward kernel; `terms` as in `wgmma.py`."""
    values, operand = blocks.values, 2 * terms
    stage = GPU_CHUNK * operand * (values + (2 if outputs else 1) * state_dim) + 3 * 4 * GPU_CHUNK
    scratch = operand * state_dim * (GPU_CHUNK + values) + 4 * (GPU_CHUNK * values + 128)
    if outputs:
        scratch += operand * GPU_CHUNK**2 + (2 if terms == 1 else 4) * GPU_CHUNK * values
    return blocks.stages * stage + scratch


def smem_bytes_backward(blocks: GpuBlocks, state_dim: int, terms: int, outputs: bool, part_itemsize: int) -> int:
    """Bytes of shared memory of the backward kernel; `part_itemsize`: of an element of db and dc."""
    values, operand, sides = blocks.values, 2 * terms, 2 if outputs else 1
    stage = operand * (GPU_CHUNK * sides * (values + state_dim) + state_dim * values) + 3 * 4 * GPU_CHUNK
    gradient = GPU_CHUNK * ((2 if terms == 1 else 4) * values + part_itemsize * state_dim)
    scratch = (4 + operand) * state_dim * values + gradient + 4 * (5 * GPU_CHUNK + state_dim + 128)
    if outputs:
        scratch += 2 * GPU_CHUNK**2 + operand * GPU_CHUNK * (squares_of(terms) * GPU_CHUNK + values)
    return blocks.stages * stage + scratch


def choose_gpu(groups_shared: bool, head_dim: int, state_dim: int, terms: int) -> tuple[GpuBlocks, GpuBlocks]:
    """Return the block sizes of the forward and the backward kernel; see the module's docstring for the reasons.

    `groups_shared`: several heads share b and c.

    Raises:
        ValueError: nothing fits.
    """
    state_rows = GPU_CHUNK * (1 if state_dim == GPU_CHUNK else 2)
    parts = [part for part in range(1, head_dim + 1) if head_dim % part == 0]
    candidates = [GpuBlocks(head_dim // part, stages) for part in parts for stages in (2, 1)]
    candidates = [blocks for blocks in candidates if blocks.values % _MIN_VALUES == 0]

    def fits_forward(blocks: GpuBlocks) -> bool:
        registers = state_rows * blocks.values // 128
        used = smem_bytes_forward(blocks, state_dim, terms, outputs=True)
        return registers <= _STATE_REGISTERS and used <= SMEM_BUDGET

    def fits_backward(blocks: GpuBlocks) -> bool:
        whole = terms == 1 and not groups_shared and blocks.values == head_dim
        return smem_bytes_backward(blocks, state_dim, terms, True, 2 if whole else 4) <= SMEM_BUDGET

    forward = next((blocks for blocks in candidates if fits_forward(blocks)), None)
    backward = next((blocks for blocks in candidates if fits_backward(blocks)), None)
    if forward is None or backward is None:
        raise ValueError(
            f"pallas_gpu: no block of head_dim = {head_dim}, state_dim = {state_dim}, {terms} terms "
            f"fits {SMEM_BUDGET} bytes of shared memory"
        )
    return forward, backward


def choose_gpu_parts(blocks: int, chunks: int) -> int:
    """Return into how many parts the sequence is cut, `blocks` thread blocks and `chunks` chunks long.

    A block holds most of a multiprocessor's shared memory, so fewer blocks than multiprocessors leave some idle. Parts
    fill them, at a price: x and b are read twice, their gradients come in two sums, and states of parts go through
    memory. For N = P = 96 in bfloat16 that is 1.7 times the bytes in the forward pass and 2.2 times in all, so two
    parts gain nothing: at least 3, each of at least 1024 tokens (its states then cost a tenth of what it reads and
    writes), and no more than fill the chip once.
    """
    parts = min(_MULTIPROCESSORS // blocks, chunks // _PART_CHUNKS)
    if parts < _MIN_PARTS:
        return 1
    return -(-chunks // -(-chunks // parts))  # as few as chunks of equal number need
