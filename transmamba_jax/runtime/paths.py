"""Paths as people type them, and names of files as messages show them."""

import argparse
import os
import re
from pathlib import Path
from typing import cast


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return the path that an option means: a leading `~` or `~user` is that home folder.

    The one rule for every path that is read from YAML, from the command line or from Python. `gs://BUCKET/...` and
    `s3://BUCKET/...` become a `storage.bucket.BucketPath`, which has the methods of a `Path`.

    Raises:
        ValueError: there is no such user; or the path is empty, as an unset variable of a shell leaves it; or the URL
            names no bucket, or needs a package that is not installed; or it is a URL that lost a slash.
    """
    url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text := os.fspath(path))
    if url is not None:
        from transmamba_jax.runtime.storage import bucket  # fsspec

        return cast(Path, bucket.parse(text))
    lost = re.match(r"(gs|s3):/*", text, re.IGNORECASE)
    if lost is not None:  # pathlib.Path("gs://bucket/run") is gs:/bucket/run
        raise ValueError(
            f"path {show_path(path)} lacks a slash (pathlib.Path takes one away; give URLs as text): write "
            f"{lost[1].lower()}://{show_path(text[lost.end() :])}; for a folder that is called so, ./{show_path(path)}"
        )
    if os.fspath(path) == "":
        raise ValueError("a path must not be empty (an unset variable?); the current folder is '.'")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = Path(expanded).parts[0]
        raise ValueError(
            f"path {show_path(path)}: there is no home folder {name!r}; for a folder that is called so, write "
            f"./{show_path(path)}"
        )
    return Path(expanded)


def user_cache() -> Path:
    """Return the folder of what can be made again: `$XDG_CACHE_HOME/transmamba_jax`, by default in `~/.cache`.

    Raises:
        ValueError: the user has no home folder.
    """
    return expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "transmamba_jax"


def option_path(text: str) -> Path:
    """Return `expand_path` of an argument: the `type` of every path in an argparse parser."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def show_path(path: str | os.PathLike[str]) -> str:
    r"""Return a file's name for a message: bytes that are not UTF-8 and control characters as `\xff`, `\n`."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
