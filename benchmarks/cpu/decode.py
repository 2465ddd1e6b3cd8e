"""Race decoding: `python -m benchmarks.cpu.decode` prints tables in about seven minutes.

One row, float32, greedy, a byte vocabulary. Contenders keep their states and decode a few tokens in turns, always from
the same length, so that noise of the machine affects all alike. The fastest turn counts. `--only` selects parts:

  flat     Time per token after the last TransPoint, after a prefill of 1k, 4k, 16k and 64k tokens.
  cache    Bytes of all arrays but the parameters along a sequence of 16k tokens under V9, over those of the
           Transformer's cache.
  prompt   Memory of the process while prompts of 8k, 16k and 64k tokens are read in prefill chunks of 2k, under V9.
  speed    Tokens per second at 1k, 8k and 32k: V9, the Transformer and Mamba-2 of this code and, where transformers is
           installed, its Llama of the same width, depth and MLP, and its Mamba-2 of about as many parameters. Speed
           does not depend on the values of the caches, so they are random.
  choices  An eager against a lazy SSM state; seconds to compile one stage of 16 layers.
"""

import argparse
import dataclasses
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import transmamba_jax as tm
from benchmarks import timing
from transmamba_jax import cache as memory
from transmamba_jax import schedule
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate.decode import BLOCK_STEPS, Decoder, DecodeState
from transmamba_jax.runtime import host_memory

CONFIG = ModelConfig(transpoints=(0,), dtype="float32")  # 8 layers, d_model 256, H 4, head dim and state 64, MLP 704
NEVER = 10**9
FLAT_STEPS = 8  # tokens of a turn of `flat`: short, so that some turns meet no noise
PEER_STEPS = 4  # of a turn of transformers' models, which take tokens one by one
Part = Callable[[Any, float, tuple[int, ...]], None]


def random_params(config: ModelConfig) -> Any:
    """Return random parameters; their values do not matter for speed."""
    shapes = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.02 * draw.normal(size=leaf.shape), leaf.dtype), shapes)


def after(decoder: Decoder, length: int) -> DecodeState:
    """Return a state after `length` tokens, with a random cache and capacity for a turn."""
    draw = np.random.default_rng(0)
    fill = lambda leaf: jnp.array(draw.random(leaf.shape, np.float32), leaf.dtype)
    sizes = [length + BLOCK_STEPS if length < point else 0 for point in decoder.transpoints]
    layers = tuple(jax.tree.map(fill, memory.init_layer(decoder.config, 1, size, lazy=True)) for size in sizes)
    state = decoder.start(1)
    cache = dataclasses.replace(state.cache, layers=layers, lengths=jnp.array([length], jnp.int32))
    return dataclasses.replace(state, cache=cache)


def turns(decoder: Decoder, state: DecodeState, steps: int) -> timing.Contender:
    """Decode a turn of `steps` tokens, always from the length of `state`."""
    length, held = state.cache.lengths, [state]
    total = int(length[0]) + BLOCK_STEPS

    def turn(_round: int) -> None:
        state = held.pop()
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=jnp.array(length)))
        held.append(decoder.decode(state, steps, donate=True, total=total)[1])

    return turn


def with_cpu_time(call: timing.Contender) -> tuple[timing.Contender, list[float]]:
    """Note the CPU seconds of each call, which other processes do not lengthen by taking turns on the core."""
    spent: list[float] = []

    def noted(index: int) -> None:
        start = time.process_time()
        call(index)
        spent.append(time.process_time() - start)

    return noted, spent


def flatness(params: Any, seconds: float, _contexts: tuple[int, ...]) -> None:
    """Print the time per token after the last TransPoint."""
    decoder = Decoder(tm.TransMamba(CONFIG), params, schedule.log_spaced(1024))
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 65536).tolist()
    state, read = decoder.start(1), 0
    contenders, spent = {}, {}
    for length in (1024, 4096, 16384, 65536):
        state, read = decoder.extend(state, [text[read:length]]), length
        name = f"{length // 1024}k"
        contenders[name], spent[name] = with_cpu_time(turns(decoder, state, FLAT_STEPS))
    times = timing.round_robin(contenders, rounds=10_000, warmup=3, seconds=seconds)
    base = times["1k"]
    print(f"flat: after the last TransPoint (1024), {len(base.seconds)} rounds")
    print("   tokens   ms a token   CPU ms   over 1k: median of rounds, minima, CPU median, CPU minima")
    middle = lambda name: statistics.median(spent[name])
    for name, measured in times.items():
        each = f"{1e3 * measured.minimum / FLAT_STEPS:12.3f} {1e3 * min(spent[name]) / FLAT_STEPS:8.3f}"
        wall = f"{measured.paired_ratio(base):9.3f} {measured.ratio(base):8.3f}"
        print(
            f"   {name:>6} {each} {wall} {middle(name) / middle('1k'):8.3f} {min(spent[name]) / min(spent['1k']):8.3f}"
        )


def bytes_along(params: Any, _seconds: float, _contexts: tuple[int, ...]) -> None:
    """Print the bytes that are held just before and after every TransPoint of V9, over the Transformer's at 8k."""
    layers, end = CONFIG.num_layers, 16384
    whole = layers * memory.cache_bytes(CONFIG, 1, 8192, NEVER)
    pairs = layers * 8192 * (CONFIG.d_key + CONFIG.d_inner) * 4
    decoder = Decoder(tm.TransMamba(CONFIG), params, schedule.v9(8192))
    live = lambda: sum(array.nbytes for array in jax.live_arrays())
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, end).tolist()
    others, state, read = live(), decoder.start(1), 0
    print(f"cache: V9, bytes; the Transformer of 8192 tokens has {whole:,}, keys and values alone {pairs:,}")
    for length in (127, 255, 511, 1023, 2047, 4095, 8191, 8192, 12000, end):
        state = decoder.extend(state, [text[read : length - 1]], donate=True, total=end) if length > read + 1 else state
        read, (_, state) = length, decoder.decode(state, 1, donate=True, total=end)
        own = sum(memory.nbytes((layer.keys, layer.values)) for layer in state.cache.layers)
        held = live() - others
        pair = f"keys and values {own:>12,} ({own / pairs:6.2%})"
        print(f"   {length:>6} tokens {held:>12,} ({held / whole:6.2%}), {pair}", flush=True)


def prompt_memory(params: Any, _seconds: float, _contexts: tuple[int, ...]) -> None:
    """Print the peak of the process's memory after each prompt; a longer one must not lift it."""
    decoder = Decoder(tm.TransMamba(CONFIG), params, schedule.v9(8192))
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 65536).tolist()
    print("prompt: peak resident MB of the process so far, bytes of the state after it")
    for length in (8192, 16384, 65536):
        state = decoder.prefill([text[:length]], total=length + 1)
        jax.block_until_ready(state)
        peak = host_memory.peak_bytes() / 2**20
        print(f"   {length:>6} tokens {peak:8.0f} {memory.nbytes(state):>12,}", flush=True)
        del state


def llama(length: int) -> timing.Contender:
    """Decode with the Llama of transformers, of the same width, depth and MLP, with its dynamic cache."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    heads, width = CONFIG.num_heads, CONFIG.head_dim
    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.d_model,
        intermediate_size=CONFIG.mlp_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
    )
    model = LlamaForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        cache.update(*torch.rand(2, 1, heads, length, width), index)

    def turn(_round: int) -> None:
        with torch.inference_mode():
            greedy_torch(lambda token: model(token, past_key_values=cache, use_cache=True).logits)
        cache.crop(-PEER_STEPS)  # a view: the next token copies the cache, as every token does
        if cache.get_seq_length() != length:
            raise RuntimeError(f"the cache must be back at {length} tokens, found {cache.get_seq_length()}")

    return turn


def mamba2(_length: int) -> timing.Contender:
    """Decode with the Mamba-2 of transformers, with twice the layers instead of MLPs, about as many parameters."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.d_model,
        num_hidden_layers=2 * CONFIG.num_layers,
        num_heads=2 * CONFIG.d_model // 64,
        head_dim=64,
        state_size=64,
        n_groups=1,
        expand=2,
        tie_word_embeddings=True,
    )
    model = Mamba2ForCausalLM(config).eval()
    with torch.inference_mode():
        cache = model(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache_params

    def turn(_round: int) -> None:
        with torch.inference_mode():
            greedy_torch(lambda token: model(token, cache_params=cache, use_cache=True).logits)

    return turn


def greedy_torch(forward: Callable[[Any], Any]) -> None:
    """Decode a turn greedily."""
    import torch

    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(PEER_STEPS):
        token = forward(token)[:, -1:].argmax(-1)


def race(params: Any, seconds: float, contexts: tuple[int, ...]) -> None:
    """Print tokens per second against the peers."""
    model = tm.TransMamba(CONFIG)
    ours = {"V9": schedule.v9(8192), "Transformer": (NEVER,), "Mamba-2": (0,)}
    decoders = {name: Decoder(model, params, points) for name, points in ours.items()}
    peers: dict[str, Callable[[int], timing.Contender]] = {}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        peers = {"transformers Llama": llama, "transformers Mamba-2": mamba2}
    steps = dict.fromkeys(ours, BLOCK_STEPS) | dict.fromkeys(peers, PEER_STEPS)
    print("speed: tokens per second, and how many times as many V9 has")
    for length in contexts:
        contenders = {name: turns(decoder, after(decoder, length), BLOCK_STEPS) for name, decoder in decoders.items()}
        contenders |= {name: make(length) for name, make in peers.items()}
        times = timing.round_robin(contenders, rounds=1000, seconds=seconds)
        speed = {name: steps[name] / measured.minimum for name, measured in times.items()}
        row = (f"{name} {value:.1f} ({speed['V9'] / value:.2f})" for name, value in speed.items())
        print(f"   {length:>6}, {len(times['V9'].seconds)} rounds: " + ", ".join(row), flush=True)


def choices(params: Any, seconds: float, _contexts: tuple[int, ...]) -> None:
    """Print eager against lazy, and the time to compile."""
    contenders = {}
    for name, lazy in (("lazy", True), ("eager", False)):
        decoder = Decoder(tm.TransMamba(CONFIG), params, (NEVER,), lazy)
        contenders[name] = turns(decoder, decoder.prefill([[1] * 1000], total=1000 + BLOCK_STEPS), BLOCK_STEPS)
    times = timing.round_robin(contenders, rounds=1000, warmup=2, seconds=seconds)
    print(f"choices: lazy over eager while all 8 layers attend: {times['lazy'].ratio(times['eager']):.3f}")
    deep = dataclasses.replace(CONFIG, num_layers=16)
    decoder = Decoder(tm.TransMamba(deep), random_params(deep), schedule.v9(8192))
    for length in (3000, 9000):
        state = after(decoder, length)
        start = time.perf_counter()
        decoder.decode(state, 1)
        taken = time.perf_counter() - start
        print(f"   16 layers, first token after {length} tokens, compilation included: {taken:.1f} s")


PARTS: dict[str, Part] = {
    "flat": flatness,
    "cache": bytes_along,
    "prompt": prompt_memory,
    "speed": race,
    "choices": choices,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="parts; default: all")
    parser.add_argument("--seconds", type=float, default=40, help="of timed rounds, a table's row; default: 40")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768], help="of speed, in tokens")
    options = parser.parse_args()
    packages = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    print(timing.heading("jax", *packages))
    params = random_params(CONFIG)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    print(f"float32, batch 1, {CONFIG.num_layers} layers, d_model {CONFIG.d_model}, {count:,} parameters\n", flush=True)
    for name in options.only:
        PARTS[name](params, options.seconds, tuple(options.contexts))


if __name__ == "__main__":
    main()
