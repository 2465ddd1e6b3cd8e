"""Continuations of prompts of any lengths, as a whole or as a stream of tokens, up to stop sequences."""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from transmamba_jax.generate.arguments import check_model, whole_number
from transmamba_jax.generate.decode import BLOCK_STEPS, PREFILL_CHUNK_SIZE, Decoder, DecodeState
from transmamba_jax.generate.prompts import check_prompts
from transmamba_jax.generate.sampling import Sampling, row_keys
from transmamba_jax.model import TransMamba


def generate(
    model: TransMamba,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    transpoints: Sequence[int] | None = None,
    vocab_size: int | None = None,
    prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
) -> list[list[int]]:
    """Continue each prompt by `max_new_tokens` tokens, or up to a stop sequence, and return the new tokens.

    Prompts of different lengths in one call give the tokens that each gives alone (sampled ones under its own key).

    Args:
        model: the model.
        params: its parameters.
        prompts: a list of lists of token ids, at least one per prompt; lengths may differ.
        max_new_tokens: tokens to add to each prompt.
        temperature: 0 takes the most likely token (so does any below 1.2e-38, the least normal float32); above, logits
            are divided by it and sampled.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        key: random key, needed when temperature > 0; the same key gives the same tokens. An array of keys, one
            per prompt, or one key, with which prompt i is sampled under `jax.random.fold_in(key, i)`.
        min_p: sample among tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divide the positive logits of tokens that are there already by this, multiply the negative.
        stop: token sequences that end a continuation, which is returned without them.
        transpoints: schedule to run under; None: the config's.
        vocab_size: ids that the tokenizer has; those from it on are never sampled. None: all of the model's.
        prefill_chunk_size: prompt tokens that are read at a time, which bounds memory.

    Returns:
        The new token ids of each prompt.

    Raises:
        ValueError: a prompt or stop sequence is not a list of token ids, is empty or has an id outside the vocabulary,
            or an option is out of range.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    check_model(model)
    rows: list[list[int]] = [[] for _ in check_prompts(prompts, model.config.vocab_size)]
    decoder = Decoder(model, params, transpoints, vocab_size=vocab_size)
    options: Any = {"stop": stop, "prefill_chunk_size": prefill_chunk_size, "block": BLOCK_STEPS}
    for news in stream(decoder, prompts, max_new_tokens, sampling, key, **options):
        for row, new in zip(rows, news, strict=True):
            row.extend(new)
    return rows


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]] | DecodeState,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008
    key: jax.Array | None = None,
    *,
    stop: Sequence[Sequence[int]] = (),
    prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
    block: int = 8,
    donate: bool = False,
) -> Generator[list[list[int]], None, DecodeState]:
    """Yield the new tokens of every row after every `block` steps; arguments as for `generate`.

    A call of a compiled program stores the keys and values of all its tokens together, which costs as much as a token
    where the cache is long: blocks of a few tokens are nearly as fast as long ones, single tokens are not.

    Tokens that may be the beginning of a stop sequence are held back until that is clear, so a row's part of a yield
    has 0 to `block` tokens and those held back. The generator ends when every row has stopped or has its tokens. It
    returns the state then, in which rows that stopped have read on: to continue what was yielded, read it
    (`Decoder.extend`) after the state before.

    Instead of prompts it takes a state, which it leaves as it was. With `donate` its buffers are reused, and memory
    falls as far as nobody else refers to that state.

    Raises:
        ValueError: as for `generate`, when called and not at the first token.
    """
    max_new_tokens, block = whole_number("max_new_tokens", max_new_tokens, 0), whole_number("block", block, 1)
    whole_number("prefill_chunk_size", prefill_chunk_size, 1)
    stop = [] if isinstance(stop, list | tuple) and not stop else check_prompts(stop, decoder.config.vocab_size, "stop")
    if isinstance(prompts, DecodeState):
        rows, total = len(prompts.lengths), None  # more may follow
    else:
        prompts = check_prompts(prompts, decoder.config.vocab_size)
        rows, total = len(prompts), max(map(len, prompts)) + max_new_tokens
    keys, outputs = row_keys(key, rows, sampling), [_Output(stop) for _ in range(rows)]

    read = partial(decoder.prefill, prefill_chunk_size=prefill_chunk_size, total=total)
    write = partial(decoder.decode, sampling=sampling, key=keys, total=total)
    return _stream(prompts, read, write, outputs, max_new_tokens, block, donate)


def _stream(
    source: Sequence[Sequence[int]] | DecodeState,
    read: Callable[..., DecodeState],
    write: Callable[..., tuple[np.ndarray, DecodeState]],
    outputs: list["_Output"],
    left: int,
    block: int,
    donate: bool,
) -> Generator[list[list[int]], None, DecodeState]:
    state = source if isinstance(source, DecodeState) else read(source)
    donate = donate or state is not source
    del source  # what its layers drop would stay
    while left > 0 and not all(output.stopped for output in outputs):
        count = min(block, left)
        tokens, state = write(state, count, donate=donate)
        left, donate = left - count, True
        yield [output.take(row, last=left == 0) for output, row in zip(outputs, tokens.tolist(), strict=True)]
    return state


class _Output:
    """Release the tokens of one row, up to its first stop sequence."""

    def __init__(self, stop: Sequence[Sequence[int]]) -> None:
        self.stopped = False
        self._stop = [list(sequence) for sequence in stop]
        self._held: list[int] = []

    def take(self, tokens: list[int], last: bool) -> list[int]:
        """Return what is certain not to be part of a stop sequence; `last`: nothing will follow."""
        ready: list[int] = []
        for token in tokens:
            if self.stopped:
                return ready
            self._held.append(token)
            ends = [sequence for sequence in self._stop if self._held[-len(sequence) :] == sequence]
            if ends:
                self.stopped = True
                return ready + self._held[: -max(map(len, ends))]
            free = len(self._held) - self._begun()
            ready += self._held[:free]
            self._held = self._held[free:]
        if last and not self.stopped:
            ready += self._held
        return ready

    def _begun(self) -> int:
        """Count the last tokens that are the beginning of a stop sequence."""
        lengths = [
            length
            for sequence in self._stop
            for length in range(1, min(len(sequence), len(self._held) + 1))
            if self._held[-length:] == sequence[:length]
        ]
        return max(lengths, default=0)
