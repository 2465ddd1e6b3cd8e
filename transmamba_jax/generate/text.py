"""Text from tokens as they come: characters when they are final, up to a stop string or the end of the document."""

from collections.abc import Iterator, Sequence

import jax

from transmamba_jax import data
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.generate.sampling import Sampling
from transmamba_jax.generate.streaming import stream


class TextStream:
    """Decode the new tokens of one row step by step.

    A piece of text is released when no token that follows can change it, and when it cannot be the beginning of a stop
    string. Hence the pieces of `add` joined are the decoded text of all tokens, however the tokens were cut into calls.
    The text is that behind the prompt: a tokenizer's spaces may depend on their neighbours, and a character of several
    tokens may have begun in the prompt.
    """

    def __init__(self, tokenizer: data.Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Start behind `prompt`, whose text is not released; a text of `stop` ends the stream and is left out.

        Raises:
            ValueError: a stop string is empty.
        """
        if "" in stop:
            raise ValueError(f"stop[{list(stop).index('')}] is empty; it needs at least one character")
        self.ended = False
        """A stop string or the end of the document has come: nothing is released from here on."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(prompt)
        """Tokens behind those whose text is final; those of the last final piece are kept as the context."""
        self._decoded = len(tokenizer.decode_stable(self._tokens))
        """Characters of the text of `_tokens` that have been taken."""
        self._final = len(self._tokens)
        """Number of `_tokens` that had a final text when it was last asked for."""
        self._held = ""
        """Text that may be the beginning of a stop string."""

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """Append tokens and return the text that is certain now; `last`: nothing will follow, so all of it."""
        if self.ended:
            return ""
        new = list(tokens)
        end = self._tokenizer.end_of_document
        at_end = end in new
        if at_end:
            new = new[: new.index(end)]
        self._held += self._decode(new, last or at_end)
        found = [(place + len(text), place) for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:  # the string that is complete first; of several, the longest
            self.ended = True
            return self._release(min(found)[1])
        self.ended = at_end
        return self._release(len(self._held) if last or at_end else len(self._held) - self._begun())

    def _decode(self, new: list[int], last: bool) -> str:
        """Return the text that becomes final with the new tokens."""
        self._tokens += new
        whole = self._tokenizer.decode(self._tokens)
        text = whole if last else self._tokenizer.decode_stable(self._tokens)
        piece, self._decoded = text[self._decoded :], max(self._decoded, len(text))
        if text == whole and new:
            # Decoding takes time in proportion to what is kept. A context of one final piece is enough, unless it has
            # no text: decoders treat the first token with a text in their own way.
            context = self._tokens[self._final :]
            decoded = len(self._tokenizer.decode(context))
            if decoded:
                self._tokens, self._decoded = context, decoded
                self._final = len(context)
        return piece

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _begun(self) -> int:
        """Count the last characters that are the beginning of a stop string."""
        lengths = [
            length
            for text in self._stop
            for length in range(1, min(len(text), len(self._held) + 1))
            if self._held.endswith(text[:length])
        ]
        return max(lengths, default=0)


def stream_text(
    decoder: Decoder,
    tokenizer: data.Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    *,
    stop: Sequence[str] = (),
    block: int = 8,
) -> Iterator[list[str]]:
    """Yield the new text of every row after every `block` tokens; each row's pieces joined are its continuation.

    A row ends at the first stop string, which is left out, at the end of the document, or after `max_new_tokens`.

    Raises:
        ValueError: as for `stream`, or a stop string is empty; when called and not at the first text.
    """
    rows = [TextStream(tokenizer, prompt, stop) for prompt in prompts]
    return _stream_text(rows, stream(decoder, prompts, max_new_tokens, sampling, key, block=block))


def _stream_text(rows: list[TextStream], tokens: Iterator[list[list[int]]]) -> Iterator[list[str]]:
    for news in tokens:
        yield [row.add(new) for row, new in zip(rows, news, strict=True)]
        if all(row.ended for row in rows):
            return
    yield [row.add([], last=True) for row in rows]
