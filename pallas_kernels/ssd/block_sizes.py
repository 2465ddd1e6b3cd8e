"""Block sizes of the TPU and GPU kernels, from shape, dtype and chip: tables of candidates, no search at run time.

A grid cell of the TPU kernels holds `heads` heads of `tokens` tokens and walks them in chunks of `chunk` tokens.

- chunk = 128: a vector register has 128 lanes, which a shorter chunk leaves empty in every Q x Q tile, and the matrix
  unit of v5e and v5p has that edge. A longer one makes 2 Q (N + P) products a token outgrow the memory traffic. On v6e,
  whose matrix unit has an edge of 256, it is 256 in bfloat16: the compiler writes 10 to 16 % fewer instructions a token
  and head then, and 7 % fewer to 1 % more for the others. The argument chunk_size is not used.
- tokens: the most that fit, at most 1024. The forward pass keeps one float32 state a cell for the backward pass,
  4 N P / tokens bytes a token and head: at 128 tokens (N = P = 96) that is a third of the traffic of the whole forward
  pass, at 512 a tenth.
- heads: the most that fit beside that, at most 4 (the products of all heads of a chunk are unrolled: more heads are
  more code to compile), and whole registers of 128 lanes (4 heads of P = 96, 2 or 4 of 64), so that a cell is cut out
  of the arrays as they lie in memory, [B, T, H P]. Where no number of heads does that, blocks are cut from a copy.
- "fits": blocks of the backward pass, the larger one, with double buffering, and its scratch stay within 12 MiB. The
  compiler's limit for a kernel is 16 MiB by default (v5e, v5p; 32 MiB on v6e), and it needs some for itself.

The chip is that of the mesh of `jax.set_mesh` or of the default backend; a program lowered for a topology without a
mesh is traced before its chip is known, and gets chunks of 128.

A thread block of the GPU kernels (Hopper) holds `values` of the P columns of one head and streams chunks of 64 tokens
through `stages` slots of shared memory.

- chunk = 64: the rows of one warpgroup's product.
- values: all of P where that fits, else an equal part of P. A part more reads b and c again, and in the backward pass
  writes one more float32 part of db and dc. The forward pass keeps its float32 state in registers, at most 96 of the
  255 that a thread can have (two products of 64 rows and the rest need about as many): that cuts P = 128 in two.
- stages: 2 where that fits, so that the next chunk arrives during the products of this one; else 1.
- "fits": within 222 of the 227 KiB that a block can have on a Hopper; scratch of the compiler, barriers and alignment
  came to 4 and a little.
"""

import dataclasses

CHUNK = 128
WIDE_CHUNK = 256
LANES = 128
VMEM_BUDGET = 12 * 2**20

_TOKENS = (1024, 512, 256, 128)
_MAX_HEADS = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one grid cell holds: `heads` heads, `tokens` tokens, walked in chunks of `chunk` tokens."""

    heads: int
    tokens: int
    chunk: int = CHUNK


def whole_lanes(width: int, full: int) -> bool:
    """Say whether a block of `width` of the `full` last axis can be cut out of an array: whole lanes, or all of it."""
    return width == full or width % LANES == 0


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def vmem_bytes(blocks: Blocks, groups: int, head_dim: int, state_dim: int, itemsize: int) -> int:
    """Bytes of VMEM that a cell of the backward pass takes: blocks twice, scratch once, lanes padded to 128.

    `groups` is the number of groups in the cell.
    """
    heads, tokens = blocks.heads, blocks.tokens
    width, group_width = _padded(heads * head_dim), _padded(groups * state_dim)
    state = 4 * state_dim * width
    streamed = tokens * itemsize * (3 * width + 4 * group_width) + 4 * 4 * tokens * max(8, heads)
    return 2 * (streamed + 4 * state) + state * (tokens // blocks.chunk + 1)


def choose_chunk(length: int, itemsize: int, device_kind: str) -> int:
    """Return the tokens of a chunk of the TPU kernels for a row on a kind of device."""
    wide = "v6" in device_kind and itemsize == 2 and length > CHUNK
    return WIDE_CHUNK if wide else CHUNK


def choose(
    length: int, num_heads: int, groups: int, head_dim: int, state_dim: int, itemsize: int, chunk: int = CHUNK
) -> Blocks:
    """Return the block sizes for a call; see the module's docstring for the reasons.

    Raises:
        ValueError: no block of these head and state dimensions fits VMEM.
    """
    ratio = num_heads // groups
    needed = -(-length // chunk) * chunk
    candidates = [
        heads
        for heads in range(1, num_heads + 1)
        if num_heads % heads == 0 and (heads % ratio == 0 or ratio % heads == 0) and heads <= max(_MAX_HEADS, ratio)
    ]

    def copies(heads: int) -> int:
        """How many of x and b need a transposed copy."""
        in_cell = max(1, heads // ratio)
        return (not whole_lanes(heads * head_dim, num_heads * head_dim)) + (
            not whole_lanes(in_cell * state_dim, groups * state_dim)
        )

    for wanted in sorted({copies(heads) for heads in candidates}):
        for tokens in (size for size in _TOKENS if size % chunk == 0):
            fitting = [
                heads
                for heads in candidates
                if heads <= _MAX_HEADS
                and copies(heads) == wanted
                and vmem_bytes(Blocks(heads, tokens, chunk), max(1, heads // ratio), head_dim, state_dim, itemsize)
                <= VMEM_BUDGET
            ]
            if fitting:
                return Blocks(max(fitting), min(tokens, needed), chunk)
    raise ValueError(
        f"pallas_tpu: no block of head_dim = {head_dim}, state_dim = {state_dim} fits {VMEM_BUDGET} bytes of VMEM"
    )


# --- GPU --------------------------------------------------------------------------------------------------------------

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
    """What a thread block holds: `values` columns of x, and `stages` chunks in flight."""

    values: int
    stages: int


def squares_of(pieces: int) -> int:
    """How many [Q, Q] operands the backward kernel keeps in shared memory at once; the others wait in registers."""
    return 3 if pieces == 1 else 1


def smem_bytes_forward(blocks: GpuBlocks, state_dim: int, pieces: int, outputs: bool) -> int:
    """Bytes of shared memory of the forward kernel; `pieces` as in `pallas_gpu_tiles.py`."""
    values, operand = blocks.values, 2 * pieces
    stage = GPU_CHUNK * operand * (values + (2 if outputs else 1) * state_dim) + 3 * 4 * GPU_CHUNK
    scratch = operand * state_dim * (GPU_CHUNK + values) + 4 * (GPU_CHUNK * values + 128)
    if outputs:
        scratch += operand * GPU_CHUNK**2 + (2 if pieces == 1 else 4) * GPU_CHUNK * values
    return blocks.stages * stage + scratch


def smem_bytes_backward(blocks: GpuBlocks, state_dim: int, pieces: int, outputs: bool, part_itemsize: int) -> int:
    """Bytes of shared memory of the backward kernel; `part_itemsize`: of an element of db and dc."""
    values, operand, sides = blocks.values, 2 * pieces, 2 if outputs else 1
    stage = operand * (GPU_CHUNK * sides * (values + state_dim) + state_dim * values) + 3 * 4 * GPU_CHUNK
    gradient = GPU_CHUNK * ((2 if pieces == 1 else 4) * values + part_itemsize * state_dim)
    scratch = (4 + operand) * state_dim * values + gradient + 4 * (5 * GPU_CHUNK + state_dim + 128)
    if outputs:
        scratch += 2 * GPU_CHUNK**2 + operand * GPU_CHUNK * (squares_of(pieces) * GPU_CHUNK + values)
    return blocks.stages * stage + scratch


def choose_gpu(groups_shared: bool, head_dim: int, state_dim: int, pieces: int) -> tuple[GpuBlocks, GpuBlocks]:
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
        used = smem_bytes_forward(blocks, state_dim, pieces, outputs=True)
        return registers <= _STATE_REGISTERS and used <= SMEM_BUDGET

    def fits_backward(blocks: GpuBlocks) -> bool:
        whole = pieces == 1 and not groups_shared and blocks.values == head_dim
        return smem_bytes_backward(blocks, state_dim, pieces, True, 2 if whole else 4) <= SMEM_BUDGET

    forward = next((blocks for blocks in candidates if fits_forward(blocks)), None)
    backward = next((blocks for blocks in candidates if fits_backward(blocks)), None)
    if forward is None or backward is None:
        raise ValueError(
            f"pallas_gpu: no block of head_dim = {head_dim}, state_dim = {state_dim}, {pieces} pieces "
            f"fits {SMEM_BUDGET} bytes of shared memory"
        )
    return forward, backward


def choose_gpu_parts(blocks: int, chunks: int) -> int:
    """Return into how many parts the sequence is cut, `blocks` thread blocks and `chunks` chunks long.

    A block holds most of a multiprocessor's shared memory, so fewer blocks than multiprocessors leave some idle. Parts
    fill them, at a price: x and b are read twice, their gradients come in two sums, and states of parts go through
    memory. For N = P = 96 in bfloat16 that is 1.7 times the bytes forwards and 2.2 times in all, so two parts gain
    nothing: at least 3, each of at least 1024 tokens (its states then cost a tenth of what it reads and writes), and
    no more than fill the chip once.
    """
    parts = min(_MULTIPROCESSORS // blocks, chunks // _PART_CHUNKS)
    if parts < _MIN_PARTS:
        return 1
    return -(-chunks // -(-chunks // parts))  # as few as chunks of equal number need
