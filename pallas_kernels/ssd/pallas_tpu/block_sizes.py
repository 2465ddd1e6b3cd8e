"""Block sizes of the TPU kernels, from shape, dtype and chip: tables of candidates, no search at run time.

A grid cell of the TPU kernels holds `heads` heads of `tokens` tokens and walks them in chunks of `chunk` tokens.

- chunk = 128: a vector register has 128 lanes, which a shorter chunk leaves empty in every Q x Q tile, and the matrix
  unit of v5e and v5p has that edge. With a longer one the 2 Q (N + P) FLOPs per token outgrow the memory traffic. On
  v6e, whose matrix unit has an edge of 256, it is 256 in bfloat16: the compiler emits 10 to 16 % fewer instructions per
  token and head then, and 7 % fewer to 1 % more for the others. The argument chunk_size is not used.
- tokens: the most that fit, at most 1024. The forward pass keeps one float32 state per cell as a residual,
  4 N P / tokens bytes per token and head: at 128 tokens (N = P = 96) that is a third of the traffic of the entire
  forward pass, at 512 a tenth.
- heads: the most that fit beside that, at most 4 (the matmuls of all heads of a chunk are unrolled: more heads are more
  code to compile), and whole registers of 128 lanes (4 heads of P = 96, 2 or 4 of 64), so that a cell is cut out of the
  arrays in their layout in memory, [B, T, H P]. Where no number of heads does that, blocks are cut from a copy.
- "fits": blocks of the backward pass, the larger one, with double buffering, and its scratch stay within 12 MiB. The
  compiler's limit for a kernel is 16 MiB by default (v5e, v5p; 32 MiB on v6e), and it needs some for itself.

The chip is that of the mesh of `jax.set_mesh` or of the default backend; a program lowered for a topology without a
mesh is traced before its chip is known, and gets chunks of 128.
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
    """Contents of one grid cell: `heads` heads, `tokens` tokens, walked in chunks of `chunk` tokens."""

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
        """Return the number of x and b that need a transposed copy."""
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
