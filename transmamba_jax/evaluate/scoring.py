"""Log-likelihoods and continuations of texts of any lengths, as benchmarks ask for them.

    log p(continuation | context) = sum_i log softmax(z_{i-1})[token_i]      over the tokens of the continuation

Requests are sorted by length and batched; rows are padded on the right, which leaves no trace in real tokens.
"""

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Bool

from transmamba_jax import cache, data
from transmamba_jax.checkpoint import command_options
from transmamba_jax.config import KernelsConfig
from transmamba_jax.generate.arguments import check_params, raise_not_finite, whole_number
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.generate.prompts import check_prompt
from transmamba_jax.generate.sampling import Sampling, fold_rows
from transmamba_jax.generate.text import stream_text
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import calibration, serving_mesh
from transmamba_jax.runtime.token_loss import chunked_log_likelihoods, tokens_at_a_time
from transmamba_jax.shapes import Array, Float32, Int

BLOCK_STEPS = 16
"""Tokens that are generated between two looks for a text that ends them."""

_log = logging.getLogger(__name__)


def token_scores(
    model: nn.Module,
    chunk: int,
    params: Any,
    tokens: Int[Array, "B T_plus_1"],
    segment_ids: Int[Array, "B T_plus_1"] | None = None,
    vocab_size: int | None = None,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Return log p of each token but the first given those before it, and whether it is the most likely one.

    The most likely id is looked for below `vocab_size` (None: among all), as greedy decoding does.

    Logits exist for `chunk` tokens of a device at a time, in float32.
    """
    inputs = {} if segment_ids is None else {"segment_ids": segment_ids[:, :-1]}
    hidden = model.apply({"params": params}, tokens[:, :-1], **inputs, method="hidden")
    logits = lambda part: model.apply({"params": params}, part, method="logits")
    return chunked_log_likelihoods(logits, hidden, tokens[:, 1:], chunk, vocab_size)


def windows(context: Sequence[int], tokens: Sequence[int], length: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text behind a context into (context, continuation) pairs that predict every token of it once.

    Each pair makes the model read `length` tokens at most: as much context as fits.
    """
    row, before = [*context, *tokens], len(context)
    pairs = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        pairs.append((row[max(before + stop - 1 - length, 0) : before + start], list(tokens[start:stop])))
    return pairs


def well_formed(text: str) -> str:
    """Return a text that UTF-8 can spell: halves of a surrogate pair are joined, a single one becomes U+FFFD.

    JSON files have them, where a text was cut between them.

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"a request must be of texts, found {type(text).__name__} {text!r}"[:120])
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_pair(tokenizer: data.Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]] | None:
    """Return the tokens of a context and of its continuation, as the lm-evaluation-harness cuts them.

    Spaces at the end of the context belong to the continuation. Both are encoded together and cut where the context's
    own tokens end, because tokens may reach across. A continuation that has no tokens of its own then, since the last
    token of the context holds it, is encoded alone. A context without tokens is the end of another document.

    Returns:
        None where the continuation is a text and no token spells it: it has no likelihood.
    """
    context, continuation = well_formed(context), well_formed(continuation)
    text = context.rstrip()
    continuation, context = context[len(text) :] + continuation, text
    before = tokenizer.encode(context)
    tokens = tokenizer.encode(context + continuation)[len(before) :] or tokenizer.encode(continuation)
    if continuation and not tokens:
        return None
    return before or [tokenizer.end_of_document], tokens


class Scorer:
    """Answers requests with one model under its config's schedule; see `lm_eval_adapter` for the harness."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        tokenizer: data.Tokenizer,
        max_length: int,
        batch_size: int = 8,
        loss_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        """Take a model.

        Args:
            model: the model.
            params: its parameters.
            tokenizer: its tokenizer, whose end of a document goes before a text without a context.
            max_length: tokens that the model may read in a row; longer contexts lose their beginning.
            batch_size: requests that are answered together.
            loss_chunk: tokens whose logits exist at a time; None: as `train.loss_chunk`.
            seed: of the random keys where continuations are sampled: one a request, by its place.

        Raises:
            ValueError: the tokenizer or the parameters do not fit the model, or a number is less than 1.
        """
        data.check_vocabulary(tokenizer, model.config.vocab_size)
        check_params(model, params)
        self.tokenizer = tokenizer
        self.max_length = whole_number("max_length", max_length, 1)
        self.batch_size = whole_number("batch_size", batch_size, 1)
        if loss_chunk is not None:
            loss_chunk = whole_number("loss_chunk", loss_chunk, 1)
        chunk = tokens_at_a_time(loss_chunk, model.config.vocab_size)
        self._model, self._key = model, jax.random.key(seed)
        self._params, self._mesh = serving_mesh.place(params)
        self._scores = jax.jit(functools.partial(token_scores, model, chunk, vocab_size=tokenizer.vocab_size))

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Decoder of the model; made when it is first used, because it holds its own copy of the parameters."""
        return Decoder(self._model, self._params, vocab_size=self.tokenizer.vocab_size)

    def log_likelihoods(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), log p and whether greedy decoding would give the continuation.

        A continuation longer than `max_length` is scored in `windows`. One without tokens has log p 0.

        Raises:
            ValueError: a context or continuation is not a list of token ids, has an id outside the vocabulary, or a
                context is empty; or logits are NaN, and the message names the parameters that are not finite.
        """
        pairs = list(pairs)  # an iterator can be read once
        rows, owners = list[tuple[list[int], list[int]]](), list[int]()
        lost = 0
        for index, pair in enumerate(pairs):
            context, continuation = self._check(*_pair(pair, index), index)
            lost += len(context) > 1 and len(context) + len(continuation) > self.max_length + 1
            cut = windows(context, continuation, self.max_length)
            rows += cut
            owners += [index] * len(cut)
        _warn_of_cuts(lost, self.max_length)
        scores: list[list[float]] = [[] for _ in pairs]
        greedy = [True] * len(pairs)
        for index, (score, likeliest) in zip(owners, self._score(rows), strict=True):
            scores[index].append(score)
            greedy[index] &= likeliest
        return [(math.fsum(parts), each) for parts, each in zip(scores, greedy, strict=True)]

    def _check(self, context: Any, continuation: Any, index: int) -> tuple[list[int], list[int]]:
        size = self._model.config.vocab_size
        context = check_prompt(context, size, f"the context of request {index}")
        return context, check_prompt(continuation, size, f"the continuation of request {index}", least=0)

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score pairs of at most `max_length` + 1 tokens."""
        rows = [context + continuation for context, continuation in pairs]
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
                if math.isnan(answers[index][0]):
                    raise_not_finite(self._params, "texts have no likelihood")
        return answers

    def text_log_likelihoods(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return log p and greediness of each continuation of a text; see `encode_pair` for its tokens.

        A continuation that no token spells, as a tokenizer without spaces has none for " ", gets (-inf, False).
        """
        pairs = list(pairs)  # an iterator can be read once
        encoded = [encode_pair(self.tokenizer, *_pair(pair, index)) for index, pair in enumerate(pairs)]
        answers = iter(self.log_likelihoods([pair for pair in encoded if pair is not None]))
        missing = [pair for pair, found in zip(pairs, encoded, strict=True) if found is None]
        if missing:
            _log.warning(
                "%d continuations have no tokens, such as %r: their log p is -inf", len(missing), missing[0][1]
            )
        return [(-math.inf, False) if pair is None else next(answers) for pair in encoded]

    def document_log_likelihoods(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """Return log p of each whole document, after the end of another; long ones in `windows`."""
        pairs = [([self.tokenizer.end_of_document], tokens) for tokens in documents]
        return [score for score, _ in self.log_likelihoods(pairs)]

    def continuations(
        self,
        prompts: Sequence[str],
        until: str | Sequence[str] | None = (),
        max_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Continue each prompt up to the first text of `until`, the end of the document, or `max_tokens` tokens.

        A text of `until` is looked for in the text, because tokens may reach across it, and is left out. A prompt that
        does not fit into `max_length` beside `max_tokens` loses its beginning. Where no prompt would fit, prompt and
        new tokens get half of `max_length` each. A line says either.

        Raises:
            ValueError: `prompts` is one text, or max_tokens < 1.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, found the text {prompts[:20]!r}")
        max_tokens, until = (
            whole_number("max_tokens", max_tokens, 1),
            [until] if isinstance(until, str) else until or [],
        )
        if max_tokens >= self.max_length:
            asked, max_tokens = max_tokens, max(self.max_length // 2, 1)
            _log.warning(
                "%d new tokens leave no place for a prompt in max_length=%d: at most %d are generated",
                asked,
                self.max_length,
                max_tokens,
            )
        sampling = Sampling() if sampling is None else sampling
        space = max(self.max_length - max_tokens, 1)
        whole = [self.tokenizer.encode(well_formed(prompt)) or [self.tokenizer.end_of_document] for prompt in prompts]
        _warn_of_cuts(sum(len(tokens) > space for tokens in whole), space)
        rows = [tokens[-space:] for tokens in whole]
        answers = [""] * len(rows)
        for batch in self._batches(rows):
            # The last batch is filled up: another number of rows would be another program.
            filled = batch + batch[-1:] * (min(self.batch_size, len(rows)) - len(batch))
            keys = fold_rows(self._key, np.array(filled))
            texts = self._continue([rows[index] for index in filled], list(until), max_tokens, sampling, keys)
            for index, text in zip(filled, texts, strict=True):
                answers[index] = text
        return answers

    def _continue(
        self, rows: list[list[int]], until: list[str], max_tokens: int, sampling: Sampling, keys: jax.Array
    ) -> list[str]:
        options: Any = {"stop": until, "block": BLOCK_STEPS}
        pieces = stream_text(self.decoder, self.tokenizer, rows, max_tokens, sampling, keys, **options)
        return ["".join(parts) for parts in zip(*pieces, strict=True)]

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
        checkpoint: a run, its folder of checkpoints, or one step.
        step: None: the newest.
        schedule: schedule to run under: a name, scaled to `max_length`, or TransPoints; None: the checkpoint's.
        max_length: None: data.seq_len, the length that the model was trained on.
        batch_size: as for `Scorer`.
        seed: as for `Scorer`.

    Raises:
        ValueError: there is no such checkpoint or schedule, the model has too few layers for it, or a number is less
            than 1.
    """
    saved = command_options.restore(checkpoint, step)
    config = saved.config
    length = config.data.seq_len if max_length is None else max_length
    model = command_options.with_schedule(config.model, schedule, length, "schedule")
    tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
    kernels = calibration.kernels(model, KernelsConfig(), "read")
    return Scorer(
        TransMamba(model, kernels), saved.params, tokenizer, length, batch_size, config.train.loss_chunk, seed
    )


def _pair(pair: Any, index: int) -> tuple[Any, Any]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"request {index} must be a pair (context, continuation), found {pair!r}"[:160])
    return pair[0], pair[1]


def _warn_of_cuts(count: int, length: int) -> None:
    if count:
        _log.warning("%d contexts are too long: only their last %d tokens are read", count, length)
