"""SSD as Triton kernels, for NVIDIA GPUs before Hopper: one program per chunk, but for the walk of states.

    running sums of l in each chunk -> walk: the state before each chunk -> outputs

The backward pass runs the same walk again, the walk of the gradients from the end, and two kernels per chunk: by head
(x, dt, l, d) and by group (b, c). Where rows are few and long, the walk is split into segments: each from 0, joined by
their decays, then again from the state before each. `forward.py` and `backward.py` have the kernels, `block_sizes.py`
the sizes.

jax-triton and triton are imported when a call is traced, so nothing here needs them before that.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.ssd import kernel_vjp
from pallas_kernels.ssd.protocol import SsdInputs
from pallas_kernels.ssd.triton import block_sizes
from pallas_kernels.varying import align_varying_axes

supports_output_start = False
partitionable = False

_DTYPES = (jnp.float32, jnp.bfloat16)
_MAX_DIM = 256
_OLDEST = 80
"""Compute capability times ten: the first with a matrix unit for bfloat16. Its PTX runs on every later GPU."""

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def _missing() -> list[str]:
    """Return the reasons why the kernels cannot be compiled on this machine."""
    reasons = [
        f"the package {package} is not installed: pip install -e '.[triton]'"
        for module, package in (("jax_triton", "jax-triton"), ("triton", "triton"))
        if importlib.util.find_spec(module) is None
    ]
    if not any(importlib.util.find_spec(plugin) for plugin in _CUDA_PLUGINS):
        reasons.append("JAX has no CUDA plugin here: pip install -e '.[cuda12]'")
    meant = target.mesh_device()
    if meant is not None and meant.platform == "tpu":
        reasons.append(f"it needs an NVIDIA GPU, found {meant.device_kind} in the mesh of jax.set_mesh")
    elif jax.default_backend() == "gpu":
        device = jax.devices()[0]
        if "cuda" not in device.client.platform_version or _capability() < _OLDEST:
            reasons.append(f"it needs an NVIDIA GPU of compute capability 8.0 or later, found {device.device_kind}")
    return reasons


def _capability() -> int:
    """Compute capability times ten to compile for; without a GPU the oldest."""
    if jax.default_backend() != "gpu":
        return _OLDEST
    return int(jax.devices()[0].compute_capability.replace(".", ""))


def unsupported_reason(x: jax.Array, b: jax.Array) -> str | None:
    """Return why the kernels do not support these shapes and dtypes on this machine; None: they do."""
    reasons = []
    if x.dtype not in _DTYPES:
        reasons.append(f"x must be float32 or bfloat16, found {x.dtype.name}: states may leave the range of float16")
    for name, size in (("the head dim P of x", x.shape[3]), ("the state dim N of b", b.shape[3])):
        if size > _MAX_DIM:
            reasons.append(f"{name} must be at most {_MAX_DIM}, found {size}")
    return "; ".join(reasons + _missing()) or None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Shapes of a call and its block sizes."""

    batch: int
    length: int
    num_heads: int
    groups: int
    head_dim: int
    state_dim: int
    blocks: block_sizes.Blocks

    @classmethod
    def make(cls, x: jax.Array, b: jax.Array) -> "_Plan":
        """Plan a call of these shapes. Raises ValueError where the kernels do not support it."""
        reason = unsupported_reason(x, b)
        if reason is not None:
            raise ValueError(f"implementation 'triton' cannot serve this call: {reason}")
        shape = (*x.shape, *b.shape[2:])
        blocks = block_sizes.choose(*shape, itemsize=x.dtype.itemsize)
        batch, length, num_heads, head_dim, groups, state_dim = shape
        return cls(batch, length, num_heads, groups, head_dim, state_dim, blocks)

    @property
    def total(self) -> int:
        """Chunks of a row, the padding of the last segment included."""
        return self.blocks.segments * self.blocks.chunks

    @property
    def constants(self) -> dict[str, Any]:
        """Shapes that every kernel takes."""
        dims = {"LENGTH": self.length, "HEADS": self.num_heads, "GROUPS": self.groups}
        return dims | {"P": self.head_dim, "N": self.state_dim, "Q": self.blocks.chunk}

    def rows(self, value: jax.Array) -> jax.Array:
        """[B, T, H] -> [B, H, whole segments], zeros beyond the end: dt = 0 and l = 0 leave the state as it is."""
        tail = self.total * self.blocks.chunk - self.length
        return jnp.pad(value, ((0, 0), (0, tail), (0, 0))).transpose(0, 2, 1)

    def tokens(self, rows: jax.Array) -> jax.Array:
        """Undo `rows`."""
        return rows[:, :, : self.length].transpose(0, 2, 1)

    def states(self, count: int) -> tuple[int, ...]:
        """Shape of `count` states of a row."""
        return self.batch, self.num_heads, count, self.state_dim, self.head_dim

    def state_tiles(self, tile: int) -> int:
        """Tiles of a state."""
        return -(-self.state_dim // tile) * -(-self.head_dim // tile)


def _launch(
    kernel: str, operands: Sequence[jax.Array], results: Any, grid: tuple[int, ...], stages: int, constants: dict
) -> Any:
    """Call a Triton kernel by its name with arrays, then results, then constants by name."""
    import jax_triton

    from pallas_kernels.ssd.triton import backward, forward

    module = backward if kernel.endswith("_gradients") else forward
    operands = [target.assert_platform(operands[0], "triton", "cuda"), *operands[1:]]
    return jax_triton.triton_call(
        *operands,
        kernel=getattr(module, kernel),
        out_shape=results,
        grid=grid,
        name=f"ssd_{kernel}",
        num_warps=block_sizes.WARPS,
        num_stages=stages,
        compute_capability=_capability(),
        **constants,
    )


def _call(
    kernel: str,
    operands: Sequence[jax.Array],
    results: dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]],
    grid: tuple[int, ...],
    stages: int = 2,
    **constants: Any,
) -> dict[str, jax.Array]:
    """Launch a kernel; `results` are shapes and dtypes by name. Inside `jax.shard_map` they vary as the operands do."""
    operands = align_varying_axes(*operands)
    shapes = [jax.ShapeDtypeStruct(*result) for result in results.values()]
    found = align_varying_axes(*operands, *_launch(kernel, operands, shapes, grid, stages, constants))
    return dict(zip(results, found[len(operands) :], strict=True))


def _precision(dtype: jnp.dtype) -> str:
    """Return the precision of matmuls: float32 as three of TF32 parts, the error of a 21-bit mantissa or less."""
    return "tf32x3" if dtype == jnp.float32 else "ieee"


# A pointer that a kernel does not touch still has to be one: `_UNUSED` shapes a result, any operand stands for another.
_UNUSED = ((1,), jnp.float32)


def _sums(plan: _Plan, log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum l [B, H, tokens] inside its chunks, in two parts."""
    part = (log_decay.shape, jnp.float32)
    grid = (plan.batch * plan.num_heads * plan.total,)
    sums = _call("running_sums", [log_decay], {"coarse": part, "fine": part}, grid, Q=plan.blocks.chunk)
    return sums["coarse"], sums["fine"]


def _walk(
    plan: _Plan,
    value: jax.Array,
    key: jax.Array,
    rows: tuple[jax.Array, ...],
    first: jax.Array,
    *,
    reverse: bool = False,
    add: bool = True,
    from_first: bool = True,
    save: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Return the states of all chunks (nothing without `save`) and those at the ends of the segments."""
    blocks = plan.blocks
    results = {
        "states": (plan.states(plan.total), value.dtype) if save else _UNUSED,
        "ends": (plan.states(blocks.segments), jnp.float32),
    }
    found = _call(
        "walk",
        [value, key, *rows, first],
        results,
        (blocks.segments * plan.state_tiles(blocks.tile), plan.num_heads, plan.batch),
        stages=3,
        **plan.constants,
        SEGMENTS=blocks.segments,
        CHUNKS=blocks.chunks,
        TILE_P=blocks.tile,
        TILE_N=blocks.tile,
        REVERSE=reverse,
        ADD=add,
        FROM_FIRST=from_first,
        SAVE=save,
        PRECISION=_precision(value.dtype),
    )
    return found["states"], found["ends"]


def _states(
    plan: _Plan,
    value: jax.Array,
    key: jax.Array,
    rows: tuple[jax.Array, ...],
    first: jax.Array,
    *,
    reverse: bool = False,
    add: bool = True,
    save: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the states of all chunks (nothing without `save`), before the segments [B, H, segments, N, P] and last.

    `first` and the last are [B, H, N, P]; reversed, they are the gradients after the row and before it.
    """
    segments = plan.blocks.segments
    walk = functools.partial(_walk, plan, value, key, rows, reverse=reverse, add=add)
    if segments == 1:
        states, ends = walk(first[:, :, None], save=save)
        return states, first[:, :, None], ends[:, :, 0]
    states, ends = walk(first, from_first=False, save=False)
    _, coarse, fine = rows
    by_chunk = (coarse + fine).reshape(plan.batch, plan.num_heads, segments, plan.blocks.chunks, plan.blocks.chunk)
    whole = jnp.exp(jnp.sum(by_chunk[..., -1], axis=-1))
    size = plan.state_dim * plan.head_dim
    joined = _call(
        "pass_states",
        [ends, whole, first],
        {"before": (plan.states(segments), jnp.float32), "last": (first.shape, jnp.float32)},
        (plan.batch * plan.num_heads, -(-size // block_sizes.PASS_TILE)),
        SIZE=size,
        SEGMENTS=segments,
        TILE=block_sizes.PASS_TILE,
        REVERSE=reverse,
    )
    if save:
        states, _ = walk(joined["before"])
    return states, joined["before"], joined["last"]


def _outputs(plan, x, rows, b, c, d, states):
    tile = plan.blocks.tile
    return _call(
        "outputs",
        [x, *rows, b, c, d, states],
        {"y": (x.shape, x.dtype)},
        (plan.total * -(-plan.head_dim // tile), plan.num_heads, plan.batch),
        **plan.constants,
        TOTAL=plan.total,
        TILE_P=tile,
        TILE_N=tile,
        PRECISION=_precision(x.dtype),
    )["y"]


def _row_gradients(plan, x, rows, b, c, d, dy, states, dstates) -> dict[str, jax.Array]:
    """Gradients of x, dt and l as rows, b, and of c and d where there is a `c`."""
    outputs, blocks = c is not None, plan.blocks
    c, d, dy = (c, d, dy) if outputs else (b, rows[0], x)
    constants = plan.constants | {"TOTAL": plan.total, "PRECISION": _precision(x.dtype), "OUTPUTS": outputs}
    constants |= {"TILE_P": blocks.gradient_tile, "TILE_N": blocks.gradient_tile}
    row = (rows[0].shape, jnp.float32)
    parts = plan.num_heads // blocks.part
    whole = parts == plan.groups
    of_group = ((plan.batch, plan.length, parts, plan.state_dim), x.dtype if whole else jnp.float32)
    by_head = _call(
        "head_gradients",
        [x, *rows, b, c, d, dy, states, dstates],
        {
            "x": (x.shape, x.dtype),
            "dt": row,
            "log_decay": row,
            "d": (plan.states(plan.total)[:3], jnp.float32) if outputs else _UNUSED,
        },
        (plan.total, plan.num_heads, plan.batch),
        **constants,
    )
    by_group = _call(
        "group_gradients",
        [x, *rows, b, c, dy, states, dstates],
        {"b": of_group, "c": of_group if outputs else _UNUSED, "log_decay": row if outputs else _UNUSED},
        (plan.total, parts, plan.batch),
        **constants,
        PART=blocks.part,
    )

    def group(gradient: jax.Array) -> jax.Array:
        if whole:
            return gradient
        by_part = gradient.reshape(plan.batch, plan.length, plan.groups, -1, plan.state_dim)
        return jnp.sum(by_part, axis=3).astype(x.dtype)

    found = {"x": by_head["x"], "dt": by_head["dt"], "log_decay": by_head["log_decay"], "b": group(by_group["b"])}
    if outputs:
        found["log_decay"] += by_group["log_decay"]
        found |= {"c": group(by_group["c"]), "d": jnp.sum(by_head["d"], axis=(0, 2))}
    return found


def _rows(plan, dt, log_decay) -> tuple[jax.Array, ...]:
    return (plan.rows(dt), *_sums(plan, plan.rows(log_decay)))


def _run(plan: _Plan, inputs: SsdInputs, save: bool) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Run the forward pass; see `kernel_vjp`. Its residuals, the states before the segments, are small."""
    del save
    x, dt, log_decay, b, c, d, h = inputs
    rows = _rows(plan, dt, log_decay)
    states, before, last = _states(plan, x, b, rows, h.swapaxes(2, 3), save=c is not None)
    y = None if c is None else _outputs(plan, x, rows, b, c, d, states)
    return y, last.swapaxes(2, 3), before


def _gradients(plan: _Plan, inputs: SsdInputs, before: jax.Array, dy: jax.Array | None, dlast: jax.Array) -> SsdInputs:
    """Run the backward pass; see `kernel_vjp`."""
    x, dt, log_decay, b, c, d, _ = inputs
    rows = _rows(plan, dt, log_decay)
    states, _ = _walk(plan, x, b, rows, before)
    value, key = (x, b) if dy is None else (dy, c)
    dstates, _, dfirst = _states(plan, value, key, rows, dlast.swapaxes(2, 3), reverse=True, add=dy is not None)
    found = _row_gradients(plan, x, rows, b, c, d, dy, states, dstates)
    tokens = {name: plan.tokens(found[name]) for name in ("dt", "log_decay")}
    return SsdInputs(**found | tokens | {"initial_state": dfirst.swapaxes(2, 3)})


forward, final_state = kernel_vjp.operators(_Plan.make, _run, _gradients)
