"""Continue a text with a checkpoint.

python -m transmamba_jax.generate --checkpoint runs/tiny/checkpoints --prompt "def main("
"""

import argparse
import collections
import os
import sys
from collections.abc import Sequence

import jax

from transmamba_jax import data
from transmamba_jax.checkpoint import command_options
from transmamba_jax.config import KernelsConfig
from transmamba_jax.generate.decode import PREFILL_CHUNK_SIZE, Decoder, DecodeState
from transmamba_jax.generate.sampling import Sampling
from transmamba_jax.generate.streaming import stream
from transmamba_jax.generate.text import TextStream
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import calibration, compile_cache, hardware, logs

_TURNS = 4  # of a session that :back can forget: each is kept with its keys and values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transmamba generate",
        description="Continue a text with a checkpoint, as it comes. Without --prompt, in a terminal: a session.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    command_options.add_arguments(parser)
    add("--prompt", default=None, metavar="TEXT", help="text to continue; -: read standard input")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens to add (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the logits; 0: always the most likely token (default: %(default)s)",
    )
    add("--top-k", type=int, default=None, metavar="K", help="sample among the K most likely tokens")
    add("--top-p", type=float, default=None, metavar="P", help="among the fewest whose probabilities reach P")
    add(
        "--min-p", type=float, default=None, metavar="P", help="among those at least P times as likely as the likeliest"
    )
    add(
        "--repetition-penalty",
        type=float,
        default=None,
        metavar="X",
        help="above 1: make tokens less likely that are there already",
    )
    add("--seed", type=int, default=0, help="random seed of the sampling (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add(
        "--prefill-chunk-size",
        type=int,
        default=PREFILL_CHUNK_SIZE,
        metavar="N",
        help="prompt tokens read at a time, which bounds the memory of a long prompt (default: %(default)s)",
    )
    return parser


class Terminal:
    """A checkpoint and the options of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the checkpoint.

        Raises:
            ValueError: it is not there, or an option is out of range.
        """
        self.sampling = Sampling(
            options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p
        )
        for name in ("max_new_tokens", "prefill_chunk_size"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1, found {getattr(options, name)}")
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed must be in 0..{2**32 - 1}, found {options.seed}")
        if "" in options.stop:
            raise ValueError("--stop is empty; it needs at least one character")
        self.stop: list[str] = options.stop
        saved = command_options.restore(options.checkpoint, options.step)
        self.options, self.key = options, jax.random.key(options.seed)
        self.tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
        config = command_options.apply(saved.config, options)
        model = TransMamba(config, calibration.kernels(config, KernelsConfig(), "read"))
        self.decoder = Decoder(model, saved.params, vocab_size=self.tokenizer.vocab_size)

    def encode(self, text: str, name: str = "the prompt") -> list[int]:
        """Return the tokens of a text.

        Raises:
            ValueError: there are none, or the text is from bytes that are no UTF-8.
        """
        try:
            tokens = self.tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be text in UTF-8, found another byte at character {error.start}") from None
        if not tokens:
            raise ValueError(f"{name} is empty; it needs at least one token")
        return tokens

    def show(
        self, source: list[list[int]] | DecodeState, prompt: Sequence[int]
    ) -> tuple[list[int], DecodeState | None]:
        """Continue one prompt or state and print the text as it comes.

        Args:
            source: what to continue.
            prompt: the tokens before the new ones, on which their text may depend.

        Returns:
            The tokens of the text that was printed, and the state after them; None: it has read on.
        """
        options, text = self.options, TextStream(self.tokenizer, prompt, self.stop)
        size = options.prefill_chunk_size
        tokens = stream(self.decoder, source, options.max_new_tokens, self.sampling, self.key, prefill_chunk_size=size)
        new, shown, state = list[int](), list[str](), None
        while not text.ended:
            try:
                (block,) = next(tokens)
            except StopIteration as end:
                state = end.value
                break
            new += block
            shown.append(text.add(block))
            print(shown[-1], end="", flush=True)
        shown.append(text.add([], last=True))
        print(shown[-1], flush=True)
        return (new, state) if state is not None else (self._tokens_of("".join(shown), prompt, new), None)

    def _tokens_of(self, shown: str, prompt: Sequence[int], new: list[int]) -> list[int]:
        """Return tokens of the text that was shown: as many of the new ones as spell it, and the rest encoded."""
        before = len(self.tokenizer.decode_stable(prompt))
        for count in range(len(new), -1, -1):
            text = self.tokenizer.decode([*prompt, *new[:count]])[before:]
            if self.tokenizer.end_of_document not in new[:count] and shown.startswith(text):
                return new[:count] + self.tokenizer.encode(shown[len(text) :])
        return self.tokenizer.encode(shown)

    def turn(self, state: DecodeState, line: str) -> DecodeState:
        """Add a line and its continuation; return the state where the text that was shown ends."""
        prompt, size = self.encode(line, "the line") if line else [], self.options.prefill_chunk_size
        if line:
            state = self.decoder.extend(state, [prompt], size)
        shown, after = self.show(state, prompt)
        if after is not None:
            return after
        return self.decoder.extend(state, [shown], size) if shown else state

    def session(self) -> None:
        """Read lines from the terminal, and continue the text so far with each."""
        print(
            "A line is added to the text and continued; an empty one continues; :back forgets a turn "
            f"(of the last {_TURNS}), Ctrl-C stops and forgets the present one; Ctrl-D ends."
        )
        states = collections.deque([self.decoder.start(1)], _TURNS + 1)
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line == ":back" and len(states) > 1:
                states.pop()
            elif line == ":back":
                print("There is no turn to forget.")
            elif line or states[-1].lengths[0] > 0:
                try:
                    states.append(self.turn(states[-1], line))
                except KeyboardInterrupt:
                    print("\nStopped; this turn is forgotten.")
                except ValueError as error:
                    print(error)


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Continue a prompt, standard input, or what is typed, and print the text as it comes."""
    options = _parser().parse_args(arguments)
    try:
        if sys.stdin is None and options.prompt in (None, "-"):
            raise ValueError("--prompt TEXT is needed: standard input is closed")
        if options.prompt is None and not sys.stdin.isatty():
            raise ValueError("--prompt is needed where standard input is no terminal; --prompt - reads standard input")
        compile_cache.keep_programs()
        hardware.require_devices()
        terminal = Terminal(options)
        if options.prompt is None:
            terminal.session()
            return 0
        text = _standard_input() if options.prompt == "-" else options.prompt
        prompt = terminal.encode(text)
        print(text, end="", flush=True)
        terminal.show([prompt], prompt)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # who read the text has gone, as `head` does
            print(error, file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 1
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be text in UTF-8: {error}") from None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # After Ctrl-C a program may be compiling still, in a thread of XLA that crashes as the interpreter is taken down.
    os._exit(code)
