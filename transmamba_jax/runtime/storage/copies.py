"""Copies of what is in a bucket, for readers that need files of this machine, and the way back."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from transmamba_jax.runtime.paths import expand_path, show_path, user_cache
from transmamba_jax.runtime.storage.files import is_remote

_RANGE = 2**24  # bytes of a request

_log = logging.getLogger("transmamba_jax.storage")


def is_url(text: str) -> bool:
    """Tell whether a text is the URL of a bucket."""
    return re.match(r"(gs|s3)://", text) is not None


def local_copy(path: Path, cache: Path | None = None) -> Path:
    """Return a path of this machine with the contents of a file or folder: itself, or a copy in the cache.

    A copy is made once. Its name depends on the names, sizes and versions of the objects, so it is never out of date.

    Raises:
        OSError: an object cannot be read, or the cache cannot be written.
    """
    if not is_remote(path):
        return path
    remote: Any = path
    if remote.is_file():
        return _mirror(remote.parent, {remote.name: remote.info()}, cache) / remote.name
    own = remote.files._strip_protocol(str(remote)).rstrip("/") + "/"
    found = remote.files.find(str(remote), detail=True)
    return _mirror(remote, {name.removeprefix(own): info for name, info in found.items()}, cache)


class CopiedPattern(NamedTuple):
    """A pattern of copies, and what they are copies of."""

    pattern: str
    folder: Path
    url: str
    """Folder of the bucket whose objects have their copies in `folder`, under the same names."""

    def told(self, text: str) -> str:
        """Return a text with the names of the objects in place of those of the copies."""
        return text.replace(glob.escape(str(self.folder)), self.url).replace(str(self.folder), self.url)


def local_pattern(pattern: str, cache: Path, folders: bool = False) -> CopiedPattern:
    """Copy the objects that a URL with wildcards names and return the pattern of the copies.

    Names below the first wildcard stay as they are: they decide the split. With `folders`, a URL names a folder.

    Raises:
        ValueError: nothing matches, the bucket cannot be read, or the cache cannot be written.
    """
    if folders:
        return _local_folder(pattern, cache)
    scheme, _, rest = pattern.partition("://")
    parts = [part for part in rest.split("/") if part not in ("", ".")]  # as in a path
    pattern = f"{scheme}://{'/'.join(parts)}"
    wild = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root: Any = expand_path(f"{scheme}://{'/'.join(parts[: max(wild, 1)])}")
    own = root.files._strip_protocol(str(root)).rstrip("/") + "/"
    try:
        matched = root.files.glob(pattern, detail=True)
        found = {name.removeprefix(own): info for name, info in matched.items() if info["type"] == "file"}
        if matched and not found:
            raise ValueError(f"{pattern} names folders; for the objects in them write {pattern}/**/*")
        if not found:
            braces = "; braces are no wildcards" if "{" in pattern else ""
            raise ValueError(f"{pattern} matches no object{braces}; {root} holds {_named(root)}")
        folder = _mirror(root, found, cache)
    except OSError as error:
        raise _unreadable(root, cache, error) from None
    return CopiedPattern("/".join([glob.escape(str(folder)), *parts[wild:]]), folder, str(root))


def _local_folder(url: str, cache: Path) -> CopiedPattern:
    root: Any = expand_path(url)
    try:
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}; {root.parent} holds {_named(root.parent)}")
        folder = local_copy(root, cache)
    except OSError as error:
        raise _unreadable(root, cache, error) from None
    return CopiedPattern(str(folder), folder, str(root))


def _unreadable(root: Any, cache: Path, error: OSError) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"there is no bucket {root.bucket}, or an object was deleted while it was read: {error}")
    return ValueError(f"cannot copy {root} into {show_path(cache)}: {error.strerror or error}")


def _named(root: Any) -> str:
    names = [path.name for path in root.iterdir()] if root.exists() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def _mirror(root: Any, found: Mapping[str, Mapping[str, Any]], cache: Path | None) -> Path:
    """Copy objects below `root` into a folder that is named after them, unless it is there."""
    facts = _facts(found)
    key = hashlib.blake2b(repr((str(root), facts)).encode(), digest_size=16).hexdigest()
    folder = (user_cache() if cache is None else cache) / "buckets" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{key}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the copy
        if not folder.is_dir():
            partial = folder.with_name(f"{key}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            sizes = {name: int(info["size"]) for name, info in found.items()}
            _log.info("copying %d files, %.1f MiB, of %s", len(sizes), sum(sizes.values()) / 2**20, root)
            _download(root, sizes, partial)
            root.files.invalidate_cache()
            now = root.files.find(str(root), detail=True)
            own = root.files._strip_protocol(str(root)).rstrip("/") + "/"
            if _facts({name: now[own + name] for name in found if own + name in now}) != facts:
                raise OSError(errno.EIO, "its objects changed while they were copied; try again")
            partial.rename(folder)
    return folder


def _facts(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """Return name, size and version of every object, sorted."""
    return sorted(
        (name, int(info["size"]), str(info.get("generation") or info.get("ETag"))) for name, info in found.items()
    )


def _download(root: Any, sizes: Mapping[str, int], folder: Path) -> None:
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=str(root), disable=None, leave=False) as bar:
        for name, size in sizes.items():
            if not name or name.endswith("/"):
                continue  # an empty object that stands for a folder
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for start in range(0, size, _RANGE):
                    part = root.files.cat_file(str(root / name), start=start, end=min(start + _RANGE, size))
                    file.write(part)
                    bar.update(len(part))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to: itself, or one of this machine whose files are uploaded at the end of the body.

    Raises:
        OSError: a file cannot be uploaded.
    """
    if not is_remote(folder):
        yield folder
        return
    remote: Any = folder
    with tempfile.TemporaryDirectory(prefix="transmamba-") as made:
        local = Path(made)
        yield local
        for path in sorted(local.rglob("*")):
            if path.is_file():
                remote.files.put_file(str(path), str(remote / path.relative_to(local).as_posix()))
