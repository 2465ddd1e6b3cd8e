"""Measure the cost of the split at the TransPoint: mixers, their parts and compilation, in one process.

    python -m benchmarks.cpu.layer [--seq-len 8192] [--rounds 7] [--only cost|compilation|unrolled]

Prints ratios, forward and forward + backward, float32, batch 1:
  1. the mixer at P = 0 (P = T) over a mixer that has only the SSM (attention) branch;
  2. the mixer at P = T/2 over the sum of its parts, each timed alone: projections of T tokens, attention over P,
     converter over P, SSM over T - P, output projection of T;
  3. the mixer averaged over the TransPoints of schedule V9 over the mixer at P = T;
  4. compilation of the gradient of a 16-layer model over that of an 8-layer one, in seconds of CPU time (other work on
     the machine does not count): under four TransPoints, and under V9, of which 8 layers are one period and need no
     loop over periods; what is kept for the backward pass passes through that loop, so for every choice of remat;
  5. forward + backward of complete models, and compilation in seconds of CPU time, by `kernels.unrolled_layers`: the
     studies' model (4 layers of width 64, 32 rows of 64 tokens) and one of 8 layers of width 256, 4 rows of 512.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import transmamba_jax as tm
from benchmarks import timing
from transmamba_jax import schedule
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.mixer import Mixer, over_tokens
from transmamba_jax.runtime import host_memory

CONFIG = ModelConfig(transpoints=(0,), dtype="float32")  # d_model 256, H 4, head dim and state 64, chunk 64

Function = Callable[..., jax.Array]


def attention_only(mixer: Mixer, x: jax.Array) -> jax.Array:
    """A plain attention mixer: no TransPoint, no Δ, no gate."""
    return over_tokens(mixer.out, mixer._attend(*mixer._project(x, None), None))


def ssm_only(mixer: Mixer, x: jax.Array) -> jax.Array:
    """A plain Mamba-2 mixer: no TransPoint."""
    q, k, v = mixer._project(x, None)
    return over_tokens(mixer.out, mixer._gate(x, mixer._scan(q, k, v, mixer._compute_dt(x), None, None)[0]))


def contender(function: Function, backward: bool, *arguments: Any) -> timing.Contender:
    """Compile `function`, or the gradient of its sum with respect to every argument, and call it on `arguments`."""
    run = function
    if backward:
        scalar = lambda *arguments: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(*arguments)))
        run = jax.grad(scalar, argnums=tuple(range(len(arguments))))
    compiled = jax.jit(run).lower(*arguments).compile()
    return lambda _round: jax.block_until_ready(compiled(*arguments))


def parts(params: Any, x: jax.Array, point: int) -> dict[str, tuple[Any, ...]]:
    """Return the parts of a mixer at TransPoint `point`: name -> function and its arguments."""
    apply = lambda method: lambda params, *arrays: Mixer(CONFIG).apply({"params": params}, *arrays, method=method)
    q, k, v = apply(lambda m, x: m._project(x, None))(params, x)
    dt = apply(lambda m, x: m._compute_dt(x))(params, x)
    state = tm.memory_converter(k[:, :point], v[:, :point], dt[:, :point], -jnp.exp(params["a_log"]))
    inner = jnp.ones((*x.shape[:2], CONFIG.d_inner))
    convert = lambda params, k, v, dt: tm.memory_converter(
        k, v, dt, -jnp.exp(params["a_log"]), chunk_size=KernelsConfig().chunk_size
    )
    return {
        "projections": (apply(lambda m, x: (m._project(x, None), m._compute_dt(x))), params, x),
        "attention": (
            apply(lambda m, q, k, v: m._attend(q, k, v, None)),
            params,
            q[:, :point],
            k[:, :point],
            v[:, :point],
        ),
        "converter": (convert, params, k[:, :point], v[:, :point], dt[:, :point]),
        "ssm": (
            apply(lambda m, x, *arrays: m._gate(x, m._scan(*arrays, None)[0])),
            *(params, x[:, point:], q[:, point:], k[:, point:], v[:, point:], dt[:, point:], state),
        ),
        "output": (apply(lambda m, y: over_tokens(m.out, y)), params, inner),
    }


def compile_seconds(num_layers: int, seq_len: int, points: schedule.Schedule, remat: Any = "none") -> float:
    """CPU time to trace, lower and compile the gradient of a model."""
    model = tm.TransMamba(ModelConfig(num_layers=num_layers, transpoints=points, dtype="float32", remat=remat))
    tokens = jnp.zeros((1, seq_len), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    start = time.process_time()
    jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, tokens)))).lower(params).compile()
    return time.process_time() - start


def cost(length: int, rounds: int) -> None:
    """Print what a mixer costs at every TransPoint, beside its branches and its parts."""
    print(f"float32, batch 1, T {length}, d_model {CONFIG.d_model}, H {CONFIG.num_heads}, head dim and state 64\n")
    x = jax.random.normal(jax.random.key(0), (1, length, CONFIG.d_model))
    params = jax.jit(lambda: Mixer(CONFIG).init(jax.random.key(1), x[:, :1], 0))()["params"]
    at = lambda point: lambda params, x: Mixer(CONFIG).apply({"params": params}, x, point)
    only = lambda method: lambda params, x: Mixer(CONFIG).apply({"params": params}, x, method=method)
    v9 = schedule.v9(length)
    for backward in (False, True):
        print("forward + backward" if backward else "forward")
        contenders = {f"P={point}": contender(at(point), backward, params, x) for point in v9}
        contenders["ssm only"] = contender(only(ssm_only), backward, params, x)
        contenders["attention only"] = contender(only(attention_only), backward, params, x)
        pieces = {name: contender(call[0], backward, *call[1:]) for name, call in parts(params, x, length // 2).items()}
        times = timing.round_robin({**contenders, **pieces}, rounds=rounds)
        whole = times[f"P={length}"].minimum
        total = sum(times[name].minimum for name in pieces)
        print(f"  P = 0 / SSM only          {times['P=0'].ratio(times['ssm only']):.3f}")
        print(f"  P = T / attention only    {times[f'P={length}'].ratio(times['attention only']):.3f}")
        print(f"  P = T/2 / sum of parts    {times[f'P={length // 2}'].minimum / total:.3f}")
        print("    parts, ms:", ", ".join(f"{name} {1e3 * times[name].minimum:.1f}" for name in pieces))
        mean = sum(times[f"P={point}"].minimum for point in v9) / len(v9)
        print(f"  mean over V9 / P = T      {mean / whole:.3f}")
        print("    ms:", ", ".join(f"{name} {1e3 * times[name].minimum:.0f}" for name in contenders))


def unrolled(rounds: int) -> None:
    """Print what several layers in one turn of the loop over layers save and cost."""
    narrow = ModelConfig(
        vocab_size=64,
        num_layers=4,
        d_model=64,
        num_heads=2,
        num_groups=1,
        head_dim=32,
        state_dim=8,
        mlp_dim=0,
        dtype="float32",
        remat="none",
        transpoints=(0,),
    )
    wide = ModelConfig(vocab_size=256, num_layers=8, dtype="float32", remat="dots", transpoints=(0,))
    for config, rows, length, chunk in ((narrow, 32, 64, 32), (wide, 4, 512, 64)):
        tokens = jnp.zeros((rows, length), jnp.int32)
        params = jax.jit(tm.TransMamba(config).init)(jax.random.key(0), tokens[:1, :1])["params"]
        for name, points in (("Mamba-2", (0,)), ("Transformer", (length,))):
            contenders, seconds = {}, {}
            for count in (1, 2, 4, 8)[: config.num_layers.bit_length()]:
                kernels = KernelsConfig(chunk_size=chunk, unrolled_layers=count)
                model = tm.TransMamba(dataclasses.replace(config, transpoints=points), kernels)
                run = lambda params, model=model, tokens=tokens: model.apply(
                    {"params": params}, tokens, method="hidden"
                )
                start = time.process_time()
                contenders[str(count)] = contender(run, True, params)
                seconds[str(count)] = time.process_time() - start
            times = timing.round_robin(contenders, rounds=rounds)
            found = (
                f"{count}: {1e3 * times[count].minimum:.1f} ms, {times[count].ratio(times['1']):.2f}, "
                f"compilation {seconds[count]:.1f} s"
                for count in contenders
            )
            print(f"{config.num_layers} layers of width {config.d_model}, {name}: {'; '.join(found)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("cost", "compilation", "unrolled"))
    options = parser.parse_args()
    host_memory.keep_freed()  # as train.py does
    print(timing.heading("jax", "flax"))
    if options.only in (None, "cost"):
        cost(options.seq_len, options.rounds)
    if options.only in (None, "unrolled"):
        unrolled(options.rounds)
    if options.only in (None, "compilation"):
        compile_seconds(1, 16, (16,))  # what a process does once
        length = 256
        four, v9 = schedule.log_spaced(length, period=4), schedule.v9(length)
        for name, points, remat in (("four", four, "none"), *(("V9", v9, remat) for remat in ("none", "dots", "full"))):
            shallow, deep = (compile_seconds(num_layers, length, points, remat) for num_layers in (8, 16))
            ratio = f"{deep / shallow:.2f} ({deep:.1f} / {shallow:.1f} s of CPU time)"
            print(f"compilation, 16 layers / 8 layers, {name}, remat {remat}: {ratio}", flush=True)


if __name__ == "__main__":
    main()
