"""Race decoding: `python -m benchmarks.decode` from the root of the repository prints tables.

One row, float32, greedy, a byte vocabulary. Speed does not depend on what is remembered, so a context of n tokens is a
cache of n random tokens, which takes no time to make; every contender goes on for a few tokens in its turn, and the
fastest turn counts.

  1. Time per token after the last TransPoint, at 1k, 4k, 16k and 64k tokens.
  2. Bytes of the cache along a sequence of 16k tokens under V9, over those of the Transformer.
  3. Tokens per second at 1k, 8k and 32k: V9, the Transformer and Mamba-2 of this code and, where transformers is
     installed, its Llama of the same width, depth and MLP, and its Mamba-2 of about as many parameters.
  4. The state carried along or left for the TransPoint; seconds to compile one stage of 16 layers.
"""

import argparse
import dataclasses
import importlib.util
import math
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
from transmamba_jax.decode import BLOCK_STEPS, Decoder, DecodeState

CONFIG = ModelConfig(transpoints=(0,), dtype="float32")  # 8 layers, d_model 256, H 4, head dim and state 64, MLP 704
NEVER = 10**9
STEPS = BLOCK_STEPS


def random_params(config: ModelConfig) -> Any:
    """Parameters of the right shapes; what they are does not matter for speed."""
    shapes = jax.eval_shape(tm.TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.02 * draw.normal(size=leaf.shape), leaf.dtype), shapes)


def after(decoder: Decoder, length: int) -> DecodeState:
    """A state after `length` tokens, with a random cache and room for a turn."""
    cache = memory.init_cache(decoder.config, 1, length + STEPS, decoder.transpoints, lazy=False)
    draw = np.random.default_rng(0)
    fill = lambda leaf: jnp.array(draw.standard_normal(leaf.shape, np.float32), leaf.dtype)
    layers = tuple(
        dataclasses.replace(layer, state=fill(layer.state))
        if point <= length
        else dataclasses.replace(layer, keys=fill(layer.keys), values=fill(layer.values), state=fill(layer.state))
        for point, layer in zip(decoder.transpoints, cache.layers, strict=True)
    )
    cache = dataclasses.replace(cache, layers=layers, lengths=jnp.array([length], jnp.int32))
    return dataclasses.replace(decoder.start(1), cache=cache)


def turns(decoder: Decoder, length: int) -> timing.Contender:
    """Go on for a turn from `length` tokens, always from the same state, whose copy is not part of the time."""
    state = decoder.decode(after(decoder, length), 0)[1]
    _, ready = decoder.decode(state, 1)  # drops what is not needed, makes room
    ready = dataclasses.replace(ready, cache=dataclasses.replace(ready.cache, lengths=state.cache.lengths))
    held = [ready]

    def turn(_round: int) -> None:
        _, following = decoder.decode(held.pop(), STEPS, consume=True, total=length + STEPS)
        lengths = jnp.array([length], jnp.int32)
        held.append(dataclasses.replace(following, cache=dataclasses.replace(following.cache, lengths=lengths)))

    return turn


def flatness(params: Any, rounds: int) -> None:
    """Print the time per token after the last TransPoint."""
    decoder = Decoder(tm.TransMamba(CONFIG), params, schedule.log_spaced(1024))
    contenders = {f"{length // 1024}k": turns(decoder, length) for length in (1024, 4096, 16384, 65536)}
    times = timing.round_robin(contenders, rounds=rounds)
    base = times["1k"].minimum
    print("1. after the last TransPoint (1024), ms per token and ratio to 1k")
    for name, measured in times.items():
        print(f"   {name:>4} {1e3 * measured.minimum / STEPS:8.3f} {measured.minimum / base:8.3f}")


def bytes_along(params: Any) -> None:
    """Print the bytes of the cache just before and after every TransPoint of V9, over the Transformer's at 8k."""
    layers = CONFIG.num_layers
    whole = layers * memory.cache_bytes(CONFIG, 1, 8192, NEVER)
    pairs = layers * 8192 * (CONFIG.d_key + CONFIG.d_inner) * 4
    decoder = Decoder(tm.TransMamba(CONFIG), params, schedule.v9(8192))
    print(f"2. V9, bytes of the cache; the Transformer of 8192 tokens has {whole:,}, keys and values alone {pairs:,}")
    for length in (127, 255, 511, 1023, 2047, 4095, 8191, 8192, 12000, 16384):
        # What is allocated while token `length` is read: empty memories of the layers that are alive then.
        state = decoder._ready(decoder.start(1), length + 1, length, 16384)
        own = sum(memory.nbytes((layer.keys, layer.values)) for layer in state.cache.layers)
        total = memory.nbytes(state.cache.layers)
        pair = f"keys and values {own:>12,} ({own / pairs:6.2%})"
        print(f"   {length:>6} tokens {total:>12,} ({total / whole:6.2%}), {pair}")


def llama(length: int) -> timing.Contender:
    """The Llama of transformers, of the same width, depth and MLP, with its dynamic cache."""
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
    past = [torch.randn(2, 1, heads, length, width) for _ in range(config.num_hidden_layers)]

    def turn(_round: int) -> None:
        cache = DynamicCache(config=config)
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        with torch.inference_mode():
            greedy_torch(lambda token: model(token, past_key_values=cache, use_cache=True).logits)

    return turn


def mamba2(_length: int) -> timing.Contender:
    """The Mamba-2 of transformers, with twice the layers instead of MLPs, about as many parameters."""
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
    """Go on for a turn."""
    import torch

    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(STEPS):
        token = forward(token)[:, -1:].argmax(-1)


def race(params: Any, rounds: int, contexts: tuple[int, ...]) -> None:
    """Print tokens per second against the peers."""
    model = tm.TransMamba(CONFIG)
    ours = {"V9": schedule.v9(8192), "Transformer": (NEVER,), "Mamba-2": (0,)}
    decoders = {name: Decoder(model, params, points) for name, points in ours.items()}
    peers: dict[str, Callable[[int], timing.Contender]] = {}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        peers = {"transformers Llama": llama, "transformers Mamba-2": mamba2}
    print("3. tokens per second, and V9 over each")
    for length in contexts:
        contenders = {name: turns(decoder, length) for name, decoder in decoders.items()}
        contenders |= {name: make(length) for name, make in peers.items()}
        times = timing.round_robin(contenders, rounds=rounds)
        row = (
            f"{name} {STEPS / measured.minimum:.0f} ({measured.minimum / times['V9'].minimum:.2f})"
            for name, measured in times.items()
        )
        print(f"   {length:>6}: " + ", ".join(row), flush=True)


def choices(params: Any, rounds: int) -> None:
    """Print eager against lazy, and the time to compile."""
    contenders = {}
    for name, lazy in (("lazy", True), ("eager", False)):
        decoder = Decoder(tm.TransMamba(CONFIG), params, (NEVER,), lazy)
        state = decoder.prefill([[1] * 1000], total=1000 + STEPS)
        held = [decoder.decode(state, 1, total=1000 + STEPS)[1]]

        def turn(_round: int, held: list[DecodeState] = held, decoder: Decoder = decoder) -> None:
            state = held.pop()
            lengths = jnp.array([1000], jnp.int32)
            state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=lengths))
            held.append(decoder.decode(state, STEPS - 1, consume=True, total=1000 + STEPS)[1])

        contenders[name] = turn
    times = timing.round_robin(contenders, rounds=rounds)
    print(f"4. lazy over eager while all 8 layers attend: {times['lazy'].ratio(times['eager']):.3f}")
    deep = dataclasses.replace(CONFIG, num_layers=16)
    decoder = Decoder(tm.TransMamba(deep), random_params(deep), schedule.v9(8192))
    for length in (3000, 9000):
        state = after(decoder, length)
        start = time.perf_counter()
        decoder.decode(state, 1)
        seconds = time.perf_counter() - start
        print(f"   16 layers, first token after {length} tokens, compilation included: {seconds:.1f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    options = parser.parse_args()
    packages = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    print(timing.heading("jax", *packages))
    params = random_params(CONFIG)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    print(f"float32, batch 1, {CONFIG.num_layers} layers, d_model {CONFIG.d_model}, {count:,} parameters\n")
    flatness(params, options.rounds)
    bytes_along(params)
    race(params, options.rounds, tuple(options.contexts))
    choices(params, options.rounds)


if __name__ == "__main__":
    main()
