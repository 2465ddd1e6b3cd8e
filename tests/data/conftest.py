"""Small corpora, and the standard library prepared once for the session."""

import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from transmamba_jax.data.stdlib_dataset import prepare


@pytest.fixture(scope="session")
def stdlib_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with the prepared standard library."""
    cache = tmp_path_factory.mktemp("cache")
    prepare(cache)
    return cache


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., list[bytes]]:
    """Write `count` text files of different lengths and return their bytes in the order of the source."""

    def write(count: int, longest: int = 60, seed: int = 0) -> list[bytes]:
        generator = random.Random(seed)
        texts = []
        for number in range(count):
            words = "".join(generator.choices("abcdé \n", k=generator.randint(1, longest)))
            texts.append(f"<{number}>{words}".encode())
            (tmp_path / f"{number:04d}.txt").write_bytes(texts[-1])
        return texts

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every look-up of a name and every connection an error that nothing catches as a network failure."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}, {options}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
