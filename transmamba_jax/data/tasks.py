"""The synthetic tasks: each a frozen dataclass whose fields are the options of its name; see `synthetic`.

Sources: MQAR (Zoology) arXiv 2312.04927; recall, noisy recall, selective copying and induction after MAD,
arXiv 2403.17844; copying and the phone book after "Repeat After Me", arXiv 2402.01032.
"""

import dataclasses
import functools
import sysconfig
from pathlib import Path
from typing import ClassVar

import numpy as np

from transmamba_jax.data.task_rows import Row, Task, Writer

_LETTERS = 26
_MOST_LETTERS = 13  # of a name: as a number it is an int64
_DIGITS = 10


@dataclasses.dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall (Zoology): pairs k v k v ..., then every key once, followed by its value.

    The pairs stand at the front. Behind them a key is asked at an even offset o, drawn without replacement with
    p(o) ~ (o / 2 + 1)^(power - 1): near offsets are likelier. The value follows its key as the answer. Keys are from
    the lower half of the vocabulary without 0, values from the upper. Elsewhere is 0, or with `random=1` any id.
    """

    vocab: int = 256
    pairs: int = 8
    power: float = 0.01
    random: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, vocab=4, pairs=1)
        if self.pairs > self.vocab // 2 - 1:
            raise ValueError(f"mqar: pairs must be at most vocab / 2 - 1 = {self.vocab // 2 - 1}, found {self.pairs}")

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.vocab

    def least_length(self) -> int:
        """Return 4 tokens per pair: the pair, and its question."""
        return 4 * self.pairs

    def most_answers(self, _length: int) -> int:
        """Return one token for each pair."""
        return self.pairs

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        half, start = self.vocab // 2, 2 * self.pairs
        keys = 1 + generator.choice(half - 1, self.pairs, replace=False)
        values = half + generator.integers(self.vocab - half, size=self.pairs)
        tokens = generator.integers(self.vocab, size=length) if self.random else np.zeros(length, np.int64)
        tokens[:start:2], tokens[1:start:2] = keys, values
        places = np.arange(1, (length - start) // 2 + 1, dtype=np.float64) ** (self.power - 1)
        offsets = generator.choice(len(places), self.pairs, replace=False, p=places / places.sum())
        answers, facts = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        for pair, offset in enumerate(offsets):
            place = start + 2 * offset
            tokens[place : place + 2] = keys[pair], values[pair]
            facts[place + 1] = 2 * pair + 1
        for number, place in enumerate(np.flatnonzero(facts >= 0), start=1):
            answers[place] = number
        return Row(tokens.astype(np.int32), (answers > 0).astype(np.float32), answers, facts)


@dataclasses.dataclass(frozen=True)
class Recall:
    """In-context recall (MAD): a stream of key value pairs; a key that was seen before is followed by its value.

    A pair has a new key with probability `new` while there are any, else a key that was seen, drawn uniformly; its
    value is then an answer. The ids 0 .. keys - 1 are keys, those behind them values. The fact is the key's latest
    value before.
    """

    keys: int = 32
    values: int = 32
    new: float = 0.5
    noise: ClassVar[int] = 0
    share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, keys=1, values=1)
        _in_unit(self, "new")

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.keys + self.values + self.noise

    def least_length(self) -> int:
        """Return two pairs: one to see, one to ask."""
        return 4

    def most_answers(self, length: int) -> int:
        """Return one token for each pair but the first."""
        return length // 2 - 1

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        writer = Writer(length)
        unseen = generator.permutation(self.keys).tolist()
        # Drawn together: a draw by itself takes longer than the rest of a pair.
        coins, picks = generator.random((2, length // 2)).tolist()
        values = (self.keys + generator.integers(self.values, size=self.keys)).tolist()
        keys: list[int] = []  # in the order of their first pairs
        seen: dict[int, tuple[int, int]] = {}  # key -> value, place of the value
        for coin, pick in zip(coins, picks, strict=True):
            while self.share and writer.room > 2 and generator.random() < self.share:
                writer.put(self.keys + self.values + int(generator.integers(self.noise)))
            if writer.room < 2:
                break
            if unseen and (not seen or coin < self.new):
                key, value = unseen.pop(), values[len(unseen)]
                keys.append(key)
                writer.put(key, value)
            else:
                key = keys[int(pick * len(keys))]
                value, fact = seen[key]
                writer.put(key)
                writer.answer([value], [fact])
            seen[key] = value, len(writer.tokens) - 1
        return writer.row()


@dataclasses.dataclass(frozen=True)
class NoisyRecall(Recall):
    """Recall with noise: before a pair, noise tokens of ids of their own, each further one with probability `share`."""

    noise: int = 16  # type: ignore[misc]
    share: float = 0.4  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        _at_least(self, noise=1)
        _in_unit(self, "share")
        if self.share == 1:
            raise ValueError("noisy_recall: share must be below 1, found 1: no pair would follow")


@dataclasses.dataclass(frozen=True)
class Phonebook:
    """A phone book ("Repeat After Me"): lines of name, number and line end, then some of the names, each answered.

    Names are distinct strings of `letters` letters, numbers have `digits` digits. Ids: letters, then digits, then the
    end of a line, the question mark before the asked names, and padding.
    """

    entries: int = 12
    letters: int = 3
    digits: int = 2
    queries: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, entries=1, letters=1, digits=1, queries=1)
        if self.entries > _LETTERS**self.letters:
            raise ValueError(f"phonebook: {self.letters} letters make fewer names than entries={self.entries}")
        if self.letters > _MOST_LETTERS:
            raise ValueError(f"phonebook: letters must be at most {_MOST_LETTERS}, found {self.letters}")
        if self.queries > self.entries:
            raise ValueError(f"phonebook: queries={self.queries} must not exceed entries={self.entries}")

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return _LETTERS + _DIGITS + 3

    def least_length(self) -> int:
        """Return the tokens of the book and its questions."""
        return (self.entries + self.queries) * (self.letters + self.digits + 1)

    def most_answers(self, _length: int) -> int:
        """Return the digits of the asked numbers."""
        return self.queries * self.digits

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        line, ask, padding = range(_LETTERS + _DIGITS, self.vocab_size)
        names = _distinct_words(generator, self.entries, self.letters)
        numbers = _LETTERS + generator.integers(_DIGITS, size=(self.entries, self.digits))
        writer, places = Writer(length), []
        for name, number in zip(names, numbers, strict=True):
            writer.put(*name)
            places.append(len(writer.tokens))
            writer.put(*number, line)
        for entry in generator.choice(self.entries, self.queries, replace=False):
            writer.put(ask, *names[entry])
            writer.answer(list(numbers[entry]), [places[entry] + digit for digit in range(self.digits)])
        return writer.row(padding)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copying ("Repeat After Me"): BOS x_1 .. x_L COPY x_1 .. x_L, the second half answered.

    Ids: `alphabet` letters, then BOS, COPY and padding.
    """

    count: int = 20
    alphabet: int = 26

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, count=1, alphabet=2)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.alphabet + 3

    def least_length(self) -> int:
        """Return both halves and two markers."""
        return 2 * self.count + 2

    def most_answers(self, _length: int) -> int:
        """Return the second half."""
        return self.count

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        letters = list(generator.integers(self.alphabet, size=self.count))
        writer = Writer(length)
        writer.put(self.alphabet, *letters, self.alphabet + 1)
        writer.answer(letters, list(range(1, self.count + 1)))
        return writer.row(self.alphabet + 2)


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
    """Selective copying (MAD): tokens stand among blanks; behind the COPY marker they are written out in order.

    Ids: `alphabet` letters, then blank and COPY. The row is full: blanks fill what the tokens leave.
    """

    count: int = 16
    alphabet: int = 16

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, count=1, alphabet=2)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.alphabet + 2

    def least_length(self) -> int:
        """Return the tokens twice and the marker."""
        return 2 * self.count + 1

    def most_answers(self, _length: int) -> int:
        """Return the tokens among the blanks."""
        return self.count

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        letters = generator.integers(self.alphabet, size=self.count)
        context = np.full(length - self.count - 1, self.alphabet)
        places = np.sort(generator.choice(len(context), self.count, replace=False))
        context[places] = letters
        writer = Writer(length)
        writer.put(*context, self.alphabet + 1)
        writer.answer(list(letters), list(places))
        return writer.row()


@dataclasses.dataclass(frozen=True)
class Induction:
    """Induction: random tokens, among them a marker; the row ends with the marker again and the token behind it.

    Ids: `alphabet` letters, then the marker. The answer is the token after the only occurrence of the marker before.
    """

    alphabet: int = 16

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, alphabet=2)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return self.alphabet + 1

    def least_length(self) -> int:
        """Return marker and token, twice."""
        return 4

    def most_answers(self, _length: int) -> int:
        """Return one."""
        return 1

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        context = generator.integers(self.alphabet, size=length - 2)
        place = int(generator.integers(len(context) - 1))
        context[place] = self.alphabet
        writer = Writer(length)
        writer.put(*context, self.alphabet)
        writer.answer([int(context[place + 1])], [place + 1])
        return writer.row()


@dataclasses.dataclass(frozen=True)
class Needle:
    """A needle in a haystack: one sentence with a number in real text, asked for at the end of the row.

    Bytes of the standard library's text surround `The number is 12345.`, which begins at the share `depth` of the
    text (below 0: drawn uniformly); the row ends with `The number is ` and the digits as the answer. Vocabulary: bytes.
    """

    digits: int = 5
    depth: float = -1.0
    _STATEMENT: ClassVar[bytes] = b"\nThe number is "

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(self, digits=1)
        if self.depth > 1:
            raise ValueError(f"needle: depth must be at most 1, or below 0 for a random one, found {self.depth}")

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        return 256

    def least_length(self) -> int:
        """Return fact and question without any text."""
        return 2 * (len(self._STATEMENT) + self.digits) + 1

    def most_answers(self, _length: int) -> int:
        """Return the digits of the number."""
        return self.digits

    def row(self, generator: np.random.Generator, length: int) -> Row:
        """Draw one row."""
        number = list(48 + generator.integers(_DIGITS, size=self.digits))
        room = length - self.least_length()
        text = _stdlib_text()
        begin = int(generator.integers(max(len(text) - room, 1)))
        depth = generator.random() if self.depth < 0 else self.depth
        place = round(depth * room)
        writer = Writer(length)
        writer.put(*text[begin : begin + place], *self._STATEMENT)
        fact = len(writer.tokens)
        writer.put(*number, ord("."), *text[begin + place : begin + room], *self._STATEMENT)
        writer.answer(number, [fact + digit for digit in range(self.digits)])
        return writer.row(ord("\n"))


TASKS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "recall": Recall,
    "noisy_recall": NoisyRecall,
    "phonebook": Phonebook,
    "copy": Copy,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "needle": Needle,
}


def _at_least(task: object, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(task, name)
        if value < minimum:
            raise ValueError(f"{type(task).__name__}: {name} must be >= {minimum}, found {value}")


def _in_unit(task: object, name: str) -> None:
    value = getattr(task, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{type(task).__name__}: {name} must be from 0 to 1, found {value}")


def _distinct_words(generator: np.random.Generator, count: int, letters: int) -> np.ndarray:
    """Draw distinct strings of letters, int [count, letters]."""
    numbers = generator.choice(_LETTERS**letters, count, replace=False)
    return numbers[:, None] // _LETTERS ** np.arange(letters)[::-1] % _LETTERS


@functools.cache
def _stdlib_text() -> bytes:
    """Return 8 MB of the running Python's own source files, without what is not ASCII."""
    from transmamba_jax.data.stdlib_dataset import source_files  # imports TFDS

    files = source_files(Path(sysconfig.get_path("stdlib")))
    text = b"\n".join(path.read_bytes() for path in files)[: 2**23]
    return text.translate(None, bytes(range(128, 256)))
