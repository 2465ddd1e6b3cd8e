"""Test the paths that options name and the names that messages show."""

import os
from pathlib import Path

import pytest

from transmamba_jax.runtime.paths import expand_path, show_path


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/runs/a") == Path("/home/me/runs/a")
    assert expand_path("~") == Path("/home/me")
    assert expand_path(Path("~/runs")) == Path("/home/me/runs")
    assert expand_path("runs/~a/~") == Path("runs/~a/~")


def test_a_user_without_a_home_is_refused():
    with pytest.raises(ValueError, match=r"path ~nobody-here/x: there is no home folder '~nobody-here'.* write "):
        expand_path("~nobody-here/x")
    assert expand_path("./~nobody-here") == Path("~nobody-here")


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xc3\xa9.txt", "café.txt"), (b"a\xff.txt", r"a\xff.txt"), (b"a\nb\x1b[1m", r"a\nb\x1b[1m")],
)
def test_names_in_messages_are_printable(name: bytes, shown: str):
    assert show_path(os.fsdecode(name)) == shown
    assert show_path(Path(os.fsdecode(name))).isprintable()
