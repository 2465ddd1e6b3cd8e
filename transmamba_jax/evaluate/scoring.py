"""Log-likelihoods and continuations of texts of any lengths, as benchmarks ask for them.

    log p(continuation | context) = sum_i log softmax(z_{i-1})[token_i]      over the tokens of the continuation

Requests are sorted by length and batched; rows are padded on the right, which leaves no trace in real tokens.
"""

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from transmamba_jax import cache, data, sharding
from transmamba_jax.checkpoint import command_options as serving_options
from transmamba_jax.generate import stream
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.generate.sampling import Sampling
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import serving_mesh
from transmamba_jax.shapes import Array, Float32, Int, SegmentIds

BLOCK_STEPS = 16
"""Tokens that are generated between two looks for a text that ends them."""

_log = logging.getLogger(__name__)


def token_scores(
    model: TransMamba,
    chunk: int,
    params: Any,
    tokens: Int[Array, "B T+1"],
    segment_ids: SegmentIds | None = None,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p of each token but the first given those before it, and whether it is the most likely one.

    Logits exist for `chunk` tokens of a device at a time, in float32.
    """
    targets = tokens[:, 1:]
    inputs = {} if segment_ids is None else {"segment_ids": segment_ids[:, :-1]}
    hidden = model.apply({"params": params}, tokens[:, :-1], **inputs, method="hidden")
    rows, time = targets.shape
    held = rows // sharding.parts("rows", rows)
    width = min(max(chunk // held, 1), time)
    count = math.ceil(time / width)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - time)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        logits = model.apply({"params": params}, hidden, method="logits")
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, count * width)[:, :time]
    scores, likeliest = jax.lax.map(score, (cut(hidden), cut(targets)))
    return join(scores), join(likeliest)


def windows(tokens: Sequence[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Cut a document into (context, continuation) pairs that predict every token once.

    Each pair makes the model read `length` tokens at most: as much context as there is room for, and a `prefix` before
    the first token.
    """
    row = [prefix, *tokens]  # row[i] comes before tokens[i]
    pairs = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        pairs.append((row[max(stop - length, 0) : start + 1], list(tokens[start:stop])))
    return pairs


class Scorer:
    """Answers requests with one model under its config's schedule; see `lm_eval_adapter` for the harness."""

    def __init__(
        self,
        model: TransMamba,
        params: Any,
        tokenizer: data.Tokenizer,
        max_length: int,
        batch_size: int = 8,
        loss_chunk: int = 8192,
        seed: int = 0,
    ) -> None:
        """Take a model.

        Args:
            model: the model.
            params: its parameters.
            tokenizer: its tokenizer, whose end of a document goes before a text without a context.
            max_length: tokens that the model may read in a row; longer contexts lose their beginning.
            batch_size: requests that are answered together.
            loss_chunk: tokens whose logits exist at a time.
            seed: of the random keys where continuations are sampled: one a request, by its place.

        Raises:
            ValueError: the tokenizer does not fit the model, or a number is less than 1.
        """
        data.check_vocabulary(tokenizer, model.config.vocab_size)
        for name, value in (("max_length", max_length), ("batch_size", batch_size), ("loss_chunk", loss_chunk)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, found {value}")
        self.tokenizer, self.max_length, self.batch_size = tokenizer, max_length, batch_size
        self._model, self._key = model, jax.random.key(seed)
        self._params, self._mesh = serving_mesh.place(params)
        self._scores = jax.jit(functools.partial(token_scores, model, loss_chunk))

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Holds its own copy of the parameters, so it is made when it is needed."""
        return Decoder(self._model, self._params)

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), log p and whether greedy decoding would give the continuation.

        Raises:
            ValueError: a context is empty, or a continuation is longer than `max_length`.
        """
        rows = []
        for index, (context, continuation) in enumerate(pairs):
            if not context:
                raise ValueError(f"the context of request {index} is empty; it needs at least one token")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"the continuation of request {index} has {len(continuation)} tokens, more than "
                    f"max_length={self.max_length}; its log-likelihood is that of `windows`"
                )
            rows.append([*context, *continuation][-self.max_length - 1 :])
        _warn_of_cuts(sum(len(context) + len(rest) > self.max_length + 1 for context, rest in pairs), self.max_length)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for batch in self._batches(rows):
            longest = max(max(len(rows[index]) for index in batch) - 1, 1)
            width = min(cache.bucket(longest), self.max_length) + 1
            tokens = np.zeros((min(self.batch_size, len(rows)), width), np.int32)
            for place, index in enumerate(batch):
                tokens[place, : len(rows[index])] = rows[index]
            with serving_mesh.use(self._mesh):
                scores, likeliest = (np.asarray(array) for array in self._scores(self._params, tokens))
            for place, index in enumerate(batch):
                stop = len(rows[index]) - 1
                cut = np.s_[place, stop - len(pairs[index][1]) : stop]
                answers[index] = float(scores[cut].sum(dtype=np.float64)), bool(likeliest[cut].all())
        return answers

    def document_log_likelihoods(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """Return log p of each whole document, after the end of another; long ones in `windows`."""
        cuts = [windows(tokens, self.tokenizer.end_of_document, self.max_length) for tokens in documents]
        scores = iter(self.log_likelihoods([pair for pairs in cuts for pair in pairs]))
        return [math.fsum(next(scores)[0] for _ in pairs) for pairs in cuts]

    def continuations(
        self, prompts: Sequence[str], until: Sequence[str] = (), max_tokens: int = 256, sampling: Sampling | None = None
    ) -> list[str]:
        """Continue each prompt up to the first text of `until`, the end of the document, or `max_tokens` tokens.

        What ends a continuation is looked for in its text, because tokens may reach across it; it is cut off.

        Raises:
            ValueError: max_tokens leaves no room for a prompt within `max_length`.
        """
        if not 0 < max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens must be in 1..{self.max_length - 1}, found {max_tokens}: the model reads "
                f"max_length={self.max_length} tokens, of which the prompt needs at least one"
            )
        sampling = Sampling() if sampling is None else sampling
        room = self.max_length - max_tokens
        whole = [self.tokenizer.encode(prompt) or [self.tokenizer.end_of_document] for prompt in prompts]
        _warn_of_cuts(sum(len(tokens) > room for tokens in whole), room)
        rows = [tokens[-room:] for tokens in whole]
        answers = [""] * len(rows)
        for batch in self._batches(rows):
            # The last batch is filled up: another number of rows would be another program.
            filled = batch + batch[-1:] * (min(self.batch_size, len(rows)) - len(batch))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self._key, jnp.array(filled))
            texts = self._continue([rows[index] for index in filled], list(until), max_tokens, sampling, keys)
            for index, text in zip(filled, texts, strict=True):
                answers[index] = text
        return answers

    def _continue(
        self, rows: list[list[int]], until: list[str], max_tokens: int, sampling: Sampling, keys: jax.Array
    ) -> list[str]:
        new: list[list[int]] = [[] for _ in rows]
        ended = [False] * len(rows)
        texts = [""] * len(rows)
        for news in stream(self.decoder, rows, max_tokens, sampling, keys, block=BLOCK_STEPS):
            for index, tokens in enumerate(news):
                if not ended[index]:
                    new[index] += tokens
                    texts[index], ended[index] = self._text(rows[index], new[index], until)
            if all(ended):
                break
        return texts

    def _text(self, row: list[int], new: list[int], until: list[str]) -> tuple[str, bool]:
        """Return the text of the new tokens up to what ends them, and whether something does."""
        end = self.tokenizer.end_of_document
        ended = end in new
        new = new[: new.index(end)] if ended else new
        # Decoded with the prompt, because a space may depend on what is before it.
        text = self.tokenizer.decode(row + new)[len(self.tokenizer.decode(row)) :]
        places = [text.index(stop) for stop in until if stop in text]
        return text[: min(places, default=len(text))], ended or bool(places)

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Cut the rows' numbers into batches of like lengths, the longest first."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


def load(
    checkpoint: str | Path,
    step: int | None = None,
    schedule: str | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Scorer:
    """Make a scorer of a checkpoint.

    Args:
        checkpoint: <workdir>/checkpoints.
        step: None: the newest.
        schedule: name of the TransPoint schedule to run under, scaled to `max_length`; None: the checkpoint's.
        max_length: None: data.seq_len, the length that the model was trained on.
        batch_size: as for `Scorer`.
        seed: as for `Scorer`.

    Raises:
        ValueError: there is no such checkpoint or schedule, the model has too few layers for it, or a number is less
            than 1.
    """
    saved = serving_options.restore(Path(checkpoint), step)
    config = saved.config
    length = config.data.seq_len if max_length is None else max_length
    model = serving_options.run_under(config.model, schedule, length, "schedule=")
    tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
    return Scorer(TransMamba(model), saved.params, tokenizer, length, batch_size, config.train.loss_chunk, seed)


def _warn_of_cuts(count: int, length: int) -> None:
    if count:
        _log.warning("%d contexts are longer than there is room for: only their last %d tokens are read", count, length)
