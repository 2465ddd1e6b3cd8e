"""Race the parts of a Transformer's train step: `python -m benchmarks.cpu.step_parts` says where the step's time goes.

Each part is a minimal program, forward and backward: XLA's, with the functions that this project's model calls, and
PyTorch's, as transformers' Llama calls them. They take turns in one process. The sizes are those of
`benchmarks.cpu.train_step`: 8 layers, d_model 256, 4 heads, MLP 704, vocabulary 8192, float32. A part's time counts as
often as a step runs it. The sums lack what a whole program fuses or copies between its parts.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.nn import functional

from benchmarks import timing
from benchmarks.cpu.train_step import MODEL, SHAPES, parse_shape
from transmamba_jax import rotary
from transmamba_jax.attention import api as attention
from transmamba_jax.convolution import causal_conv
from transmamba_jax.norm import rms_norm
from transmamba_jax.runtime import host_memory
from transmamba_jax.runtime.token_loss import chunked_cross_entropy, tokens_at_a_time

LAYERS, HEADS, CHANNELS = MODEL.num_layers, MODEL.num_heads, MODEL.d_model
MLP_DIM, VOCABULARY = MODEL.mlp_dim, MODEL.vocab_size


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step: its arguments, all float32, and one function of them for each library.

    Attributes:
        count: how often a step runs it.
        shapes: of the arguments, all of which get a gradient.
        ours: for XLA.
        theirs: for PyTorch; None: Llama has no such part.
        gives_gradients: `ours` returns its gradients too.
    """

    count: int
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Any]
    theirs: Callable[..., Any] | None
    gives_gradients: bool = False


def parts(batch: int, length: int) -> dict[str, Part]:
    """Return the parts of a step by name, in the order of a layer."""
    tokens = batch * length
    wide, hidden, heads = (tokens, CHANNELS), (tokens, MLP_DIM), (batch, length, HEADS, CHANNELS // HEADS)
    positions, targets = np.arange(length), np.random.default_rng(1).integers(0, VOCABULARY, (batch, length))
    half = CHANNELS // HEADS // 2
    angle = torch.from_numpy(positions[:, None] * 1e4 ** (-np.arange(half) / half)).float()
    cos, sin = (torch.cat([turn, turn], -1)[None, :, None] for turn in (angle.cos(), angle.sin()))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def loss(x: jax.Array, weight: jax.Array) -> Any:
        chunk, weights = tokens_at_a_time(None, VOCABULARY), jnp.ones((batch, length), jnp.float32)
        return chunked_cross_entropy(logits, weight, x, jnp.asarray(targets), weights, chunk)

    def logits(weight: jax.Array, x: jax.Array) -> jax.Array:
        return (x.reshape(-1, CHANNELS) @ weight.T).reshape(*x.shape[:-1], VOCABULARY)

    def their_loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((x @ weight.T).reshape(-1, VOCABULARY), torch.from_numpy(targets).reshape(-1))

    def matmul(x: Any, weight: Any) -> Any:
        return x @ weight

    return {
        f"projections {CHANNELS} x {CHANNELS}": Part(4 * LAYERS, (wide, (CHANNELS, CHANNELS)), matmul, matmul),
        f"projections {CHANNELS} x {MLP_DIM}": Part(2 * LAYERS, (wide, (CHANNELS, MLP_DIM)), matmul, matmul),
        f"projections {MLP_DIM} x {CHANNELS}": Part(LAYERS, (hidden, (MLP_DIM, CHANNELS)), matmul, matmul),
        "convolution and SiLU": Part(
            3 * LAYERS,
            ((batch, length, CHANNELS), (4, CHANNELS), (CHANNELS,)),
            lambda x, kernel, bias: jax.nn.silu(causal_conv(x, kernel, bias)),
            None,
        ),
        "rotary embedding": Part(
            2 * LAYERS, (heads,), lambda x: rotary.rotate(x, jnp.arange(length), theta=1e4), rotated
        ),
        "attention": Part(LAYERS, (heads, heads, heads), attention.causal_attention, attended),
        "SwiGLU": Part(
            LAYERS,
            (hidden, hidden),
            lambda gate, up: jax.nn.silu(gate) * up,
            lambda gate, up: functional.silu(gate) * up,
        ),
        "RMSNorm": Part(
            2 * LAYERS + 1,
            (wide, (CHANNELS,)),
            lambda x, weight: rms_norm(x, weight, 1e-6),
            lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        ),
        "head and loss": Part(
            1, ((batch, length, CHANNELS), (VOCABULARY, CHANNELS)), loss, their_loss, gives_gradients=True
        ),
    }


def race(part: Part, seconds: float) -> dict[str, timing.Timing]:
    """Time the forward and backward pass of a part."""
    draw = np.random.default_rng(0)
    values = [draw.standard_normal(shape, np.float32) / 8 for shape in part.shapes]
    arrays = [jnp.asarray(value) for value in values]

    shape = () if part.gives_gradients else jax.eval_shape(part.ours, *arrays).shape
    cotangent = jnp.asarray(draw.standard_normal(shape, np.float32))

    @jax.jit
    def ours(arguments: list[jax.Array], cotangent: jax.Array) -> Any:
        if part.gives_gradients:
            return part.ours(*arguments)
        result, gradient = jax.vjp(part.ours, *arguments)
        return result, gradient(cotangent)

    contenders: dict[str, timing.Contender] = {"XLA": lambda _: jax.block_until_ready(ours(arrays, cotangent))}
    if part.theirs is not None:
        theirs, tensors = part.theirs, [torch.tensor(value, requires_grad=True) for value in values]
        given = torch.tensor(np.asarray(cotangent))

        def run(_: int) -> None:
            for tensor in tensors:
                tensor.grad = None
            theirs(*tensors).backward(given)

        contenders["PyTorch"] = run
    return timing.round_robin(contenders, rounds=1000, warmup=3, seconds=seconds)


def optimizer_step(seconds: float) -> dict[str, timing.Timing]:
    """Time clipping and AdamW over as many parameters as the model has."""
    layer = ((CHANNELS, CHANNELS),) * 4 + ((CHANNELS, MLP_DIM),) * 2 + ((MLP_DIM, CHANNELS),)
    shapes = (*layer * LAYERS, (VOCABULARY, CHANNELS))
    draw = np.random.default_rng(0)
    values = [draw.standard_normal(shape, np.float32) for shape in shapes]
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1))
    gradients = [jnp.asarray(value) for value in values]
    held = jax.tree.map(jnp.copy, [(gradients, transform.init(gradients))])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, gradients: Any) -> Any:
        updates, state = transform.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    theirs = torch.optim.AdamW(tensors, lr=3e-4, weight_decay=0.1, fused=True)
    for tensor, value in zip(tensors, values, strict=True):
        tensor.grad = torch.tensor(value)

    def ours(_: int) -> None:
        held.append(jax.block_until_ready(step(*held.pop(), gradients)))

    def run(_: int) -> None:
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        theirs.step()

    return timing.round_robin({"XLA": ours, "PyTorch": run}, rounds=1000, warmup=3, seconds=seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=list(SHAPES), metavar="BxT", help="such as 4x512"
    )
    parser.add_argument("--seconds", type=float, default=5, help="of timed rounds, a part; default: 5")
    options = parser.parse_args()
    host_memory.keep_freed()
    print(timing.heading("jax", "torch"))
    for batch, length in options.shapes:
        print(f"\n{batch} x {length}: ms of a step that the part takes, fastest of its calls")
        sums = {"XLA": 0.0, "PyTorch": 0.0}
        rows = {name: (part.count, race(part, options.seconds)) for name, part in parts(batch, length).items()}
        rows["clipping and AdamW"] = (1, optimizer_step(options.seconds))
        for name, (count, times) in rows.items():
            spent = {library: 1e3 * count * measured.minimum for library, measured in times.items()}
            sums = {library: total + spent.get(library, 0) for library, total in sums.items()}
            theirs = f"{spent['PyTorch']:9.1f}  {spent['XLA'] / spent['PyTorch']:5.2f}" if "PyTorch" in spent else ""
            print(f"   {name:<24} {spent['XLA']:9.1f} {theirs}", flush=True)
        print(f"   {'sum':<24} {sums['XLA']:9.1f} {sums['PyTorch']:9.1f}  {sums['XLA'] / sums['PyTorch']:5.2f}")


if __name__ == "__main__":
    main()
