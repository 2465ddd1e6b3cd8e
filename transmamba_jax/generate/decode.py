"""Read prompts and continue them, with memory that falls at every TransPoint.

A stage is the set of layers that still attend. Each stage has its own compiled program. Capacity, branches of the
layers and batch are static in it; the number of steps is not. Between two programs `_prepare_cache` drops keys and
values that no row needs any more, computes the states that are needed now, and allocates capacity.

A stage has one program, and another only where

- it is so long that its capacity must grow (`cache.choose_capacity`), by four times each time beyond 2048 tokens;
- rows have lengths on both sides of a TransPoint: both branches are computed until the last row is past it;
- tokens are sampled in another way (greedily, with a temperature, with top-k ...), or given and not sampled.

Prompts are read by programs of their own, for the padded length of a prefill chunk: one of 5 up to 256 tokens, of 17
up to 2048. A first chunk has another where the shortest row reaches a TransPoint that it does not reach elsewhere, a
later chunk for each position of a TransPoint in it. Up to 32 tokens after others need none: the stage's program reads
them.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from transmamba_jax import cache as memory
from transmamba_jax import schedule, sharding
from transmamba_jax.cache import Cache, LayerCache
from transmamba_jax.config import ModelConfig
from transmamba_jax.generate import decode_step
from transmamba_jax.generate import sampling as sampler
from transmamba_jax.generate import state as decode_state
from transmamba_jax.generate.arguments import check_model, check_params, check_schedule, raise_not_finite, whole_number
from transmamba_jax.generate.decode_step import LayerMode, Weights
from transmamba_jax.generate.prompts import check_prompts, padded_length
from transmamba_jax.generate.sampling import Sampling, SamplingParams
from transmamba_jax.generate.state import DecodeState
from transmamba_jax.model import TransMamba, embed
from transmamba_jax.runtime import serving_mesh
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.shapes import Array, Int

BLOCK_STEPS = 32
"""Tokens of one call of a compiled program, at most."""
_ROWS = ("rows", None)

PREFILL_CHUNK_SIZE = 2048
"""Prompt tokens read at a time, which bounds the memory of a long prompt."""


class Decoder:
    """Read prompts and continue them with one model under one schedule.

    Holds a copy of the parameters that is packed for single tokens. Every method returns a new state and leaves the
    given one as it was, unless that is donated, which saves a copy of the cache. Parameters that are placed on a mesh
    are used on all of its devices: see `serving_mesh`.
    """

    def __init__(
        self,
        model: TransMamba,
        params: Any,
        transpoints: Sequence[int] | None = None,
        lazy: bool = True,
        *,
        vocab_size: int | None = None,
    ) -> None:
        """Pack the parameters.

        Args:
            model: the model.
            params: its parameters.
            transpoints: schedule to run under; None: the config's.
            lazy: see `cache`.
            vocab_size: ids that the tokenizer has. A model may have more, to which training padded its vocabulary:
                ids from `vocab_size` on are never sampled. None: every id of the model may be.

        Raises:
            ValueError: the model has an attention function of its own, the parameters do not fit it or are placed on
                several meshes, the schedule is invalid, or `vocab_size` is not in 1..the model's.
        """
        check_model(model)
        check_params(model, params)
        self.config, size = model.config, model.config.vocab_size
        if vocab_size is not None and not 1 <= vocab_size <= size:
            raise ValueError(f"vocab_size must be in 1..{size}, the ids of the model, found {vocab_size}")
        self._vocab_size = None if vocab_size == size else vocab_size
        self._model, self._lazy = model, lazy
        self._params, self._mesh = serving_mesh.place(params)
        self.transpoints = check_schedule(transpoints, model)
        with serving_mesh.use(self._mesh):
            self._weights = _pack_weights(model.config, self._params)

    def start(self, batch: int) -> DecodeState:
        """Return the state of `batch` rows without any token."""
        cache = memory.init_cache(self.config, batch, 0, self.transpoints, self._lazy)
        size = (batch, self.config.vocab_size)
        return DecodeState(cache, jnp.zeros(size, jnp.float32), jnp.zeros(size, bool))

    def save(self, state: DecodeState, file: str | Path) -> None:
        """Write a state to a file of safetensors, with the config and the schedule that it belongs to.

        Raises:
            ValueError: it comes from another schedule, or the file cannot be written.
        """
        self._check_schedule(state)
        decode_state.save(expand_path(file), state, self.config)

    def load(self, file: str | Path) -> DecodeState:
        """Read what `save` wrote; the parameters must be the same, which only their shapes are checked for.

        Raises:
            ValueError: the file cannot be read, is of another config or schedule, or is not a complete state.
        """
        return decode_state.load(expand_path(file), self.config, self.transpoints)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
        *,
        total: int | None = None,
    ) -> DecodeState:
        """Read prompts of any lengths; arguments and errors as for `extend`."""
        prompts = check_prompts(prompts, self.config.vocab_size)
        return self.extend(self.start(len(prompts)), prompts, prefill_chunk_size, total=total, donate=True)

    def extend(
        self,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
        *,
        total: int | None = None,
        donate: bool = False,
    ) -> DecodeState:
        """Read more tokens of each row. Rows of different lengths so far take as many tokens each.

        Args:
            state: state of the rows so far.
            prompts: tokens of each row, of any lengths.
            prefill_chunk_size: tokens that are read at a time: a matter of speed and memory, not of the result.
            total: as for `decode`.
            donate: reuse the buffers of `state`, which is deleted.

        Raises:
            ValueError: a prompt is no list of token ids, is empty or has an id outside the vocabulary; there is not one
                per row; rows and prompts both differ in length; the rows come from another schedule; or
                prefill_chunk_size < 1.
        """
        prompts = check_prompts(prompts, self.config.vocab_size)
        self._check_schedule(state)
        lengths = state.lengths
        if len(prompts) != len(lengths):
            raise ValueError(f"prompts must be one per row, found {len(prompts)} for {len(lengths)} rows")
        news = np.array([len(prompt) for prompt in prompts])
        even, level = news.min() == news.max(), lengths.min() == lengths.max()
        if not (even or level):
            raise ValueError(
                f"rows of different lengths must get as many tokens each, found rows of {lengths.tolist()} tokens and "
                f"prompts of {news.tolist()}; read each row alone (state.rows), or together from the start"
            )
        size = whole_number("prefill_chunk_size", prefill_chunk_size, 1)
        with serving_mesh.use(self._mesh):
            if even and (not level or (lengths[0] > 0 and news[0] <= BLOCK_STEPS)):
                # A few tokens cost less one after another than a program for them would.
                return self._decode_tokens(state, np.array(prompts, np.int32), Sampling(), None, total, donate)[1]
            return self._prefill_chunks(state, prompts, size, total, donate)

    def decode(
        self,
        state: DecodeState,
        steps: int,
        sampling: Sampling = Sampling(),  # noqa: B008
        key: jax.Array | None = None,
        *,
        total: int | None = None,
        donate: bool = False,
    ) -> tuple[np.ndarray, DecodeState]:
        """Add `steps` tokens to each row and return them, int32 [B, steps], with the state after them.

        Args:
            state: state of the rows so far.
            steps: tokens to add.
            sampling: options of sampling.
            key: one random key, or one per row; needed when the temperature is not 0. A row's token at a position
                depends on its key, its position and the model alone.
            total: length that the longest row will have, if that is known: that capacity is allocated at once.
            donate: reuse the buffers of `state`, which is deleted.

        Raises:
            ValueError: steps < 0, a key is missing or of a wrong shape, or the state is empty or another schedule's.
        """
        steps = whole_number("steps", steps, 0)
        self._check_schedule(state)
        if state.lengths.min() == 0:
            raise ValueError("state must have at least one token per row; read a prompt first")
        keys = serving_mesh.copy(sampler.row_keys(key, len(state.lengths), sampling), self._mesh)
        unknown = np.full((len(state.lengths), steps), -1, np.int32)
        with serving_mesh.use(self._mesh):
            return self._decode_tokens(state, unknown, sampling, keys, total, donate)

    def _decode_tokens(
        self,
        state: DecodeState,
        given: np.ndarray,
        sampling: Sampling,
        keys: jax.Array | None,
        total: int | None,
        donate: bool,
    ) -> tuple[np.ndarray, DecodeState]:
        """Read the given tokens one after another; -1: sample one."""
        steps, done = given.shape[1], 0
        read = np.zeros_like(given)
        while done < steps:
            lengths = state.lengths
            count = min(steps - done, BLOCK_STEPS, self._until_event(lengths))
            modes = tuple(decode_step.layer_mode(point, lengths) for point in self.transpoints)
            state = self._prepare_cache(state, int(lengths.max()) + count, int(lengths.min()), total)
            if not donate and done == 0:
                state = jax.tree.map(jnp.copy, state)
            block = np.full((len(given), BLOCK_STEPS), -1, np.int32)
            block[:, :count] = given[:, done : done + count]
            options = keys, sampling.as_params(), self._vocab_size
            static = self.config, modes, sampling.top_k
            tokens, broken, state = _decode_block(self._weights, state, block, *options, count, *static)
            if broken:
                raise_not_finite(self._params)
            read[:, done : done + count] = np.asarray(tokens)[:, :count]
            done += count
            state = self._trim_cache(state)
        return read, state

    def _check_schedule(self, state: DecodeState) -> None:
        if state.cache.transpoints != self.transpoints:
            asked, found = self.transpoints, state.cache.transpoints
            raise ValueError(f"state must come from a decoder with the TransPoints {asked}, found {found}")

    def _until_event(self, lengths: np.ndarray) -> int:
        """Count the steps until the shortest or the longest row reaches a TransPoint."""
        ahead = [point - length for point in self.transpoints for length in (lengths.min(), lengths.max())]
        return int(min((distance for distance in ahead if distance > 0), default=BLOCK_STEPS))

    def _trim_cache(self, state: DecodeState) -> DecodeState:
        """Drop the parts of the cache that the next token does not need."""
        return self._prepare_cache(state, int(state.lengths.max()) + 1, int(state.lengths.min()), None, grow=False)

    def _prepare_cache(
        self, state: DecodeState, end: int, shortest: int, total: int | None, grow: bool = True
    ) -> DecodeState:
        """Prepare the layers' caches for tokens up to position `end`.

        Drop keys and values where the shortest row, of `shortest` tokens, needs them no more. Compute the states that
        are needed. Allocate capacity where there is not enough, none beyond the next TransPoint.
        """
        capacity = memory.choose_capacity(end, total, self.transpoints)
        most = min((point for point in self.transpoints if point >= end), default=end)
        empty = state.lengths.max() == 0
        layers = []
        for index, (point, layer) in enumerate(zip(self.transpoints, state.cache.layers, strict=True)):
            attends = shortest < point
            if empty:
                lazy = self._lazy and end <= point
                layer = memory.init_layer(self.config, len(state.lengths), min(point, capacity) * attends, lazy)
                layer = memory.spread(layer)
            elif layer.state is None and end > point:
                converted = _convert(self.config, self._model.kernels, self._weights.layers[index], layer)
                layer = dataclasses.replace(layer, state=converted, dt=None)
            if not attends:
                layer = dataclasses.replace(layer, keys=None, values=None)
            elif layer.capacity > min(point, most):
                layer = memory.resize(layer, min(point, most))
            elif grow and layer.capacity < min(point, end):
                layer = memory.resize(layer, min(point, capacity))
            layers.append(layer)
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=tuple(layers)))

    def _prefill_chunks(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], size: int, total: int | None, donate: bool
    ) -> DecodeState:
        """Read prompts, after rows of one length, `size` tokens at a time."""
        start, news = int(state.lengths[0]), np.array([len(prompt) for prompt in prompts])
        seen = np.array(state.seen)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        state = dataclasses.replace(state, seen=jnp.array(seen))
        total = None if total is None else max(total, start + int(news.max()))
        for offset in range(0, int(news.max()), size):
            # A chunk is padded up to a length that other prompts share; padding leaves no trace.
            width = min(size, padded_length(int(news.max()) - offset))
            valid = np.clip(news - offset, 0, width).astype(np.int32)
            tokens = np.zeros((len(prompts), width), np.int32)
            for row, prompt in enumerate(prompts):
                tokens[row, : valid[row]] = prompt[offset : offset + width]
            state = self._prefill_chunk(state, start + offset, tokens, valid, total, donate or offset > 0)
        return state

    def _prefill_chunk(
        self, state: DecodeState, start: int, tokens: np.ndarray, valid: np.ndarray, total: int | None, donate: bool
    ) -> DecodeState:
        """Read one chunk of every row, of which `valid` tokens are real."""
        width, fresh = tokens.shape[1], start == 0
        # Attention over the first chunk reads the chunk itself: a cache is only for the tokens that follow.
        shortest = int((state.lengths + valid).min() if fresh else state.lengths.min())
        state = self._prepare_cache(state, start + width, shortest, total)
        if not donate:
            state = jax.tree.map(jnp.copy, state)
        splits = tuple(min(max(point - start, 0), width) for point in self.transpoints)
        state = _prefill_program(self._params, state, tokens, jnp.int32(start), valid, self._model, splits, fresh)
        return self._trim_cache(state)


_pack_weights = jax.jit(decode_step.pack_weights, static_argnums=0)
_convert = jax.jit(decode_step.convert, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(5, 6, 7), donate_argnums=1)
def _prefill_program(
    params: Any,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    valid: Int[Array, "B"],
    model: TransMamba,
    splits: schedule.Schedule,
    fresh: bool,
) -> DecodeState:
    arguments = (tokens, state.cache.layers, start, valid, splits, fresh)
    hidden, layers = model.apply({"params": params}, *arguments, method="extend")
    logits = model.apply({"params": params}, hidden, method="logits")
    logits = jnp.where(valid[:, None] > 0, logits, state.logits)
    return _placed_state(state.cache, layers, state.cache.lengths + valid, logits, state.seen)


@partial(jax.jit, static_argnums=(7, 8, 9), donate_argnums=1)
def _decode_block(
    weights: Weights,
    state: DecodeState,
    given: Int[Array, "B S"],
    keys: jax.Array | None,
    params: SamplingParams,
    vocab_size: Int[Array, ""] | int | None,
    steps: Int[Array, ""] | int,
    config: ModelConfig,
    modes: tuple[LayerMode, ...],
    top_k: int | None,
) -> tuple[Int[Array, "B S"], Bool[Array, ""], DecodeState]:
    """Read `steps` tokens, the given ones or (where -1) sampled ones.

    Returns:
        The tokens, whether logits are NaN, and the state after the tokens.
    """
    rows, starts, large = jnp.arange(len(given)), state.cache.lengths, state.cache.layers
    # The loop carries what changes with every token; large caches stay outside and are only read.
    moving = tuple(LayerCache(layer.window, layer.state) for layer in large)
    stagings = tuple(memory.staging_layer(layer, given.shape[1]) for layer in large)

    def read_one(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, logits, seen, moving, stagings = carry
        sampled = sampler.sample(logits, seen, keys, starts + index, params, top_k, vocab_size)
        token = jnp.where(given[:, index] < 0, sampled, given[:, index])
        x = embed(config, weights.embedding, token)
        moved, written = [], []
        for layer_weights, layer, small, staging, mode in zip(
            weights.layers, large, moving, stagings, modes, strict=True
        ):
            cache = dataclasses.replace(layer, window=small.window, state=small.state)
            x, cache, staging = decode_step.layer_step(config, layer_weights, x, cache, staging, starts, index, mode)
            moved.append(LayerCache(cache.window, cache.state))
            written.append(staging)
        logits = decode_step.next_logits(config, x, weights.final_norm, weights.embedding, weights.head)
        tokens, seen = tokens.at[:, index].set(token), seen.at[rows, token].set(True)
        return tokens, logits, seen, tuple(moved), tuple(written)

    carry = (jnp.zeros_like(given), state.logits, state.seen, moving, stagings)
    tokens, logits, seen, moving, stagings = jax.lax.fori_loop(0, steps, read_one, carry)
    layers = tuple(
        dataclasses.replace(memory.flush(layer, staging, starts, steps), window=small.window, state=small.state)
        for layer, staging, small in zip(large, stagings, moving, strict=True)
    )
    state = _placed_state(state.cache, layers, starts + steps, logits, seen)
    broken = jnp.isnan(logits).any()  # NaN stays in a cache, and so in the logits of all later tokens
    return sharding.constrain(tokens, (None, None)), broken, state


def _placed_state(
    before: Cache, layers: tuple[LayerCache, ...], lengths: Int[Array, "B"], logits: Array, seen: Array
) -> DecodeState:
    """Return the state after a program, sharded over rows and heads, lengths replicated."""
    lengths = sharding.constrain(lengths, (None,))
    cache = dataclasses.replace(before, layers=tuple(map(memory.spread, layers)), lengths=lengths)
    return DecodeState(cache, sharding.constrain(logits, _ROWS), sharding.constrain(seen, _ROWS))
