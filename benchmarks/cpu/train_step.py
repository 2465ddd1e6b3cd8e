"""Race the whole train step: `python -m benchmarks.cpu.train_step` prints tables in about ten minutes.

Loss, gradients, clipping and AdamW with every metric on, float32, 8 layers, d_model 256, vocabulary 8192, on random
tokens. Contenders take turns in one process, so that noise of the machine affects all alike. Where transformers is
installed, its Llama (SDPA attention, the same width, depth, heads and MLP) and its Mamba-2 (16 layers instead of 8 with
an MLP, about as many parameters) train with PyTorch's fused AdamW; the loss is the same mean cross-entropy.

`share` is the share of the processor's matmul rate: FLOPs of the step, counted as `training/metrics.py` does, over the
time that they take at the rate of a 2048 x 256 x 704 matmul in this process. `--memory NAME` runs one contender for
three steps and prints the peak of the process, so that each is measured alone. `--unrolled 1 8` races this project's
steps by `kernels.unrolled_layers`; without it they have what a run would have.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import transmamba_jax as tm
from benchmarks import timing
from transmamba_jax import schedule
from transmamba_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from transmamba_jax.runtime import host_memory
from transmamba_jax.training import kernels
from transmamba_jax.training.metrics import flops_per_token

SHAPES = ((4, 512), (1, 2048), (1, 8192))
# 8 layers, d_model 256, 4 heads, MLP 704. As in the configs for a CPU, and in the peers, nothing is rematerialised.
MODEL = ModelConfig(vocab_size=8192, transpoints=(0,), dtype="float32", remat="none")
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, warmup_steps=1, weight_decay=0.1)
OURS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "Transformer": lambda length: (length,),
    "Mamba-2": lambda _: (0,),
    "V9": schedule.v9,
}
PEERS = {"transformers Llama": "llama", "transformers Mamba-2": "mamba2"}
RATIOS = (("Mamba-2", "transformers Mamba-2"), ("Transformer", "transformers Llama"), ("V9", "transformers Llama"))


def our_config(name: str, batch: int, length: int) -> Config:
    """Return the config of a contender of this project: defaults but for the vocabulary, dtype, remat and optimizer."""
    return Config(
        model=dataclasses.replace(MODEL, transpoints=OURS[name](length)),
        data=DataConfig(seq_len=length, batch_size=batch),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=10_000),
    )


def our_step(name: str, batch: int, length: int, unrolled: int | None = None) -> timing.Contender:
    """Return one train step of this project, with the state that it replaces."""
    config = our_config(name, batch, length)
    chosen = dataclasses.replace(config.kernels, unrolled_layers=unrolled)
    model = tm.TransMamba(config.model, kernels.for_training(config.model, chosen))
    state = tm.TrainState.create(config, model)
    step = tm.make_train_step(config, model, tm.make_optimizer(config))
    draw = np.random.default_rng(0)
    batches = [_tokens(draw, batch, length) for _ in range(2)]
    held = [state]

    def run(index: int) -> None:
        tokens = batches[index % 2]
        state, metrics = step(held.pop(), {"tokens": tokens, "bytes": jnp.ones_like(tokens)})
        held.append(jax.block_until_ready(state))
        if not np.isfinite(metrics["loss"]):
            raise RuntimeError(f"{name}: the loss is {metrics['loss']}")

    return run


def _tokens(draw: np.random.Generator, batch: int, length: int) -> jax.Array:
    return jnp.asarray(draw.integers(0, MODEL.vocab_size, (batch, length + 1)), jnp.int32)


def peer_step(kind: str, batch: int, length: int) -> timing.Contender:
    """Return one train step of a model of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": MODEL.vocab_size, "hidden_size": MODEL.d_model, "tie_word_embeddings": True}
    if kind == "llama":
        heads = {"num_attention_heads": MODEL.num_heads, "num_key_value_heads": MODEL.num_heads}
        model = LlamaForCausalLM(
            LlamaConfig(
                **sizes,
                **heads,
                intermediate_size=MODEL.mlp_dim,
                num_hidden_layers=MODEL.num_layers,
                max_position_embeddings=max(length for _, length in SHAPES),
                attn_implementation="sdpa",
            )
        )
    else:
        heads = {"num_heads": 2 * MODEL.d_model // 64, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, num_hidden_layers=2 * MODEL.num_layers, chunk_size=64))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    draw = np.random.default_rng(0)
    rows = [torch.from_numpy(draw.integers(0, MODEL.vocab_size, (batch, length + 1))) for _ in range(2)]

    def run(index: int) -> None:
        tokens = rows[index % 2]
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, MODEL.vocab_size), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def make(name: str, batch: int, length: int) -> timing.Contender:
    """Return the step of a contender by its name, of one of ours followed by its layers per iteration where given."""
    if name in PEERS:
        return peer_step(PEERS[name], batch, length)
    ours, _, unrolled = name.partition(" / ")
    return our_step(ours, batch, length, int(unrolled) if unrolled else None)


def matmul_rate() -> float:
    """Return the FLOP/s of a 2048 x 256 x 704 matmul, the MLP's at 2048 tokens."""
    a, b = (jnp.ones(shape, jnp.float32) for shape in ((2048, 256), (256, 704)))
    product = jax.jit(jnp.matmul)
    times = timing.round_robin({"matmul": lambda _: jax.block_until_ready(product(a, b))}, rounds=200, warmup=5)
    return 2 * 2048 * 256 * 704 / times["matmul"].minimum


def race(names: list[str], batch: int, length: int, seconds: float) -> dict[str, timing.Timing]:
    """Time a shape and print a line per contender."""
    rate = matmul_rate()
    contenders = {name: make(name, batch, length) for name in names}
    times = timing.round_robin(contenders, rounds=1000, warmup=2, seconds=seconds)
    print(
        f"{batch} x {length}: {len(times[names[0]].seconds)} rounds, matmul rate {rate / 1e9:.0f} GFLOP/s", flush=True
    )
    for name, measured in times.items():
        share = ""
        if name not in PEERS:
            config = our_config(name.partition(" / ")[0], batch, length)
            chunk = 64 if config.kernels.chunk_size is None else config.kernels.chunk_size
            flops = batch * length * flops_per_token(config.model, length, chunk)
            share = f"  {flops / 1e9:7.1f} GFLOP  share {flops / rate / measured.minimum:.2f}"
        print(f"   {name:<22} {1e3 * measured.minimum:9.1f} ms  median {1e3 * measured.median:9.1f}{share}", flush=True)
    return times


def memory(name: str, batch: int, length: int) -> float:
    """Return the peak of a process that runs three steps of a contender alone, in MB."""
    command = [sys.executable, "-m", "benchmarks.cpu.train_step", "--memory", name, "--shapes", f"{batch}x{length}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def parse_shape(text: str) -> tuple[int, int]:
    """Return rows and tokens of a shape such as 4x512."""
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = list(PEERS) if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch") else []
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=list(SHAPES), metavar="BxT", help="such as 4x512"
    )
    parser.add_argument("--only", nargs="+", choices=[*OURS, *peers], default=[*OURS, *peers], help="contenders")
    parser.add_argument(
        "--unrolled", nargs="+", type=int, default=[], help="layers per iteration of the loop over layers"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of timed rounds, a shape; default: 60")
    parser.add_argument("--memory", choices=[*OURS, *peers], help="print the peak memory of three steps of this one")
    parser.add_argument("--no-memory", action="store_true", help="leave the table of memory out")
    options = parser.parse_args()
    host_memory.keep_freed()  # as train.py does; PyTorch gains too
    if options.memory:
        step = make(options.memory, *options.shapes[0])
        for index in range(3):
            step(index)
        print(f"peak MB {host_memory.peak_bytes() / 2**20:.0f}")
        return
    print(timing.heading("jax", *(["torch", "transformers"] if peers else [])), "\n")
    names = [
        f"{name} / {count}" if count else name
        for name in options.only
        for count in (options.unrolled if name in OURS and options.unrolled else [0])
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for batch, length in options.shapes:
        times = race(names, batch, length, options.seconds)
        pairs = [(ours, peer) for ours, peer in (*RATIOS, ("V9", "Transformer")) if {ours, peer} <= set(times)]
        for name in options.only if options.unrolled else []:
            first, *others = (f"{name} / {count}" for count in options.unrolled)
            pairs += [(other, first) for other in others if other in times]
        for ours, peer in pairs:
            ratios.setdefault((ours, peer), []).append(times[ours].ratio(times[peer]))
            print(f"   {ours} / {peer}: {ratios[ours, peer][-1]:.2f}")
    print("\ngeometric means")
    for (ours, peer), values in ratios.items():
        print(f"   {ours} / {peer}: {statistics.geometric_mean(values):.2f}")
    if not options.no_memory:
        print("\npeak MB of a process of its own, three steps, imports included")
        for batch, length in options.shapes:
            print(f"   {batch} x {length}: " + ", ".join(f"{n} {memory(n, batch, length):.0f}" for n in options.only))


if __name__ == "__main__":
    main()
