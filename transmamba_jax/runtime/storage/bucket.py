"""Paths of objects in a bucket with the methods of `pathlib.Path` that a run uses.

A folder exists where an object has a name below it. Names have no rename: `rename` copies and deletes.
"""

import fnmatch
import functools
import importlib.util
import io
import os
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from etils.epath import gpath

SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme -> the package that reads it, and the extra that has the package."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", re.ASCII)
_WILDCARDS = "*?["
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Status(NamedTuple):
    """Size and time of an object, named as in `os.stat_result`."""

    st_size: int
    st_mtime: float


class BucketPath(gpath.PosixGPath):
    """Path of an object or a folder, `gs://bucket/run`; orbax takes it for one of its own."""

    @property
    def scheme(self) -> str:
        """Return `gs` or `s3`."""
        return str(self.parts[1])

    @property
    def bucket(self) -> str:
        """Return the name of the bucket."""
        return str(self.parts[2])

    @property
    def files(self) -> Any:
        """Return the file system."""
        return filesystem(self.scheme)

    def exists(self) -> bool:
        """Tell whether there is such an object or folder; unlike fsspec, an error is none of both and raised."""
        return self._info() is not None

    def is_dir(self) -> bool:
        """Tell whether objects have names below this one."""
        return (self._info() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        """Tell whether this is an object."""
        return (self._info() or {}).get("type") == "file"

    def is_symlink(self) -> bool:
        """Return False: there are no links."""
        return False

    def absolute(self) -> "BucketPath":
        """Return the path itself."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":  # noqa: ARG002
        """Return the path itself."""
        return self

    def stat(self) -> Status:  # type: ignore[override]
        """Return the size and time of an object."""
        info = self.info()
        time = info.get("mtime") or info.get("LastModified")
        return Status(int(info["size"]), 0.0 if time is None else time.timestamp())

    def version(self) -> str:
        """Return a text that changes when the object is written again."""
        info = self.info()
        return str(info.get("generation") or info.get("ETag"))

    def info(self) -> dict[str, Any]:
        """Return what the service says of an object or folder.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._info()
        if found is None:
            raise self._missing()
        return found

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield the objects and folders right below this one."""
        try:
            names = self.files.ls(str(self), detail=False, refresh=True)
        except FileNotFoundError:
            raise self._missing() from None
        own = self.files._strip_protocol(str(self)).rstrip("/")
        yield from (self / name.rstrip("/").rpartition("/")[2] for name in names if name.rstrip("/") != own)

    def below(self) -> dict[str, Status]:
        """Return the objects at any depth, in order: name below this folder -> status.

        An empty object whose name ends with a slash, which other programs write for a folder, is none of them.
        """
        own = self.files._strip_protocol(str(self)).rstrip("/") + "/"
        found = self.files.find(str(self), detail=True)
        times = {name: info.get("mtime") or info.get("LastModified") for name, info in found.items()}
        return {
            name.removeprefix(own): Status(int(found[name]["size"]), times[name].timestamp() if times[name] else 0.0)
            for name in sorted(found)
            if name.startswith(own) and not name.endswith("/")
        }

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the objects at any depth whose names match."""
        for name in self.below():
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the objects and folders that match; `**` stands for folders at any depth."""
        scheme = f"{self.scheme}://"
        yield from (type(self)(scheme + name) for name in self.files.glob(f"{self}/{pattern}"))

    def read_bytes(self) -> bytes:
        """Read an object."""
        try:
            return bytes(self.files.cat_file(str(self)))
        except FileNotFoundError:
            raise self._missing() from None

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Read an object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Write an object: all of it is there when this returns, or what was there before."""
        try:
            self.files.pipe_file(str(self), data)
        except FileNotFoundError:
            raise FileNotFoundError(2, f"there is no bucket {self.bucket}", str(self)) from None
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write an object as text."""
        self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))
        return len(data)

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:  # type: ignore[override]
        """Open an object; what is written is uploaded when the file is closed, unless an error closes it."""
        if mode.rstrip("b") == "r":
            stream: Any = io.BytesIO(self.read_bytes())
        elif mode.rstrip("b") == "w":
            stream = _Upload(self)
        else:
            raise ValueError(f"mode {mode!r}: an object is read or written as a whole")
        return stream if "b" in mode else _Text(stream, **{"encoding": "utf-8", **options})

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:  # noqa: ARG002
        """Make an empty object where there is none."""
        if not self.exists():
            self.write_bytes(b"")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with its first object."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object."""
        try:
            self.files.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise self._missing() from None

    def rmtree(self, missing_ok: bool = True) -> None:
        """Delete all objects below."""
        try:
            self.files.rm(str(self), recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise self._missing() from None

    def rename(self, target: Any) -> "BucketPath":
        """Copy the object, or all below the folder, and delete it: interrupted, both are there."""
        target = type(self)(target)
        names = [""] if self.is_file() else list(self.below())
        for name in names:
            self.files.cp_file(str(self / name), str(target / name))
        self.rmtree() if names != [""] else self.unlink()
        return target

    replace = rename

    def _info(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self.files.info(str(self))
        except FileNotFoundError:
            return None
        return found

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(2, os.strerror(2), str(self))


class _Upload(io.BytesIO):
    """A buffer that becomes an object when it is closed."""

    def __init__(self, path: BucketPath) -> None:
        super().__init__()
        self._path = path

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            io.BytesIO.close(self)
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed:
            self._path.write_bytes(self.getvalue())
        super().close()


class _Text(io.TextIOWrapper):
    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            io.BytesIO.close(self.buffer)  # type: ignore[arg-type]
            return
        self.close()


def parse(url: str) -> BucketPath:
    """Return the path of a URL, without a request.

    Raises:
        ValueError: the scheme is none of `SCHEMES`, its package is not installed, the bucket's name is none, or the
            path has `..`, a control character or a wildcard, with which a deletion by fsspec reaches other folders.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(f"{url} must be a path of this machine, gs://BUCKET/... or s3://BUCKET/...")
    bucket, _, name = rest.partition("/")
    if _BUCKET.fullmatch(bucket) is None:
        raise ValueError(
            f"{url} names the bucket {bucket!r}; a name has 3 to 222 lower-case letters, digits, '-', '_' and '.'"
        )
    if _CONTROL.search(name) is not None:
        raise ValueError(f"{url!r} has a control character or a line end, which names in a bucket do not have")
    if ".." in name.split("/"):
        raise ValueError(f"{url} has '..', which a bucket does not have: write the whole path")
    if any(char in name for char in _WILDCARDS):
        raise ValueError(f"{url} has a wildcard ({' '.join(_WILDCARDS)}), and must name one place: write its name")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{url} needs the package {package}: pip install -e '.[{extra}]'")
    return BucketPath(url.rstrip("/"))


@functools.cache
def filesystem(scheme: str) -> Any:
    """Return the fsspec file system of a scheme."""
    if scheme == "gs":
        from transmamba_jax.runtime.storage import gcs  # seconds of import

        return gcs.filesystem()
    from transmamba_jax.runtime.storage import s3

    return s3.filesystem()
