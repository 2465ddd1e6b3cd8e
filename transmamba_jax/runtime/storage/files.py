"""Operations on files for which a path has no method."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from transmamba_jax.runtime.paths import user_cache

_REQUESTS = 8  # at one time
_ENDS = "#;"
"""Characters behind which orbax reads no more of a path: the fragment of a URL and its parameters."""

T = TypeVar("T")


def is_remote(path: Path) -> bool:
    """Tell whether a path is in a bucket."""
    return not isinstance(path, Path)


def require_checkpoints(path: Path, option: str) -> None:
    """Refuse storage that cannot hold checkpoints.

    Raises:
        ValueError: it is in a bucket of S3, or its name has a character that ends a name for orbax.
    """
    if not is_remote(path):
        return
    if path.scheme != "gs":  # type: ignore[attr-defined]
        raise ValueError(
            f"{option} {path}: checkpoints are in folders and on gs://, orbax refuses s3:// (to 0.12); data and "
            "exported folders may be on s3://"
        )
    found = [char for char in _ENDS if char in str(path)]
    if found:
        raise ValueError(
            f"{option} {path}: a checkpoint's name in a bucket must not have {found[0]!r}, where orbax ends it: the "
            "arrays would be in another folder; write another name"
        )


def free_bytes(folder: Path) -> float:
    """Return the free space; a bucket has no end."""
    return float("inf") if is_remote(folder) else shutil.disk_usage(folder).free


def copy(source: Path, target: Path) -> None:
    """Copy a file within one storage."""
    if is_remote(source):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copy(source, target)


def delete(path: Path, first: str = "") -> None:
    """Delete a folder, a file or a link, if it is there; in a bucket, the file `first` of a folder before the others.

    A folder of a bucket disappears object by object.
    """
    if path.is_dir() and not path.is_symlink():
        if is_remote(path):
            if first:
                (path / first).unlink(missing_ok=True)
            path.rmtree()  # type: ignore[attr-defined]
        else:
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_below(folder: Path) -> dict[str, int]:
    """Return the files at any depth, in order: name below the folder -> size in bytes."""
    if is_remote(folder):
        found: Mapping[str, Any] = folder.below()  # type: ignore[attr-defined]
        return {name: status.st_size for name, status in found.items()}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def map_files(function: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """Return `function` of every path in order; of those in a bucket, several at a time."""
    paths = list(paths)
    if not paths or not is_remote(paths[0]):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(function, paths))


def replace_text(path: Path, text: str, partial: str, durable: bool = False) -> None:
    """Write a file atomically: under the name `partial` first, where there is a rename.

    `durable`: it is on disk when this returns, whatever happens to the machine; what is in a bucket always is.
    """
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    waiting = path.with_name(partial)
    with waiting.open("w", encoding="utf-8") as stream:
        stream.write(text)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    waiting.replace(path)  # atomic: a kill here leaves one or the other
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def local_folder(workdir: Path) -> Path:
    """Return the work directory; of one in a bucket, a folder of this machine for programs that write nowhere else."""
    if not is_remote(workdir):
        return workdir
    folder = user_cache() / "workdirs" / quote(str(workdir), safe="")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
